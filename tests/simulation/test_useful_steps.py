"""Nothing is simulated after the end of an episode, and useful steps are those trained on."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv
from host_group_factory import EXECUTED, HORIZON, LIMITS, GroupFactory, fake

from jaxvla.layout import parse_layout
from jaxvla.sharding import make_mesh
from jaxvla.simulation.assembler import SegmentAssembler
from jaxvla.simulation.group import Cursor, DeviceEnvGroup, DeviceStepper, EnvGroup
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import PolicySample, stand_in

NUM_CHUNKS = 12


def experience(group: EnvGroup, kinds: np.ndarray) -> SegmentAssembler:
    """Runs chunks of action kinds [T, E, H]; the second component of an action is 0."""
    assembler, observation = SegmentAssembler(), group.reset(Cursor())
    for chunk, kind in enumerate(kinds):
        actions: Any = np.stack([kind, np.zeros_like(kind)], -1).astype(np.float32)
        zero: Any = np.zeros(len(kind), np.float32)
        sample = PolicySample(actions=actions, trace=zero, log_prob=zero, value=zero)
        result = group.step_chunk(actions, Cursor(chunk=chunk))
        assembler.add(observation, sample, 0, result)
        observation = result.observation
    return assembler


# --------------------------------------------------------------------------- device envs


def device_group(num_envs: int, num_executed: int) -> DeviceEnvGroup:
    table = TokenTable(
        tokens=stand_in(np.array([[1], [2]], np.int32)), mask=stand_in(np.ones((2, 1), bool))
    )
    env: Any = CounterEnv()
    stepper = DeviceStepper(
        env,
        table,
        num_envs=num_envs,
        num_executed=num_executed,
        mesh=make_mesh(parse_layout("colocated=1").roles["simulation"]),
    )
    return DeviceEnvGroup(stepper, name="group", key=jax.random.key(0))


def counted(assembler: SegmentAssembler, kinds: np.ndarray) -> tuple[int, int]:
    """(control steps, useful ones) by a loop over the worlds, given the tasks they played."""
    tasks = np.stack([result.task for result in assembler._results])
    total = useful = 0
    for world in range(kinds.shape[1]):
        age = 0
        for chunk, task in zip(kinds[:, world], tasks[:, world], strict=True):
            num_steps, is_over, has_exploded = 0, False, False
            for kind in chunk:
                if is_over:
                    break
                num_steps, age = num_steps + 1, age + 1
                has_exploded |= kind == EXPLODE
                is_over = kind in (SUCCEED, FAIL)
                is_over |= age == CounterEnv.spec.max_episode_steps[task]
            age = 0 if is_over or has_exploded else age
            total += num_steps
            useful += 0 if has_exploded else num_steps
    return total, useful


def test_device_envs_count_what_a_loop_executes() -> None:
    random = np.random.default_rng(0)
    weights = {WALK: 0.7, SUCCEED: 0.1, FAIL: 0.1, EXPLODE: 0.1}
    kinds = random.choice(list(weights), p=list(weights.values()), size=(NUM_CHUNKS, 4, 3))
    assembler = experience(device_group(num_envs=4, num_executed=3), kinds)
    counts = assembler.counts()
    assert counts[:2] == counted(assembler, kinds)
    # The script has ends and explosions.
    assert counts.useful_env_steps < counts.env_steps < kinds.size
    assert counts.queries == NUM_CHUNKS * 4 and counts.invalid_samples > 0


def test_a_device_env_stands_still_after_success() -> None:
    """Not one leaf of its state changes for the rest of the chunk."""
    group = device_group(num_envs=2, num_executed=4)
    kinds = np.full((1, 2, 4), WALK)
    kinds[0, 0, 1] = SUCCEED
    assembler = experience(group, kinds)
    assert assembler.counts()[:2] == (2 + 3, 2 + 3)  # the other one is a short or a long episode
    for leaf in jax.tree.leaves(jax.device_get(group._path)):
        for later in (2, 3):
            np.testing.assert_array_equal(leaf[0, later], leaf[0, 1])


# ----------------------------------------------------------------------------- host envs


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Iterator[GroupFactory]:
    factory = GroupFactory(tmp_path)
    yield factory
    factory.close()


def test_host_envs_count_what_they_execute(make: GroupFactory) -> None:
    """Env e of task e succeeds in its chunk `e + 1`, at the first of its control steps."""
    kinds = np.full((3, 3, HORIZON), fake.STEP)
    for env in range(3):
        kinds[min(env + 1, 2), env] = fake.SUCCEED
    made = make(3)
    assembler = experience(made.group, kinds)
    expected = 0
    for env, limit in enumerate(LIMITS):
        age = 0
        for kind in kinds[:, env, 0]:
            num_steps = 1 if kind == fake.SUCCEED else min(EXECUTED, limit - age)
            age += num_steps
            expected += num_steps
            age = 0 if kind == fake.SUCCEED or age == limit else age
    assert assembler.counts() == (expected, expected, 9, 0, 0)
    lengths = int(assembler.episodes().length.sum())
    assert lengths <= expected  # what is missing are the episodes that still run


def test_steps_of_a_dead_host_env_are_not_useful(make: GroupFactory) -> None:
    kinds = np.full((2, 2, HORIZON), fake.STEP)
    kinds[1, 0] = fake.EXIT
    made = make(2, first_env=1)
    counts = experience(made.group, kinds).counts()
    assert counts.invalid_samples == 1
    assert counts[:2] == (3 * EXECUTED,) * 2  # what the dead one did is not known
