"""What has to be held and where it has to go, derived from a LIBERO task's goal terms.

The static part of `libero_expert`: names are looked up, grasps planned, and places told apart that
several objects go to. Nothing here knows single tasks or objects.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from jaxvla.envs.libero_grasps import BodyBoxes, Grasps, collision_boxes, find_grasps
from jaxvla.envs.predicates import GoalTerm, InRegion, JointsAt, OnObject, OnRegion, Region

_MAX_KNOB_LEVER_M = 0.02
"""Greatest distance of a knob's centre of mass from its hinge."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """Where an object is to go."""

    body: int
    """Body that the place is fixed to."""
    pos: np.ndarray
    """float [3], the place in that body's frame, m."""
    half_size: np.ndarray
    """float [3], half the region's extent along the body's axes; zeros for a mere point."""
    is_inside: bool
    """Whether the object goes into the region instead of onto it."""
    support: np.ndarray
    """bool [N], which of the scene's boxes may bear the object."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """What to do about one goal term: what to hold, and where to."""

    body: int
    boxes: np.ndarray
    """bool [N], which of the scene's boxes belong to the body."""
    grasps: Grasps
    place: Place | None
    """None: a knob."""
    joint: int = -1
    """Address of the knob's angle in `qpos`."""
    threshold: float = 0.0
    sign: float = 1.0
    """+1: the angle must exceed the threshold, -1: stay below it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """All steps, in the order in which they are taken."""

    steps: tuple[Step, ...]
    scene: BodyBoxes
    """Collision boxes of all objects and fixtures, N of them."""


def make_plan(terms: Sequence[GoalTerm], fixtures: Sequence[str], model: mujoco.MjModel) -> Plan:
    """Plans a goal; takes 1 to 10 s.

    Args:
      terms: all of which are to hold.
      fixtures: root bodies of furniture.
      model: the task's physics model, or LIBERO's own.

    Raises:
      KeyError: the model lacks a body or a joint.
      ValueError: a goal term has no plan, or a body no grasp.
    """
    roots = [model.body(name).id for name in fixtures]
    roots = np.append(np.flatnonzero(model.body_dofnum == 6), roots).astype(int)
    scene = collision_boxes(model, np.flatnonzero(np.isin(model.body_rootid, roots)))
    ordered = sorted(terms, key=lambda term: not isinstance(term, JointsAt))
    steps = _spread([_plan_term(term, model, scene) for term in ordered])
    return Plan(steps=tuple(steps), scene=scene)


def _plan_term(term: GoalTerm, model: mujoco.MjModel, scene: BodyBoxes) -> Step:
    if isinstance(term, JointsAt):
        return _plan_knob(term, model, scene)
    if isinstance(term, OnObject):
        body = model.body(term.support).id
        place = Place(
            body=body,
            pos=np.zeros(3),
            half_size=np.zeros(3),
            is_inside=False,
            support=_tree(model, body, scene),
        )
    elif isinstance(term, OnRegion | InRegion):
        place = _plan_region(term.region, model, scene, isinstance(term, InRegion))
    else:
        raise ValueError(f"no plan for a goal of kind {type(term).__name__}")
    body = model.body(term.object).id
    return Step(body=body, place=place, **_plan_grasp(body, model, scene))


def _plan_region(region: Region, model: mujoco.MjModel, scene: BodyBoxes, is_inside: bool) -> Place:
    body = model.body(region.body).id
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, np.asarray(region.quat))
    return Place(
        body=body,
        pos=np.asarray(region.pos),
        half_size=np.abs(rotation.reshape(3, 3) @ np.asarray(region.half_size)),
        is_inside=is_inside,
        support=_tree(model, body, scene),
    )


def _plan_knob(term: JointsAt, model: mujoco.MjModel, scene: BodyBoxes) -> Step:
    joint = model.joint(term.joints[0])
    body = int(joint.bodyid[0])
    is_vertical = joint.type[0] == mujoco.mjtJoint.mjJNT_HINGE and abs(joint.axis[2]) > 0.9
    # A knob turns about its middle, a door does not.
    lever = np.linalg.norm(np.cross(model.body_ipos[body] - joint.pos, joint.axis))
    if len(term.joints) != 1 or not is_vertical or lever > _MAX_KNOB_LEVER_M:
        raise ValueError(f"no plan for joints {', '.join(term.joints)}: only knobs are turned")
    return Step(
        body=body,
        place=None,
        joint=int(joint.qposadr[0]),
        threshold=term.threshold,
        sign=1.0 if term.comparison in (">", ">=") else -1.0,
        **_plan_grasp(body, model, scene),
    )


def _plan_grasp(body: int, model: mujoco.MjModel, scene: BodyBoxes) -> dict[str, Any]:
    boxes = collision_boxes(model, np.array([body]))
    grasps = find_grasps(boxes, model.body_ipos[body]) if len(boxes.body) else None
    if grasps is None or not np.isfinite(grasps.cost).any():
        raise ValueError(f"the hand finds no hold on body {model.body(body).name!r}")
    return {"grasps": grasps, "boxes": scene.body == body}


def _tree(model: mujoco.MjModel, body: int, scene: BodyBoxes) -> np.ndarray:
    """Which boxes belong to the body's object or fixture, bool [N]."""
    return (model.body_rootid[scene.body] == model.body_rootid[body]) & (body != 0)


def _spread(steps: Sequence[Step]) -> list[Step]:
    """Moves places apart that several objects go to, along the region's longer side."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    for index, step in enumerate(steps):
        if step.place is not None and step.place.half_size.any():
            groups.setdefault((step.place.body, step.place.pos.tobytes()), []).append(index)
    spread = list(steps)
    for members in groups.values():
        for rank, index in enumerate(members):
            place = steps[index].place
            assert place is not None
            longer = int(np.argmax(place.half_size[:2]))
            pos = place.pos.copy()
            share = (rank + 0.5) / len(members) - 0.5
            pos[longer] += share * place.half_size[longer]
            spread[index] = dataclasses.replace(
                steps[index], place=dataclasses.replace(place, pos=pos)
            )
    return spread
