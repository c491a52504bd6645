"""Reads the goal of a LIBERO task out of LIBERO's own env, as terms of `predicates`.

Thresholds of drawers, doors and knobs are found by asking the fixture's own methods, so that
every fixture of the package is covered by its own code. The tasks of libero_spatial, object,
goal, 10 and 90 use On, In, Open, Close, TurnOn and TurnOff; all goals are conjunctions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxvla.envs.predicates import (
    Contact,
    GoalTerm,
    InRegion,
    JointsAt,
    OnObject,
    OnRegion,
    Region,
    Up,
)

UP_HEIGHT_M = 1.0

_JOINT_PREDICATES = {
    "open": ("is_open", "default_open_ranges", False),
    "close": ("is_close", "default_close_ranges", True),
    "turnon": ("turn_on", "default_turnon_ranges", False),
    "turnoff": ("turn_off", "default_turnoff_ranges", True),
}
"""Predicate -> the fixture's method, its range in `object_properties`, and whether all of the
joints must agree (LIBERO: open or on if any joint is, closed or off if all are)."""


def extract_goal(env: Any) -> tuple[GoalTerm, ...]:
    """Translates a task's goal.

    Args:
      env: LIBERO's ControlEnv or OffScreenRenderEnv, built for the task.

    Raises:
      ValueError: the goal has a predicate, or a kind of object in it, that LIBERO cannot
        evaluate or that none of its tasks uses.
    """
    domain = env.env
    return tuple(_translate(domain, *state) for state in domain.parsed_problem["goal_state"])


def _translate(domain: Any, predicate: str, *names: str) -> GoalTerm:
    if predicate in _JOINT_PREDICATES and len(names) == 1:
        return _joints_at(domain, predicate, names[0])
    if predicate == "up" and len(names) == 1:
        return Up(object=_body(domain, names[0]), height_m=UP_HEIGHT_M)
    if predicate == "on" and len(names) == 2:
        return _on(domain, *names)
    if predicate == "in" and len(names) == 2 and _is_site(domain, names[1]):
        return InRegion(object=_body(domain, names[0]), region=_region(domain, names[1]))
    raise ValueError(f"goal {predicate}({', '.join(names)}) has no translation")


def _on(domain: Any, name: str, support: str) -> OnObject | OnRegion:
    body = _body(domain, name)
    if not _is_site(domain, support):
        return OnObject(
            object=body, support=_body(domain, support), contact=_contact(domain, name, support)
        )
    parent = domain.object_states_dict[support].parent_name
    is_touched = domain.get_object(parent) is not None
    return OnRegion(
        object=body,
        region=_region(domain, support),
        contact=_contact(domain, name, parent) if is_touched else None,
    )


def _is_site(domain: Any, name: str) -> bool:
    return domain.object_states_dict[name].object_state_type == "site"


def _body(domain: Any, name: str) -> str:
    """Body whose position LIBERO takes for the object's."""
    if _is_site(domain, name):
        raise ValueError(f"{name} is a region, expected an object")
    return domain.sim.model.body_id2name(domain.obj_body_id[name])


def _contact(domain: Any, name: str, other: str) -> Contact:
    return Contact(
        geoms=tuple(domain.get_object(name).contact_geoms),
        other_geoms=tuple(domain.get_object(other).contact_geoms),
    )


def _region(domain: Any, name: str) -> Region:
    """The site's place in the model, with the size that LIBERO's predicates use."""
    model = domain.sim.model
    site = model.site_name2id(name)
    x, y, z = (float(size) for size in domain.object_sites_dict[name].size)
    return Region(
        body=model.body_id2name(model.site_bodyid[site]),
        pos=tuple(model.site_pos[site].tolist()),
        quat=tuple(model.site_quat[site].tolist()),
        half_size=(x, y, z),
    )


def _joints_at(domain: Any, predicate: str, name: str) -> JointsAt:
    method, ranges, needs_all = _JOINT_PREDICATES[predicate]
    if _is_site(domain, name):
        if predicate not in ("open", "close"):
            raise ValueError(f"goal {predicate}({name}): LIBERO has it for objects only")
        joints = domain.object_sites_dict[name].joints
        fixture = domain.get_object(domain.object_states_dict[name].parent_name)
    else:
        fixture = domain.get_object(name)
        joints = fixture.joints
    bounds = fixture.object_properties["articulation"][ranges]
    comparison, threshold = find_threshold(getattr(fixture, method), bounds)
    return JointsAt(
        joints=tuple(joints), comparison=comparison, threshold=threshold, needs_all=needs_all
    )


def find_threshold(
    condition: Callable[[float], bool], candidates: Sequence[float]
) -> tuple[str, float]:
    """Finds out which comparison with which number a condition is.

    Args:
      condition: a comparison of its argument with one of the candidates.
      candidates: numbers.

    Returns:
      Comparison, such as "<", and number.

    Raises:
      ValueError: the condition changes at none of the candidates or at several.
    """
    patterns = {
        (True, False, False): "<",
        (True, True, False): "<=",
        (False, False, True): ">",
        (False, True, True): ">=",
    }
    found = []
    for number in sorted(set(candidates)):
        below, above = math.nextafter(number, -math.inf), math.nextafter(number, math.inf)
        pattern = (bool(condition(below)), bool(condition(number)), bool(condition(above)))
        if pattern in patterns:
            found.append((patterns[pattern], float(number)))
    if len(found) != 1:
        raise ValueError(f"the condition changes at {len(found)} of {sorted(set(candidates))}")
    return found[0]
