"""The scripted expert: its rules on small hand-made worlds, and its success in LIBERO itself."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from libero_marks import needs_libero

from jaxvla.envs.libero_expert import Expert, bind_plan
from jaxvla.envs.libero_plans import make_plan
from jaxvla.envs.libero_workspace import ExpertState, clear_height, read_state, view_state
from jaxvla.envs.predicates import (
    Contact,
    GoalTerm,
    InRegion,
    JointsAt,
    OnObject,
    Region,
    Up,
)

WORLD = """
<mujoco>
  <worldbody>
    <geom name="table" type="plane" size="1 1 0.1"/>
    <body name="robot0_base" pos="-0.6 0 0">
      <body name="link1">
        <joint name="robot0_joint1" axis="0 0 1"/>
        <geom type="sphere" size="0.01" contype="0" conaffinity="0"/>
        <body name="link2" pos="0 0 0.333">
          <joint name="robot0_joint2" axis="0 1 0"/>
          <geom type="sphere" size="0.01" contype="0" conaffinity="0"/>
        </body>
      </body>
    </body>
    <body name="hand" mocap="true" pos="0 0 0.4" quat="0 0.7071068 0.7071068 0">
      <site name="gripper0_grip_site"/>
    </body>
    <body name="left" pos="0 0 2">
      <joint name="left" type="slide" axis="0 1 0"/>
      <geom type="sphere" size="0.01" contype="0" conaffinity="0"/>
    </body>
    <body name="right" pos="0 0 2">
      <joint name="right" type="slide" axis="0 1 0"/>
      <geom type="sphere" size="0.01" contype="0" conaffinity="0"/>
    </body>
    <body name="item" pos="0.05 0.1 0.04">
      <freejoint name="item"/>
      <geom name="item" type="box" size="0.02 0.04 0.04"/>
    </body>
    <body name="pad" pos="-0.1 -0.2 0.01">
      <freejoint name="pad"/>
      <geom name="pad" type="box" size="0.08 0.08 0.01"/>
    </body>
    <body name="wall" pos="0 -0.05 0.1">
      <geom name="wall" type="box" size="0.1 0.01 0.1"/>
    </body>
    <body name="stove" pos="0.2 0.3 0.02">
      <geom name="stove" type="box" size="0.05 0.05 0.02"/>
      <body name="knob" pos="0 0 0.02">
        <joint name="knob" axis="0 0 1" range="0 2"/>
        <geom name="knob" type="box" size="0.01 0.03 0.03" pos="0 0 0.03"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position name="gripper0_gripper_finger_joint1" joint="left"/>
    <position name="gripper0_gripper_finger_joint2" joint="right"/>
  </actuator>
</mujoco>
"""
ON_PAD = OnObject(
    object="item", support="pad", contact=Contact(geoms=("item",), other_geoms=("pad",))
)
KNOB_ON = JointsAt(joints=("knob",), comparison=">=", threshold=0.5, needs_all=False)
Act = Callable[[ExpertState], jax.Array]
FIXTURES = ("wall", "stove")


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(WORLD)


def plan(model: mujoco.MjModel, *terms: GoalTerm) -> Expert:
    return bind_plan(make_plan(terms, FIXTURES, model), model)


@pytest.fixture(scope="module")
def expert(model: mujoco.MjModel) -> Expert:
    """Is to put the item on the pad."""
    return plan(model, ON_PAD)


@pytest.fixture(scope="module")
def act(expert: Expert) -> Act:
    return jax.jit(expert.action)


def place(
    model: mujoco.MjModel,
    hand: tuple[float, float, float],
    opening: float = 0.08,
    item: tuple[float, float, float] = (0.05, 0.1, 0.04),
    knob: float = 0.0,
    hand_yaw: float = 0.0,
) -> ExpertState:
    """A state with hand and item at these places. Unturned, the hand closes along y."""
    data = mujoco.MjData(model)
    data.mocap_pos[0] = hand
    turn, pose = np.empty(4), data.mocap_quat[0].copy()
    mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), hand_yaw)
    mujoco.mju_mulQuat(data.mocap_quat[0], turn, pose)
    data.joint("left").qpos[0], data.joint("right").qpos[0] = opening / 2, -opening / 2
    data.joint("item").qpos[:3] = item
    data.joint("knob").qpos[0] = knob
    mujoco.mj_kinematics(model, data)
    return read_state(data)


def test_far_from_the_item_the_hand_stays_high_and_open(model: mujoco.MjModel, act: Act) -> None:
    # Its tips, 1 cm below the site, are lower than the item's top at 0.08 m plus 2 cm.
    action = act(place(model, (-0.1, 0.1, 0.06)))
    assert action[2] > 0.5
    np.testing.assert_array_equal(action[:2], 0.0)
    # High enough, it travels straight to the item.
    action = act(place(model, (-0.1, 0.1, 0.111)))
    assert action[0] > 0.9
    assert abs(float(action[1])) < 0.1 and abs(float(action[2])) < 0.1
    assert action[6] == -1.0


def test_above_the_item_the_hand_turns_across_its_narrow_side(
    model: mujoco.MjModel, act: Act
) -> None:
    # The item is 4 cm wide along x and 8 cm along y; the hand closes along y: a quarter turn.
    action = act(place(model, (0.05, 0.1, 0.2)))
    assert abs(float(action[5])) == 1.0
    # Closing along x it may come down.
    for yaw in (-np.pi / 2, np.pi / 2):
        action = act(place(model, (0.05, 0.1, 0.2), hand_yaw=yaw))
        assert abs(float(action[5])) < 0.05
        assert action[2] == -1.0


GRASP = (0.05, 0.1, 0.056)
"""2.4 cm below the item's top."""


def test_around_the_item_the_fingers_close_then_lift(model: mujoco.MjModel, act: Act) -> None:
    around = act(place(model, GRASP, hand_yaw=np.pi / 2))
    np.testing.assert_allclose(around[:3], 0.0, atol=0.05)
    assert around[6] == 1.0
    held = act(place(model, GRASP, opening=0.042, hand_yaw=np.pi / 2))
    assert held[6] == 1.0
    assert held[2] == 1.0
    np.testing.assert_array_equal(held[:2], 0.0)


def test_fingers_closed_on_nothing_open(model: mujoco.MjModel, act: Act) -> None:
    # The item has slipped away by 5 cm.
    state = place(model, (0.05, 0.15, 0.056), opening=0.0, hand_yaw=np.pi / 2)
    assert act(state)[6] == -1.0


def carried(model: mujoco.MjModel, x: float, y: float, z: float) -> ExpertState:
    """The item in the hand, at a place."""
    hand = (x, y, z + GRASP[2] - 0.04)
    return place(model, hand, opening=0.042, item=(x, y, z), hand_yaw=np.pi / 2)


def test_the_item_is_carried_over_the_wall(model: mujoco.MjModel, act: Act) -> None:
    # The wall's top is at 0.2 m, between the item and the pad; the item's bottom has to clear it.
    low = act(carried(model, 0.0, 0.1, 0.2))
    assert low[2] > 0.5
    assert low[1] == 0.0
    high = act(carried(model, 0.0, 0.1, 0.27))
    assert high[1] == -1.0
    assert high[6] == 1.0


def test_the_item_is_lowered_and_let_go_on_the_pad(model: mujoco.MjModel, act: Act) -> None:
    above = act(carried(model, -0.1, -0.2, 0.2))
    assert above[2] == -1.0
    assert above[6] == 1.0
    # The pad is 2 cm high, the item's position 4 cm above its bottom.
    down = act(carried(model, -0.1, -0.2, 0.066))
    assert down[6] == -1.0
    np.testing.assert_array_equal(down[:3], 0.0)
    # Once the fingers are open the hand rises, and stays open.
    free = place(
        model, (-0.1, -0.2, 0.076), opening=0.08, item=(-0.1, -0.2, 0.06), hand_yaw=np.pi / 2
    )
    rising = act(free)
    assert rising[2] > 0.5
    assert rising[6] == -1.0


def test_the_knob_comes_first_and_is_turned_until_it_is_on(model: mujoco.MjModel) -> None:
    act = jax.jit(plan(model, ON_PAD, KNOB_ON).action)
    # The knob's bar is 2 cm thick along x, 5 cm to 10 cm above the table.
    at_knob = (0.2, 0.3, 0.076)
    state = place(model, at_knob, opening=0.022, hand_yaw=np.pi / 2)
    turning = act(state)
    assert turning[5] > 0.5
    assert turning[6] == 1.0
    # Beyond the threshold by a margin the item is due: rise and open.
    on = place(model, at_knob, opening=0.022, hand_yaw=np.pi / 2 + 0.7, knob=0.7)
    leaving = act(on)
    assert leaving[2] > 0.5
    assert leaving[6] == -1.0


def test_objects_of_one_region_get_places_apart(model: mujoco.MjModel) -> None:
    region = Region(
        body="stove", pos=(0.0, 0.0, 0.02), quat=(1.0, 0.0, 0.0, 0.0), half_size=(0.05, 0.1, 0.05)
    )
    pair = make_plan(
        [InRegion(object="item", region=region), InRegion(object="item", region=region)],
        FIXTURES,
        model,
    )
    places = [step.place.pos for step in pair.steps if step.place is not None]
    # The longer side, y, is shared out: a quarter of its 0.2 m to either side of the centre.
    np.testing.assert_allclose(places, [[0.0, -0.025, 0.02], [0.0, 0.025, 0.02]])


def test_clear_height_sees_what_stands_on_the_way_only(
    model: mujoco.MjModel, expert: Expert
) -> None:
    view = view_state(place(model, (0.0, 0.1, 0.4)), expert.plan, expert.arm)
    everything = np.ones(len(view.centre), bool)
    across = clear_height(view, everything, jnp.array([0.0, 0.1, 0.4]), jnp.array([0.0, -0.3, 0.0]))
    # The wall's top, 2 cm of room, and 1 cm from the site to the tips.
    np.testing.assert_allclose(across, 0.23, atol=1e-6)
    beside = clear_height(
        view, everything, jnp.array([-0.4, 0.3, 0.4]), jnp.array([-0.4, 0.35, 0.05])
    )
    np.testing.assert_allclose(beside, 0.05, atol=1e-6)


def test_goals_beyond_the_rules_are_refused(model: mujoco.MjModel) -> None:
    with pytest.raises(ValueError, match="no plan for a goal of kind Up"):
        plan(model, Up(object="item", height_m=1.0))
    with pytest.raises(ValueError, match="only knobs"):
        plan(model, dataclasses.replace(KNOB_ON, joints=("robot0_joint2",)))
    door = mujoco.MjModel.from_xml_string(
        WORLD.replace(
            'size="0.01 0.03 0.03" pos="0 0 0.03"', 'size="0.01 0.03 0.03" pos="0.1 0 0.03"'
        )
    )
    with pytest.raises(ValueError, match="only knobs"):
        plan(door, KNOB_ON)
    with pytest.raises(ValueError, match="no hold on body 'hand'"):
        plan(model, dataclasses.replace(ON_PAD, object="hand"))


def test_batches_give_the_actions_of_their_worlds(
    model: mujoco.MjModel, expert: Expert, act: Act
) -> None:
    states = [
        place(model, (-0.1, 0.1, 0.06)),
        place(model, GRASP, opening=0.042, hand_yaw=np.pi / 2),
        carried(model, 0.0, 0.1, 0.27),
    ]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    actions = jax.jit(jax.vmap(expert.action))(batch)
    assert actions.dtype == jnp.float32
    for state, action in zip(states, actions, strict=True):
        np.testing.assert_allclose(action, act(state), atol=1e-4)


@pytest.mark.libero
@pytest.mark.slow
@needs_libero
@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 0), ("libero_object", 0)])
def test_expert_solves_tasks_of_the_package(suite: str, task_id: int) -> None:
    script = pathlib.Path(__file__).parents[2] / "scripts" / "libero_expert_table.py"
    options = [f"--suites={suite}", f"--task_ids={task_id}", "--states=2", "--least=2"]
    process = subprocess.run(
        [sys.executable, str(script), *options],
        env={**os.environ, "MUJOCO_GL": "disable"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
