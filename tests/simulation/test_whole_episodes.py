"""Groups of episodes that begin alike, one per env and trajectory; padding after their ends."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv
from host_group_factory import EXECUTED, LIMITS, SEED, STEPS, TASK, GroupFactory, fake
from scripted_group import (
    GOES_ON,
    INVALID,
    TERMINATED,
    TRUNCATED,
    ScriptedGroup,
    number_of,
    numbers,
)
from simulator_run import FakeClient, FakeQueue, Log, TicketsForEach, make
from test_assembler import fill

from jaxvla.envs.tabletop import Tabletop, TabletopConfig
from jaxvla.layout import parse_layout
from jaxvla.sharding import make_mesh
from jaxvla.simulation.group import Cursor, DeviceEnvGroup, DeviceStepper
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import stand_in

E, G, HORIZON = 8, 4, 2
TABLE = TokenTable(
    tokens=stand_in(np.array([[1], [2]], np.int32)), mask=stand_in(np.ones((2, 1), bool))
)
T = 3
"""Chunks of the longest episode: five control steps, two at a time."""


# --------------------------------------------------------------------------- device envs


@functools.cache
def stepper(num_devices: int = 1, group_size: int = G) -> DeviceStepper:
    env: Any = CounterEnv()
    return DeviceStepper(
        env,
        TABLE,
        num_envs=E,
        num_executed=HORIZON,
        mesh=make_mesh(parse_layout(f"colocated={num_devices}").roles["simulation"]),
        group_size=group_size,
    )


def device_group(seed: int = 0, **how: int) -> DeviceEnvGroup:
    return DeviceEnvGroup(stepper(**how), name="group", key=jax.random.key(seed))


def actions(*kinds: float, reward: float = 0.0) -> np.ndarray:
    """Chunks float32 [E, HORIZON, 2] whose first step is of each env's kind, and then walks."""
    made = np.full((E, HORIZON, 2), reward, np.float32)
    made[:, :, 0] = WALK
    made[:, 0, 0] = kinds or (WALK,) * E
    return made


def begins(group: Any, segment: int = 0) -> Any:
    return jax.device_get(group.reset(Cursor(segment=segment)))


@pytest.mark.parametrize("num_devices", [1, 4])
def test_neighbours_begin_alike_to_the_bit(num_devices: int) -> None:
    """Every leaf of the state and of the pictures; four devices split groups of four envs."""
    group = device_group(num_devices=num_devices)
    seen, state = begins(group), group.state()
    for leaf in jax.tree.leaves((seen, state)):
        np.testing.assert_array_equal(leaf, np.repeat(leaf[::G], G, axis=0))
    identities = [seen.state[i, 0] for i in range(0, E, G)]
    others = [begins(device_group(seed), segment) for seed, segment in ((0, 1), (1, 0))]
    identities += [x.state[i, 0] for x in others for i in range(0, E, G)]
    assert len(set(identities)) == len(identities)
    again = device_group(num_devices=1)
    again.reset(Cursor(segment=5))
    jax.tree.map(np.testing.assert_array_equal, begins(again), seen)


@pytest.mark.slow
def test_tabletop_episodes_begin_alike_to_the_bit() -> None:
    """A real scene: what is compiled for a batch of worlds rounds alike in every row, or not."""
    env: Any = Tabletop(TabletopConfig(tasks=("reach", "push"), image_size=16))
    num = len(env.spec.instructions)
    table = TokenTable(
        tokens=stand_in(np.arange(num, dtype=np.int32)[:, None]),
        mask=stand_in(np.ones((num, 1), bool)),
    )
    mesh = make_mesh(parse_layout("colocated=1").roles["simulation"])
    made = DeviceStepper(env, table, num_envs=6, num_executed=2, mesh=mesh, group_size=3)
    group = DeviceEnvGroup(made, name="group", key=jax.random.key(0))
    seen, state = begins(group), group.state()
    for leaf in jax.tree.leaves((seen, state)):
        np.testing.assert_array_equal(leaf, np.repeat(leaf[::3], 3, axis=0))
    assert not np.array_equal(seen.images[0], seen.images[3])


def test_a_device_env_stands_still_until_the_next_reset() -> None:
    group = device_group()
    group.reset_to(np.ones(E, int), np.arange(E))  # limit of five steps
    kinds = (SUCCEED, FAIL, EXPLODE) + (WALK,) * (E - 3)
    first = jax.device_get(group.step_chunk(actions(*kinds, reward=1.0), Cursor()))
    np.testing.assert_array_equal(first.num_steps[:4], [1, 1, 2, 2])
    np.testing.assert_array_equal(first.success[:4], [True, False, False, False])
    np.testing.assert_array_equal(first.terminated[:4], [True, True, False, False])
    np.testing.assert_array_equal(first.invalid[:4], [False, False, True, False])
    held = jax.device_get(group.state())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(held))
    told = [
        jax.device_get(group.step_chunk(actions(reward=1.0), Cursor(chunk=1 + i))) for i in range(3)
    ]
    for result in told:
        for name in ("reward", "num_steps", "terminated", "truncated", "success", "invalid"):
            assert not np.any(np.asarray(getattr(result, name))[:3]), name
        np.testing.assert_array_equal(result.episode_return[:3], first.episode_return[:3])
        seen, shown = result.observation, first.observation
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:3], b[:3]), seen, shown)
    np.testing.assert_array_equal([x.num_steps[3] for x in told], [2, 1, 0])
    np.testing.assert_array_equal([x.truncated[3] for x in told], [False, True, False])
    later = jax.device_get(group.state())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:3], b[:3]), later, held)
    fresh = begins(group, segment=1)
    np.testing.assert_array_equal(fresh.images, 0)
    assert np.asarray(group.step_chunk(actions(), Cursor(segment=1)).num_steps).min() == HORIZON


# ----------------------------------------------------------------------------- host envs


@pytest.fixture
def make_host(tmp_path: pathlib.Path) -> Iterator[GroupFactory]:
    factory = GroupFactory(tmp_path)
    yield factory
    factory.close()


def column(observation: Any, entry: int) -> list[float]:
    return observation.state[:, entry].tolist()


def test_host_neighbours_begin_alike(make_host: GroupFactory) -> None:
    """Two env groups of two starts each: four starts take turns at three tasks."""
    groups = [make_host(4, first_env=first, group_size=2, num_starts=4).group for first in (0, 4)]
    seeds = []
    for segment in range(4):
        seen = [group.reset(Cursor(segment=segment)) for group in groups]
        found = [x for y in seen for x in column(y, TASK)]
        expected = [(start + 4 * segment) % 3 for start in range(4)]
        assert found == np.repeat(expected, 2).tolist()
        assert [g.instruction(2) for g in groups] == ["do " + "abc"[expected[i]] for i in (1, 3)]
        drawn = [x for y in seen for x in column(y, SEED)]
        assert drawn == np.repeat(drawn[::2], 2).tolist()
        seeds += drawn[::2]
        for observation in seen:
            np.testing.assert_array_equal(observation.images[::2], observation.images[1::2])
    assert len(set(seeds)) == len(seeds) == 16
    # A function of the run's seed and the segment, whatever came before.
    again = make_host(1, first_env=5, group_size=2, num_starts=4).group.reset(Cursor(segment=2))
    expected = groups[1].reset(Cursor(segment=2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), again, expected)
    other = make_host(1, group_size=2, num_starts=4, seed=1).group.reset(Cursor())
    assert not set(column(other, SEED)) & set(seeds)


def test_as_many_starts_as_tasks_keep_their_tasks(make_host: GroupFactory) -> None:
    group = make_host(2, first_env=3, group_size=2, num_starts=3).group
    for segment in range(3):
        assert column(group.reset(Cursor(segment=segment)), TASK) == [1, 2]


def test_a_host_env_stands_still_until_the_next_reset(make_host: GroupFactory) -> None:
    """Nothing is sent to it: a worker that is asked to hang after its end would not answer."""
    made = make_host(3, group_size=3, num_starts=3, first_env=3)  # task 1 limits to four steps
    assert LIMITS[1] == 2 * EXECUTED
    made.group.reset(Cursor())
    first = made.step(fake.SUCCEED, fake.EXIT, fake.STEP, reward=0.5)
    np.testing.assert_array_equal(first.terminated, [True, False, False])
    np.testing.assert_array_equal(first.invalid, [False, True, False])
    second = made.step(fake.HANG, fake.HANG, fake.STEP, reward=0.5)
    np.testing.assert_array_equal(second.num_steps, [0, 0, EXECUTED])
    np.testing.assert_array_equal(second.truncated, [False, False, True])
    np.testing.assert_array_equal(second.reward, [0.0, 0.0, 1.0])
    third = made.step(fake.HANG, fake.HANG, fake.HANG)
    for result in (second, third):
        for name in ("terminated", "success", "invalid"):
            assert not np.any(getattr(result, name)), name
    assert not np.any(third.num_steps) and not np.any(third.truncated)
    assert made.restarts() == {"exit": 1}
    seen = made.group.reset(Cursor(segment=1))
    assert column(seen, STEPS) == [0, 0, 0]
    np.testing.assert_array_equal(made.step(*[fake.STEP] * 3).num_steps, EXECUTED)


# ----------------------------------------------------------------------------- assembling

STANDS = GOES_ON
"""How a group reports an env whose episode is over."""
SCRIPT = np.array(
    [
        [TERMINATED, GOES_ON, INVALID, GOES_ON],
        [STANDS, TRUNCATED, STANDS, GOES_ON],
        [STANDS, STANDS, STANDS, TERMINATED],
    ]
)


def assembled(script: np.ndarray, num_chunks: int) -> Any:
    """Of a group whose envs stand still after their ends; they go unread from there on."""
    assembler = fill(script[:num_chunks])
    over = np.zeros(script.shape[1], bool)
    for result, row in zip(assembler._results, script, strict=False):
        result.num_steps[over] = 0
        result.reward[over] = 0.0
        over |= row != GOES_ON
    return assembler


def test_what_follows_an_episode_is_not_valid() -> None:
    trajectory = assembled(SCRIPT, T).finish([], length=T)
    expected = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(trajectory.valid, expected)
    np.testing.assert_array_equal(trajectory.bootstrap_value[trajectory.valid], 0.0)


@pytest.mark.parametrize("is_on_device", [False, True])
def test_a_short_trajectory_is_filled_up(is_on_device: bool) -> None:
    script = SCRIPT[:, :3]
    assembler = assembled(script, 2)
    assert assembler.all_ended and not assembled(SCRIPT, 2).all_ended
    if is_on_device:
        placed = [jax.device_put(x) for x in assembler._observations]
        assembler._observations = placed
    short, filled = assembler.finish([]), assembler.finish([], length=5)
    for before, after in zip(jax.tree.leaves(short), jax.tree.leaves(filled), strict=True):
        assert after.shape == (5, *before.shape[1:]) and after.dtype == before.dtype
        np.testing.assert_array_equal(after[:2], before)
    np.testing.assert_array_equal(filled.valid[2:], False)
    np.testing.assert_array_equal(filled.reward[2:], 0.0)
    shown = number_of(filled.observation)
    np.testing.assert_array_equal(shown[2:], np.repeat(shown[[1]], 3, axis=0))
    assert assembler.counts().queries == 2 * 3  # padding asks nothing


def test_uniform_groups() -> None:
    """Of returns, whatever the way to them; envs that failed count in no group."""
    ended = np.full((1, 8), TERMINATED)
    ended[0, [5, 6, 7]] = INVALID
    assembler = fill(np.concatenate([np.full((1, 8), GOES_ON), ended]))
    first, second = (result.reward for result in assembler._results)
    first[:], second[:] = 0.0, 0.0
    first[[0, 5]], second[1] = 1.0, 1.0  # 1 1 0 0 | 0 ? ? ?
    np.testing.assert_array_equal(assembler.is_uniform(4), [False, True])
    np.testing.assert_array_equal(assembler.is_uniform(2), [True, True, True, True])


# ------------------------------------------------------------------------------- programs


class Episodic(ScriptedGroup):
    """Its script is that of one segment, and starts anew with every reset."""

    def reset(self, cursor: Cursor) -> Any:
        self.chunk = cursor.segment * len(self.script)
        return super().reset(cursor)

    def state(self) -> Any:
        raise AssertionError("between whole episodes there is nothing to save")

    def load_state(self, state: Any) -> Any:
        raise AssertionError("nor to continue")


ONE = np.array([[TERMINATED, GOES_ON], [GOES_ON, TERMINATED], [GOES_ON, GOES_ON]])
"""Two of three chunks are needed."""


def test_a_group_is_reset_asked_until_all_have_ended_and_no_value_is() -> None:
    log: Log = []
    queue = FakeQueue(2, log)
    make([Episodic("a", ONE, log)], queue, group_size=2).run()
    expected: Log = []
    for segment in range(2):
        expected += [("reset", "a", segment), ("admit", "a"), ("join", "a")]
        for chunk in range(2):
            expected += [("explore", "a"), ("step", "a", segment, chunk)]
        expected += [("leave", "a"), ("put", "a")]
    assert log == [*expected, ("reset", "a", 2)]  # ready for the next ticket
    for segment, item in enumerate(queue.items):
        assert item.payload.reward.shape == (T, 2)
        first = numbers(segment * T, 2)
        np.testing.assert_array_equal(number_of(item.payload.observation)[0], first)
        assert item.info.end_state == {} and item.info.next_segment == segment + 1
        assert item.info.num_queries == 4
        assert len(item.info.is_uniform) == 1


def test_in_lockstep_a_lane_whose_episodes_have_ended_leaves() -> None:
    """Else the server would wait for its next request, and the other lane for the server."""
    log: Log = []
    groups = [Episodic("a", ONE[:, :1], log), Episodic("b", ONE[:, 1:], log)]
    make(groups, FakeQueue(2, log), overlap=False, group_size=1).run()
    after = log[log.index(("step", "b", 0, 0)) + 1 :]
    assert after[:3] == [("leave", "a"), ("explore", "b"), ("step", "b", 0, 1)]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_restart_makes_the_trajectories_that_would_have_followed(overlap: bool) -> None:
    def made(count: int, **options: Any) -> Any:
        queue = TicketsForEach(count)
        groups = [Episodic(name, ONE) for name in "ab"]
        simulator = make(groups, queue, group_size=2, overlap=overlap)
        if options:
            simulator.simulator.restore(options["snapshots"])
        simulator.run()
        keys = [
            [k.tolist() for kind, _, k in c.queries if kind == "explore"] for c in simulator.clients
        ]
        return {(x.info.group, x.info.next_segment): x for x in queue.items}, keys

    whole, keys = made(3)
    snapshots = {
        name: GroupSnapshot(next_segment=1, end_state=whole[name, 1].info.end_state)
        for name in "ab"
    }
    rest, later = made(2, snapshots=snapshots)
    assert rest.keys() == {(name, n) for name in "ab" for n in (2, 3)}
    for name, item in rest.items():
        jax.tree.map(np.testing.assert_array_equal, item.payload, whole[name].payload)
    assert later == [x[2:] for x in keys]


def test_noise_differs_between_envs_that_began_alike() -> None:
    made = make([Episodic("a", ONE)], FakeQueue(1), group_size=2)
    made.run()
    client: FakeClient = made.clients[0]
    rows = [tuple(row) for _, _, keys in client.queries for row in keys.tolist()]
    assert len(set(rows)) == len(rows) == 4
