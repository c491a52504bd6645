"""Groups of worker processes: episodes, their ends, and workers that die in the middle."""

import os
import pathlib
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from host_group_factory import (
    EXECUTED,
    LIMITS,
    SEED,
    SPEC,
    STEPS,
    TABLE,
    TASK,
    TIMEOUT_S,
    GroupFactory,
    Made,
    fake,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.simulation.group import Cursor
from jaxvla.simulation.host_group import HostEnvGroup


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Iterator[GroupFactory]:
    factory = GroupFactory(tmp_path)
    yield factory
    factory.close()


def states(observation: Any, entry: int) -> list[float]:
    return observation.state[:, entry].tolist()


def kill(pid: int) -> None:
    """Kills a worker and waits until it is dead."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    readable, _, _ = select.select([descriptor], [], [], TIMEOUT_S)
    os.close(descriptor)
    assert readable


# --- episodes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_envs", "first_env"), [(1, 0), (1, 5), (4, 2)])
def test_every_env_plays_the_task_of_its_number(
    make: GroupFactory, num_envs: int, first_env: int
) -> None:
    made = make(num_envs, first_env=first_env)
    seen = made.group.reset(Cursor())
    expected = (first_env + np.arange(num_envs)) % len(LIMITS)
    assert states(seen, TASK) == expected.tolist()
    assert states(seen, STEPS) == [0.0] * num_envs
    assert len(set(states(seen, SEED))) == num_envs
    np.testing.assert_array_equal(seen.tokens, TABLE.tokens[expected])
    np.testing.assert_array_equal(seen.token_mask, TABLE.mask[expected])
    assert seen.image_mask.shape == (num_envs, 2) and np.asarray(seen.image_mask).all()
    assert [made.group.instruction(e) for e in range(num_envs)] == [
        SPEC.instructions[task] for task in expected
    ]
    again = made.group.reset(Cursor())
    assert states(again, TASK) == expected.tolist()
    assert not set(states(seen, SEED)) & set(states(again, SEED))


def test_episodes_belong_to_the_number_of_the_env(make: GroupFactory) -> None:
    """Not to the group that holds it; the seed of the run changes them all."""
    whole, parts, other = make(2), [make(1, first_env=e) for e in range(2)], make(2, seed=1)
    for _ in range(2):
        expected = whole.group.reset(Cursor())
        found = [part.group.reset(Cursor()) for part in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
        jax.tree.map(np.testing.assert_array_equal, joined, expected)
        assert not set(states(expected, SEED)) & set(states(other.group.reset(Cursor()), SEED))


def test_a_chunk_runs_its_executed_part(make: GroupFactory) -> None:
    made = make(2, first_env=1)
    made.group.reset(Cursor())
    result = made.step(fake.STEP, fake.STEP, reward=0.25)
    np.testing.assert_array_equal(result.num_steps, EXECUTED)
    np.testing.assert_array_equal(result.reward, EXECUTED * 0.25)
    assert states(result.observation, STEPS) == [EXECUTED] * 2
    np.testing.assert_array_equal(result.observation.images, EXECUTED)
    np.testing.assert_array_equal(result.task, [1, 2])
    for name in ("terminated", "truncated", "success", "invalid"):
        assert not np.any(getattr(result, name)), name
    result = made.step(fake.STEP, fake.STEP, reward=0.5)
    np.testing.assert_array_equal(result.episode_return, EXECUTED * (0.25 + 0.5))
    np.testing.assert_array_equal(result.episode_steps, 2 * EXECUTED)


def test_success_ends_the_chunk_and_the_episode(make: GroupFactory) -> None:
    made = make(2, first_env=2)
    before = made.group.reset(Cursor())
    made.step(fake.STEP, fake.STEP, reward=0.5)
    result = made.step(fake.STEP, fake.SUCCEED, reward=0.5)
    np.testing.assert_array_equal(result.success, [False, True])
    np.testing.assert_array_equal(result.terminated, [False, True])
    np.testing.assert_array_equal(result.num_steps, [2, 1])
    np.testing.assert_array_equal(result.episode_steps, [4, 3])
    np.testing.assert_array_equal(result.episode_return, [2.0, 2.0])
    # Env 0 goes on, env 1 starts its next episode.
    assert states(result.observation, STEPS) == [4, 0]
    seeds, old = states(result.observation, SEED), states(before, SEED)
    assert (seeds[0] == old[0], seeds[1] == old[1]) == (True, False)
    result = made.step(fake.STEP, fake.STEP, reward=0.5)
    np.testing.assert_array_equal(result.episode_steps, [6, 2])
    np.testing.assert_array_equal(result.episode_return, [3.0, 1.0])


def test_an_episode_that_ends_early_is_followed_while_others_still_step(
    make: GroupFactory, tmp_path: pathlib.Path
) -> None:
    """Env 1 cannot finish its chunk before env 0, which succeeds, has begun its next episode."""
    os.mkfifo(tmp_path / "gate")
    made = make(2, config={"directory": str(tmp_path), "opens_gate": 0}, step_timeout_s=20.0)
    before = made.group.reset(Cursor())
    result = made.step(fake.SUCCEED, fake.GATE, reward=0.5)
    assert made.restarts() == {} and not np.any(result.invalid)
    np.testing.assert_array_equal(result.success, [True, False])
    np.testing.assert_array_equal(result.num_steps, [1, EXECUTED])
    assert states(result.observation, STEPS) == [0, EXECUTED]
    seeds, old = states(result.observation, SEED), states(before, SEED)
    assert (seeds[0] == old[0], seeds[1] == old[1]) == (False, True)


def test_the_time_limit_shortens_the_last_chunk(make: GroupFactory) -> None:
    """Tasks 0 and 1 have limits of 3 and 4 steps."""
    made = make(2)
    before = made.group.reset(Cursor())
    made.step(fake.STEP, fake.STEP, reward=1.0)
    result = made.step(fake.STEP, fake.STEP, reward=1.0)
    np.testing.assert_array_equal(result.num_steps, [1, 2])
    np.testing.assert_array_equal(result.reward, [1.0, 2.0])
    np.testing.assert_array_equal(result.truncated, True)
    assert not np.any(result.terminated) and not np.any(result.success)
    np.testing.assert_array_equal(result.episode_steps, [3, 4])
    # The end of the old episodes, and the beginning of the new ones.
    final = result.final_observation
    assert states(final, STEPS) == [3, 4] and states(final, SEED) == states(before, SEED)
    assert [row.max() for row in np.asarray(final.images)] == [3, 4]
    assert states(result.observation, STEPS) == [0, 0]
    assert states(result.observation, TASK) == [0, 1]
    assert not np.any(np.array(states(result.observation, SEED)) == states(before, SEED))


def test_success_at_the_time_limit_is_no_truncation(make: GroupFactory) -> None:
    made = make(1)
    made.group.reset(Cursor())
    made.step(fake.STEP)
    result = made.step(fake.SUCCEED)
    assert result.episode_steps == [LIMITS[0]]
    assert (result.terminated, result.success, result.truncated) == ([True], [True], [False])


@dataclass
class Model:
    """One env, as the class's docstring has it."""

    task: int
    steps: int = 0
    total: float = 0.0

    def step(self, kind: float, reward: float) -> tuple[Any, ...]:
        """(reward, steps, terminated, truncated, return, episode steps) of a chunk."""
        num_steps = min(EXECUTED, LIMITS[self.task] - self.steps)
        gain = num_steps * reward
        if kind == fake.SUCCEED:
            num_steps, gain = 1, 1.0
        self.steps, self.total = self.steps + num_steps, self.total + gain
        is_over = kind != fake.SUCCEED and self.steps == LIMITS[self.task]
        told = (gain, num_steps, kind == fake.SUCCEED, is_over, self.total, self.steps)
        if is_over or kind == fake.SUCCEED:
            self.steps, self.total = 0, 0.0
        return told


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Three envs, one per task."""
    factory = GroupFactory(tmp_path_factory.mktemp("trio"))
    yield factory(3)
    factory.close()


KINDS = st.tuples(*[st.sampled_from([fake.STEP, fake.STEP, fake.SUCCEED])] * 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(KINDS, st.integers(-2, 2)), min_size=1, max_size=8))
def test_every_env_is_what_a_loop_gives(
    trio: Made, script: list[tuple[tuple[float, ...], int]]
) -> None:
    seen = trio.group.reset(Cursor())
    models = [Model(task) for task in range(3)]
    for kinds, reward in script:
        result = trio.step(*kinds, reward=reward / 4)
        names = ("reward", "num_steps", "terminated", "truncated", "episode_return")
        columns = [np.asarray(getattr(result, name)).tolist() for name in (*names, "episode_steps")]
        expected = [m.step(k, reward / 4) for m, k in zip(models, kinds, strict=True)]
        assert list(zip(*columns, strict=True)) == expected
        assert states(result.observation, STEPS) == [model.steps for model in models]
        is_new = np.array(states(result.observation, SEED)) != np.array(states(seen, SEED))
        np.testing.assert_array_equal(is_new, np.asarray(result.terminated) | result.truncated)
        seen = result.observation


# --- what is handed out -----------------------------------------------------------------------


def test_observations_are_snapshots(make: GroupFactory) -> None:
    """The workers write into the same rows again and again."""
    made = make(2)
    held: list[Any] = [made.group.reset(Cursor())]
    for kinds in ((fake.STEP, fake.STEP), (fake.STEP, fake.SUCCEED), (fake.EXIT, fake.STEP)):
        held += [made.step(*kinds), made.group.frames([0, 1]), made.group.state()]
    copies = [jax.tree.map(lambda x: np.array(x, copy=True), x) for x in held]
    for _ in range(3):
        made.step(fake.STEP, fake.STEP)
    jax.tree.map(np.testing.assert_array_equal, held, copies)
    for leaf in jax.tree.leaves(held):
        assert not np.shares_memory(leaf, made.pool.images)
        assert not np.shares_memory(leaf, made.pool.state)


def test_frames_show_the_end_of_the_chunk(make: GroupFactory) -> None:
    made = make(2)
    made.group.reset(Cursor())
    made.step(fake.STEP, fake.STEP)
    made.step(fake.STEP, fake.STEP)  # both run out of time
    frames = made.group.frames([1, 0])
    assert [frame.shape for frame in frames] == [(1, *fake.IMAGE_SHAPE)] * 2
    assert [frame.max() for frame in frames] == [4, 3]
    assert made.group.frames_per_s == SPEC.control_hz / EXECUTED


def test_evaluation_episodes_are_what_is_asked_for(make: GroupFactory) -> None:
    made = make(2)
    seen = made.group.reset_to(np.array([2, 1]), np.array([7, 2**32 - 1]))
    assert states(seen, TASK) == [2, 1]
    assert states(seen, SEED) == [7, np.float32(2**32 - 1)]
    np.testing.assert_array_equal(seen.tokens, TABLE.tokens[np.array([2, 1])])
    assert [made.group.instruction(e) for e in range(2)] == ["do c", "do b"]
    made.step(fake.STEP, fake.STEP)
    result = made.step(fake.STEP, fake.STEP)
    np.testing.assert_array_equal(result.truncated, [False, True])
    np.testing.assert_array_equal(result.task, [2, 1])


# --- restarts of the run ----------------------------------------------------------------------


def test_a_restart_begins_the_running_episodes_anew(make: GroupFactory) -> None:
    made = make(2)
    made.group.reset(Cursor())
    began = made.step(fake.SUCCEED, fake.STEP).observation  # episodes 2 and 1 run
    first = made.group.state()
    made.step(fake.STEP, fake.STEP)
    later = made.group.state()
    np.testing.assert_array_equal(first["episodes"], [2, 1])
    np.testing.assert_array_equal(later["episodes"], [2, 2])  # the second one ran out of time
    successor = make(2)
    seen = successor.group.load_state(first)
    assert states(seen, SEED) == states(began, SEED)
    assert states(seen, STEPS) == [0, 0]
    # From there on the successor draws what the first would have drawn.
    ends = [x.step(fake.SUCCEED, fake.SUCCEED).observation for x in (made, successor)]
    assert states(ends[0], SEED)[0] == states(ends[1], SEED)[0]
    np.testing.assert_array_equal(first["episodes"], [2, 1])


def test_shapes_of_a_snapshot(make: GroupFactory) -> None:
    made = make(3)
    made.group.reset(Cursor())
    struct, state = HostEnvGroup.state_struct(3), made.group.state()
    assert jax.tree.structure(struct) == jax.tree.structure(state)
    for expected, leaf in zip(jax.tree.leaves(struct), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)


# --- workers that die -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        pytest.param(fake.EXIT, "exit", marks=pytest.mark.fault(1)),
        pytest.param(fake.SEGFAULT, "signal", marks=pytest.mark.fault(2)),
        (fake.RAISE, "exception"),
    ],
)
def test_a_lost_episode_is_invalid(make: GroupFactory, kind: float, cause: str) -> None:
    """The chunk is worth nothing and ends nothing; the env goes on with its next episode."""
    made = make(2, first_env=1)
    before = made.group.reset(Cursor())
    made.step(fake.STEP, fake.STEP, reward=0.5)
    pids = made.pool.pids
    result = made.step(kind, fake.STEP, reward=0.5)
    np.testing.assert_array_equal(result.invalid, [True, False])
    for name in ("terminated", "truncated", "success"):
        assert not np.any(getattr(result, name)), name
    np.testing.assert_array_equal(result.reward, [0.0, 1.0])
    np.testing.assert_array_equal(result.num_steps, [0, 2])
    np.testing.assert_array_equal(result.episode_return, [1.0, 2.0])  # what there was before
    np.testing.assert_array_equal(result.episode_steps, [2, 4])
    assert states(result.observation, STEPS) == [0, 4]
    assert states(result.observation, TASK) == [1, 2]
    seeds, old = states(result.observation, SEED), states(before, SEED)
    assert (seeds[0] == old[0], seeds[1] == old[1]) == (False, True)
    assert made.restarts() == {cause: 1}
    assert (made.pool.pids[0] == pids[0], made.pool.pids[1] == pids[1]) == (False, True)
    result = made.step(fake.STEP, fake.STEP, reward=0.5)
    assert not np.any(result.invalid)
    np.testing.assert_array_equal(result.episode_return, [1.0, 3.0])
    np.testing.assert_array_equal(result.episode_steps, [2, 6])


def test_every_replacement_is_counted_once_and_logged(
    make: GroupFactory, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(2, first_env=1)
    made.group.reset(Cursor())
    assert made.restarts() == {}
    for kinds, expected in (
        ((fake.EXIT, fake.STEP), {"exit": 1}),
        ((fake.STEP, fake.STEP), {"exit": 1}),
        ((fake.RAISE, fake.EXIT), {"exit": 2, "exception": 1}),
    ):
        made.step(*kinds)
        assert made.restarts() == expected
    assert caplog.messages[0] == "group: 1 worker process(es) replaced, cause exit"
    assert len(caplog.messages) == 3


def test_a_death_between_episodes_costs_no_episode(make: GroupFactory) -> None:
    """A worker that dies before a reset is replaced, and its successor runs that episode."""
    made, healthy = make(2), make(2)
    for x in (made, healthy):
        x.group.reset(Cursor())
    kill(made.pool.pids[1])
    actual, expected = (x.group.reset(Cursor()) for x in (made, healthy))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert made.restarts() == {"signal": 1} and healthy.restarts() == {}
    assert not np.any(made.step(fake.STEP, fake.STEP).invalid)


def test_an_env_that_never_starts_ends_the_run(make: GroupFactory) -> None:
    made = make(2, config={"raise_in_reset": True}, max_failures=2)
    with pytest.raises(RuntimeError, match="2 failures in a row"):
        made.group.reset(Cursor())
    assert_no_process(made.pool.pids)


@pytest.mark.fault(5)
@pytest.mark.parametrize("group_size", [0, 1])
def test_an_env_that_is_set_aside_is_invalid_from_then_on(
    make: GroupFactory, group_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(2, max_failures=2, group_size=group_size, num_starts=2)
    for segment in range(4):
        made.group.reset(Cursor(segment=segment))
        result = made.step(fake.BAD_STATE, fake.STEP, reward=0.5)
        np.testing.assert_array_equal(result.invalid, [True, False])
        np.testing.assert_array_equal(result.num_steps, [0, 2])
        assert np.isfinite(result.observation.state).all()
    assert made.restarts() == {"exception": 2}
    assert made.recorder.totals()["faults/quarantined_envs"] == 1
    assert sum("group: env 0 is set aside: 2 failures in a row" in x for x in caplog.messages) == 1


def test_an_evaluation_does_without_no_env(make: GroupFactory) -> None:
    made = make(2, max_failures=1)
    made.group.reset_to(np.array([0, 1]), np.array([0, 0]))
    with pytest.raises(RuntimeError, match="group: 1 failures in a row; the last: env 0"):
        made.step(fake.RAISE, fake.STEP)


# --- the end ----------------------------------------------------------------------------------


def assert_no_process(pids: tuple[int, ...]) -> None:
    """Dead, and reaped."""
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _in_use(made: Made) -> None:
    made.group.reset(Cursor())
    made.step(fake.STEP, fake.EXIT)  # a replacement among them


def _in_a_call(made: Made) -> None:
    made.group.reset(Cursor())
    made.pool.submit_step_chunk(0, np.array([[fake.HANG, 0.0]]))


@pytest.mark.parametrize("use", [lambda made: None, _in_use, _in_a_call])
def test_close_leaves_no_process(make: GroupFactory, use: Callable[[Made], None]) -> None:
    made = make(2)
    use(made)
    pids = made.pool.pids
    made.group.close()
    assert_no_process(pids)
    made.group.close()  # may be called again
