"""Many machines from one: arithmetic by hand, limits, and the paper's larger rows."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_system import NOTHING, costs, one, schedule, system

from jaxvla.scaling.cost_model import (
    BANDS,
    Assumptions,
    Base,
    Deployment,
    at_rows,
    best_num_learning,
    deploy,
    slowest,
)
from jaxvla.scaling.simulate import simulate

_FREE = Assumptions(
    host_gb_per_s=math.inf, reduce_gb_per_s=math.inf, latency_s=0.0, fixed_fraction=0.0
)


def _base(*, weight_bytes: int = 0, **changes: Any) -> Base:
    """Two groups of eight envs, all stages on one device: 2 * 4 * (1 + 0.5) + 3 = 15 s."""
    samples = costs(
        num_chunks=4,
        chunk_s={8: one(1.0)},
        service_s={8: one(0.5)},
        value_s={8: NOTHING},
        train_s={64: one(3.0)},
        gradient_s={},
        weight_bytes=weight_bytes,
    )
    unit = system(
        2,
        devices=["all"] * 2,
        server_devices=(("all",),),
        learner_devices=("all",),
        envs_per_group=8,
        segment_length=4,
        buckets=(8,),
        trigger_rows=8,
        max_batch=8,
        schedule=schedule(overlap_training=False),
        trajectories_per_update=2,
    )
    values: dict[str, Any] = {
        "system": unit,
        "samples": samples,
        "steps_per_update": 6,
        "trajectory_bytes": 1e9,
        "devices_per_unit": 1,
    }
    return Base(**values | changes)


def _run(base: Base, assumptions: Assumptions = _FREE, **deployment: int) -> Any:
    return simulate(*deploy(base, Deployment(**deployment), assumptions))


def test_one_unit_is_the_measured_run():
    base = _base()
    alone, named = simulate(base.system, base.samples), _run(base, num_units=1)
    assert named.device_busy == {"all@0": alone.device_busy["all"]}
    assert dataclasses.replace(named, device_busy=alone.device_busy) == alone
    assert _run(base, num_units=1).update_s == pytest.approx(15.0)


@pytest.mark.parametrize("num_units", [2, 8])
def test_with_free_networks_and_no_variation_units_add_up(num_units: int):
    alone, many = _run(_base(), num_units=1), _run(_base(), num_units=num_units)
    assert many.update_s == pytest.approx(alone.update_s)
    assert many.env_steps_per_s == pytest.approx(num_units * alone.env_steps_per_s)


def test_gradients_take_two_of_the_ring_and_two_latencies_a_level():
    network = dataclasses.replace(_FREE, reduce_gb_per_s=2.0, latency_s=0.01)
    many = _run(_base(weight_bytes=10**9), network, num_units=8)
    reduce_s = 2 * (7 / 8) * 0.5 + 2 * 3 * 0.01
    assert many.update_s == pytest.approx(15.0 + 6 * reduce_s)


def test_strong_scaling_shrinks_calls_by_their_rows():
    # Half the envs: half of every call, as nothing of it is fixed.
    assert _run(_base(), num_units=2, shrink=2).update_s == pytest.approx(7.5)
    fixed = dataclasses.replace(_FREE, fixed_fraction=0.5)
    assert _run(_base(), fixed, num_units=2, shrink=2).update_s == pytest.approx(0.75 * 15.0)
    with pytest.raises(ValueError, match="8 envs per group do not divide by 16"):
        _run(_base(), num_units=16, shrink=16)


def test_separate_units_send_trajectories_and_weights():
    network = dataclasses.replace(_FREE, host_gb_per_s=0.5, latency_s=0.25)
    large, samples = deploy(
        _base(weight_bytes=10**9), Deployment(num_units=4, num_learning=1), network
    )
    assert (large.num_groups, len(large.server_devices)) == (6, 3)
    assert large.learner_devices == ("all@3",)
    assert large.trajectories_per_update == 8
    assert samples.finish_s == pytest.approx(2.0 + 0.25)
    assert samples.pull_s == pytest.approx(2 * (2.0 + 0.25))
    # One unit trains on what four trained on.
    assert samples.train_s[8 * 8 * 4] == pytest.approx(12.0)
    result = simulate(large, samples)
    # Eight trajectories of six groups: two rounds. All groups of a unit share its device.
    assert result.update_s > 12.0 + 12.0
    assert result.staleness_max == 0


def test_the_best_split_balances_rollout_and_training():
    # 6 s of rollout and 1.5 s of training per trajectory: four to one.
    assert best_num_learning(_base(), 10, _FREE) == 2
    assert best_num_learning(_base(), 2, _FREE) == 1
    assert best_num_learning(_base(), 1, _FREE) == 0


def test_sizes_that_were_not_measured():
    two = {8: one(1.0, 3.0), 16: one(2.0, 4.0)}
    assert at_rows(two, 8, 0.0) is two[8]
    # 1 s and an eighth per row; the nearest size in ratio is 16.
    assert at_rows(two, 32, 0.9) == pytest.approx(5.0 / 3.0 * two[16])
    assert at_rows(two, 2, 0.9) == pytest.approx(1.25 / 2.0 * two[8])
    alone = {8: one(1.0, 3.0)}
    assert at_rows(alone, 4, 0.5).mean() == pytest.approx(1.5)
    assert at_rows(alone, 16, 0.0).mean() == pytest.approx(4.0)
    falling = {8: one(3.0), 16: one(1.0)}
    assert at_rows(falling, 4, 0.0) == pytest.approx(3.0)
    steep = {8: one(1.0), 16: one(4.0)}
    assert at_rows(steep, 1, 0.0) > 0.0
    with pytest.raises(ValueError, match="no samples of any size"):
        at_rows({}, 8, 0.0)


@given(
    samples=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=30),
    count=st.integers(1, 300),
)
@settings(deadline=None)
def test_the_slowest_of_many(samples: list[float], count: int):
    drawn = slowest(np.asarray(samples), count)
    assert set(drawn) <= set(samples)
    assert drawn.mean() >= np.mean(samples) - 1e-9 or count == 1
    assert drawn.max() == max(samples) or count == 1


def test_the_slowest_of_many_has_the_mean_of_order_statistics():
    samples = np.random.default_rng(0).exponential(size=20_000)
    # The largest of n exponentials is 1 + 1/2 + ... + 1/n on average.
    exact = samples.mean() * sum(1.0 / k for k in range(1, 17))
    assert slowest(samples, 16).mean() == pytest.approx(exact, rel=0.02)


def test_bands_are_in_order_and_deployments_are_checked():
    rates = [
        _run(_base(weight_bytes=10**10), BANDS[band], num_units=4, shrink=2).env_steps_per_s
        for band in ("low", "mid", "high")
    ]
    assert rates == sorted(rates)
    with pytest.raises(ValueError, match="num_learning = 2"):
        Deployment(num_units=2, num_learning=2)
