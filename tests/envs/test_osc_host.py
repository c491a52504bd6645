"""The host's control steps against the float64 reference, and inside jitted functions."""

import dataclasses

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from small_arm import REST, ReferenceArm, arm_xml, start_worlds

from jaxvla.envs import osc
from jaxvla.envs.osc_host import HostPhysics, StepInput, StepOutcome

MODEL = mujoco.MjModel.from_xml_string(arm_xml())
ARM = osc.find_arm(MODEL, rest_rad=tuple(REST))
LINK = np.array([MODEL.body("link1").id])
E = 5


def start(seed: int = 0) -> StepInput:
    return start_worlds(MODEL, E, np.random.default_rng(seed))


def actions(count: int, seed: int = 1) -> np.ndarray:
    """[count, E, 7]; some without a turn, which keeps the goal rotation."""
    random = np.random.default_rng(seed)
    drawn = random.uniform(-1.2, 1.2, (count, E, 7))
    drawn[random.random((count, E)) < 0.3, 3:6] = 0.0
    return drawn


def standing(heights: np.ndarray | None = None) -> np.ndarray:
    """Poses [E, 1, 7] of the arms' first links."""
    pose = np.concatenate([MODEL.body_pos[LINK], MODEL.body_quat[LINK]], -1)
    poses = np.tile(pose, (E, 1, 1))
    if heights is not None:
        poses[:, 0, 2] += heights
    return poses


def onward(outcome: StepOutcome) -> StepInput:
    names = [field.name for field in dataclasses.fields(StepInput)]
    return StepInput(**{name: getattr(outcome, name) for name in names})


def test_batches_follow_the_reference_world_by_world() -> None:
    physics, worlds = HostPhysics(MODEL, ARM, LINK), start()
    references = [ReferenceArm(MODEL, REST) for _ in range(E)]
    for reference, qpos in zip(references, np.asarray(worlds.qpos), strict=True):
        reference.load(qpos, np.zeros(MODEL.nv))
    for action in actions(6):
        outcome = physics.control_steps(worlds, standing(), action)
        for reference, row in zip(references, action, strict=True):
            reference.step(row)
        worlds = onward(outcome)
        # States are handed on in float32.
        expected = np.stack([reference.data.qpos for reference in references])
        np.testing.assert_allclose(outcome.qpos, expected, atol=2e-5)
        goals = np.stack([reference.goal_position for reference in references])
        np.testing.assert_allclose(outcome.goal_position, goals, atol=2e-5)
        turned = np.stack([reference.goal_rotation for reference in references])
        np.testing.assert_allclose(outcome.goal_rotation, turned, atol=5e-5)
        grips = np.stack([reference.gripper for reference in references])
        np.testing.assert_allclose(outcome.gripper, grips, atol=1e-6)


def test_positions_in_the_result_are_one_physics_step_old() -> None:
    outcome = HostPhysics(MODEL, ARM, LINK).control_steps(start(), standing(), actions(1)[0])
    data = mujoco.MjData(MODEL)
    hand = MODEL.body("link7").id
    for row in range(E):
        data.qpos[:] = outcome.qpos[row]
        mujoco.mj_kinematics(MODEL, data)
        distance = np.linalg.norm(data.xpos[hand] - outcome.xpos[row, hand])
        speed = np.abs(outcome.qvel[row, ARM.dofs]).max()
        assert 0.0 < distance < 0.002 * 2.0 * speed * 7


def test_every_world_has_its_own_fixtures() -> None:
    heights = np.linspace(0.0, 0.4, E)
    worlds = start()
    same = HostPhysics(MODEL, ARM, LINK).control_steps(worlds, standing(), np.zeros((E, 7)))
    moved = HostPhysics(MODEL, ARM, LINK).control_steps(worlds, standing(heights), np.zeros((E, 7)))
    link = MODEL.body("link7").id
    rise = moved.xpos[:, link, 2] - same.xpos[:, link, 2]
    np.testing.assert_allclose(rise, heights, atol=1e-5)
    np.testing.assert_allclose(moved.qpos, same.qpos, atol=1e-5)


def test_a_diverged_world_is_not_finite_and_the_next_one_in_its_place_is() -> None:
    physics, worlds, action = HostPhysics(MODEL, ARM, LINK), start(), actions(1)[0]
    expected = physics.control_steps(worlds, standing(), action)
    qvel = np.array(worlds.qvel)
    qvel[2, 0] = 1e12  # finite, but the next state is not
    fast = physics.control_steps(worlds.replace(qvel=qvel), standing(), action)
    np.testing.assert_array_equal(np.isnan(fast.qpos).all(-1), np.arange(E) == 2)
    qpos = np.array(worlds.qpos)
    qpos[2] = np.nan
    bad = physics.control_steps(worlds.replace(qpos=qpos), standing(), action)
    is_bad = np.arange(E) == 2
    np.testing.assert_array_equal(np.isnan(bad.qpos).all(-1), is_bad)
    np.testing.assert_array_equal(bad.qpos[~is_bad], expected.qpos[~is_bad])
    poses = standing()
    poses[2] = np.nan
    lost = physics.control_steps(worlds, poses, action)
    np.testing.assert_array_equal(np.isnan(lost.qpos).all(-1), is_bad)
    again = physics.control_steps(worlds, standing(), action)
    np.testing.assert_allclose(again.qpos, expected.qpos, atol=1e-6)


@pytest.mark.parametrize("num_worlds", [1, E])
def test_results_do_not_depend_on_the_batch(num_worlds: int) -> None:
    worlds, action = start(), actions(1)[0]
    whole = HostPhysics(MODEL, ARM, LINK).control_steps(worlds, standing(), action)
    part = HostPhysics(MODEL, ARM, LINK).control_steps(
        jax.tree.map(lambda x: x[:num_worlds], worlds),
        standing()[:num_worlds],
        action[:num_worlds],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:num_worlds], b, atol=1e-6), whole, part)


def test_jitted_and_mapped_steps_are_the_same() -> None:
    physics, worlds, action = HostPhysics(MODEL, ARM, LINK), start(), actions(2)
    expected = physics.control_steps(worlds, standing(), action[0])
    expected = physics.control_steps(onward(expected), standing(), action[1])

    @jax.jit
    def run(worlds: StepInput, poses: jax.Array, actions: jax.Array) -> StepOutcome:
        step = jax.vmap(physics.control_step)
        return step(onward(step(worlds, poses, actions[0])), poses, actions[1])

    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (worlds, standing(), action))
    actual = run(*arguments)
    np.testing.assert_allclose(actual.qpos, expected.qpos, atol=1e-5)
    np.testing.assert_allclose(actual.geom_xpos, expected.geom_xpos, atol=1e-5)
    alone = jax.jit(physics.control_step)(
        *jax.tree.map(lambda x: x[0], arguments[:2]), action[0, 0]
    )
    first = physics.control_steps(worlds, standing(), action[0])
    np.testing.assert_allclose(alone.qpos, first.qpos[0], atol=1e-5)


def test_scenes_may_have_no_fixtures() -> None:
    worlds, action = start(), actions(1)[0]
    expected = HostPhysics(MODEL, ARM, LINK).control_steps(worlds, standing(), action)
    physics = HostPhysics(MODEL, ARM, np.zeros(0, int))
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (worlds, action))
    poses = jnp.zeros((E, 0, 7))
    actual = jax.jit(jax.vmap(physics.control_step))(arguments[0], poses, arguments[1])
    np.testing.assert_allclose(actual.qpos, expected.qpos, atol=1e-5)
