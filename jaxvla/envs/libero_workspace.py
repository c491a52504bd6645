"""What the scripted expert sees of a state: hand, boxes, grasps, and where there is room.

Everything is for one world, in world coordinates, and a pure function of the physics state.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.libero_grasps import TIP_M, UPS
from jaxvla.envs.libero_plans import Plan, Step
from jaxvla.envs.osc import ArmNames

_CLEARANCE_M = 0.02
"""Height at which things are passed over."""
_CORRIDOR_M = 0.06
"""Half width of the way that must be clear."""
_REACH_M = 0.66
"""From shoulder to wrist, with 4 cm to spare."""
_WRIST_BACK_M = 0.088
_WRIST_UP_M = 0.21
"""Place of the wrist relative to a hand that points down: towards the robot, and up."""
# Points of the open hand that must be free, in its frame: x closes, z towards the tips.
_FINGER_POINTS = [(x, y, z) for x in (-0.055, 0.055) for y in (-0.01, 0.01) for z in (0.006, -0.02)]
_PALM_POINTS = [(x, y, z) for x in (-0.1, 0.1) for y in (-0.03, 0.03) for z in (-0.032, -0.08)]
_HAND_POINTS = np.asarray(_FINGER_POINTS + _PALM_POINTS)
_GAP_M = 0.012
"""Distance from other things below which a grasp is avoided."""


class PhysicsState(Protocol):
    """What the expert reads: `mjx.Data` has it, and so has `mujoco.MjData`."""

    qpos: Any
    """[nq]."""
    xpos: Any
    """[nbody, 3], m."""
    xmat: Any
    """[nbody, 3, 3] or [nbody, 9]."""
    site_xpos: Any
    """[nsite, 3], m."""
    site_xmat: Any
    """[nsite, 3, 3] or [nsite, 9]."""


@flax.struct.dataclass(kw_only=True)
class ExpertState:
    """A physics state as a pytree, for jit on host simulations."""

    qpos: jax.Array
    xpos: jax.Array
    xmat: jax.Array
    site_xpos: jax.Array
    site_xmat: jax.Array


def read_state(state: PhysicsState) -> ExpertState:
    """Copies what the expert reads, as float32."""
    names = (field.name for field in dataclasses.fields(ExpertState))
    return ExpertState(**{name: jnp.asarray(getattr(state, name), jnp.float32) for name in names})


@flax.struct.dataclass(kw_only=True)
class View:
    """The state, as seen by all rules."""

    hand: jax.Array
    """[3]."""
    hand_rotation: jax.Array
    """[3, 3]."""
    opening: jax.Array
    """[]."""
    shoulder: jax.Array
    """[3]."""
    xpos: jax.Array
    xmat: jax.Array
    """[nbody, 3, 3]."""
    qpos: jax.Array
    centre: jax.Array
    """[N, 3], of the scene's boxes."""
    rotation: jax.Array
    """[N, 3, 3]."""
    half_size: jax.Array
    """[N, 3]."""
    extent: jax.Array
    """[N, 3], half the extents along the world's axes."""


@flax.struct.dataclass(kw_only=True)
class Holds:
    """The grasps of a body's present attitude, in the world."""

    point: jax.Array
    """[G, 3]."""
    axis: jax.Array
    """[G, 3]."""
    width: jax.Array
    """[G]."""
    cost: jax.Array
    """[G]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmParts:
    """Places of the arm's parts in a model's arrays."""

    hand: int
    """Site id."""
    shoulder: int
    """Body whose origin is the arm's second joint."""
    fingers: tuple[int, int]
    """Addresses in `qpos`."""


def find_parts(model: mujoco.MjModel) -> ArmParts:
    """Looks the arm's parts up.

    Raises:
      KeyError: the model has no arm with LIBERO's names.
    """
    names = ArmNames()
    first, second = (
        int(model.jnt_qposadr[model.actuator(name).trnid[0]]) for name in names.fingers
    )
    return ArmParts(
        hand=model.site(names.hand).id,
        shoulder=int(model.joint(names.joints[1]).bodyid[0]),
        fingers=(first, second),
    )


def view_state(state: PhysicsState, plan: Plan, arm: ArmParts) -> View:
    """Places the scene's boxes and the hand."""
    xpos = jnp.asarray(state.xpos, jnp.float32)
    xmat = jnp.asarray(state.xmat, jnp.float32).reshape(-1, 3, 3)
    qpos = jnp.asarray(state.qpos, jnp.float32)
    scene = plan.scene
    turn = xmat[scene.body]
    rotation = turn @ jnp.asarray(scene.rotation, jnp.float32)
    offset = (turn @ jnp.asarray(scene.centre, jnp.float32)[..., None])[..., 0]
    half = jnp.asarray(scene.half_size, jnp.float32)
    return View(
        hand=jnp.asarray(state.site_xpos, jnp.float32)[arm.hand],
        hand_rotation=jnp.asarray(state.site_xmat, jnp.float32)[arm.hand].reshape(3, 3),
        opening=qpos[arm.fingers[0]] - qpos[arm.fingers[1]],
        shoulder=xpos[arm.shoulder],
        xpos=xpos,
        xmat=xmat,
        qpos=qpos,
        centre=xpos[scene.body] + offset,
        rotation=rotation,
        half_size=half,
        extent=(jnp.abs(rotation) @ half[..., None])[..., 0],
    )


def find_holds(step: Step, view: View) -> Holds:
    """Looks up the grasps for the direction that is up now."""
    rotation = view.xmat[step.body]
    up = jnp.argmax(jnp.asarray(UPS, jnp.float32) @ rotation[2])
    point, axis, width, cost = (
        jnp.asarray(getattr(step.grasps, name))[up] for name in ("point", "axis", "width", "cost")
    )
    return Holds(
        point=view.xpos[step.body] + point @ rotation.T,
        axis=axis @ rotation.T,
        width=width,
        cost=cost,
    )


def bottom_of(step: Step, view: View) -> jax.Array:
    """Height of the body's lowest point, []."""
    return (view.centre[step.boxes, 2] - view.extent[step.boxes, 2]).min()


def overreach(points: jax.Array, view: View) -> jax.Array:
    """How much too far the hand's places [..., 3] are for a hand that points down, m.

    The arm's outstretched length is from its shoulder to its wrist, which is then above and
    short of the hand.
    """
    offset = points - view.shoulder
    ahead = jnp.linalg.norm(offset[..., :2], axis=-1) - _WRIST_BACK_M
    return jnp.maximum(jnp.hypot(ahead, offset[..., 2] + _WRIST_UP_M) - _REACH_M, 0.0)


def crowding(points: jax.Array, axes: jax.Array, view: View, others: np.ndarray) -> jax.Array:
    """How deep the open hand at each grasp [G] is within other things; 0 with room, float [G]."""
    if not others.any():
        return jnp.zeros(len(points))
    rotation = jax.vmap(hand_down)(axes)
    hand = points[:, None] + jnp.einsum("gij,pj->gpi", rotation, jnp.asarray(_HAND_POINTS))
    offset = hand[:, :, None] - view.centre[others]
    local = jnp.einsum("gpni,nij->gpnj", offset, view.rotation[others])
    half = view.half_size[others]
    distance = (jnp.abs(local) - half).max(-1).min(-1)
    return jnp.clip(1.0 - distance / _GAP_M, 0.0, 2.0).sum(-1)


def clear_height(view: View, boxes: np.ndarray, start: jax.Array, end: jax.Array) -> jax.Array:
    """Height of the hand's site at which its tips pass over the boxes between two points, []."""
    fraction = jnp.linspace(0.0, 1.0, 10)[:, None]
    way = start[:2] + fraction * (end - start)[:2]
    gap = jnp.abs(way[:, None] - view.centre[:, :2]) - view.extent[:, :2]
    is_near = (gap < _CORRIDOR_M).all(-1).any(0) & boxes
    tops = jnp.where(is_near, view.centre[:, 2] + view.extent[:, 2], -jnp.inf)
    return jnp.maximum(tops.max(), end[2] - TIP_M - _CLEARANCE_M) + TIP_M + _CLEARANCE_M


def hand_down(axis: jax.Array) -> jax.Array:
    """Rotation [3, 3] of a hand that points down and closes along the axis."""
    down = jnp.asarray([0.0, 0.0, -1.0])
    return jnp.stack([axis, jnp.cross(down, axis), down], -1)
