"""Emulated stages on a clock that the test moves."""

import threading

import numpy as np
import pytest

from jaxvla.scaling.emulated_time import EmulatedTime
from jaxvla.scaling.emulation import (
    AffineCost,
    DevicePool,
    EmulatedGroup,
    EmulatedSampler,
    EmulatedTrainFunctions,
    Stage,
    empty_train_state,
)
from jaxvla.simulation.assembler import SegmentAssembler
from jaxvla.simulation.group import Cursor
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.tracing import NullTracer

_LONG_S = 60.0


class Hand(EmulatedTime):
    """Time that sleeping moves, unless it is held."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.is_held = False
        self.waits: list[float] = []
        """Ends of all waits."""

    def now_s(self) -> float:
        return self.time_s

    def sleep_until(self, end_s: float) -> None:
        if end_s > self.time_s:
            self.waits.append(end_s)
            if not self.is_held:
                self.time_s = end_s

    def __enter__(self) -> "Hand":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Bench:
    """A pool with a meter on the same clock."""

    def __init__(self) -> None:
        self.time = Hand()
        self.pool = DevicePool(self.time)
        self.meter = ActivityMeter("simulation", tracer=NullTracer(clock=self.time.now_s))

    def stage(self, name: str = "work", variation: float = 0.0) -> Stage:
        random = np.random.default_rng(0)
        return Stage(name, self.pool, self.meter, variation=variation, random=random)


@pytest.fixture
def bench():
    bench = Bench()
    with bench.meter.thread("test"):
        yield bench


def test_an_idle_pool_starts_at_once(bench: Bench):
    bench.time.time_s = 3.0
    bench.pool.run("a", 2.0, bench.meter)
    assert bench.time.waits == [5.0]
    bench.time.time_s = 9.0
    bench.pool.run("b", 1.0, bench.meter)
    assert bench.time.waits == [5.0, 10.0]
    assert bench.pool.busy_s(9.5) == {"a": 2.0, "b": 0.5}
    assert bench.pool.busy_s(10.0) == {"a": 2.0, "b": 1.0}


def test_a_busy_pool_runs_one_after_the_other(bench: Bench):
    bench.time.is_held = True  # as if all three had asked at time 0
    for work_s in (5.0, 3.0, 2.0):
        bench.pool.run("a", work_s, bench.meter)
    # The second waits for the first to end, then for itself, and so on.
    assert bench.time.waits == [5.0, 5.0, 8.0, 8.0, 10.0]


def test_waiting_for_the_pool_is_no_work(bench: Bench):
    bench.time.is_held = True
    bench.pool.run("a", 5.0, bench.meter)
    bench.time.is_held = False
    with bench.meter.busy("b"):
        bench.pool.run("b", 3.0, bench.meter)
    activity = bench.meter.snapshot().total
    assert activity.waiting_s == {"devices": 5.0}
    assert activity.busy_s["b"] == 3.0


def test_threads_share_a_pool_without_overlap():
    """Whatever the order, the last of n equal pieces ends at n times the length."""
    bench = Bench()
    bench.time.is_held = True
    ready = threading.Barrier(8)

    def run() -> None:
        with bench.meter.thread("worker"):
            ready.wait(_LONG_S)
            bench.pool.run("a", 2.0, bench.meter)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LONG_S)
        assert not thread.is_alive()
    # Every end but the last is also the start of somebody else.
    assert sorted(bench.time.waits) == sorted([*range(2, 17, 2), *range(2, 15, 2)])
    assert bench.pool.busy_s(7.0) == {"a": 7.0}
    assert bench.pool.busy_s(20.0) == {"a": 16.0}


def test_lengths_have_the_mean_and_variation_asked_for(bench: Bench):
    stage = bench.stage(variation=0.3)
    lengths, before_s = [], 0.0
    for _ in range(4000):
        stage.run(2.0)
        lengths.append(bench.time.time_s - before_s)
        before_s = bench.time.time_s
    # Standard errors: 0.6 / sqrt(4000) = 0.0095 of the mean, about 1.4 % of the deviation.
    assert np.mean(lengths) == pytest.approx(2.0, abs=0.04)
    assert np.std(lengths) == pytest.approx(0.6, rel=0.06)
    assert min(lengths) > 0.0


def test_without_variation_lengths_are_exact(bench: Bench):
    bench.stage().run(2.5)
    assert bench.time.time_s == 2.5


def test_affine_cost():
    cost = AffineCost.of(10.0, 4, fixed_s=2.0)
    assert [cost.seconds(rows) for rows in (1, 2, 4, 8)] == [4.0, 6.0, 10.0, 18.0]


def test_group_makes_trajectories_of_full_length(bench: Bench):
    group = EmulatedGroup("g", bench.stage(), num_envs=3, num_executed=10, step_s=1.5)
    sampler = EmulatedSampler(bench.stage(), cost=AffineCost(fixed_s=0.0, row_s=0.5), max_rows=5)
    observation, assembler = group.reset(Cursor()), SegmentAssembler()
    for chunk in range(4):
        sample, bucket = sampler.run("explore", {}, [observation], np.zeros((3, 2), np.uint32))
        assert bucket == 3
        result = group.step_chunk(sample.actions, Cursor(chunk=chunk))
        assembler.add(observation, sample, 7, result)
        observation = result.observation
    assert len(assembler.bootstrap_queries(observation)) == 1
    values, _ = sampler.run("value", {}, [observation], np.zeros((3, 2), np.uint32))
    trajectory = assembler.finish([values])
    assert trajectory.reward.shape == trajectory.value.shape == (4, 3)
    assert assembler.counts()[0] == 4 * 3 * 10
    assert assembler.versions() == (7, 7)
    assert bench.time.time_s == 4 * 1.5 + 5 * 3 * 0.5


def test_training_takes_its_time_and_changes_nothing(bench: Bench):
    functions = EmulatedTrainFunctions(bench.stage(), step_s=2.0, gradient_s=3.0)
    state = empty_train_state()
    same, metrics = functions.step(state, None, None, 0)
    assert same is state and np.isfinite(metrics["grad_norm"])
    assert bench.time.time_s == 2.0
    part = functions.gradient(state.params, *functions.targets(state.params, None, 0))
    same, metrics = functions.apply(state, functions.accumulate(part, part))
    assert same is state and np.isfinite(metrics["grad_norm"])
    assert bench.time.time_s == 5.0
