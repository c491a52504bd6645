"""The controller in MJX, on the reduced scene, against robosuite's in LIBERO's own env."""

import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from libero_marks import needs_libero
from libero_stock import run_probe
from mujoco import mjx

from jaxvla.envs import osc

pytestmark = [pytest.mark.libero, pytest.mark.slow, needs_libero]

SUITE, TASK = "libero_10", 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """60 control steps in LIBERO, above the table."""
    output = tmp_path_factory.mktemp("osc") / "seen.npz"
    run_probe("libero_osc_probe.py", SUITE, str(TASK), str(output), timeout_s=900)
    with np.load(output) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def scene(seen: dict[str, np.ndarray]) -> tuple[mujoco.MjModel, mjx.Model, osc.Arm]:
    model = mujoco.MjModel.from_xml_string(str(seen["xml"]))
    model.body_pos[:], model.body_quat[:] = seen["body_pos"], seen["body_quat"]
    # The arm touches nothing, and what lies on the table is no matter here.
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    return model, mjx.put_model(model, impl="jax"), osc.find_arm(model)


def test_rest_pose_is_that_of_the_env(seen: dict[str, np.ndarray], scene: tuple) -> None:
    np.testing.assert_allclose(scene[2].rest, seen["rest"], atol=1e-7)


def test_torques_equal_robosuites(seen: dict[str, np.ndarray], scene: tuple) -> None:
    """Same state, same goal, in 61 states along an episode."""
    _, model, arm = scene

    @jax.jit
    @jax.vmap
    def run(qpos, qvel, position, rotation):
        data = mjx.make_data(model).replace(qpos=qpos, qvel=qvel)
        data = mjx.com_vel(model, mjx.crb(model, mjx.com_pos(model, mjx.kinematics(model, data))))
        data = mjx.rne(model, data)  # qfrc_bias; contacts are not needed
        goal = osc.OscState(goal_position=position, goal_rotation=rotation, gripper=jnp.zeros(2))
        return osc.torques(data, mjx.full_m(model, data), arm=arm, state=goal)

    names = ("qpos", "qvel", "goal_position", "goal_rotation")
    actual = run(*(jnp.asarray(seen[name], jnp.float32) for name in names))
    error = np.linalg.norm(actual - seen["torques"], axis=-1)
    assert (error / np.linalg.norm(seen["torques"], axis=-1)).max() < 1e-4


def test_arm_follows_robosuites_for_60_control_steps(
    seen: dict[str, np.ndarray], scene: tuple
) -> None:
    _, model, arm = scene
    step = jax.jit(functools.partial(osc.control_step, model, arm=arm))
    data = mjx.make_data(model).replace(
        qpos=jnp.asarray(seen["qpos"][0], jnp.float32),
        qvel=jnp.asarray(seen["qvel"][0], jnp.float32),
    )
    state = osc.initial_state(mjx.kinematics(model, data), arm=arm)
    for index, action in enumerate(seen["actions"], 1):
        data, state = step(data, state=state, action=jnp.asarray(action))
        np.testing.assert_allclose(
            data.qpos[arm.qpos], seen["qpos"][index][arm.qpos], atol=1e-4, err_msg=f"step {index}"
        )
        np.testing.assert_allclose(state.gripper, seen["gripper"][index], atol=1e-5)
    fingers = slice(7, 9)
    np.testing.assert_allclose(data.qpos[fingers], seen["qpos"][-1][fingers], atol=1e-4)
    moved = np.linalg.norm(seen["hand"].max(0) - seen["hand"].min(0))
    assert moved > 0.1  # the episode is not trivial
