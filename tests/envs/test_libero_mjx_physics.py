"""libero_mjx on MJX against C MuJoCo: open loop, and whole control steps through the env."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from compiled_libero import MARKS, task_dir

from jaxvla.envs.broad_phase import fwd_position
from jaxvla.envs.libero_deviation import swing
from jaxvla.envs.libero_mjx import LiberoMjx, LiberoMjxConfig, load_tasks
from jaxvla.envs.osc import find_arm
from jaxvla.envs.quiet_mjx import mjx

pytestmark = MARKS

SUITE = "libero_spatial"
NUM_STEPS = 200
E = 4


def config(physics: str) -> LiberoMjxConfig:
    return LiberoMjxConfig(
        suite=SUITE,
        task_ids=(0, 1),
        image_size=64,
        physics=physics,
        task_dir=task_dir(SUITE, 0, 1),
    )


@pytest.fixture(scope="module")
def reduced() -> Any:
    return mujoco.MjModel.from_xml_string(load_tasks(config("mjx"))[0].physics_xml)


@pytest.fixture(scope="module")
def start() -> np.ndarray:
    return load_tasks(config("mjx"))[0].start_states[0]


def test_mjx_follows_mujoco_open_loop(reduced: Any, start: np.ndarray) -> None:
    controls, expected = swing(reduced, start, NUM_STEPS)
    model = mjx.put_model(reduced, impl="jax")

    def step(data: mjx.Data, control: jax.Array) -> tuple[mjx.Data, None]:
        data = mjx.fwd_velocity(model, fwd_position(model, data.replace(ctrl=control)))
        data = mjx.fwd_acceleration(model, mjx.fwd_actuation(model, data))
        return mjx.euler(model, mjx.solve(model, data)), None

    @jax.jit
    def run(qpos: jax.Array, qvel: jax.Array, controls: jax.Array) -> jax.Array:
        data = mjx.make_data(model).replace(qpos=qpos, qvel=qvel)
        return jax.lax.scan(step, data, controls)[0].qpos

    qpos, qvel = np.split(start.astype(np.float32), [reduced.nq])
    end = run(qpos, qvel, controls.astype(np.float32))
    arm = find_arm(reduced).qpos
    np.testing.assert_allclose(end[arm], expected, atol=1e-4)
    assert np.abs(expected - start[arm]).max() > 0.02  # the arm does move


def test_control_steps_of_both_physics_agree() -> None:
    """Random actions in both tasks; with the fixtures where each episode has them."""
    scenes = [LiberoMjx(config(physics)).scenes[0] for physics in ("mjx", "mujoco")]
    tasks, seeds = jnp.asarray([0, 1, 0, 1]), jnp.arange(E, dtype=jnp.uint32)
    worlds = [
        jax.vmap(scene.reset_to, (None, 0, 0))(jax.random.key(0), tasks, seeds) for scene in scenes
    ]
    steps = [jax.jit(jax.vmap(scene.step)) for scene in scenes]
    for key in jax.random.split(jax.random.key(1), 8):
        actions = jax.random.uniform(key, (E, 7), minval=-1.0)
        worlds = [step(state, actions) for step, state in zip(steps, worlds, strict=True)]
    ours, reference = worlds
    arm = find_arm(scenes[0].model)
    np.testing.assert_allclose(ours.qpos[:, arm.qpos], reference.qpos[:, arm.qpos], atol=1e-4)
    np.testing.assert_allclose(
        ours.controller.goal_rotation, reference.controller.goal_rotation, atol=1e-4
    )
    np.testing.assert_allclose(ours.controller.gripper, reference.controller.gripper, atol=1e-5)
    objects = np.flatnonzero(scenes[0].model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
    for address in scenes[0].model.jnt_qposadr[objects]:
        place = slice(address, address + 3)
        np.testing.assert_allclose(ours.qpos[:, place], reference.qpos[:, place], atol=1e-3)
    for name in ("num_steps", "success", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(reference, name))
    assert not np.any(ours.contact_overflow)
