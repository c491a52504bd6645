"""The simulation of a run against closed forms."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_system import NOTHING, costs, one, schedule, system

from jaxvla.scaling.simulate import simulate

_BARRIERS = {"overlap_training": False}


def _lognormal(sigma: float, count: int = 400) -> np.ndarray:
    """Mean 1."""
    random = np.random.default_rng(0)
    samples = random.lognormal(-(sigma**2) / 2, sigma, count)
    return samples / samples.mean()


def _largest_of(samples: np.ndarray, count: int) -> float:
    """Mean of the largest of `count` draws with replacement: sum over the order statistics of
    x_(i) * ((i / n)^count - ((i - 1) / n)^count)."""
    steps = np.linspace(0.0, 1.0, len(samples) + 1) ** count
    return float(np.sort(samples) @ np.diff(steps))


@pytest.mark.parametrize(("num_groups", "sigma"), [(4, 0.3), (8, 0.6)])
def test_synchronous_is_the_slowest_group_and_training(num_groups: int, sigma: float):
    """B / (E[max of N] + T_train + T_sync)."""
    samples = _lognormal(sigma)
    result = simulate(
        system(
            num_groups,
            schedule=schedule(**_BARRIERS),
            trajectories_per_update=num_groups,
            num_updates=301,
        ),
        costs(chunk_s={1: samples}, train_s={num_groups: one(1.0)}, publish_s=one(0.25)),
    )
    exact_s = _largest_of(samples, num_groups) + 1.0 + 0.25
    error_s = 4.0 * result.update_std_s / math.sqrt(300)
    assert error_s < 0.1 * exact_s
    assert result.update_s == pytest.approx(exact_s, abs=error_s)
    assert result.env_steps_per_s == pytest.approx(num_groups / result.update_s)
    assert result.staleness_max == result.staleness_mean == 0.0


@pytest.mark.parametrize(("train_s", "slower"), [(0.1, "simulation"), (2.0, "learning")])
def test_asynchronous_reaches_the_slower_side(train_s: float, slower: str):
    """min(N / E[d], B / (T_train + T_sync)), for long enough queues; never above."""
    result = simulate(
        system(
            8,
            schedule=schedule(max_staleness=8, window=32),
            trajectories_per_update=8,
            num_updates=151,
        ),
        costs(chunk_s={1: _lognormal(0.6)}, train_s={8: one(train_s)}, publish_s=one(0.1)),
    )
    bounds = {"simulation": 8.0, "learning": 8.0 / (train_s + 0.1)}
    assert min(bounds, key=bounds.__getitem__) == slower
    assert result.env_steps_per_s == pytest.approx(bounds[slower], rel=0.03)
    assert result.busy[slower] > 0.95
    assert result.staleness_max <= result.staleness_bound


def _repairmen(num_clients: int, think_s: float, service_s: float) -> float:
    """Requests per second of a closed loop M/M/1//N: service rate * (1 - p_0), with
    1 / p_0 = sum_k N! / (N - k)! (service / think)^k.
    https://en.wikipedia.org/wiki/Machine-repair_problem"""
    ratio = service_s / think_s
    weights = [math.perm(num_clients, k) * ratio**k for k in range(num_clients + 1)]
    return (1.0 - 1.0 / sum(weights)) / service_s


@pytest.mark.parametrize("service_s", [0.1, 0.5])
def test_a_server_is_busy_as_queueing_theory_says(service_s: float):
    random, num_groups, num_chunks = np.random.default_rng(1), 4, 50
    think, service = (random.exponential(size=4000) for _ in range(2))
    result = simulate(
        system(
            num_groups,
            segment_length=num_chunks,
            trajectories_per_update=num_groups,
            num_updates=61,
        ),
        costs(
            num_chunks=num_chunks,
            chunk_s={1: think / think.mean()},
            service_s={1: service_s * service / service.mean()},
            train_s={num_groups * num_chunks: NOTHING},
        ),
    )
    exact = _repairmen(num_groups, 1.0, service_s)
    # Groups that wait for a ticket do not ask: a little below the closed loop of all.
    assert result.env_steps_per_s == pytest.approx(exact, rel=0.03)
    assert result.busy["serving"] == pytest.approx(exact * service_s, rel=0.03)


@pytest.mark.parametrize("num_cores", [1.0, 2.0])
def test_stages_that_share_cores_slow_each_other(num_cores: float):
    """Four groups of one thread each and nothing else: so many cores, so many steps."""
    result = simulate(
        system(
            4,
            devices=["host"] * 4,
            cores={"host": num_cores},
            segment_length=10,
            trajectories_per_update=4,
        ),
        costs(num_chunks=10, chunk_s={1: one(1.0)}, train_s={40: NOTHING}),
    )
    assert result.env_steps_per_s == pytest.approx(num_cores, rel=1e-6)
    assert result.device_busy["host"] == pytest.approx(1.0)
    assert result.busy["simulation"] == pytest.approx(1.0)


def test_a_stage_alone_on_shared_cores_takes_its_time():
    names: dict[str, Any] = {"server_devices": (("host",),), "learner_devices": ("host",)}
    result = simulate(
        system(1, devices=["host"], cores={"host": 2.0}, schedule=schedule(**_BARRIERS), **names),
        costs(
            chunk_s={1: one(3.0)},
            service_s={1: one(2.0)},
            train_s={1: one(5.0)},
            cores={"simulate": 8.0, "infer": 1.0, "train": 1.5},
        ),
    )
    assert result.update_s == pytest.approx(10.0)
    assert result.device_busy["host"] == pytest.approx((3.0 * 2 + 2.0 * 1 + 5.0 * 1.5) / 20.0)


@pytest.mark.parametrize("shared", [False, True])
def test_stages_on_one_device_take_turns(shared: bool):
    names = ("all",) if shared else ("learning",)
    result = simulate(
        system(
            1, devices=["all"], server_devices=(("all",),), learner_devices=names, segment_length=10
        ),
        costs(
            num_chunks=10,
            chunk_s={1: one(1.0)},
            service_s={1: one(0.5)},
            train_s={10: one(6.0)},
        ),
    )
    assert result.update_s == pytest.approx(21.0 if shared else 15.0)
    assert result.device_busy["all"] == pytest.approx(1.0)


def test_streamed_training_hides_behind_simulation():
    settings_: dict[str, Any] = {"trajectories_per_update": 4, "num_updates": 6}
    expensive = costs(
        chunk_s={1: one(1.0)},
        train_s={4: one(2.0)},
        gradient_s={1: one(0.5)},
        apply_s=one(0.25),
    )
    apart = schedule(**_BARRIERS)
    whole = simulate(system(1, schedule=apart, **settings_), expensive)
    parts = simulate(
        system(1, schedule=schedule(stream_microbatches=True, **_BARRIERS), **settings_), expensive
    )
    assert whole.update_s == pytest.approx(4.0 + 2.0)
    assert parts.update_s == pytest.approx(4.0 + 0.5 + 0.25)


def test_batches_wait_for_the_trigger_and_no_longer_than_they_may():
    """Two groups out of step by half a second: served together if the first one is held back."""
    two: dict[str, Any] = {"buckets": (1, 2), "max_batch": 2, "trigger_rows": 2}
    samples = costs(
        num_chunks=20,
        chunk_s={1: one(1.0, 1.5)},
        service_s={1: one(0.1), 2: one(0.1)},
        train_s={40: NOTHING},
    )
    settings_: dict[str, Any] = {
        "trajectories_per_update": 2,
        "num_updates": 20,
        "segment_length": 20,
    }
    together = simulate(system(2, max_wait_s=10.0, **two, **settings_), samples)
    alone = simulate(system(2, max_wait_s=1e-3, **two, **settings_), samples)
    assert together.rows_per_batch > 1.8
    assert together.rows_per_batch > alone.rows_per_batch
    assert alone.env_steps_per_s > together.env_steps_per_s


def test_lockstep_asks_for_all_groups_at_once():
    """T * (service + groups one after the other) + training."""
    result = simulate(
        system(
            3,
            segment_length=7,
            buckets=(3,),
            max_batch=3,
            schedule=schedule(overlap_training=False, overlap_rollout=False),
            trajectories_per_update=3,
        ),
        costs(
            num_chunks=7,
            num_values=1,
            chunk_s={1: one(2.0)},
            service_s={3: one(0.5)},
            value_s={3: one(0.25)},
            train_s={21: one(4.0)},
        ),
    )
    assert result.rows_per_batch == 3.0
    assert result.update_s == pytest.approx(7 * (3 * 2.0 + 0.5) + 0.25 + 4.0)


def test_busy_and_waiting_are_all_of_the_time():
    result = simulate(
        system(3, segment_length=5, trajectories_per_update=2, num_updates=30),
        costs(
            num_chunks=5,
            chunk_s={1: _lognormal(0.5)},
            service_s={1: one(0.2)},
            train_s={10: one(3.0)},
            publish_s=one(0.5),
            between_s=one(0.1),
        ),
    )
    for role, num_threads in (("simulation", 3), ("serving", 1), ("learning", 1)):
        activity = result.activities[role]
        assert activity.thread_s == pytest.approx(num_threads * 29 * result.update_s)
        shares = sum(activity.waiting_fractions.values()) + activity.busy_fraction
        assert shares == pytest.approx(1.0)
    learning = result.activities["learning"].busy_s
    assert learning["publish"] / learning["train"] == pytest.approx(0.5 / 3.0)


@given(
    num_groups=st.integers(1, 4),
    per_update=st.integers(1, 2),
    max_staleness=st.integers(0, 3),
    window=st.integers(1, 6),
    interval=st.integers(1, 4),
    overlap_rollout=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_the_bound_holds_and_a_seed_decides_everything(
    num_groups: int,
    per_update: int,
    max_staleness: int,
    window: int,
    interval: int,
    overlap_rollout: bool,
    seed: int,
):
    plan = system(
        num_groups,
        segment_length=2,
        buckets=(num_groups,),
        max_batch=num_groups,
        schedule=schedule(
            max_staleness=max_staleness,
            window=window,
            publish_interval=min(interval, max_staleness + 1),
            overlap_rollout=overlap_rollout,
        ),
        trajectories_per_update=per_update * num_groups,
        num_updates=6,
        is_endless=False,
    )
    samples = costs(
        num_chunks=2,
        chunk_s={1: _lognormal(1.0, 30)},
        service_s={num_groups: one(0.1, 0.3)},
        train_s={2 * per_update * num_groups: one(0.5, 2.0)},
        publish_s=one(0.1),
    )
    result = simulate(plan, samples, seed=seed)
    assert result.staleness_mean <= result.staleness_max <= result.staleness_bound
    assert result == simulate(plan, samples, seed=seed)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match=r"train_s: no samples of 1 rows, only of \[2\]"):
        simulate(system(1), costs(train_s={2: NOTHING}))
    with pytest.raises(ValueError, match="num_warmup = 5, num_updates = 5"):
        system(1, num_warmup=5)
    with pytest.raises(ValueError, match="max_batch = 2, the last bucket is 1"):
        system(1, max_batch=2)
    with pytest.raises(ValueError, match="must be a multiple of the 2 env groups"):
        system(2, schedule=schedule(overlap_rollout=False))
