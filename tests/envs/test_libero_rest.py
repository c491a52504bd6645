"""Objects at rest stay, and the arm goes, where they do in LIBERO's own model."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from libero_marks import needs_libero
from libero_rest_probe import KEPT
from libero_stock import run_probe

from jaxvla.envs.broad_phase import contact_overflow, fwd_position
from jaxvla.envs.libero_deviation import replay, rest
from jaxvla.envs.osc import find_arm
from jaxvla.envs.quiet_mjx import mjx

pytestmark = [
    pytest.mark.libero,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_libero,
]

TASKS = ("libero_goal:0", "libero_10:6")
"""A table with cabinet, stove and rack; a living room table."""
DISTANCE_M, ANGLE_DEG = 1e-3, 1.0


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    directory = tmp_path_factory.mktemp("rest")
    run_probe("libero_rest_probe.py", str(directory), *TASKS, timeout_s=900)
    scenes = {}
    for task in TASKS:
        with np.load(directory / f"{task.replace(':', '_')}.npz") as archive:
            scenes[task] = dict(archive)
    return scenes


def load(scene: dict[str, np.ndarray]) -> Any:
    model: Any = mujoco.MjModel.from_xml_string(str(scene["xml"]))
    model.body_pos[:], model.body_quat[:] = scene["body_pos"], scene["body_quat"]
    return model


def deviation(scene: dict[str, np.ndarray], data: Any) -> tuple[float, float]:
    """Greatest distance (m) and angle (degrees) of a free object from its place in C MuJoCo."""
    free = scene["free"]
    distance = np.linalg.norm(data.xipos[free] - scene["xipos"][free], axis=1)
    cosine = np.abs((data.xquat[free] * scene["xquat"][free]).sum(axis=1))
    return distance.max(), np.degrees(2 * np.arccos(np.minimum(cosine, 1))).max()


@pytest.mark.parametrize("task", TASKS)
def test_states_and_inertias_are_those_of_the_original(scenes: dict, task: str):
    scene, model = scenes[task], load(scenes[task])
    assert [model.body(index).name for index in range(model.nbody)] == scene["bodies"].tolist()
    for name in KEPT:
        np.testing.assert_allclose(getattr(model, name), scene[name], 1e-9, 1e-15, err_msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_objects_stay_at_rest_in_the_reduced_scene(scenes: dict, task: str):
    scene = scenes[task]
    distance, angle = deviation(scene, rest(load(scene), scene["start"], num_control_steps=100))
    assert distance < DISTANCE_M and angle < ANGLE_DEG


@pytest.mark.parametrize("task", TASKS)
def test_the_arm_follows_the_original_open_loop(scenes: dict, task: str):
    scene, model = scenes[task], load(scenes[task])
    end = replay(model, scene["start"], scene["controls"])
    np.testing.assert_allclose(end, scene["joints"], atol=1e-3)
    still = scene["start"][find_arm(model).qpos]
    assert np.abs(end - still).max() > 0.02  # the arm does move


def test_objects_stay_at_rest_in_mjx(scenes: dict):
    scene = scenes["libero_10:6"]
    model = load(scene)
    device_model, arm = mjx.put_model(model, impl="jax"), find_arm(model)

    def substep(data: mjx.Data, _: None) -> tuple[mjx.Data, None]:
        data = mjx.fwd_velocity(device_model, fwd_position(device_model, data))
        data = data.replace(ctrl=data.ctrl.at[arm.motors].set(data.qfrc_bias[arm.dofs]))
        data = mjx.fwd_acceleration(device_model, mjx.fwd_actuation(device_model, data))
        return mjx.euler(device_model, mjx.solve(device_model, data)), None

    @jax.jit
    def step(data: mjx.Data) -> tuple[mjx.Data, jax.Array]:
        data = jax.lax.scan(substep, data, length=25)[0]
        return data, contact_overflow(device_model, data)

    qpos, qvel = np.split(scene["start"].astype(np.float32), [model.nq])
    data = mjx.make_data(device_model).replace(qpos=jnp.asarray(qpos), qvel=jnp.asarray(qvel))
    overflows = []
    for _ in range(100):
        data, overflow = step(data)
        overflows.append(overflow)
    assert not np.any(overflows)
    end = mujoco.MjData(model)
    end.qpos[:] = data.qpos
    mujoco.mj_fwdPosition(model, end)
    distance, angle = deviation(scene, end)
    assert distance < DISTANCE_M and angle < ANGLE_DEG
