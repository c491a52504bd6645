"""The controller against float64 NumPy on a small arm. Against robosuite: test_osc_libero.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from scipy.spatial.transform import Rotation
from small_arm import REST, ReferenceArm, arm_xml

from jaxvla.envs import osc

NUM_WORLDS = 4


@functools.cache
def scene() -> tuple[mujoco.MjModel, mjx.Model, osc.Arm]:
    model = mujoco.MjModel.from_xml_string(arm_xml())
    return model, mjx.put_model(model, impl="jax"), osc.find_arm(model, rest_rad=tuple(REST))


def random_states(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses about the rest pose, moving; fingers within their range."""
    model = scene()[0]
    rng = np.random.default_rng(seed)
    qpos = np.tile(model.qpos0, (count, 1))
    qpos[:, 7:14] = REST + rng.uniform(-0.4, 0.4, (count, 7))
    qpos[:, 14:16] = rng.uniform(0.01, 0.03, (count, 1)) * [1, -1]
    qvel = rng.uniform(-0.5, 0.5, (count, model.nv))
    # float32 values, so that both sides start from the same numbers
    return qpos.astype(np.float32), qvel.astype(np.float32)


def load(qpos: np.ndarray, qvel: np.ndarray) -> mjx.Data:
    """Worlds [E] with the given states."""
    data = mjx.make_data(scene()[1])
    fill = jax.vmap(lambda q, v: data.replace(qpos=q, qvel=v))
    return fill(jnp.asarray(qpos), jnp.asarray(qvel))


@jax.jit
@jax.vmap
def start(data: mjx.Data) -> tuple[mjx.Data, osc.OscState]:
    """Worlds [E] with kinematics, and the controllers' states."""
    model, arm = scene()[1:]
    data = mjx.kinematics(model, data)
    return data, osc.initial_state(data, arm=arm)


def one_world(seed: int) -> mjx.Data:
    """A world with kinematics."""
    data, _ = start(load(*random_states(seed=seed, count=NUM_WORLDS)))
    return jax.tree.map(lambda x: x[0], data)


@functools.cache
def compiled_step():
    _, model, arm = scene()
    step = functools.partial(osc.control_step, model, arm=arm)
    return jax.jit(jax.vmap(lambda data, state, action: step(data, state=state, action=action)))


@pytest.mark.parametrize(
    "vector", [(0, 0, 0), (1e-5, 0, 0), (0.5, -0.5, 0.5), (0, 0, 3.0), (-2.0, 1.0, 0.1)]
)
def test_rotation_matrix_is_the_one_of_scipy(vector: tuple[float, ...]) -> None:
    expected = Rotation.from_rotvec(vector).as_matrix()
    actual = osc.rotation_matrix(jnp.asarray(vector, jnp.float32))
    np.testing.assert_allclose(actual, expected, atol=3e-7)  # rounding of float32


def test_torques_equal_the_reference() -> None:
    model, mjx_model, arm = scene()
    qpos, qvel = random_states(seed=0, count=64)
    rng = np.random.default_rng(1)
    offset = rng.uniform(-0.05, 0.05, (64, 3)).astype(np.float32)
    turn = rng.uniform(-0.5, 0.5, (64, 3))

    @jax.jit
    @jax.vmap
    def run(data, offset, turned):
        data = mjx.fwd_velocity(mjx_model, mjx.fwd_position(mjx_model, data))
        state = osc.initial_state(data, arm=arm)
        state = dataclasses.replace(
            state,
            goal_position=state.goal_position + offset,
            goal_rotation=turned @ state.goal_rotation,
        )
        return osc.torques(data, mjx.full_m(mjx_model, data), arm=arm, state=state)

    turned = Rotation.from_rotvec(turn).as_matrix().astype(np.float32)
    actual = run(load(qpos, qvel), offset, turned)
    reference = ReferenceArm(model, REST)
    for row in range(64):
        reference.load(qpos[row], qvel[row])
        reference.goal_position = reference.position + offset[row]
        reference.goal_rotation = turned[row] @ reference.rotation
        expected = reference.torques()
        error = np.linalg.norm(actual[row] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (row, error)


def test_goal_is_relative_to_the_present_pose_in_world_axes() -> None:
    data, arm = one_world(seed=2), scene()[2]
    state = osc.OscState(
        goal_position=jnp.full(3, 9.0), goal_rotation=9.0 * jnp.eye(3), gripper=jnp.ones(2)
    )
    action = jnp.asarray([1.0, -0.5, 7.0, 0.0, 0.0, -3.0, 1.0])  # two beyond the limits
    goal = osc.set_goal(data, action, arm=arm, state=state)
    position, rotation = data.site_xpos[arm.hand], data.site_xmat[arm.hand]
    np.testing.assert_allclose(goal.goal_position - position, [0.05, -0.025, 0.05], atol=1e-6)
    turned = Rotation.from_rotvec([0, 0, -0.5]).as_matrix() @ np.asarray(rotation)
    np.testing.assert_allclose(goal.goal_rotation, turned, atol=1e-6)
    np.testing.assert_array_equal(goal.gripper, state.gripper)


def test_goal_rotation_stays_when_no_rotation_is_asked_for() -> None:
    data, arm = one_world(seed=3), scene()[2]
    before = osc.OscState(
        goal_position=jnp.zeros(3), goal_rotation=9.0 * jnp.eye(3), gripper=jnp.zeros(2)
    )
    goal = osc.set_goal(data, jnp.zeros(7), arm=arm, state=before)
    np.testing.assert_array_equal(goal.goal_rotation, before.goal_rotation)
    np.testing.assert_array_equal(goal.goal_position, data.site_xpos[arm.hand])


def test_gripper_opens_closes_and_holds() -> None:
    arm = scene()[2]
    command, ctrl = osc.gripper_control(jnp.zeros(2), jnp.full(7, 0.3), arm=arm)
    np.testing.assert_allclose(command, [-0.01, 0.01], atol=1e-7)
    np.testing.assert_allclose(ctrl, [0.02 - 0.0002, -0.02 + 0.0002], atol=1e-8)
    held, _ = osc.gripper_control(command, jnp.zeros(7), arm=arm)
    np.testing.assert_array_equal(held, command)
    opened, ctrl = osc.gripper_control(jnp.asarray([0.995, -0.995]), -jnp.ones(7), arm=arm)
    np.testing.assert_array_equal(opened, [1.0, -1.0])
    np.testing.assert_allclose(ctrl, [0.04, -0.04], atol=1e-8)


def test_control_steps_follow_the_reference() -> None:
    """20 control steps (500 physics steps) with all axes moving, in several worlds at once."""
    model, _, _ = scene()
    qpos, qvel = random_states(seed=4, count=NUM_WORLDS)
    actions = np.random.default_rng(5).uniform(-1.2, 1.2, (20, NUM_WORLDS, 7)).astype(np.float32)
    actions[5:8, :, 3:6] = 0.0  # the goal rotation stays
    actions[10, 0] = 0.0
    data = load(qpos, qvel)
    state = start(data)[1]
    for action in actions:
        data, state = compiled_step()(data, state, action)
    for row in range(NUM_WORLDS):
        reference = ReferenceArm(model, REST)
        reference.load(qpos[row], qvel[row])
        for action in actions[:, row]:
            reference.step(action)
        # Without gravity compensation or with the goal moving along, errors are above 1e-2.
        np.testing.assert_allclose(data.qpos[row, 7:], reference.data.qpos[7:], atol=2e-5)
        np.testing.assert_allclose(state.gripper[row], reference.gripper, atol=1e-5)


def test_positions_in_the_result_are_one_physics_step_old() -> None:
    """As in MuJoCo after mj_step; success conditions rely on it."""
    data = load(*random_states(seed=6, count=NUM_WORLDS))
    data, _ = compiled_step()(data, start(data)[1], jnp.zeros((NUM_WORLDS, 7)))
    now, _ = start(data)
    model = scene()[0]
    before = data.qpos[:, :3] - data.qvel[:, :3] * model.opt.timestep  # the free ball
    np.testing.assert_allclose(data.xpos[:, 1], before, atol=1e-6)
    assert np.abs(np.asarray(data.xpos[:, 1]) - np.asarray(now.xpos[:, 1])).max() > 1e-4


def test_unknown_names_and_integrators_are_refused() -> None:
    model = scene()[0]
    with pytest.raises(KeyError, match="nowhere"):
        osc.find_arm(model, osc.ArmNames(hand="nowhere"))
    with pytest.raises(ValueError, match="6 rest angles"):
        osc.find_arm(model, rest_rad=(0.0,) * 6)
    other = mujoco.MjModel.from_xml_string(arm_xml().replace("Euler", "implicitfast"))
    with pytest.raises(ValueError, match="integrator"):
        osc.find_arm(other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('<site name="gripper0', '<joint name="wrist"/><site name="gripper0', "'wrist'"),
        ('name="robot0_joint1"', 'name="robot0_joint1" type="slide"', "hinges"),
    ],
)
def test_arms_beyond_the_jacobian_are_refused(old: str, new: str, message: str) -> None:
    """The joints are all that move the hand, and turn."""
    xml = arm_xml().replace(old, new, 1)
    with pytest.raises(ValueError, match=message):
        osc.find_arm(mujoco.MjModel.from_xml_string(xml))
