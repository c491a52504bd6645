"""Success conditions of manipulation tasks as data, and their evaluation on physics states.

A task's goal is a tuple of terms, all of which must hold. Terms hold numbers and names only, so
they can be written to a file (`term_to_dict`); `bind` looks the names up in a model and gives
a `Goal`, whose methods are pure functions of the physics state: jit and vmap them.

The conditions are LIBERO's (https://github.com/Lifelong-Robot-Learning/LIBERO, files
`libero/libero/envs/predicates/base_predicates.py`, `object_states/base_object_states.py` and
`objects/site_object.py`), with its thresholds and including three oddities, marked below. An
object's position is that of its body frame; z points up.

Contact is LIBERO's "some collision geom of one touches some of the other", which MuJoCo finds
where the distance is not positive. It is computed from the boxes' poses: MJX's contact list has a
budget and may leave out the very pair that is asked for, and with impl="warp" all worlds share
it. For boxes this is the same test, since MuJoCo collides two boxes by their separating axes too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

ON_OBJECT_DISTANCE_M = 0.03
"""On(object, object): greatest horizontal distance of the two positions."""
ON_REGION_BELOW_M = 0.005
ON_REGION_ABOVE_M = 0.10
"""On(object, region): how far the object may be below and above the region's upper face."""
IN_REGION_BELOW_M = 0.01
"""In(object, region): how far the object may be below the region."""

COMPARISONS = ("<", "<=", ">", ">=")

Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A box fixed to a body: LIBERO's sites, which the physics model need not have."""

    body: str
    """"world" for the world itself."""
    pos: Vector
    """Centre in the body's frame, m."""
    quat: tuple[float, float, float, float]
    """Orientation in the body's frame, (w, x, y, z)."""
    half_size: Vector
    """m."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contact:
    """Some geom of one group touches some geom of the other. All geoms are boxes."""

    geoms: tuple[str, ...]
    other_geoms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnObject:
    """The object lies on another: not lower, touching, and close horizontally."""

    object: str
    """Body."""
    support: str
    """Body."""
    contact: Contact


@dataclass(frozen=True, kw_only=True, slots=True)
class OnRegion:
    """The object stands on a region, and touches what the region belongs to."""

    object: str
    """Body."""
    region: Region
    contact: Contact | None
    """None: the region is a zone of the table, which need not be touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InRegion:
    """The object's position lies in a region; contacts do not matter."""

    object: str
    """Body."""
    region: Region


@dataclass(frozen=True, kw_only=True, slots=True)
class JointsAt:
    """Drawers, doors and knobs stand beyond a threshold: Open, Close, TurnOn, TurnOff."""

    joints: tuple[str, ...]
    """Slide and hinge joints."""
    comparison: str
    """One of COMPARISONS: position, comparison, threshold."""
    threshold: float
    """m or rad."""
    needs_all: bool
    """All joints, or any of them. Without joints the first holds, the second does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    """The object is at least at a height."""

    object: str
    """Body."""
    height_m: float


GoalTerm = OnObject | OnRegion | InRegion | JointsAt | Up

_KINDS: dict[str, type] = {
    "on_object": OnObject,
    "on_region": OnRegion,
    "in_region": InRegion,
    "joints_at": JointsAt,
    "up": Up,
}
_PARTS: dict[str, type] = {"region": Region, "contact": Contact}
"""Field name -> type of the fields that are dataclasses."""


def term_to_dict(term: GoalTerm) -> dict[str, Any]:
    """Writes a term as plain data that JSON can hold."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(term, cls))
    return {"kind": kind, **dataclasses.asdict(term)}


def term_from_dict(data: Mapping[str, Any]) -> GoalTerm:
    """Reads what `term_to_dict` wrote, also after a trip through JSON.

    Raises:
      ValueError: unknown kind, or fields that are missing or unknown.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"goal term of kind {kind!r}; kinds are {', '.join(_KINDS)}")
    for name, cls in _PARTS.items():
        if fields.get(name) is not None:
            fields[name] = _build(cls, fields[name])
    return _build(_KINDS[kind], fields)


def _build(cls: type, fields: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    if set(fields) != known:
        raise ValueError(f"{cls.__name__}: fields are {sorted(known)}, got {sorted(fields)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


class PhysicsState(Protocol):
    """What goals read: `mjx.Data` of any impl has it, and so has `mujoco.MjData`."""

    qpos: Any
    """[nq]."""
    xpos: Any
    """[nbody, 3], m."""
    xmat: Any
    """[nbody, 3, 3] or [nbody, 9]."""
    geom_xpos: Any
    """[ngeom, 3], m."""
    geom_xmat: Any
    """[ngeom, 3, 3] or [ngeom, 9]."""


Check = Callable[[PhysicsState], jax.Array]
"""Physics state -> bool []."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """Terms bound to a model."""

    checks: tuple[Check, ...]

    def terms(self, state: PhysicsState) -> jax.Array:
        """bool [num_terms], which of the terms hold.

        After a control step, positions of bodies and geoms lie one physics step behind `qpos`,
        here as in LIBERO (see `osc.control_step`). To judge a `qpos` that was set from outside,
        compute kinematics first.
        """
        # Accelerators would otherwise rotate by matrices of 8 to 11 bits.
        with jax.default_matmul_precision("highest"):
            return jnp.stack([check(state) for check in self.checks])

    def is_reached(self, state: PhysicsState) -> jax.Array:
        """bool [], whether all terms hold."""
        return self.terms(state).all()


def bind(terms: Sequence[GoalTerm], model: mujoco.MjModel) -> Goal:
    """Looks names up.

    Args:
      terms: at least one.
      model: the physics model; its geoms may differ from those the terms were made from, as
        long as names and shapes of the ones in contacts are kept.

    Raises:
      KeyError: the model lacks a body, geom or joint.
      ValueError: no terms; a geom in a contact is no box or has a margin; a joint is neither
        slide nor hinge; an unknown comparison.
    """
    if not terms:
        raise ValueError("a goal needs at least one term")
    return Goal(checks=tuple(_bind_term(term, model) for term in terms))


def _bind_term(term: GoalTerm, model: mujoco.MjModel) -> Check:
    if isinstance(term, OnObject):
        return _bind_on_object(term, model)
    if isinstance(term, OnRegion):
        return _bind_on_region(term, model)
    if isinstance(term, InRegion):
        return _bind_in_region(term, model)
    if isinstance(term, JointsAt):
        return _bind_joints_at(term, model)
    body, height = model.body(term.object).id, term.height_m
    return lambda state: jnp.asarray(state.xpos)[body, 2] >= height


def _bind_on_object(term: OnObject, model: mujoco.MjModel) -> Check:
    body, support = model.body(term.object).id, model.body(term.support).id
    touches = _bind_contact(term.contact, model)

    def holds(state: PhysicsState) -> jax.Array:
        xpos = jnp.asarray(state.xpos)
        offset = xpos[body] - xpos[support]
        is_close = jnp.linalg.norm(offset[:2]) < ON_OBJECT_DISTANCE_M
        return (offset[2] >= 0) & is_close & touches(state)

    return holds


def _bind_on_region(term: OnRegion, model: mujoco.MjModel) -> Check:
    body = model.body(term.object).id
    pose = _bind_region(term.region, model)
    half = np.asarray(term.region.half_size)
    touches = _bind_contact(term.contact, model) if term.contact else None

    def holds(state: PhysicsState) -> jax.Array:
        centre, rotation = pose(state)
        # Oddity: LIBERO applies the rotation where its inverse would give region coordinates.
        offset = rotation @ (jnp.asarray(state.xpos)[body] - centre)
        is_inside = (jnp.abs(offset[:2]) < half[:2]).all()
        is_low = offset[2] < half[2] + ON_REGION_ABOVE_M
        is_on = is_inside & is_low & (offset[2] > half[2] - ON_REGION_BELOW_M)
        return is_on & touches(state) if touches else is_on

    return holds


def _bind_in_region(term: InRegion, model: mujoco.MjModel) -> Check:
    body = model.body(term.object).id
    pose = _bind_region(term.region, model)
    half = np.asarray(term.region.half_size)
    slack = np.asarray([0.0, 0.0, IN_REGION_BELOW_M])

    def holds(state: PhysicsState) -> jax.Array:
        centre, rotation = pose(state)
        # Oddity: a box along the world's axes, spanned by the rotated diagonal. It is exact for
        # quarter turns and may be thinner than the region, down to nothing, for others.
        extent = jnp.abs(rotation @ half)
        position = jnp.asarray(state.xpos)[body]
        is_above = position > centre - extent - slack
        return (is_above & (position < centre + extent)).all()

    return holds


def _bind_region(
    region: Region, model: mujoco.MjModel
) -> Callable[[PhysicsState], tuple[jax.Array, jax.Array]]:
    """Physics state -> the region's centre [3] and rotation [3, 3] in the world."""
    body = model.body(region.body).id
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, np.asarray(region.quat, np.float64))
    local_rotation, local_pos = matrix.reshape(3, 3), np.asarray(region.pos)

    def pose(state: PhysicsState) -> tuple[jax.Array, jax.Array]:
        rotation = jnp.asarray(state.xmat)[body].reshape(3, 3)
        centre = jnp.asarray(state.xpos)[body] + rotation @ local_pos
        return centre, rotation @ local_rotation

    return pose


def _bind_joints_at(term: JointsAt, model: mujoco.MjModel) -> Check:
    scalar = (int(mujoco.mjtJoint.mjJNT_SLIDE), int(mujoco.mjtJoint.mjJNT_HINGE))
    for name in term.joints:
        if int(model.joint(name).type[0]) not in scalar:
            raise ValueError(f"joint {name!r}: expected a slide or hinge joint")
    if term.comparison not in COMPARISONS:
        raise ValueError(f"comparison {term.comparison!r}, expected one of {COMPARISONS}")
    addresses = np.asarray([model.joint(name).qposadr[0] for name in term.joints], int)
    compare = {
        "<": jnp.less,
        "<=": jnp.less_equal,
        ">": jnp.greater,
        ">=": jnp.greater_equal,
    }[term.comparison]

    def holds(state: PhysicsState) -> jax.Array:
        is_beyond = compare(jnp.asarray(state.qpos)[addresses], term.threshold)
        return is_beyond.all() if term.needs_all else is_beyond.any()

    return holds


def _bind_contact(contact: Contact, model: mujoco.MjModel) -> Check:
    first = _find_boxes(contact.geoms, model)
    second = _find_boxes(contact.other_geoms, model)

    def holds(state: PhysicsState) -> jax.Array:
        centre = jnp.asarray(state.geom_xpos)
        rotation = jnp.asarray(state.geom_xmat).reshape(-1, 3, 3)
        first_boxes, second_boxes = (
            Boxes(
                centre=centre[ids],
                rotation=rotation[ids],
                half_size=jnp.asarray(model.geom_size[ids], centre.dtype),
            )
            for ids in (first, second)
        )
        return boxes_overlap(first_boxes, second_boxes).any()

    return holds


def _find_boxes(names: Sequence[str], model: mujoco.MjModel) -> np.ndarray:
    """Geom ids, int [N]."""
    ids = np.asarray([model.geom(name).id for name in names], int)
    for name, geom in zip(names, ids, strict=True):
        if int(model.geom_type[geom]) != int(mujoco.mjtGeom.mjGEOM_BOX) or model.geom_margin[geom]:
            raise ValueError(f"geom {name!r}: contacts are found for boxes without margin only")
    return ids


@flax.struct.dataclass(kw_only=True)
class Boxes:
    """N boxes in space."""

    centre: jax.Array
    """float [N, 3]."""
    rotation: jax.Array
    """float [N, 3, 3], box frame to world frame."""
    half_size: jax.Array
    """float [N, 3]."""


def boxes_overlap(first: Boxes, second: Boxes) -> jax.Array:
    """Which boxes overlap: the separating axis test for oriented boxes.

    Two boxes are apart exactly if their projections onto one of 15 axes are: the three normals
    of each, and the products of an edge of one and an edge of the other. See S. Gottschalk,
    M. C. Lin, D. Manocha, "OBBTree", SIGGRAPH 1996, section 5, https://doi.org/10.1145/237170.237244.
    In float32 and for boxes of up to a metre, gaps of 5 micrometres and more are seen.

    Returns:
      bool [N, M].
    """
    # In the frame of the first: the second's axes as columns [N, M, 3, 3], its centre [N, M, 3].
    turn = jnp.einsum("nki,mkj->nmij", first.rotation, second.rotation)
    offset = second.centre[None] - first.centre[:, None]
    t = jnp.einsum("nki,nmk->nmi", first.rotation, offset)
    # Products of (nearly) parallel edges are (nearly) zero and tell nothing; the addend keeps
    # rounding from deciding about them. It widens boxes by 1e-6 of their size.
    A = jnp.abs(turn) + 1e-6
    h1, h2 = first.half_size[:, None], second.half_size[None]
    apart_1 = jnp.abs(t) > h1 + (A * h2[..., None, :]).sum(-1)
    t2 = (turn * t[..., None]).sum(-2)
    apart_2 = jnp.abs(t2) > h2 + (A * h1[..., None]).sum(-2)
    apart_3 = _edges_apart(turn, t, A, h1, h2)
    is_apart = apart_1.any(-1) | apart_2.any(-1) | apart_3.any((-1, -2))
    return ~is_apart


def _edges_apart(
    turn: jax.Array, t: jax.Array, A: jax.Array, h1: jax.Array, h2: jax.Array
) -> jax.Array:
    """Whether the product of edge i of the first and edge j of the second separates.

    Returns:
      bool [N, M, 3 (i), 3 (j)].
    """
    # Index i + 1 and i + 2 of the first's axes, and the same for the second's.
    t_1, t_2 = (jnp.roll(t, -k, -1)[..., None] for k in (1, 2))
    turn_1, turn_2 = (jnp.roll(turn, -k, -2) for k in (1, 2))
    A_1, A_2 = (jnp.roll(A, -k, -2) for k in (1, 2))
    h1_1, h1_2 = (jnp.roll(h1, -k, -1)[..., None] for k in (1, 2))
    B_1, B_2 = (jnp.roll(A, -k, -1) for k in (1, 2))
    h2_1, h2_2 = (jnp.roll(h2, -k, -1)[..., None, :] for k in (1, 2))
    reach = h1_1 * A_2 + h1_2 * A_1 + h2_1 * B_2 + h2_2 * B_1
    return jnp.abs(t_2 * turn_1 - t_1 * turn_2) > reach
