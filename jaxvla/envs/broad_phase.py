"""Makes MJX's contact budget go further, and counts what does not fit into it.

MJX (impl="jax") collides a fixed number of geom pairs per kind of pair, which it ranks by the
overlap of bounding spheres, and gives a fixed number of contacts to the solver, the deepest. The
spheres of the thin boards of which a cabinet is made overlap everything around it: with a bowl
in its drawer, 534 pairs rank before the last one that touches. `fwd_position` takes geoms out of
the ranking whose bounding boxes along the world's axes meet no other's, which leaves 159. It is
exact, since such geoms cannot touch, and it needs no private part of MJX: `Model.geom_rbound`
serves the ranking only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.quiet_mjx import mjx

BUDGET_NUMERICS = ("max_geom_pairs", "max_contact_points")
"""MuJoCo numerics from which MJX reads the sizes of its contact buffers."""

_OUT_OF_REACH_M = -1e3
"""Radius that puts a geom behind all others."""
_WIDER = 4
"""Factor by which the budget is widened to see what did not fit into it."""


def fwd_position(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """`mjx.fwd_position` with a better choice of the pairs that are collided.

    Args:
      model: of the impl "jax", without ellipsoids, meshes and height fields.
      data: state of one world.
    """
    # fwd_position computes the kinematics again; XLA finds the two equal and computes one.
    return mjx.fwd_position(_focused(model, mjx.kinematics(model, data)), data)


def contact_overflow(model: mjx.Model, data: mjx.Data) -> jax.Array:
    """Counts the touching contacts that the budget has left out.

    Collides the same poses again with four times the budget, which takes about as long as one
    physics step: meant to be called once per control step. Contacts left out because more touch
    than fit are the shallowest and do little harm; those of pairs that were ranked out let
    things sink into each other.

    Args:
      model: as given to `fwd_position`; its numerics hold the budget.
      data: after it, with its contacts.

    Returns:
      int32 []. Contacts beyond four times the budget are not counted.
    """
    budget = model.numeric_data.copy()
    for name in BUDGET_NUMERICS:
        index = mjx.name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, name)
        if index >= 0:
            budget[index] *= _WIDER
    wide = mjx.collision(_focused(model.replace(numeric_data=budget), data), data)
    return _num_touching(wide) - _num_touching(data)


def _num_touching(data: mjx.Data) -> jax.Array:
    impl: Any = data._impl  # where MJX asks to read contacts from; Data.contact is deprecated
    return (impl.contact.dist < 0).sum(dtype=jnp.int32)


def _focused(model: mjx.Model, data: mjx.Data) -> mjx.Model:
    """A model for these poses alone, in which geoms that cannot touch another rank last."""
    half = model.geom_aabb[:, 3:]
    active = active_geoms(data.geom_xpos, data.geom_xmat, half, touchable_pairs(model))
    return model.replace(geom_rbound=jnp.where(active, model.geom_rbound, _OUT_OF_REACH_M))


def active_geoms(xpos: Any, xmat: Any, half: Any, may_touch: np.ndarray) -> Any:
    """Geoms whose bounding boxes along the world's axes meet that of one they may touch.

    Takes NumPy and JAX arrays.

    Args:
      xpos: [G, 3], centres, m.
      xmat: [G, 3, 3], orientations.
      half: [G, 3], half the lengths of the bounding boxes in the geoms' frames, m.
      may_touch: bool [G, G], symmetric.

    Returns:
      bool [G].
    """
    reach = (abs(xmat) * half[:, None]).sum(-1)
    meets = may_touch
    for low, high in zip((xpos - reach).T, (xpos + reach).T, strict=True):
        meets = meets & (low[:, None] < high) & (low < high[:, None])
    return meets.any(0)


def touchable_pairs(model: mujoco.MjModel | mjx.Model) -> np.ndarray:
    """Which geoms may collide, planes aside: bool [G, G], symmetric.

    By MuJoCo's rules: not those of one body or of bodies welded together, of parent and child
    (unless the parent is fixed), and those without a common collision bit.
    https://mujoco.readthedocs.io/en/stable/computation/index.html#selection
    """
    weld = model.body_weldid[model.geom_bodyid]
    parent = model.body_weldid[model.body_parentid[weld]]
    is_child = (parent[:, None] == weld) & (weld[:, None] != 0) & (weld != 0)
    bits = model.geom_contype[:, None] & model.geom_conaffinity
    is_solid = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    unrelated = (weld[:, None] != weld) & ~is_child & ~is_child.T
    return ((bits | bits.T) != 0) & unrelated & is_solid[:, None] & is_solid
