"""The simulator program: what it asks, steps and puts, in which order."""

import functools
import itertools
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest
from counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv
from scripted_group import (
    GOES_ON,
    INVALID,
    TERMINATED,
    TRUNCATED,
    ScriptedGroup,
    number_of,
    numbers,
    value_of,
)
from simulator_run import (
    CALM,
    TIMEOUT_S,
    E,
    FakeClient,
    FakeQueue,
    Log,
    Made,
    T,
    TicketsForEach,
    make,
)

from jaxvla.layout import parse_layout
from jaxvla.serving.client import Answer
from jaxvla.sharding import make_mesh
from jaxvla.simulation.group import DeviceEnvGroup, DeviceStepper
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import Observation, PolicySample, stand_in

EVENTS = (WALK, WALK, SUCCEED, FAIL, EXPLODE)


# --- trajectories -----------------------------------------------------------------------------


def test_a_trajectory_per_ticket() -> None:
    queue = FakeQueue(3)
    group = ScriptedGroup("a", CALM)
    made = make([group], queue)
    made.run()
    assert [item.ticket.id for item in queue.items] == [0, 1, 2] and not queue.failed
    for segment, item in enumerate(queue.items):
        read = np.stack([numbers(segment * T + t, E) for t in range(T)])
        trajectory = item.payload
        np.testing.assert_array_equal(number_of(trajectory.observation), read)
        np.testing.assert_array_equal(trajectory.trace["choice"], read + 7)
        np.testing.assert_array_equal(trajectory.reward, read / 16)
        np.testing.assert_array_equal(trajectory.value, value_of(read))
        following = numbers((segment + 1) * T, E)
        np.testing.assert_array_equal(trajectory.bootstrap_value[-1], value_of(following))
        assert item.nbytes == sum(x.nbytes for x in jax.tree.leaves(trajectory))


def test_versions_are_those_of_the_answers() -> None:
    """Weights are new for every query: T to explore, one for the value of the end."""
    queue = FakeQueue(2)
    client = FakeClient("a", has_updates=True)
    make([ScriptedGroup("a", CALM)], queue, clients=[client]).run()
    for item, versions in zip(queue.items, ([0, 1, 2], [4, 5, 6]), strict=True):
        np.testing.assert_array_equal(
            item.payload.policy_version, np.repeat(versions, E).reshape(T, E)
        )
        assert (item.policy_version_min, item.policy_version_max) == (versions[0], versions[-1])


def test_the_record_that_travels_with_a_trajectory() -> None:
    script = np.array([[GOES_ON, INVALID], [TERMINATED, TRUNCATED], [INVALID, GOES_ON]])
    queue = FakeQueue(2)
    made = make([ScriptedGroup("a", script)], queue)
    made.run()
    first, second = (item.info for item in queue.items)
    assert (first.group, first.next_segment, second.next_segment) == ("a", 1, 2)
    assert (first.end_state, second.end_state) == ({"chunk": T}, {"chunk": 2 * T})
    assert (first.num_queries, first.num_invalid) == (T * E, 2)
    executed = np.stack([1 + numbers(t, E) % 5 for t in range(T)])
    assert first.num_env_steps == executed.sum()
    assert first.num_useful_env_steps == executed[script != INVALID].sum()
    ended = numbers(1, E)
    np.testing.assert_array_equal(first.episodes.length, ended + 3)
    np.testing.assert_array_equal(first.episodes.success, [True, False])
    overflow = sum(int((numbers(chunk, E) % 3).sum()) for chunk in range(2 * T))
    faults = {"faults/invalid_samples": 4, "faults/contact_overflow": overflow}
    assert made.recorder.totals() == faults


def test_ends_of_episodes_get_their_values() -> None:
    """Five time limits of two envs: three more queries, each answer to its own end."""
    script = np.array([[TRUNCATED, TRUNCATED], [TRUNCATED, GOES_ON], [TRUNCATED, TRUNCATED]])
    queue = FakeQueue(1)
    made = make([ScriptedGroup("a", script)], queue)
    made.run()
    (client,) = made.clients
    assert [kind for kind, _, _ in client.queries] == ["explore"] * T + ["value"] * 4
    asked = [number.tolist() for _, number, _ in client.queries[T:]]
    assert asked == [[12, 14], [1, 3], [5, 9], [11]]
    for _, number, keys in client.queries:
        assert keys.shape == (len(number), 2) and keys.dtype == np.uint32
    (item,) = queue.items
    bootstrap = np.asarray(item.payload.bootstrap_value)
    expected = value_of(np.array([[1, 3], [5, 0], [9, 11]]))
    is_cut = script == TRUNCATED
    np.testing.assert_array_equal(bootstrap[is_cut], expected[is_cut])


def test_lanes_with_unlike_numbers_of_time_limits() -> None:
    cut = np.full((T, E), TRUNCATED)
    groups = [ScriptedGroup("a", CALM), ScriptedGroup("b", cut), ScriptedGroup("c", CALM)]
    queue = FakeQueue(3)
    made = make(groups, queue, overlap=False)
    made.run()
    num_values = [[x[0] for x in client.queries].count("value") for client in made.clients]
    assert num_values == [1, 4, 1]
    expected = value_of(np.stack([numbers(t, E) + 1 for t in range(T)]))
    np.testing.assert_array_equal(queue.items[1].payload.bootstrap_value, expected)
    for item in (queue.items[0], queue.items[2]):
        np.testing.assert_array_equal(item.payload.bootstrap_value[-1], value_of(numbers(T, E)))


# --- order of things --------------------------------------------------------------------------


def test_a_group_by_itself() -> None:
    log: Log = []
    make([ScriptedGroup("a", CALM, log)], FakeQueue(2, log)).run()

    def segment(number: int) -> Log:
        chunks: Log = []
        for chunk in range(T):
            chunks += [("explore", "a"), ("step", "a", number, chunk)]
        ask: Log = [("admit", "a"), ("join", "a")]
        return [*ask, *chunks, ("value", "a"), ("put", "a"), ("leave", "a")]

    assert log == [("reset", "a", 0), *segment(0), *segment(1)]


def test_lockstep_asks_for_all_then_steps_all() -> None:
    log: Log = []
    groups = [ScriptedGroup(name, CALM, log) for name in "ab"]
    make(groups, FakeQueue(2, log), overlap=False).run()

    def both(*event: Any) -> Log:
        return [(event[0], name, *event[1:]) for name in "ab"]

    chunks: Log = []
    for chunk in range(T):
        chunks += both("explore") + both("step", 0, chunk)
    ends = both("value") + both("put") + both("leave")
    assert log == both("reset", 0) + both("admit") + both("join") + chunks + ends


def test_threads() -> None:
    groups = [ScriptedGroup(name, CALM) for name in "ab"]
    assert list(make(groups, FakeQueue(0)).simulator.threads()) == ["a", "b"]
    lockstep = make(groups, FakeQueue(0), overlap=False).simulator.threads()
    assert list(lockstep) == ["all groups"]


def test_one_client_per_group() -> None:
    with pytest.raises(ValueError):
        make([ScriptedGroup("a", CALM)], FakeQueue(0), clients=[FakeClient("a"), FakeClient("b")])


def explore_keys(made: Made) -> list[list[tuple[int, ...]]]:
    """By lane, the raw keys of all rows of all queries to explore, in order."""
    found = []
    for client in made.clients:
        keys = [keys for kind, _, keys in client.queries if kind == "explore"]
        assert all(x.shape == (E, 2) and x.dtype == np.uint32 for x in keys)
        found.append([tuple(row) for x in keys for row in x.tolist()])
    return found


def test_every_row_of_every_query_has_a_key_of_its_own() -> None:
    """A function of seed, lane, segment and chunk, whatever the schedule."""
    keys = []
    for overlap, seed in ((False, 0), (True, 0), (True, 1)):
        groups = [ScriptedGroup(name, CALM) for name in "ab"]
        made = make(groups, TicketsForEach(2), overlap=overlap, seed=seed)
        made.run()
        keys.append(explore_keys(made))
    assert keys[0] == keys[1]
    everything = [key for lanes in keys[1:] for lane in lanes for key in lane]
    assert len(set(everything)) == len(everything) == 2 * 2 * 2 * T * E


def test_a_restart_continues_where_a_group_was() -> None:
    whole = make([ScriptedGroup("a", CALM)], FakeQueue(3))
    whole.run()
    log: Log = []
    groups = [ScriptedGroup("a", CALM, log), ScriptedGroup("b", CALM, log)]
    queue = TicketsForEach(2)
    rest = make(groups, queue)
    snapshot = GroupSnapshot(next_segment=1, end_state={"chunk": T})
    rest.simulator.restore({"a": snapshot, "unknown": snapshot})
    rest.run()
    assert explore_keys(rest)[0] == explore_keys(whole)[0][T * E :]
    assert [x for x in log if x[0] in ("load", "reset")] == [("load", "a", T), ("reset", "b", 0)]
    steps = [x[2:] for x in log if x[:2] == ("step", "a")]
    assert steps == [(segment, chunk) for segment in (1, 2) for chunk in range(T)]
    first = next(item for item in queue.items if item.ticket.owner == "a")
    np.testing.assert_array_equal(number_of(first.payload.observation)[0], numbers(T, E))
    assert first.info.next_segment == 2


# --- with real worlds -------------------------------------------------------------------------


class KeyPolicyClient(FakeClient):
    """A policy that acts on its keys alone: an event and a reward per control step."""

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        state = np.asarray(observation.state)
        future: Future[Answer] = Future()
        result: Any = state[:, 1]
        if kind == "explore":
            event, reward = (keys[:, [0]] >> np.array([0, 8])) % 5, (keys[:, [1]] % 7) + [0, 1]
            actions: Any = np.stack([np.array(EVENTS)[event], reward], -1).astype(np.float32)
            result = PolicySample(actions=actions, trace=keys, log_prob=result, value=result)
        future.set_result(Answer(result=result, policy_version=0))
        return future


@functools.cache
def counter_stepper() -> DeviceStepper:
    table = TokenTable(
        tokens=stand_in(np.array([[1], [2]], np.int32)), mask=stand_in(np.ones((2, 1), bool))
    )
    mesh = make_mesh(parse_layout("colocated=1").roles["simulation"])
    env: Any = CounterEnv()
    return DeviceStepper(env, table, num_envs=E, num_executed=2, mesh=mesh)


def make_device(queue: Any, *, overlap: bool) -> Made:
    """Two groups of counting worlds."""
    groups: Any = [
        DeviceEnvGroup(counter_stepper(), name=name, key=jax.random.key(index))
        for index, name in enumerate("ab")
    ]
    clients = [KeyPolicyClient(group.name) for group in groups]
    return make(groups, queue, clients=clients, overlap=overlap)


def trajectories(queue: FakeQueue) -> dict[tuple[str, int], Any]:
    """By group and its segment, on the host."""
    return {
        (item.info.group, item.info.next_segment - 1): jax.device_get(item.payload)
        for item in queue.items
    }


def test_the_schedule_does_not_change_what_is_experienced() -> None:
    """In lockstep, side by side in threads, and after a restart from a snapshot."""
    queues = [TicketsForEach(4) for _ in range(3)]
    make_device(queues[0], overlap=False).run()
    threads = make_device(queues[1], overlap=True).start()
    assert threads.join(TIMEOUT_S) and threads.error is None
    lockstep, overlapping = trajectories(queues[0]), trajectories(queues[1])
    assert set(lockstep) == {(name, segment) for name in "ab" for segment in range(4)}
    for name, seen in (("terminated", True), ("truncated", True), ("valid", False)):
        assert any((getattr(x, name) == seen).any() for x in lockstep.values())
    jax.tree.map(np.testing.assert_array_equal, overlapping, lockstep)

    ends = {
        item.info.group: GroupSnapshot(next_segment=2, end_state=item.info.end_state)
        for item in queues[0].items
        if item.info.next_segment == 2
    }
    restarted = make_device(queues[2], overlap=True)
    restarted.simulator.restore(ends)
    restarted.run()
    again = trajectories(queues[2])
    assert set(again) == {(name, segment) for name in "ab" for segment in range(2, 6)}
    for name, segment in itertools.product("ab", (2, 3)):
        expected = lockstep[name, segment]
        jax.tree.map(np.testing.assert_array_equal, again[name, segment], expected)
