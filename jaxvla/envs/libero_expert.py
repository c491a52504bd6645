"""Scripted expert of LIBERO tasks: a memoryless function of the true physics state.

`make_expert` derives a plan from the task's goal terms and the model's collision boxes, with no
knowledge of single tasks:

  OnObject, OnRegion, InRegion  grasp the object (`libero_grasps`), carry it over what stands in
                                the way, lower it over the place, let go
  JointsAt of a vertical hinge  grasp the knob and turn it

Goals are served one after the other, knobs first. Which step of it is due follows from the state
alone (is the object between the fingers? is it over its place?), so the expert recovers from
slips and from actions that were not its own. It is good, not perfect: it serves as the source of
demonstrations and to compare simulators.
"""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.libero_grasps import OPENING_M, TIP_M
from jaxvla.envs.libero_plans import Place, Plan, Step, make_plan
from jaxvla.envs.libero_task import LiberoTask
from jaxvla.envs.libero_workspace import (
    ArmParts,
    PhysicsState,
    View,
    bottom_of,
    clear_height,
    crowding,
    find_holds,
    find_parts,
    hand_down,
    overreach,
    view_state,
)
from jaxvla.envs.osc import MAX_MOVE_M, MAX_TURN_RAD
from jaxvla.envs.predicates import term_from_dict

_REST_AXIS = np.array([0.0, 1.0, 0.0])
"""Closing direction of the hand in the arm's rest pose; LIBERO's robots face +x."""

_OPEN, _CLOSE = -1.0, 1.0
_MOVE_GAIN = 1.6
_TURN_GAIN = 1.2
"""Actions per error, both as fractions of a control step's greatest motion."""

_NEAR_M = 0.008
"""Distance from the grasp at which fingers close."""
_AROUND_M = 0.024
"""Distance from the grasp up to which the body counts as between the fingers."""
_NEAR_RAD = 0.12
_ALIGNED = 0.9
"""Cosine of the angle between the hand and a grasp up to which the hand is at it."""
_HELD_SLACK_M = 0.02
"""Greatest excess of the opening over the body's width up to which it counts as held."""
_CLOSED_M = 0.006
"""Usual excess of the opening over the body's width."""
_LEAST_PACE = 0.1
_WIDE_M = 0.071
"""Opening at which the fingers have let go of anything."""

_CONE = 8.0
"""Height over the goal per horizontal distance from it, while coming down."""
_DROP_M = 0.008
"""Height above its place at which an object is let go."""
_BELOW_RIM_M = 0.02
"""How far an object's position is lowered into a region before it is let go."""
_MARGIN_M = 0.05
"""Distance from a region's edges, where it is that large, at which objects are let go."""
_PLACED_M = 0.022
"""OnObject: horizontal distance at which the object may be let go."""
_TURN_AHEAD_RAD = 0.35
"""By how much the hand leads a knob."""
_TURN_MARGIN_RAD = 0.1

_REACH_COST = 15.0
_CROWDING_COST = 2.0
_REST_COST, _PRESENT_COST = 0.15, 0.1
"""What grasps cost, beside their own: per m, per share of a gap, and per rad from the hand's
direction at rest and now."""


@flax.struct.dataclass(kw_only=True)
class _Aim:
    """What the hand is to do next."""

    goal: jax.Array
    """[3], where it is to be."""
    axis: jax.Array
    """[3], its closing direction."""
    clear: jax.Array
    """[], height of the hand at which nothing is in the way."""
    grip: jax.Array
    """[]."""
    pace: jax.Array
    """[], share of the full speed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Expert:
    """Plans bound to a model. Static: close over it in jitted functions."""

    plan: Plan
    arm: ArmParts

    def action(self, state: PhysicsState) -> jax.Array:
        """The next action of one world; vmap it for batches.

        Args:
          state: with kinematics computed.

        Returns:
          float32 [7] in [-1, 1], see `osc`.
        """
        with jax.default_matmul_precision("highest"):
            view = view_state(state, self.plan, self.arm)
            aim = _rest(view)
            for step in reversed(self.plan.steps):
                present = _aim(step, view)
                aim = _choose(_is_done(step, view), aim, present)
            return _control(view, aim)


def _aim(step: Step, view: View) -> _Aim:
    held = _carry(step, step.place, view) if step.place else _turn(step, view)
    return _choose(_is_held(step, view), held, _approach(step, view))


def _choose(condition: jax.Array, first: _Aim, second: _Aim) -> _Aim:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def _rest(view: View) -> _Aim:
    """Nothing is left to do: rise above everything near, with open fingers."""
    clear = clear_height(view, np.ones(len(view.centre), bool), view.hand, view.hand) + 0.05
    goal = jnp.append(view.hand[:2], jnp.maximum(view.hand[2], clear))
    return _Aim(
        goal=goal,
        axis=view.hand_rotation[:, 0],
        clear=clear,
        grip=jnp.asarray(_OPEN),
        pace=jnp.ones(()),
    )


def _excess(step: Step, view: View) -> jax.Array:
    """Opening of the fingers beyond the width of what is between them, m, []; inf: nothing is."""
    holds = find_holds(step, view)
    distance = jnp.linalg.norm(holds.point - view.hand, axis=-1)
    aligned = jnp.abs(holds.axis @ view.hand_rotation[:, 0])
    is_around = (distance < _AROUND_M) & (aligned > _ALIGNED) & jnp.isfinite(holds.cost)
    # Boxes have square and oblique grasps at the same point: the direction tells which it is.
    unlike = jnp.where(
        is_around, distance / _AROUND_M + (1.0 - aligned) / (1.0 - _ALIGNED), jnp.inf
    )
    best = jnp.argmin(unlike)
    return jnp.where(is_around[best], view.opening - holds.width[best], jnp.inf)


def _is_held(step: Step, view: View) -> jax.Array:
    """Whether the fingers are closed on the body, or nearly so."""
    excess = _excess(step, view)
    # Never more than halfway between the open fingers and the body.
    return excess < jnp.minimum(_HELD_SLACK_M, OPENING_M - view.opening)


def _pace(step: Step, view: View) -> jax.Array:
    """Full speed once the fingers are closed, []. They may stay a little open around a body that
    leans, hence never zero."""
    share = 1.0 - (_excess(step, view) - _CLOSED_M) / _CLOSED_M
    return jnp.clip(share, _LEAST_PACE, 1.0)


def _approach(step: Step, view: View) -> _Aim:
    """To the best grasp, then close; after a release, first open."""
    onward = jnp.zeros(3)
    if step.place is not None:
        onward = _target(step, step.place, view) - view.xpos[step.body]
    holds = find_holds(step, view)
    points, axes = holds.point, _toward_rest(holds.axis, view)
    present = jnp.arccos(jnp.clip(axes @ view.hand_rotation[:, 0], -1.0, 1.0))
    from_rest = jnp.arccos(jnp.clip(axes @ jnp.asarray(_REST_AXIS, jnp.float32), -1.0, 1.0))
    cost = holds.cost + _PRESENT_COST * present + _REST_COST * from_rest
    crowd = crowding(points, axes, view, ~step.boxes)
    crowd += crowding(points + onward, axes, view, ~step.boxes)
    cost += _CROWDING_COST * crowd
    cost += _REACH_COST * (overreach(points, view) + overreach(points + onward, view))
    best = jnp.argmin(cost)
    point, axis = points[best], axes[best]
    clear = clear_height(view, np.ones(len(step.boxes), bool), view.hand, point)
    offset = point - view.hand
    is_near = (jnp.linalg.norm(offset[:2]) < _NEAR_M) & (jnp.abs(offset[2]) < _NEAR_M)
    is_near &= present[best] < _NEAR_RAD
    is_around = jnp.linalg.norm(offset) < _AROUND_M
    is_wide = view.opening > _WIDE_M
    done = _is_done(step, view)
    is_closing = (is_near | (is_around & ~is_wide)) & ~done
    return _Aim(
        goal=point,
        axis=axis,
        clear=clear,
        grip=jnp.where(is_closing, _CLOSE, _OPEN),
        pace=jnp.ones(()),
    )


def _toward_rest(axes: jax.Array, view: View) -> jax.Array:
    """Makes axes horizontal, with the sign that takes the hand least from its rest pose."""
    axes = axes.at[..., 2].set(0.0)
    axes = axes / jnp.maximum(jnp.linalg.norm(axes, axis=-1, keepdims=True), 1e-6)
    # The present direction decides where the two signs are about as far.
    wanted = 2.0 * jnp.asarray(_REST_AXIS, jnp.float32) + view.hand_rotation[:, 0]
    return axes * jnp.where(axes @ wanted < 0.0, -1.0, 1.0)[..., None]


def _carry(step: Step, place: Place, view: View) -> _Aim:
    """With the object in the hand: over its place, down, let go."""
    target = _target(step, place, view)
    offset = target - view.xpos[step.body]
    bottom = bottom_of(step, view)
    # The lower of object and finger tips has to clear what is in the way.
    reach = jnp.maximum(view.hand[2] - bottom, TIP_M)
    clear = clear_height(view, ~step.boxes, view.xpos[step.body], target) - TIP_M + reach
    is_over = _is_placed(step, place, view)
    return _Aim(
        goal=jnp.where(is_over, view.hand, view.hand + offset),
        axis=view.hand_rotation[:, 0],
        clear=clear,
        grip=jnp.where(is_over, _OPEN, _CLOSE),
        pace=_pace(step, view),
    )


def _turn(step: Step, view: View) -> _Aim:
    """With the knob in the hand: turn it on."""
    holds = find_holds(step, view)
    distance = jnp.linalg.norm(holds.point - view.hand, axis=-1)
    nearest = holds.point[jnp.argmin(jnp.where(jnp.isfinite(holds.cost), distance, jnp.inf))]
    x, y, _ = axis = view.hand_rotation[:, 0]
    ahead = jnp.stack([-y, x, jnp.zeros(())]) * step.sign
    angle = _TURN_AHEAD_RAD
    return _Aim(
        goal=nearest,
        axis=jnp.cos(angle) * axis + jnp.sin(angle) * ahead,
        clear=nearest[2],
        grip=jnp.asarray(_CLOSE),
        pace=_pace(step, view),
    )


def _is_done(step: Step, view: View) -> jax.Array:
    """Whether the term holds, and the fingers have let go."""
    if step.place is None:
        beyond = step.sign * (view.qpos[step.joint] - step.threshold)
        return beyond > _TURN_MARGIN_RAD
    return _is_placed(step, step.place, view) & (_excess(step, view) > 2.0 * _CLOSED_M)


def _region(place: Place, view: View) -> tuple[jax.Array, jax.Array]:
    """Centre and half extents along the world's axes, both [3]."""
    rotation = view.xmat[place.body]
    centre = view.xpos[place.body] + rotation @ jnp.asarray(place.pos, jnp.float32)
    return centre, jnp.abs(rotation @ jnp.asarray(place.half_size, jnp.float32))


def _target(step: Step, place: Place, view: View) -> jax.Array:
    """Where the object's position is to be when it is let go, [3]."""
    centre, extent = _region(place, view)
    near = jnp.abs(view.centre[:, :2] - centre[:2]) < view.extent[:, :2] + 0.01
    tops = view.centre[:, 2] + view.extent[:, 2]
    tops = jnp.where(near.all(-1) & place.support, tops, -jnp.inf)
    foot = view.xpos[step.body, 2] - bottom_of(step, view)
    if place.is_inside:
        below = jnp.where(tops < centre[2] + 0.5 * extent[2], tops, -jnp.inf).max()
        lowest = jnp.maximum(below, centre[2] - extent[2]) + foot + _DROP_M
        height = jnp.maximum(lowest, centre[2] + extent[2] - _BELOW_RIM_M)
    else:
        height = jnp.maximum(tops.max(), centre[2] + extent[2]) + foot + _DROP_M
    # Anywhere near the middle of a region will do; the nearest point spares the arm's reach.
    room = jnp.maximum(extent[:2] - _MARGIN_M, 0.0)
    return jnp.append(
        jnp.clip(view.xpos[step.body, :2], centre[:2] - room, centre[:2] + room), height
    )


def _is_placed(step: Step, place: Place, view: View) -> jax.Array:
    """Whether the object is where it may be let go, or has been."""
    target = _target(step, place, view)
    centre, extent = _region(place, view)
    offset = jnp.abs(view.xpos[step.body] - centre)[:2]
    if place.half_size.any():
        is_over = (offset < extent[:2] - 0.005).all()
    else:
        is_over = jnp.linalg.norm(offset) < _PLACED_M
    return is_over & (view.xpos[step.body, 2] < target[2] + 0.01)


def _control(view: View, aim: _Aim) -> jax.Array:
    """Proportional control towards the aim: up, across, and down in a cone."""
    axis = aim.axis.at[2].set(0.0)
    wanted = hand_down(axis / jnp.maximum(jnp.linalg.norm(axis), 1e-6))
    turn = 0.5 * jnp.cross(view.hand_rotation, wanted, axisa=0, axisb=0, axisc=0).sum(-1)
    offset = aim.goal - view.hand
    distance = jnp.linalg.norm(offset[:2])
    astray = jnp.maximum(distance - 0.004, 0.0)
    astray += 0.05 * jnp.maximum(jnp.abs(turn).max() - _NEAR_RAD, 0.0)
    height = jnp.minimum(aim.goal[2] + _CONE * astray, jnp.maximum(aim.clear, aim.goal[2]))
    rise = height - view.hand[2]
    across = offset[:2] * jnp.clip(1.0 - (rise - 0.01) / 0.03, 0.0, 1.0)
    move = aim.pace * _MOVE_GAIN * jnp.append(across, rise) / MAX_MOVE_M
    # The direction across is kept where its length is limited.
    move = move.at[:2].divide(jnp.maximum(jnp.abs(move[:2]).max() / aim.pace, 1.0))
    move = jnp.clip(move, -aim.pace, aim.pace)
    return jnp.concatenate(
        [
            move,
            jnp.clip(_TURN_GAIN * turn / MAX_TURN_RAD, -1.0, 1.0),
            aim.grip[None],
        ]
    ).astype(jnp.float32)


def make_expert(task: LiberoTask, model: mujoco.MjModel) -> Expert:
    """Plans a task; takes 1 to 10 s.

    Args:
      task: its goal and fixtures are what matters.
      model: the task's physics model, or LIBERO's own.

    Raises:
      KeyError: the model lacks a body or a joint.
      ValueError: a goal term has no plan, or a body no grasp.
    """
    return bind_plan(
        make_plan([term_from_dict(term) for term in task.goal], task.fixtures, model), model
    )


def bind_plan(plan: Plan, model: mujoco.MjModel) -> Expert:
    """Gives a plan to the arm of the model that it was made for."""
    return Expert(plan=plan, arm=find_parts(model))
