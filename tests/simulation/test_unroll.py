"""Action chunks in a batch of worlds: what is executed, what is counted, who starts afresh."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.envs.base import DeviceEnv, EnvState
from jaxvla.simulation.unroll import (
    TokenTable,
    Worlds,
    draw_worlds,
    run_chunk,
    start_episodes,
    start_worlds,
)
from jaxvla.types import ChunkResult

ENV = CounterEnv()
TABLE = TokenTable(
    tokens=np.array([[5, 6, 0], [7, 8, 9]], np.int32),
    mask=np.array([[True, True, False], [True, True, True]]),
)
SHORT, LONG = 0, 1
Events = Sequence[tuple[float, float]]
"""(event, reward) per control step."""

run = jax.jit(functools.partial(run_chunk, ENV, TABLE.on_device()))


def start(*tasks: int) -> Worlds:
    keys = jax.random.split(jax.random.key(0), len(tasks))
    return start_worlds(ENV, keys, jnp.asarray(tasks, jnp.int32))


def chunk(worlds: Worlds, *events: Events, seed: int = 1) -> tuple[Worlds, ChunkResult, EnvState]:
    keys = jax.random.split(jax.random.key(seed), len(events))
    return run(worlds, jnp.asarray(events, jnp.float32), keys)


def identities(worlds: Worlds) -> np.ndarray:
    return np.asarray(worlds.env.identity)


def test_counter_env_is_a_device_env() -> None:
    assert isinstance(ENV, DeviceEnv)


def test_a_chunk_inside_an_episode_is_run_whole() -> None:
    before = start(LONG, LONG)
    after, result, _ = chunk(before, [(WALK, 1), (WALK, 2)], [(WALK, 0), (WALK, -1)])
    np.testing.assert_array_equal(result.num_steps, 2)
    np.testing.assert_array_equal(result.reward, [3, -1])
    np.testing.assert_array_equal(result.episode_steps, 2)
    np.testing.assert_array_equal(identities(after), identities(before))
    np.testing.assert_array_equal(after.env.num_steps, 2)
    for name in ("terminated", "truncated", "success", "invalid"):
        assert not np.any(getattr(result, name)), name


@pytest.mark.parametrize(("event", "success"), [(SUCCEED, True), (FAIL, False)])
def test_nothing_counts_after_termination(event: float, success: bool) -> None:
    before = start(LONG, LONG)
    end_early = [(WALK, 1), (event, 10), (EXPLODE, 100), (SUCCEED, 1000)]
    after, result, _ = chunk(before, end_early, [(WALK, 1)] * 4)
    np.testing.assert_array_equal(result.num_steps, [2, 4])
    np.testing.assert_array_equal(result.reward, [11, 4])
    np.testing.assert_array_equal(result.terminated, [True, False])
    np.testing.assert_array_equal(result.success, [success, False])
    assert not np.any(result.truncated) and not np.any(result.invalid)
    # The next episode starts afresh in the first world, the second one goes on.
    np.testing.assert_array_equal(after.env.num_steps, [0, 4])
    np.testing.assert_array_equal(after.episode_return, [0, 4])
    assert identities(after)[0] != identities(before)[0]
    assert identities(after)[1] == identities(before)[1]
    assert not np.any(after.env.terminated) and not np.any(after.env.success)


def test_time_limit_truncates_and_shows_the_end() -> None:
    before = start(SHORT, LONG)
    after, result, _ = chunk(before, [(WALK, 1)] * 4, [(WALK, 1)] * 4)
    np.testing.assert_array_equal(result.truncated, [True, False])
    assert not np.any(result.terminated)
    np.testing.assert_array_equal(result.num_steps, [3, 4])
    np.testing.assert_array_equal(result.reward, [3, 4])
    # Before the restart: the old episode's end. After it: the new episode's beginning.
    final = result.final_observation
    np.testing.assert_array_equal(final.images[0], 3)
    np.testing.assert_array_equal(final.state[0], [identities(before)[0], 3])
    np.testing.assert_array_equal(final.tokens[0], TABLE.tokens[SHORT])
    np.testing.assert_array_equal(result.observation.images[0], 0)
    np.testing.assert_array_equal(result.observation.state[0], [identities(after)[0], 0])
    np.testing.assert_array_equal(result.task, [SHORT, LONG])


def test_the_end_is_not_shown_to_nobody() -> None:
    quiet = jax.jit(functools.partial(run_chunk, ENV, TABLE.on_device(), observe_final=False))
    before, keys = start(SHORT, LONG), jax.random.split(jax.random.key(1), 2)
    actions = jnp.asarray([[(WALK, 1)] * 4] * 2, jnp.float32)
    expected, result = run(before, actions, keys)[1], quiet(before, actions, keys)[1]
    assert result.final_observation is None and np.any(result.truncated)
    np.testing.assert_array_equal(result.truncated, expected.truncated)
    np.testing.assert_array_equal(result.observation.images, expected.observation.images)


def test_end_of_task_at_the_time_limit_is_no_truncation() -> None:
    _, result, _ = chunk(start(SHORT, SHORT), [(WALK, 0)] * 2 + [(SUCCEED, 1)], [(WALK, 0)] * 3)
    np.testing.assert_array_equal(result.terminated, [True, False])
    np.testing.assert_array_equal(result.truncated, [False, True])
    np.testing.assert_array_equal(result.success, [True, False])


def test_returns_and_steps_add_up_over_chunks_of_an_episode() -> None:
    worlds = start(LONG)
    for total, num_steps in ((3, 2), (6, 4)):
        worlds, result, _ = chunk(worlds, [(WALK, 1), (WALK, 2)])
        assert (result.episode_return[0], result.episode_steps[0]) == (total, num_steps)
    worlds, result, _ = chunk(worlds, [(WALK, 1), (WALK, 2)])
    assert (result.episode_return[0], result.episode_steps[0], result.num_steps[0]) == (7, 5, 1)
    worlds, result, _ = chunk(worlds, [(WALK, 1), (SUCCEED, 2)])
    assert (result.episode_return[0], result.episode_steps[0]) == (3, 2)


@pytest.mark.fault(6)
def test_exploded_worlds_are_invalid_and_restarted() -> None:
    before = start(LONG, LONG, SHORT, LONG)
    after, result, _ = chunk(
        before,
        [(WALK, 1), (EXPLODE, 5), (SUCCEED, 1)],  # even where it then seems to succeed
        [(WALK, 1)] * 3,
        [(EXPLODE, 1), (WALK, 1), (WALK, 1)],  # even where it then runs out of time
        [(WALK, 1), (EXPLODE, 1), (WALK, 1)],
        seed=3,
    )
    np.testing.assert_array_equal(result.invalid, [True, False, True, True])
    for name in ("terminated", "truncated", "success"):
        assert not np.any(getattr(result, name)), name
    np.testing.assert_array_equal(result.reward, [0, 3, 0, 0])
    np.testing.assert_array_equal(result.episode_return, [0, 3, 0, 0])
    np.testing.assert_array_equal(after.env.num_steps, [0, 3, 0, 0])
    np.testing.assert_array_equal(after.episode_return, [0, 3, 0, 0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.observation))
    assert (identities(after) != identities(before)).tolist() == [True, False, True, True]


def test_path_holds_every_state_and_stands_still_after_the_end() -> None:
    _, _, path = chunk(start(LONG, SHORT), [(WALK, 1), (SUCCEED, 1), (WALK, 1)], [(WALK, 1)] * 3)
    np.testing.assert_array_equal(path.num_steps, [[1, 2, 2], [1, 2, 3]])
    np.testing.assert_array_equal(path.total, [[1, 2, 2], [1, 2, 3]])


def test_new_episodes_are_a_function_of_their_keys() -> None:
    end = [(SUCCEED, 1)]
    first, _, _ = chunk(start(LONG, SHORT), end, end)
    again, _, _ = chunk(start(SHORT, LONG), end, end)
    other, _, _ = chunk(start(LONG, SHORT), end, end, seed=2)
    np.testing.assert_array_equal(identities(first), identities(again))
    assert (identities(first) != identities(other)).all()


def test_tasks_are_drawn_uniformly() -> None:
    worlds = draw_worlds(ENV, jax.random.split(jax.random.key(0), 4000))
    # 4.5 sigma of a fair coin.
    assert abs(np.mean(worlds.env.task) - 0.5) < 4.5 * 0.5 / np.sqrt(4000)
    assert len(np.unique(identities(worlds))) > 3990
    np.testing.assert_array_equal(worlds.episode_return, 0.0)


def test_tokens_follow_the_instruction() -> None:
    _, result, _ = chunk(start(LONG, SHORT), [(WALK, 0)], [(WALK, 0)])
    np.testing.assert_array_equal(result.observation.tokens, TABLE.tokens[[LONG, SHORT]])
    np.testing.assert_array_equal(result.observation.token_mask, TABLE.mask[[LONG, SHORT]])
    np.testing.assert_array_equal(result.observation.image_mask, np.ones((2, 1), bool))


def reference(task: int, events: Events) -> tuple[float, int, bool, bool, bool, bool]:
    """(reward, steps, terminated, truncated, success, invalid) of a first chunk, by a loop."""
    reward, exploded = 0.0, False
    for num_steps, (event, gain) in enumerate(events, start=1):
        reward += gain
        exploded |= event == EXPLODE
        terminated = event in (SUCCEED, FAIL)
        truncated = not terminated and num_steps == ENV.spec.max_episode_steps[task]
        if terminated or truncated:
            break
    if exploded:
        return 0.0, num_steps, False, False, False, True
    return reward, num_steps, terminated, truncated, event == SUCCEED, False


EVENT = st.tuples(
    st.sampled_from([WALK, WALK, WALK, SUCCEED, FAIL, EXPLODE]), st.integers(-3, 3).map(float)
)
ROW = st.tuples(st.integers(0, 1), st.lists(EVENT, min_size=6, max_size=6))


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, min_size=3, max_size=3))
def test_every_row_is_what_a_loop_gives(batch: list[tuple[int, Events]]) -> None:
    _, result, _ = chunk(start(*(task for task, _ in batch)), *(events for _, events in batch))
    for row, (task, events) in enumerate(batch):
        names = ("reward", "num_steps", "terminated", "truncated", "success", "invalid")
        actual = tuple(np.asarray(getattr(result, name))[row].item() for name in names)
        assert actual == reference(task, events)


# ------------------------------------------------------------------- which episodes begin


class NumberedEnv(CounterEnv):
    """Its second task's episodes have numbers, which are their identities. Plays that task only."""

    task_ids = (LONG,)

    def reset_to(self, key: jax.Array, task: jax.Array, seed: jax.Array) -> EnvState:
        return self.reset(key, task).replace(identity=seed.astype(jnp.float32))


def test_drawn_tasks_are_those_that_the_env_plays() -> None:
    keys = jax.random.split(jax.random.key(0), 16)
    np.testing.assert_array_equal(draw_worlds(NumberedEnv(), keys).env.task, LONG)
    assert set(np.asarray(draw_worlds(ENV, keys).env.task).tolist()) == {SHORT, LONG}


def test_numbered_episodes_are_asked_for_by_their_number() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    tasks, seeds = jnp.full(3, LONG, jnp.int32), jnp.asarray([4, 9, 4], jnp.uint32)
    worlds = start_episodes(NumberedEnv(), keys, tasks, seeds)
    np.testing.assert_array_equal(identities(worlds), [4, 9, 4])
    np.testing.assert_array_equal(worlds.env.task, LONG)
    np.testing.assert_array_equal(worlds.episode_return, 0.0)


def test_other_episodes_are_what_their_keys_make_them() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    tasks, seeds = jnp.asarray([SHORT, LONG], jnp.int32), jnp.asarray([7, 7], jnp.uint32)
    asked, drawn = start_episodes(ENV, keys, tasks, seeds), start_worlds(ENV, keys, tasks)
    np.testing.assert_array_equal(identities(asked), identities(drawn))
