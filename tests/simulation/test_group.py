"""Groups of device worlds: what decides their episodes, and that nothing else does."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.layout import parse_layout
from jaxvla.sharding import batch_sharding, make_mesh
from jaxvla.simulation.group import Cursor, DeviceEnvGroup, DeviceStepper
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import ChunkResult, stand_in

ENV: Any = CounterEnv()
E, HORIZON, EXECUTED = 4, 3, 2
TABLE = TokenTable(
    tokens=stand_in(np.array([[5, 6, 0], [7, 8, 9]], np.int32)),
    mask=stand_in(np.array([[True, True, False], [True, True, True]])),
)
EVENTS = (WALK, WALK, SUCCEED, FAIL, EXPLODE)
MakeGroup = Callable[..., DeviceEnvGroup]


@functools.cache
def stepper(num_devices: int) -> DeviceStepper:
    mesh = make_mesh(parse_layout(f"colocated={num_devices}").roles["simulation"])
    return DeviceStepper(ENV, TABLE, num_envs=E, num_executed=EXECUTED, mesh=mesh)


def make_group(seed: int = 0, *, num_devices: int = 1) -> DeviceEnvGroup:
    name = f"group_{seed}"
    return DeviceEnvGroup(stepper(num_devices), name=name, key=jax.random.key(seed))


def walk(reward: float = 1.0) -> np.ndarray:
    """Actions float32 [E, HORIZON, 2] that end no episode before its time limit."""
    return np.tile(np.array([WALK, reward], np.float32), (E, HORIZON, 1))


def random_actions(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    event = random.choice(np.array(EVENTS), (E, HORIZON))
    return np.stack([event, random.integers(-3, 4, (E, HORIZON))], -1).astype(np.float32)


def run(group: DeviceEnvGroup, seed: int, num_segments: int = 3, num_chunks: int = 2) -> Any:
    """Everything that a group tells in some segments of random actions, on the host."""
    told: list[Any] = [jax.device_get(group.reset(Cursor()))]
    for segment in range(num_segments):
        for chunk in range(num_chunks):
            actions = random_actions(100 * seed + 10 * segment + chunk)
            result = group.step_chunk(actions, Cursor(segment=segment, chunk=chunk))
            told.append(jax.device_get(result))
    return told


def assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def identities(observation: Any) -> np.ndarray:
    """float32 [E], of the running episodes."""
    return np.array(observation.state)[:, 0]


def tasks(observation: Any) -> list[int]:
    """Of the running episodes, by what the policy is told."""
    return [int(row[0] == TABLE.tokens[1, 0]) for row in np.asarray(observation.tokens)]


# --- stepping ---------------------------------------------------------------------------------


def test_reset_shows_fresh_episodes() -> None:
    group = make_group()
    seen = group.reset(Cursor())
    np.testing.assert_array_equal(seen.images, np.zeros((E, 1, 2, 2, 3), np.uint8))
    np.testing.assert_array_equal(np.asarray(seen.state)[:, 1], 0.0)
    assert len(set(identities(seen).tolist())) == E
    assert [group.instruction(row) for row in range(E)] == [
        ENV.spec.instructions[task] for task in tasks(seen)
    ]
    np.testing.assert_array_equal(seen.tokens, TABLE.tokens[np.array(tasks(seen))])
    np.testing.assert_array_equal(seen.token_mask, TABLE.mask[np.array(tasks(seen))])


def test_only_the_executed_part_of_a_chunk_runs() -> None:
    group = make_group()
    before = group.reset(Cursor())
    actions = walk()
    actions[:, EXECUTED:] = SUCCEED, 100.0
    result = group.step_chunk(actions, Cursor())
    np.testing.assert_array_equal(result.num_steps, EXECUTED)
    np.testing.assert_array_equal(result.reward, EXECUTED)
    assert not np.any(result.terminated)
    np.testing.assert_array_equal(identities(result.observation), identities(before))


def test_episodes_go_on_over_segments() -> None:
    group = make_group()
    group.reset_to(np.ones(E), np.arange(E))  # limit of five steps
    for segment, (steps, is_over) in enumerate([(2, False), (4, False), (5, True), (2, False)]):
        result = group.step_chunk(walk(), Cursor(segment=segment))
        if segment < 3:
            np.testing.assert_array_equal(result.episode_steps, steps)
            np.testing.assert_array_equal(result.episode_return, steps)
            np.testing.assert_array_equal(result.truncated, is_over)
            np.testing.assert_array_equal(result.num_steps, 2 - is_over)
        else:
            np.testing.assert_array_equal(result.episode_steps, 2)


def test_what_was_handed_out_is_never_written_again() -> None:
    """The worlds are donated to the next step; what others hold is not part of them."""
    group = make_group()
    held: list[Any] = [group.reset(Cursor())]
    copies = [jax.tree.map(lambda x: np.array(x, copy=True), held[0])]
    for chunk in range(5):
        held += [group.step_chunk(random_actions(chunk), Cursor(chunk=chunk)), group.state()]
        copies += [jax.tree.map(lambda x: np.array(x, copy=True), x) for x in held[-2:]]
    assert_same(held, copies)


# --- what decides an episode ------------------------------------------------------------------


def test_a_reset_is_a_function_of_key_and_segment() -> None:
    first = make_group(seed=1).reset(Cursor(segment=4))
    used = make_group(seed=1)
    run(used, seed=0)
    assert_same(used.reset(Cursor(segment=4)), first)
    for group, segment in ((make_group(seed=2), 4), (make_group(seed=1), 5)):
        other = group.reset(Cursor(segment=segment))
        assert not set(identities(first).tolist()) & set(identities(other).tolist())


def test_the_episodes_that_follow_are_a_function_of_the_cursor() -> None:
    """End every episode at once: the next ones depend on segment and chunk, and on no more."""
    end = walk()
    end[:, 0, 0] = SUCCEED

    def successors(group: DeviceEnvGroup, segment: int, chunk: int) -> tuple[float, ...]:
        group.reset(Cursor(segment=segment + chunk))
        result = group.step_chunk(end, Cursor(segment=segment, chunk=chunk))
        return tuple(identities(result.observation).tolist())

    cursors = [(0, 0), (0, 1), (1, 0), (1, 1), (7, 3)]
    found = [successors(make_group(seed=1), *cursor) for cursor in cursors]
    again = make_group(seed=1)
    assert [successors(again, *cursor) for cursor in reversed(cursors)] == found[::-1]
    everybody = [identity for row in found for identity in row]
    everybody += [x for cursor in cursors for x in successors(make_group(seed=2), *cursor)]
    assert len(set(everybody)) == len(everybody) == 2 * len(cursors) * E


def test_an_evaluation_episode_is_a_function_of_task_and_seed() -> None:
    """Wherever in whichever group it runs."""
    group, used = make_group(), make_group()
    run(used, seed=3)
    task, seed = np.array([0, 1, 1, 0]), np.array([0, 0, 5, 2**32 - 1])
    seen = group.reset_to(task, seed)
    assert tasks(seen) == task.tolist()
    moved = used.reset_to(task[::-1], seed[::-1])
    assert_same(moved, jax.tree.map(lambda x: np.asarray(x)[::-1], seen))
    assert identities(seen)[0] == identities(seen)[1]  # same seed, another task
    assert len(set(identities(seen)[1:].tolist())) == 3
    assert [group.instruction(row) for row in range(E)] == [ENV.spec.instructions[x] for x in task]


@settings(max_examples=15, deadline=None)
@given(st.permutations([0] * 4 + [1] * 4))
def test_groups_do_not_feel_each_other(order: list[int]) -> None:
    """Two groups share compiled functions; any interleaving gives the same experience."""
    expected = [run(make_group(seed), seed, num_segments=4, num_chunks=1) for seed in (0, 1)]
    groups = [make_group(seed) for seed in (0, 1)]
    told: list[list[Any]] = [[jax.device_get(group.reset(Cursor()))] for group in groups]
    for index in order:
        segment = len(told[index]) - 1
        actions = random_actions(100 * index + 10 * segment)
        result = groups[index].step_chunk(actions, Cursor(segment=segment))
        told[index].append(jax.device_get(result))
    assert_same(told, expected)


# --- snapshots --------------------------------------------------------------------------------


def test_a_snapshot_continues_exactly() -> None:
    group = make_group(seed=3)
    group.reset(Cursor())
    last = group.step_chunk(random_actions(0), Cursor(chunk=0))
    snapshot = group.state()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(snapshot))

    def go_on(group: DeviceEnvGroup) -> list[ChunkResult]:
        return [
            jax.device_get(group.step_chunk(random_actions(1 + i), Cursor(segment=1, chunk=i)))
            for i in range(3)
        ]

    expected = go_on(group)
    for _ in range(2):  # what runs after a restart does not change the snapshot either
        successor = make_group(seed=3)
        assert_same(successor.load_state(snapshot), last.observation)
        assert_same(go_on(successor), expected)


def test_a_snapshot_holds_the_return_so_far() -> None:
    group = make_group()
    group.reset_to(np.ones(E), np.arange(E))
    group.step_chunk(walk(reward=2.0), Cursor())
    successor = make_group()
    successor.load_state(group.state())
    result = successor.step_chunk(walk(reward=2.0), Cursor(chunk=1))
    np.testing.assert_array_equal(result.episode_return, 2 * 2 * EXECUTED)
    np.testing.assert_array_equal(result.episode_steps, 2 * EXECUTED)


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[2], [3, 0, 1], [0, 1, 2, 3]])
def test_frames_show_every_control_step(rows: list[int]) -> None:
    """Of the rows asked for, in that order, before ended episodes start afresh."""
    group = make_group()
    group.reset_to(np.ones(E), np.arange(E))
    group.step_chunk(walk(), Cursor())
    actions = walk()
    actions[1, 0, 0] = SUCCEED  # stands still after its end
    actions[2, 1, 0] = FAIL
    group.step_chunk(actions, Cursor(chunk=1))
    frames = group.frames(rows)
    assert [x.shape for x in frames] == [(EXECUTED, 1, 2, 2, 3)] * len(rows)
    shown = {0: [3, 4], 1: [3, 3], 2: [3, 4], 3: [3, 4]}
    assert [x[:, 0, 0, 0, 0].tolist() for x in frames] == [shown[row] for row in rows]
    assert group.frames_per_s == ENV.spec.control_hz


# --- devices ----------------------------------------------------------------------------------


def test_four_devices_give_what_one_gives() -> None:
    spread, single = (run(make_group(seed=5, num_devices=n), 5) for n in (4, 1))
    for told in (spread, single):
        for i, result in enumerate(told[1:], start=1):
            # Only what is valid; the rest depends on which worlds share a device.
            final = jax.tree.map(lambda x, r=result: x[r.truncated], result.final_observation)
            told[i] = result.replace(final_observation=final)
    assert any(result.truncated.any() for result in single[1:])
    assert_same(spread, single)
    tests = make_group(num_devices=4), make_group()
    seen = [group.reset_to(np.arange(E) % 2, np.arange(E)) for group in tests]
    assert_same(*(jax.device_get(x) for x in seen))


def test_rows_stay_on_their_devices() -> None:
    group = make_group(num_devices=4)
    rows = batch_sharding(stepper(4).mesh)
    seen = group.reset(Cursor())
    result = group.step_chunk(walk(), Cursor())
    restored = group.load_state(group.state())
    for leaf in jax.tree.leaves([seen, result, restored]):
        assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_compile_leaves_nothing_to_compile(num_devices: int) -> None:
    mesh = make_mesh(parse_layout(f"colocated={num_devices}").roles["simulation"])
    fresh = DeviceStepper(ENV, TABLE, num_envs=E, num_executed=EXECUTED, mesh=mesh)
    fresh.compile()
    group = DeviceEnvGroup(fresh, name="group", key=jax.random.key(0))
    group.reset(Cursor())
    steps: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            steps.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    group.step_chunk(walk(), Cursor())
    assert steps == []
