"""Chooses the sizes of MJX's contact buffers for a scene, from contacts counted in C MuJoCo.

MJX computes contacts for a fixed number of geom pairs per kind of pair (box-box, ...), chosen
as `broad_phase` describes, and hands a fixed number of contacts to the solver, the deepest. When
a pair that touches is not among the first, its geoms pass through each other: objects sink and
fly off. C MuJoCo has no such limits, so it tells what MJX needs. A step's time grows with both
numbers: for eight scenes together by 0.07 ms per pair and 0.2 ms per contact, on two CPU cores.

In the measured runs the hand goes to one object and one drawer, door or knob after the other,
closes on it, lifts or pulls it and lets it go. The sizes cover all but QUANTILE of the instants,
with head-room: for some milliseconds, while a bowl lands, all its boxes touch at once, and there
the deepest of them carry it. `broad_phase.contact_overflow` tells what does not fit at run
time.
"""

from collections.abc import Sequence

import mujoco
import numpy as np

from jaxvla.envs.broad_phase import active_geoms, touchable_pairs
from jaxvla.envs.libero_task import ContactBudget
from jaxvla.envs.osc import Arm, find_arm

QUANTILE = 0.995
"""Share of the measured instants that fit without head-room."""
HEAD_ROOM = 1.25
"""Buffer sizes are this much greater than what was measured."""
GRANULARITY = 8
"""Sizes are rounded up to multiples, so that similar tasks share compiled programs."""
MIN_SIZE = 32
"""Least size, for what the measured runs do not show, such as objects that topple."""

_STAGE_S = 0.25
"""Duration of one motion of the hand (above, down, close, lift)."""
_COUNT_EVERY = 5
"""Physics steps per count and per change of torques: 10 ms."""
_ABOVE_M = 0.12
_STIFFNESS_N_M = 800.0
_STIFFNESS_NM_RAD = 30.0
_DAMPING_NMS_RAD = 8.0
"""Of the hand's pull towards its target; stable for the Panda, otherwise of no importance."""

_ROBOT_PREFIXES = ("robot0_", "gripper0_")

_BOX, _PLANE = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_PLANE
_CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE
_SLOTS = {
    (_PLANE, _BOX): 4,
    (_BOX, _BOX): 4,
    (_PLANE, _CAPSULE): 2,
    (_CAPSULE, _BOX): 2,
}
"""Contacts that MJX 3.17 makes of a pair; 1 for those not listed."""


def measure_contacts(models: Sequence[mujoco.MjModel], states: np.ndarray) -> ContactBudget:
    """Runs a scene in C MuJoCo and derives its contact budget.

    Args:
      models: reduced scene, per state, with the fixtures where they are in that episode.
      states: float64 [K, nq + nv], to start from, with objects at rest.
    """
    pairs, contacts = [], []
    for model, state in zip(models, states, strict=True):
        counter = ContactCounter(model)
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = np.split(state, [model.nq])
        _tour(model, data, counter)
        pairs += counter.ranks
        contacts += counter.contacts
    most = [int(np.ceil(np.quantile(counts, QUANTILE))) for counts in (pairs, contacts)]
    return ContactBudget(
        max_geom_pairs=_with_head_room(most[0]),
        max_contact_points=_with_head_room(most[1]),
        measured_pairs=most[0],
        measured_contacts=most[1],
    )


def _with_head_room(measured: int) -> int:
    return max(MIN_SIZE, int(np.ceil(measured * HEAD_ROOM / GRANULARITY)) * GRANULARITY)


class ContactCounter:
    """Counts what MJX would need to find the contacts that C MuJoCo finds.

    Attributes:
      ranks: per count, the greatest place of a touching pair in the ranking of its kind.
      contacts: per count, the number of contacts.
    """

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self._may_touch = touchable_pairs(model)
        self._candidates = candidate_pairs(model)
        self.ranks: list[int] = []
        self.contacts: list[int] = []

    def count(self, data: mujoco.MjData) -> None:
        """Takes the contacts of the present instant into account."""
        is_touching = data.contact.dist < 0
        pairs, nums = _unique_pairs(self._model, data.contact.geom[is_touching])
        kinds = self._model.geom_type[pairs]
        slots = [_SLOTS.get((one, other), 1) for one, other in kinds.tolist()]
        self.contacts.append(int(np.minimum(nums, slots).sum()))
        active = active_geoms(
            data.geom_xpos,
            data.geom_xmat.reshape(-1, 3, 3),
            self._model.geom_aabb[:, 3:],
            self._may_touch,
        )
        rank = 0
        for kind, candidates in self._candidates.items():
            members = pairs[(kinds == kind).all(axis=1)]
            if members.size:
                rivals = candidates[active[candidates].all(axis=1)]
                furthest = _gaps(self._model, data, members).max()
                rank = max(rank, int((_gaps(self._model, data, rivals) <= furthest).sum()))
        self.ranks.append(rank)


def candidate_pairs(model: mujoco.MjModel) -> dict[tuple[int, int], np.ndarray]:
    """Geom pairs that may collide and are ranked by MJX, by kind.

    Returns:
      (type, type) -> int [M, 2], geom ids with the smaller type first. Pairs with planes, which
      MJX always checks, are left out.
    """
    pairs, _ = _unique_pairs(model, np.argwhere(np.triu(touchable_pairs(model))))
    kinds = model.geom_type[pairs]
    return {
        kind: pairs[(kinds == kind).all(axis=1)]
        for kind in {(int(one), int(other)) for one, other in kinds}
    }


def _unique_pairs(model: mujoco.MjModel, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders pairs [M, 2] by geom type, then id, and counts how often each occurs."""
    types = model.geom_type[pairs]
    is_swapped = (types[:, 0] > types[:, 1]) | (
        (types[:, 0] == types[:, 1]) & (pairs[:, 0] > pairs[:, 1])
    )
    ordered = np.where(is_swapped[:, None], pairs[:, ::-1], pairs)
    unique, nums = np.unique(ordered.reshape(-1, 2), axis=0, return_counts=True)
    return unique, nums


def _gaps(model: mujoco.MjModel, data: mujoco.MjData, pairs: np.ndarray) -> np.ndarray:
    """Distance between the bounding spheres of pairs [M, 2], m; MJX's measure of nearness."""
    offset = data.geom_xpos[pairs[:, 0]] - data.geom_xpos[pairs[:, 1]]
    return np.linalg.norm(offset, axis=1) - model.geom_rbound[pairs].sum(axis=1)


def _tour(model: mujoco.MjModel, data: mujoco.MjData, counter: ContactCounter) -> None:
    """Visits, closes on, lifts and lets go of everything that can be moved."""
    arm = find_arm(model)
    mujoco.mj_forward(model, data)
    home = data.site_xpos[arm.hand].copy()
    orientation = data.site_xmat[arm.hand].reshape(3, 3).copy()
    above = np.array([0.0, 0.0, _ABOVE_M])
    for joint in range(model.njnt):
        body = model.body(model.jnt_bodyid[joint])
        if body.name.startswith(_ROBOT_PREFIXES):
            continue
        is_free = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE
        place = data.xipos[body.id].copy() if is_free else _handle(model, data, body.id, home)
        away = place + above if is_free else place + 0.5 * (home - place)
        for target, is_open in (
            (away, True),
            (place, True),
            (place, False),
            (away, False),
            (home, True),
        ):
            _move(model, data, counter, arm, target, orientation, is_open=is_open)


def _handle(model: mujoco.MjModel, data: mujoco.MjData, body: int, home: np.ndarray) -> np.ndarray:
    """Centre [3] of the body's geom that is nearest to the hand's first place."""
    geoms = np.flatnonzero(model.geom_bodyid == body)
    if not geoms.size:
        return data.xipos[body].copy()
    distance = np.linalg.norm(data.geom_xpos[geoms] - home, axis=1)
    return data.geom_xpos[geoms[np.argmin(distance)]].copy()


def _move(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    counter: ContactCounter,
    arm: Arm,
    target: np.ndarray,
    orientation: np.ndarray,
    *,
    is_open: bool,
) -> None:
    """Pulls the hand towards a target [3] (m) by springs, and counts contacts on the way."""
    limits = model.actuator_ctrlrange[arm.fingers]
    # The fingers' ranges are [0, 0.04] and [-0.04, 0]: the end away from 0 is open.
    open_ends = np.where(np.abs(limits[:, 0]) > np.abs(limits[:, 1]), limits[:, 0], limits[:, 1])
    data.ctrl[arm.fingers] = open_ends if is_open else 0.0
    for _ in range(round(_STAGE_S / model.opt.timestep / _COUNT_EVERY)):
        data.ctrl[arm.motors] = _torques(model, data, arm, target, orientation)
        mujoco.mj_step(model, data, _COUNT_EVERY)
        counter.count(data)


def _torques(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    arm: Arm,
    target: np.ndarray,
    orientation: np.ndarray,
) -> np.ndarray:
    """Motor torques [7], N m: springs to the target, damping and gravity compensation."""
    jacobians = np.empty((2, 3, model.nv))
    mujoco.mj_jacSite(model, data, jacobians[0], jacobians[1], arm.hand)
    now = data.site_xmat[arm.hand].reshape(3, 3)
    turn = 0.5 * np.cross(now.T, orientation.T).sum(axis=0)
    force = _STIFFNESS_N_M * (target - data.site_xpos[arm.hand])
    pull = jacobians[0].T @ force + jacobians[1].T @ (_STIFFNESS_NM_RAD * turn)
    damping = _DAMPING_NMS_RAD * data.qvel[arm.dofs]
    return pull[arm.dofs] - damping + data.qfrc_bias[arm.dofs]
