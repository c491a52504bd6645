"""What every registered env promises, whatever it simulates."""

import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import compiled_libero
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from libero_marks import needs_libero

from jaxvla.config import EnvConfig
from jaxvla.envs import ENVS
from jaxvla.envs.base import DeviceEnv, EnvState, GroundedEnv, device_scenes
from jaxvla.simulation.unroll import TokenTable, Worlds, run_chunk, start_worlds
from jaxvla.types import ChunkResult, EnvSpec

E = 4
NUM_STEPS = 2
"""Control steps per chunk."""

MARKS = {
    "libero_host": [pytest.mark.libero, needs_libero],
    "libero_mjx": compiled_libero.MARKS,
}
"""Env -> marks of its tests; an env without an entry runs wherever the tests do."""


def settings(name: str) -> dict[str, Any]:
    """What an env cannot do with by default; the rest of its config is."""
    if name != "libero_mjx":
        return {}
    return {
        "task_ids": (0, 1),
        "task_dir": compiled_libero.task_dir("libero_spatial", 0, 1),
        "image_size": 64,
        "physics": "mujoco",
    }


def make_env(name: str) -> Any:
    """The env with nearly default settings, which its constructor's annotation names."""
    env_class = ENVS.get(name)
    config_class = typing.get_type_hints(env_class.__init__)["config"]
    assert issubclass(config_class, EnvConfig)
    config = config_class(**settings(name))
    assert config.name == name
    config.validate()
    return env_class(config)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in ENVS]
)
def env(request: pytest.FixtureRequest) -> Any:
    """Every registered env."""
    return make_env(request.param)


def test_spec_is_consistent(env: Any) -> None:
    spec: EnvSpec = env.spec
    assert len(spec.state_low) == len(spec.state_high) == spec.state_dim
    assert (np.asarray(spec.state_low) < np.asarray(spec.state_high)).all()
    assert len(spec.action_names) == spec.action_dim
    assert len(spec.max_episode_steps) == len(spec.tasks)
    assert min(spec.max_episode_steps) >= 1
    assert spec.image_size >= 1 and spec.control_hz > 0.0
    for names in (spec.cameras, spec.action_names, spec.tasks):
        assert names and len(set(names)) == len(names)
    assert len(spec.instructions) >= len(spec.tasks)
    assert all(sentence.strip() for sentence in spec.instructions)


def test_env_is_of_one_of_two_kinds(env: Any) -> None:
    scenes = device_scenes(env)
    if scenes:
        played = [task for scene in scenes for task in scene.task_ids]
        assert sorted(played) == list(range(len(env.spec.tasks)))
        assert all(scene.spec == env.spec and scene.config == env.config for scene in scenes)
        return
    assert callable(env.make_pool)
    worker, spec = env.worker_spec(), env.spec
    size = spec.image_size
    assert tuple(worker.image_shape) == (len(spec.cameras), size, size, 3)
    assert (worker.state_dim, worker.action_dim) == (spec.state_dim, spec.action_dim)


# --- device envs --------------------------------------------------------------------------


# Compiles faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A device env and its functions over E worlds."""

    env: DeviceEnv
    start: Callable[[jax.Array, jax.Array], Worlds]
    chunk: Callable[[Worlds, Any, jax.Array], tuple[Worlds, ChunkResult, EnvState]]

    def worlds(self, seed: int = 0) -> Worlds:
        """Fresh episodes, of all tasks in turn."""
        tasks = jnp.asarray(self.env.task_ids, jnp.int32)[np.arange(E) % len(self.env.task_ids)]
        return self.start(jax.random.split(jax.random.key(seed), E), tasks)

    def actions(self, seed: int = 0) -> np.ndarray:
        """Random bits, float32 [E, NUM_STEPS, A] at the ends of the range."""
        shape = (E, NUM_STEPS, self.env.spec.action_dim)
        return np.random.default_rng(seed).choice([-1.0, 1.0], shape).astype(np.float32)

    def run(self, worlds: Worlds, seed: int = 0) -> tuple[Worlds, ChunkResult]:
        """One chunk of `actions(seed)`."""
        keys = jax.random.split(jax.random.key(100 + seed), E)
        after, result, _ = self.chunk(worlds, self.actions(seed), keys)
        return after, result


@pytest.fixture(scope="module")
def compiled(env: Any) -> Compiled:
    """A device env, or a scene of one, compiled; host envs are tested with their processes
    elsewhere."""
    if not device_scenes(env):
        pytest.skip("not a device env")
    env = device_scenes(env)[0]
    num = len(env.spec.instructions)
    table = TokenTable(
        tokens=np.arange(num, dtype=np.int32)[:, None], mask=np.ones((num, 1), bool)
    ).on_device()
    return Compiled(
        env=env,
        start=quick_jit(lambda keys, tasks: start_worlds(env, keys, tasks)),
        chunk=quick_jit(lambda worlds, actions, keys: run_chunk(env, table, worlds, actions, keys)),
    )


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Any, expected: Any) -> None:
    """Equal but for rounding, which pictures show as a step of brightness or an edge pixel."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        if a.dtype == jnp.uint8:
            assert (np.abs(np.asarray(a, int) - np.asarray(b, int)) > 2).mean() < 1e-3
        else:
            np.testing.assert_allclose(a, b, atol=1e-5)

    jax.tree.map(compare, actual, expected)


def test_episodes_start_with_cleared_flags(compiled: Compiled) -> None:
    worlds = compiled.worlds()
    state = worlds.env
    ids = np.asarray(compiled.env.task_ids)
    np.testing.assert_array_equal(state.task, ids[np.arange(E) % len(ids)])
    for name, dtype in (
        ("num_steps", jnp.int32),
        ("reward", jnp.float32),
        ("terminated", bool),
        ("truncated", bool),
        ("success", bool),
        ("contact_overflow", jnp.int32),
    ):
        leaf = getattr(state, name)
        assert leaf.shape == (E,) and leaf.dtype == dtype, name
        assert not np.any(leaf), name
    assert np.asarray(jax.vmap(compiled.env.is_finite)(state)).all()


def test_step_keeps_shapes_and_dtypes(compiled: Compiled) -> None:
    # Else a scan over control steps does not trace, or a step compiles twice.
    env = compiled.env
    task = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(env.reset, jax.random.key(0), task)
    action = jax.ShapeDtypeStruct((env.spec.action_dim,), jnp.float32)
    stepped = jax.eval_shape(env.step, state, action)
    assert jax.tree.structure(stepped) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(stepped), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert not getattr(before, "weak_type", False)


def test_observation_is_what_the_spec_says(compiled: Compiled) -> None:
    spec = compiled.env.spec
    states = compiled.worlds().env
    seen = jax.eval_shape(compiled.env.observe, states)
    size = spec.image_size
    assert seen.images.shape == (E, len(spec.cameras), size, size, 3)
    assert seen.state.shape == (E, spec.state_dim)
    assert seen.instruction.shape == (E,)
    dtypes = (seen.images.dtype, seen.state.dtype, seen.instruction.dtype)
    assert dtypes == (jnp.uint8, jnp.float32, jnp.int32)
    if isinstance(compiled.env, GroundedEnv):
        mask = jax.eval_shape(compiled.env.observe_target, states)[1]
        assert mask.shape == seen.images.shape[:-1] and mask.dtype == bool


def test_instruction_ids_are_in_range(compiled: Compiled) -> None:
    env = compiled.env
    for seed in range(5):
        ids = np.asarray(env.instruction_ids(compiled.worlds(seed).env))
        assert ids.dtype == np.int32
        assert ((ids >= 0) & (ids < len(env.spec.instructions))).all()


def test_states_lie_within_the_bounds_at_the_start(compiled: Compiled) -> None:
    _, result = compiled.run(compiled.worlds())
    spec, state = compiled.env.spec, np.asarray(result.observation.state)
    # What normalisation is scaled for; a moving robot may exceed it a little.
    span = np.asarray(spec.state_high) - np.asarray(spec.state_low)
    assert (state >= np.asarray(spec.state_low) - 0.1 * span).all()
    assert (state <= np.asarray(spec.state_high) + 0.1 * span).all()


def test_an_episode_is_a_function_of_key_and_task(compiled: Compiled) -> None:
    assert_equal(compiled.worlds(), compiled.worlds())
    first, other = jax.tree.leaves(compiled.worlds()), jax.tree.leaves(compiled.worlds(1))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(first, other, strict=True))


def test_a_chunk_is_a_function_of_its_inputs(compiled: Compiled) -> None:
    assert_equal(compiled.run(compiled.worlds()), compiled.run(compiled.worlds()))


def test_chunk_counts_its_steps(compiled: Compiled) -> None:
    after, result = compiled.run(compiled.worlds())
    ended = np.asarray(result.terminated | result.truncated)
    assert not np.any(result.invalid)
    np.testing.assert_array_equal(np.asarray(result.num_steps)[~ended], NUM_STEPS)
    np.testing.assert_array_equal(after.env.num_steps, np.where(ended, 0, result.num_steps))
    assert np.isfinite(result.reward).all()


def test_actions_are_clipped_to_the_unit_range(compiled: Compiled) -> None:
    keys = jax.random.split(jax.random.key(5), E)
    expected = compiled.chunk(compiled.worlds(), compiled.actions(), keys)
    actual = compiled.chunk(compiled.worlds(), 2.5 * compiled.actions(), keys)
    assert_equal(actual, expected)


def test_worlds_do_not_influence_each_other(compiled: Compiled) -> None:
    order = np.array([2, 0, 3, 1])
    worlds, actions = compiled.worlds(), compiled.actions()
    keys = jax.random.split(jax.random.key(5), E)
    expected = compiled.chunk(worlds, actions, keys)
    shuffled = jax.tree.map(lambda x: x[order], worlds)
    actual = compiled.chunk(shuffled, actions[order], keys[order])
    assert_close(actual, jax.tree.map(lambda x: x[order], expected))


def test_time_limit_truncates_and_the_next_episode_starts_afresh(compiled: Compiled) -> None:
    worlds = compiled.worlds()
    limits = jnp.asarray(compiled.env.spec.max_episode_steps, jnp.int32)[worlds.env.task]
    # All but the last world take the last step before their limit.
    num_steps = jnp.where(jnp.arange(E) < E - 1, limits - 1, 0)
    late = worlds.replace(env=worlds.env.replace(num_steps=num_steps))
    after, result = compiled.run(late)
    ended = np.asarray(result.terminated) | np.asarray(result.truncated)
    np.testing.assert_array_equal(ended[:-1], True)
    assert not np.any(np.asarray(result.terminated) & np.asarray(result.truncated))
    assert not np.any(np.asarray(result.success) & np.asarray(result.truncated))
    np.testing.assert_array_equal(np.asarray(result.num_steps)[:-1], 1)
    np.testing.assert_array_equal(np.asarray(after.env.num_steps)[:-1], 0)
    np.testing.assert_array_equal(np.asarray(after.episode_return)[:-1], 0.0)
    assert not np.any(after.env.truncated) and not np.any(after.env.terminated)
    truncated = np.asarray(result.truncated)
    final, seen = result.final_observation, result.observation
    assert truncated.any()
    assert (np.asarray(final.images) != np.asarray(seen.images))[truncated].any()


def test_exploded_worlds_are_restarted_and_touch_no_other(compiled: Compiled) -> None:
    worlds = compiled.worlds()

    def poison(leaf: jax.Array) -> jax.Array:
        return leaf.at[1].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    after, result = compiled.run(worlds.replace(env=jax.tree.map(poison, worlds.env)))
    np.testing.assert_array_equal(result.invalid, np.arange(E) == 1)
    assert not (result.terminated[1] or result.truncated[1] or result.success[1])
    assert result.reward[1] == 0.0 and after.env.num_steps[1] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, result.observation)))
    healthy = np.arange(E) != 1
    expected = jax.tree.map(lambda x: x[healthy], compiled.run(worlds))
    assert_close(jax.tree.map(lambda x: x[healthy], (after, result)), expected)


def test_expert_acts_within_the_range(compiled: Compiled) -> None:
    env = compiled.env
    actions = quick_jit(jax.vmap(env.expert_action))(compiled.worlds().env)
    assert actions.shape == (E, env.spec.action_dim) and actions.dtype == jnp.float32
    assert np.abs(actions).max() <= 1.0
