"""Reductions against numpy, the name grammar, and the life of a window."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry.metrics import (
    Distribution,
    Last,
    Max,
    Mean,
    MetricRecorder,
    Min,
    Rate,
    Sum,
    Total,
    check_name,
)

# Every key that the contract names, with a value in place of each wildcard.
CONTRACT_NAMES = """
update time_s learner/loss/policy learner/loss/value learner/loss/entropy learner/loss/total
learner/ratio/mean learner/ratio/max learner/clip_fraction learner/approx_kl learner/grad_norm
queue/admitted queue/completed queue/consumed queue/dropped queue/dropped/lease_expired
queue/in_flight queue/depth queue/staleness/min queue/staleness/mean queue/staleness/p95
queue/staleness/max queue/staleness/bound rate/env_steps_per_s rate/useful_env_steps_per_s
rate/chunk_queries_per_s rate/episodes_per_s rate/updates_per_s
utilisation/simulation/busy_fraction utilisation/learning/waiting_on/trajectories_fraction
serving/batch_fill serving/latency_ms/p50 serving/latency_ms/p99 serving/queue_wait_ms/p50
serving/recompiles weights/publish_ms weights/pull_ms weights/bytes train/success_rate
train/return_mean train/episode_length_mean eval/success_rate eval/success_rate/reach
eval/success_rate/KITCHEN_SCENE1_open-it.v2 eval/episodes eval/ci95_low eval/ci95_high
faults/restarts faults/invalid_samples
"""


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def flush(recorder, **extra):
    return recorder.flush(update=1, time_s=2.0, extra=extra)


@pytest.mark.parametrize("name", CONTRACT_NAMES.split())
def test_every_contract_name_is_accepted(name):
    assert check_name(name) == name


BAD_NAMES = [
    "",
    "loss",
    "learner",
    "learner/",
    "learner//loss",
    "learner/Loss",
    "learner/loss total",
    "learner/loss\n",
    "trainer/loss",
    "queue/dropped/Lease",
    "eval/success_rate/A/B",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="metric"):
        check_name(name)


def test_a_misspelt_prefix_gets_a_hint():
    with pytest.raises(ValueError, match="did you mean 'learner'"):
        check_name("lerner/loss")


numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@settings(deadline=None)  # no timed assertions
@given(windows=st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=3))
def test_reductions_equal_numpy_however_values_arrive(windows):
    recorder = MetricRecorder()
    seen = []
    for chunks in windows:
        for chunk in chunks:
            for kind in (Mean, Max, Min, Sum, Total, Last, Distribution):
                recorder.add(f"train/{kind.__name__.lower()}", chunk, kind)
        values = np.concatenate([np.asarray(chunk) for chunk in chunks])
        seen.extend(values)
        record = flush(recorder)
        # float64 sums in another order: 80 values of at most 1e6 round within 1e-7.
        close = {"rel": 1e-9, "abs": 1e-7}
        assert record["train/mean"] == pytest.approx(values.mean(), **close)
        assert record["train/max"] == record["train/distribution/max"] == values.max()
        assert record["train/min"] == record["train/distribution/min"] == values.min()
        assert record["train/sum"] == pytest.approx(values.sum(), **close)
        assert record["train/total"] == pytest.approx(np.sum(seen), **close)
        assert record["train/last"] == values[-1]
        assert record["train/distribution/mean"] == pytest.approx(values.mean(), **close)
        for percent in (50, 95, 99):
            expected = np.percentile(values, percent)
            assert record[f"train/distribution/p{percent}"] == pytest.approx(expected)


def test_rate_divides_by_the_seconds_since_the_last_record():
    clock = FakeClock()
    recorder = MetricRecorder(clock=clock)
    recorder.add("rate/env_steps_per_s", 30, Rate)
    recorder.add("rate/env_steps_per_s", 10, Rate)
    clock.now_s += 4.0
    assert flush(recorder)["rate/env_steps_per_s"] == 10.0
    clock.now_s += 2.0
    assert flush(recorder)["rate/env_steps_per_s"] == 0.0
    recorder.add("rate/env_steps_per_s", 3, Rate)
    clock.now_s += 0.5
    assert flush(recorder)["rate/env_steps_per_s"] == 6.0
    assert math.isnan(flush(recorder)["rate/env_steps_per_s"])  # no time has passed


def test_a_window_without_values():
    recorder = MetricRecorder()
    for kind in (Mean, Max, Min, Distribution, Sum, Total, Last):
        recorder.add(f"train/{kind.__name__.lower()}", 3, kind)
    flush(recorder)
    record = flush(recorder)
    empty = {name for name, value in record.items() if math.isnan(value)}
    suffixes = ("min", "mean", "max", "p50", "p95", "p99")
    distribution = {f"train/distribution/{suffix}" for suffix in suffixes}
    assert empty == {"train/mean", "train/max", "train/min"} | distribution
    assert record["train/sum"] == 0
    assert record["train/total"] == record["train/last"] == 3


def test_an_empty_array_only_declares_the_name():
    recorder = MetricRecorder()
    recorder.add("train/return_mean", np.zeros(0), Mean)
    recorder.add("faults/restarts", [], Total)
    record = flush(recorder)
    assert math.isnan(record["train/return_mean"])
    assert record["faults/restarts"] == 0


@pytest.mark.parametrize("kind", [Mean, Max, Min, Sum, Last])
def test_nan_is_not_hidden(kind):
    recorder = MetricRecorder()
    recorder.add("learner/grad_norm", 1.0, kind)
    recorder.add("learner/grad_norm", math.nan, kind)
    assert math.isnan(flush(recorder)["learner/grad_norm"])


def test_numbers_are_python_numbers_and_counts_stay_whole():
    recorder = MetricRecorder()
    recorder.add("queue/admitted", np.int32(7), Last)
    recorder.add("faults/restarts", np.asarray([True, False, True]), Total)
    recorder.add("learner/approx_kl", np.float32(0.5), Mean)
    record = flush(recorder)
    assert (type(record["queue/admitted"]), record["queue/admitted"]) == (int, 7)
    assert (type(record["faults/restarts"]), record["faults/restarts"]) == (int, 2)
    assert type(record["learner/approx_kl"]) is float


def test_low_precision_values_are_summed_in_double():
    recorder = MetricRecorder()
    # In float16 this sum sticks at 2048; in float64 it is exact.
    recorder.add("train/return_mean", np.ones(5000, np.float16), Sum)
    assert flush(recorder)["train/return_mean"] == 5000


def test_percentiles_of_a_long_window_come_from_a_uniform_sample():
    reduction = Distribution()
    # Sorted input: keeping the first or the last values only would be far off.
    values = np.arange(20_000, dtype=np.float64)
    for chunk in np.split(values, 20):
        reduction.add(chunk)
    taken = reduction.take(1.0)
    assert (taken["/min"], taken["/max"]) == (0.0, 19_999.0)
    assert taken["/mean"] == pytest.approx(9_999.5)
    # The rank of a quantile q of 4096 samples has standard error sqrt(q (1 - q) / 4096);
    # five of those, times 20,000 values.
    for percent in (50, 95, 99):
        q = percent / 100
        slack = 5 * math.sqrt(q * (1 - q) / 4096) * 20_000
        assert taken[f"/p{percent}"] == pytest.approx(q * 20_000, abs=slack)


def test_record_begins_with_update_and_time_and_carries_extras_once():
    recorder = MetricRecorder()
    recorder.add("train/return_mean", 1.0, Mean)
    recorder.add("learner/approx_kl", 1.0, Mean)
    record = recorder.flush(update=5, time_s=1.5, extra={"eval/episodes": 8})
    names = ["update", "time_s", "eval/episodes", "learner/approx_kl", "train/return_mean"]
    assert list(record) == names
    assert (record["update"], record["time_s"], record["eval/episodes"]) == (5, 1.5, 8)
    assert "eval/episodes" not in flush(recorder)


def test_conflicts_are_refused():
    recorder = MetricRecorder()
    recorder.add("train/return_mean", 1.0, Mean)
    with pytest.raises(ValueError, match="is a Mean, not a Sum"):
        recorder.add("train/return_mean", 1.0, Sum)
    with pytest.raises(ValueError, match="both accumulated and given"):
        flush(recorder, **{"train/return_mean": 1.0})
    with pytest.raises(ValueError, match="starts with none of"):
        flush(recorder, loss=1.0)


def test_counters_continue_after_a_resume():
    first = MetricRecorder()
    first.add("faults/restarts", 2, Total)
    first.add("train/return_mean", 2, Mean)
    second = MetricRecorder()
    second.restore(first.totals())
    second.add("faults/restarts", 1, Total)
    assert second.totals() == {"faults/restarts": 3}
    with pytest.raises(ValueError, match="before it was restored"):
        second.restore(first.totals())


def test_no_value_is_lost_or_counted_twice_between_threads():
    recorder = MetricRecorder()
    num_threads, num_adds = 4, 500
    start = threading.Barrier(num_threads + 1)

    def add():
        start.wait(timeout=30)
        for _ in range(num_adds):
            recorder.add("rate/episodes_per_s", 1, Sum)

    threads = [threading.Thread(target=add) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait(timeout=30)
    count = sum(flush(recorder).get("rate/episodes_per_s", 0) for _ in range(50))
    for thread in threads:
        thread.join(timeout=30)
    assert count + flush(recorder)["rate/episodes_per_s"] == num_threads * num_adds
