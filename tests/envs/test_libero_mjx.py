"""The libero_mjx env: spec, scenes, starts, expert, targets; physics on host threads.

What its parts do is compared with LIBERO elsewhere (controller, predicates, images, resting
objects); MJX itself is stepped in test_libero_mjx_physics.py.
"""

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_libero import MARKS, task_dir

from jaxvla.config import ConfigError
from jaxvla.envs.base import FixedStartsEnv, GroundedEnv, SceneFamily, device_scenes
from jaxvla.envs.libero_host import LiberoHost
from jaxvla.envs.libero_mjx import LiberoMjx, LiberoMjxConfig, load_tasks
from jaxvla.envs.libero_worlds import LiberoScene

pytestmark = MARKS


@functools.cache
def family() -> LiberoMjx:
    return LiberoMjx(config())


def config(**changes: Any) -> LiberoMjxConfig:
    settings: dict[str, Any] = {
        "suite": "libero_spatial",
        "task_ids": (0, 1),
        "image_size": 64,
        "physics": "mujoco",
        "task_dir": task_dir("libero_spatial", 0, 1),
    }
    return LiberoMjxConfig(**settings | changes)


def scene() -> LiberoScene:
    (found,) = family().scenes
    assert isinstance(found, LiberoScene)
    return found


def test_it_is_what_it_says() -> None:
    assert isinstance(family(), SceneFamily) and device_scenes(family()) == family().scenes
    assert isinstance(scene(), GroundedEnv) and isinstance(scene(), FixedStartsEnv)


def test_the_spec_is_that_of_libero_host() -> None:
    host = LiberoHost(family().config.judge())
    assert host.spec == family().spec


def test_tasks_with_equal_models_share_a_scene() -> None:
    assert [one.task_ids for one in family().scenes] == [(0, 1)]


def test_tasks_of_a_scene_get_the_largest_contact_budget() -> None:
    tasks = load_tasks(config())
    for name in ("max_geom_pairs", "max_contact_points"):
        largest = max(getattr(task.contact_budget, name) for task in tasks)
        assert scene().model.numeric(name).data[0] == largest


@pytest.mark.parametrize("seed", [0, 7, 53])
def test_episode_k_starts_from_init_state_k(seed: int) -> None:
    for task_id, task in enumerate(load_tasks(config())):
        state = scene().reset_to(jax.random.key(1), jnp.int32(task_id), jnp.uint32(seed))
        k = seed % len(task.start_states)
        np.testing.assert_allclose(
            jnp.concatenate([state.qpos, state.qvel]), task.start_states[k], atol=1e-6
        )
        np.testing.assert_allclose(state.fixtures, task.fixture_poses[k], atol=1e-6)
        assert state.task == task_id


def test_random_episodes_are_init_states_of_their_task() -> None:
    task = load_tasks(config())[1]
    drawn = []
    for seed in range(20):
        state = scene().reset(jax.random.key(seed), jnp.int32(1))
        distance = np.abs(task.start_states[:, : len(state.qpos)] - np.asarray(state.qpos)).max(-1)
        assert distance.min() < 1e-6
        drawn.append(distance.argmin())
    assert len(set(drawn)) > 10


def test_shifts_move_objects_and_fixtures_together_and_not_the_arm() -> None:
    (shifted,) = LiberoMjx(config(max_shift_m=0.05)).scenes
    key, task, seed = jax.random.key(3), jnp.int32(0), jnp.uint32(4)
    still, moved = scene().reset_to(key, task, seed), shifted.reset_to(key, task, seed)
    shift = np.asarray(moved.fixtures[0, :2] - still.fixtures[0, :2])
    assert 0 < np.abs(shift).max() <= 0.05
    change = np.asarray(moved.qpos - still.qpos)
    model = scene().model
    for joint in range(model.njnt):
        first = model.jnt_qposadr[joint]
        expected = [*shift, 0.0] if model.jnt_type[joint] == 0 else [0.0]
        np.testing.assert_allclose(change[first : first + len(expected)], expected, atol=1e-6)
    other = shifted.reset_to(jax.random.key(4), task, seed)
    assert np.abs(np.asarray(other.fixtures - moved.fixtures)).max() > 1e-4


@functools.cache
def rollout() -> Any:
    """Two worlds of each task under the expert, at most 110 control steps; states after each."""
    env = scene()
    tasks, seeds = jnp.asarray([0, 1, 0, 1]), jnp.asarray([0, 0, 1, 1], jnp.uint32)
    start = jax.vmap(env.reset_to, (None, 0, 0))(jax.random.key(0), tasks, seeds)

    @jax.jit
    def run(states: Any) -> Any:
        def advance(states: Any, _: None) -> tuple[Any, Any]:
            stepped = jax.vmap(env.step)(states, jax.vmap(env.expert_action)(states))
            ended = states.terminated

            def choose(old: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.where(ended.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

            states = jax.tree.map(choose, states, stepped)
            return states, states

        return jax.lax.scan(advance, states, None, length=110)[1]

    return jax.device_get(run(start))


def test_the_expert_solves_both_tasks() -> None:
    states = rollout()
    np.testing.assert_array_equal(states.success[-1], True)
    np.testing.assert_array_equal(states.terminated[-1], True)
    assert (states.num_steps[-1] > 20).all()
    # Reward 1 comes with success alone.
    np.testing.assert_array_equal(states.reward, states.success)


def test_targets_are_the_bowl_that_moves() -> None:
    """Where the mask is, pixels change from the first to the last picture; elsewhere few do."""
    states = rollout()
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), states)
    seen, mask = scene().observe_target(first)
    last = scene().observe(jax.tree.map(lambda x: jnp.asarray(x[-1]), states))
    agentview = np.asarray(mask[:, 0])
    assert ((agentview.sum((1, 2)) > 8) & (agentview.mean((1, 2)) < 0.05)).all()
    change = np.abs(seen.images[:, 0].astype(int) - last.images[:, 0].astype(int)).max(-1) > 24
    for row in range(len(agentview)):
        inside, outside = change[row][agentview[row]], change[row][~agentview[row]]
        assert inside.mean() > 3 * outside.mean()


@pytest.mark.skipif(
    importlib.util.find_spec("warp") is None,
    reason="warp is not installed (pip install 'jaxvla[warp]')",
)
def test_warp_draws_the_same_images() -> None:
    (by_warp,) = device_scenes(LiberoMjx(config(renderer="warp")))
    assert isinstance(by_warp, LiberoScene)
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.vmap(scene().scene)(keys, jnp.asarray([0, 1, 0, 1]))
    expected, expected_mask = scene().observe_target(states)
    seen, mask = by_warp.observe_target(states)
    difference = np.abs(seen.images.astype(int) - expected.images.astype(int))
    assert difference.mean() < 0.1  # of 255
    assert (np.asarray(mask) != np.asarray(expected_mask)).mean() < 1e-4
    assert mask[:, 0].any((1, 2)).all()  # the wrist camera need not see it


def test_time_limits_are_the_suites_unless_given() -> None:
    assert family().spec.max_episode_steps == (220, 220)
    assert LiberoMjx(config(max_episode_steps=50)).spec.max_episode_steps == (50, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "multiple of 16"),
        ({"physics": "bullet"}, "one of mjx, warp, mujoco"),
        ({"renderer": "opengl"}, "one of jax, warp"),
        ({"max_shift_m": 0.5}, r"\[0, 0.1\]"),
        ({"max_episode_steps": 0}, "positive"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes).validate()


def test_a_missing_task_file_names_the_command(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="--job=compile_tasks") as caught:
        load_tasks(config(task_dir=str(tmp_path)))
    assert "task_ids" in str(caught.value)
    with pytest.raises(ConfigError, match="no task file"):
        load_tasks(dataclasses.replace(config(task_dir=str(tmp_path)), task_ids=()))
