"""LIBERO in worker processes, compared with LIBERO's own env class.

Simulations are built in other processes: the choice of an OpenGL backend lasts as long as a
process. One probe process serves most tests here.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libero_marks import needs_libero
from scipy.spatial.transform import Rotation

from jaxvla.config import ConfigError
from jaxvla.envs import libero_host
from jaxvla.envs.host_pool import HostResult
from jaxvla.envs.libero_host import (
    NO_OP,
    LiberoHost,
    LiberoHostConfig,
    axis_angle,
    state_vector,
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What tests/envs/libero_probe.py saw."""
    host = LiberoHost(LiberoHostConfig(task_ids=(0, 9), image_size=64))
    spec = host.worker_spec()
    output = tmp_path_factory.mktemp("libero") / "seen.npz"
    probe = pathlib.Path(__file__).with_name("libero_probe.py")
    process = subprocess.run(
        [sys.executable, str(probe), json.dumps(spec.config), str(output)],
        env={**os.environ, **spec.environment},
        cwd=output.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout
    with np.load(output) as arrays:
        return dict(arrays)


# --- the state vector ---------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_axis_angle_is_the_rotation_of_the_quaternion(values: list[float]):
    quaternion = np.array(values) / np.linalg.norm(values)
    vector = axis_angle(quaternion)
    reference = Rotation.from_quat(quaternion)  # (x, y, z, w) as well
    error = (Rotation.from_rotvec(vector) * reference.inv()).magnitude()
    assert error < 1e-9
    if quaternion[3] > 0:
        np.testing.assert_allclose(vector, reference.as_rotvec(), atol=1e-9)
    assert np.linalg.norm(vector) <= 2 * np.pi + 1e-9


def test_axis_angle_does_not_jump_when_the_hand_points_down():
    tilts = np.linspace(-0.02, 0.02, 9)  # w passes through 0
    vectors = np.array([axis_angle(np.array([np.cos(t), 0, 0, np.sin(t)])) for t in tilts])
    np.testing.assert_allclose(vectors[:, 0], np.pi - 2 * tilts, atol=1e-12)
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, 1])), np.zeros(3))
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, -1])), np.zeros(3))


def test_state_vector_order():
    half = np.sqrt(0.5)
    raw = {
        "robot0_gripper_qpos": np.array([0.04, -0.03]),
        "robot0_eef_quat": np.array([0, half, 0, half]),
        "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
    }
    state = state_vector(raw)
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, 0, np.pi / 2, 0, 0.04, -0.03], rtol=1e-6)


# --- description and settings -------------------------------------------------------------


@needs_libero
@pytest.mark.libero
def test_spec_of_a_whole_suite(capfd: pytest.CaptureFixture[str]):
    spec = LiberoHost(LiberoHostConfig(suite="libero_goal")).spec
    assert (spec.cameras, spec.image_size) == (("agentview", "wrist"), 128)
    assert (spec.state_dim, spec.action_dim, spec.control_hz) == (8, 7, 20.0)
    assert len(spec.action_names) == 7
    assert len(spec.state_low) == len(spec.state_high) == 8
    assert np.less(spec.state_low, spec.state_high).all()
    assert len(spec.tasks) == len(spec.instructions) == 10
    assert spec.tasks[0] == "open_the_middle_drawer_of_the_cabinet"
    assert spec.instructions[0] == "open the middle drawer of the cabinet"
    assert spec.max_episode_steps == (300,) * 10
    assert capfd.readouterr() == ("", "")  # the package talks


@needs_libero
@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "limit"),
    [
        ("libero_spatial", 220),
        ("libero_object", 280),
        ("libero_10", 520),
        ("libero_90", 400),
        ("libero_10_swap", 520),
    ],
)
def test_time_limit_of_the_suite(suite: str, limit: int):
    config = LiberoHostConfig(suite=suite, task_ids=(1, 0))
    assert LiberoHost(config).spec.max_episode_steps == (limit, limit)
    config.max_episode_steps = 17
    assert LiberoHost(config).spec.max_episode_steps == (17, 17)


@needs_libero
@pytest.mark.libero
def test_task_ids_pick_and_order_the_tasks():
    everything = LiberoHost(LiberoHostConfig()).spec
    chosen = LiberoHost(LiberoHostConfig(task_ids=(7, 2))).spec
    assert chosen.tasks == (everything.tasks[7], everything.tasks[2])
    assert chosen.instructions == (everything.instructions[7], everything.instructions[2])


@needs_libero
@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "instruction"),
    [
        ("libero_goal", "put the wine bottle on the rack"),
        ("libero_goal_swap", "put the wine bottle on the rack"),
        ("libero_goal_lan", "place the wine bottle on the rack"),
        ("libero_goal_task", "put the cream cheese on the rack"),
    ],
)
def test_reworded_suites_give_their_own_sentence(suite: str, instruction: str):
    spec = LiberoHost(LiberoHostConfig(suite=suite)).spec
    index = spec.tasks.index("put_the_wine_bottle_on_the_rack")
    assert spec.instructions[index] == instruction


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 63),
        ("image_size", 257),
        ("num_settle_steps", -1),
        ("max_episode_steps", 0),
        ("gl", "glfw"),
        ("reset_timeout_s", 0.0),
        ("step_timeout_s", -1.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any):
    config = LiberoHostConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"config\.env\.{name} = "):
        config.validate()
    with pytest.raises(ConfigError, match=rf"config\.env\.{name} = "):
        LiberoHost(config)


@needs_libero
@pytest.mark.libero
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "libero_spacial"}, "did you mean 'libero_spatial'"),
        ({"suite": "robocasa"}, "libero_90"),
        ({"suite": "libero_mine"}, "config.env.max_episode_steps"),
        ({"task_ids": (0, 10)}, "has 10 tasks"),
        ({"task_ids": (-1,)}, "has 10 tasks"),
    ],
)
def test_unknown_tasks_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        LiberoHost(LiberoHostConfig(**settings))


def test_missing_installations_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    monkeypatch.setattr(libero_host.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ValueError, match=r"apt-get install libosmesa6$"):
        LiberoHost(LiberoHostConfig())
    with pytest.raises(ValueError, match=r"apt-get install libegl1 libgl1$"):
        LiberoHost(LiberoHostConfig(gl="egl"))
    monkeypatch.setattr(libero_host.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(libero_host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxvla\[libero\]'"):
        LiberoHost(LiberoHostConfig())
    # The original package without its config file would ask on stdin.
    monkeypatch.setattr(
        libero_host.importlib.util, "find_spec", lambda name: None if "pro" in name else name
    )
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="LIBERO_CONFIG_PATH"):
        LiberoHost(LiberoHostConfig())


def test_importing_the_module_loads_no_simulator_and_no_jax():
    code = (
        "import sys, jaxvla.envs.libero_host; "
        "assert not {'jax', 'libero', 'robosuite', 'mujoco'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the simulation -----------------------------------------------------------------------


@needs_libero
@pytest.mark.libero
@pytest.mark.slow
def test_physics_is_that_of_a_freshly_built_stock_env(seen: dict[str, np.ndarray]):
    """Resets that keep the model, and steps without camera observables, change nothing."""
    np.testing.assert_array_equal(seen["first_sim"], seen["stock_sim"])
    np.testing.assert_array_equal(seen["first_next_sim"], seen["stock_next_sim"])


@needs_libero
@pytest.mark.libero
def test_images_are_the_stock_ones_turned_by_180_degrees(seen: dict[str, np.ndarray]):
    images = seen["first_images"]
    assert (images.dtype, images.shape) == (np.uint8, (2, 64, 64, 3))
    for image, name in zip(images, ("agentview", "robot0_eye_in_hand"), strict=True):
        np.testing.assert_array_equal(image, np.rot90(seen[f"stock_{name}_image"], 2))
        assert image.std() > 20  # a scene, not a flat colour


@needs_libero
@pytest.mark.libero
def test_state_is_the_stock_one(seen: dict[str, np.ndarray]):
    state = seen["first_state"]
    np.testing.assert_array_equal(state[:3], seen["stock_eef_pos"].astype(np.float32))
    np.testing.assert_array_equal(state[6:], seen["stock_gripper_qpos"].astype(np.float32))
    error = Rotation.from_rotvec(state[3:6]) * Rotation.from_quat(seen["stock_eef_quat"]).inv()
    assert error.magnitude() < 1e-6
    # Observables of a stock step are 4 ms older; the hand makes at most 0.6 m/s.
    np.testing.assert_allclose(state[:3], seen["stock_position"], atol=0.0025)
    np.testing.assert_allclose(
        seen["first_next_state"][:3], seen["stock_next_position"], atol=0.0025
    )


@needs_libero
@pytest.mark.libero
def test_reset_is_a_function_of_task_and_seed(seen: dict[str, np.ndarray]):
    """In between, another episode ran and left the gripper closed."""
    assert np.abs(seen["closed_fingers"] - seen["first_state"][6:]).max() > 0.01
    for name in ("images", "state", "sim", "outcome", "next_state", "next_sim"):
        np.testing.assert_array_equal(seen[f"first_{name}"], seen[f"again_{name}"], name)
    assert seen["first_model"] == seen["again_model"]  # not compiled again


@needs_libero
@pytest.mark.libero
def test_chunk_reports_and_renders_one_frame(seen: dict[str, np.ndarray]):
    np.testing.assert_array_equal(seen["first_outcome"], [0, 0, 4])
    assert seen["first_num_renders"] == 2  # both cameras once, whatever the number of steps
    assert np.abs(seen["first_next_state"] - seen["first_state"]).max() > 0.005


@needs_libero
@pytest.mark.libero
def test_seed_picks_the_init_state_and_places_the_fixtures(seen: dict[str, np.ndarray]):
    from libero.libero import benchmark

    expected = benchmark.get_benchmark_dict()["libero_spatial"]().get_task_init_states(0)[3]
    for seed in (3, 53):  # 50 init states
        np.testing.assert_array_equal(seen[f"restored_{seed}"], expected)
    moved = np.abs(seen["fixtures_3"] - seen["fixtures_53"]).max()
    assert 1e-4 < moved < 0.05


@needs_libero
@pytest.mark.libero
def test_controller_knows_the_restored_pose(seen: dict[str, np.ndarray]):
    np.testing.assert_allclose(seen["goal_position"], seen["hand_position"], atol=1e-9)


@needs_libero
@pytest.mark.libero
def test_success_stops_the_chunk(seen: dict[str, np.ndarray]):
    reward, success, num_steps = seen["success"]
    assert (reward, success) == (1, 1)
    assert 1 <= num_steps < 8
    assert not seen["success_has_frame"]


@needs_libero
@pytest.mark.libero
def test_divergence_is_an_error(seen: dict[str, np.ndarray]):
    assert "diverged" in str(seen["divergence"])


@needs_libero
@pytest.mark.libero
def test_another_task_is_another_scene(seen: dict[str, np.ndarray]):
    assert seen["other_images"].shape == seen["first_images"].shape
    assert (seen["other_images"] != seen["first_images"]).mean() > 0.05


@needs_libero
@pytest.mark.libero
def test_pool_of_workers(tmp_path: pathlib.Path):
    host = LiberoHost(LiberoHostConfig(suite="libero_10", task_ids=(2,), image_size=64))
    pool = host.make_pool(1, tmp_path)
    try:
        pool.submit_reset(0, task=0, seed=0)
        assert pool.collect(0) == HostResult()
        assert pool.images.shape == (1, 2, 64, 64, 3)
        assert pool.images.std() > 20
        before = pool.state[0].copy()
        pool.submit_step_chunk(0, np.tile(NO_OP, (3, 1)))
        assert pool.collect(0) == HostResult(num_steps=3)
        np.testing.assert_allclose(pool.state[0], before, atol=1e-3)  # the arm stays
        low, high = host.spec.state_low, host.spec.state_high
        assert (np.greater(before, low) & np.less(before, high)).all()
    finally:
        pool.close()
