"""The figures of runs that are made up."""

import bench_runtime
import pytest


def record(time_s: float, rate: float, **changed: float | None) -> dict[str, float | None]:
    return {
        "time_s": time_s,
        "rate/env_steps_per_s": rate,
        "serving/latency_ms/p50": 2.0,
        "serving/latency_ms/p99": 9.0,
        "weights/publish_ms": 3.0,
        "weights/pull_ms": 4.0,
    } | changed


def test_throughput_is_of_the_whole_time_and_not_a_mean_of_rates():
    records = [record(1.0, 999.0), record(2.0, 100.0), record(5.0, 20.0)]
    figures = bench_runtime.record_figures(records)
    assert figures["env_steps_per_s"] == pytest.approx((100 + 60) / 4)
    assert figures["update_s"] == 2.0
    assert (figures["served_p50_ms"], figures["served_p99_ms"]) == (2.0, 9.0)
    assert figures["weights_ms"] == 7.0


def test_weights_that_were_not_pulled_yet_do_not_count():
    records = [record(1.0, 1.0), record(2.0, 1.0, **{"weights/pull_ms": None})]
    figures = bench_runtime.record_figures([*records, record(3.0, 1.0)])
    assert figures["weights_ms"] == 7.0


def test_queries_are_the_waits_for_inference_behind_the_warm_up():
    def span(name: str, ts: float, dur_ms: float, **args: str) -> dict:
        return {"ph": "X", "name": name, "ts": ts, "dur": 1e3 * dur_ms, "args": args}

    trace = [span("wait", 1e6 * i, 5.0, on="inference") for i in range(10, 20)]
    trace += [span("wait", 1e5 * i, 500.0, on="inference") for i in range(10)]
    trace += [span("wait", 5e6, 900.0, on="credit"), span("simulate", 5e6, 900.0)]
    trace.append({"ph": "M", "name": "thread_name", "args": {"name": "x"}})
    figures = bench_runtime.query_figures(trace, skipped=0.5)
    assert figures == {"query_p50_ms": 5.0, "query_p99_ms": 5.0}


def test_ratios_are_taken_within_a_repeat():
    """A machine that becomes half as fast between repeats changes no ratio."""
    names = dict.fromkeys(bench_runtime.FIGURES, 1.0)
    local = [names | {"env_steps_per_s": rate} for rate in (100.0, 50.0, 25.0)]
    ray = [names | {"env_steps_per_s": 0.96 * x["env_steps_per_s"]} for x in local]
    report = bench_runtime.compare({"local": local, "ray": ray})
    assert report["ratios"] == {"local": 1.0, "ray": pytest.approx(0.96)}
    text = bench_runtime.markdown({"config": "c", **report})
    assert "| env steps/s | 50.0 | 48.0 |" in text
    assert "Target, ray at 95% of local: reached, 96.0%." in text
    slow = bench_runtime.compare({"local": local, "ray": [names for _ in local]})
    assert "missed" in bench_runtime.markdown({"config": "c", **slow})
