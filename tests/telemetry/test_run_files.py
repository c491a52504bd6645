"""What is read back from a work directory, whole or torn."""

import json
import math

import pytest
from run_dirs import AFTER, record, write_run

from jaxvla.telemetry.run_files import (
    read_records,
    read_run,
    read_trace,
    steady_median,
    thread_times,
)
from jaxvla.telemetry.tracing import Tracer


def test_a_torn_last_line_is_left_out_and_any_other_is_refused(tmp_path):
    path = write_run(tmp_path) / "metrics.jsonl"
    whole = path.read_bytes()
    for num_bytes in range(whole.rindex(b"{") + 1, len(whole) - 1):
        path.write_bytes(whole[:num_bytes])
        assert [r["update"] for r in read_records(path)] == list(range(1, 10))
    path.write_bytes(whole[:-1])  # only the line feed is missing
    assert len(read_records(path)) == 10
    path.write_bytes(whole[: whole.rindex(b"{") + 5] + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:10: not a metrics record"):
        read_records(path)
    path.write_bytes(b"[1]\n" + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not"):
        read_records(path)


def test_null_is_not_a_number(tmp_path):
    run = read_run(write_run(tmp_path, records=[record(1, train__success_rate=math.nan)]))
    assert math.isnan(run.records[0]["train/success_rate"])


def test_all_files_but_the_metrics_are_optional(tmp_path):
    run = read_run(write_run(tmp_path / "a", summary=None, config=None))
    assert (run.name, run.update, run.summary, run.videos) == ("a", 10, {}, [])
    assert (run.max_staleness(), run.staleness_bound(), run.staleness_counts()) == (2, 2, {})
    assert run.evaluated("before") is None
    empty = read_run(write_run(tmp_path / "b", records=[], summary=None, config=None))
    assert empty.update == 0 and empty.activities() == {}
    assert math.isnan(empty.max_staleness()) and math.isnan(empty.staleness_bound())
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        read_run(tmp_path / "c")
    with pytest.raises(ValueError, match="is not a directory"):
        read_run(tmp_path / "d")


def test_the_summary_has_the_last_word(tmp_path):
    run = read_run(write_run(tmp_path))
    assert run.name == "tiny"
    assert run.staleness_counts() == {0: 3, 1: 10, 2: 7}
    assert run.evaluated("after") == AFTER
    activities = run.activities()
    assert set(activities) == {"simulation", "learning"}  # no server lived in the window
    assert activities["simulation"].busy_fraction == pytest.approx(0.7)
    assert activities["learning"].waiting_fractions == pytest.approx({"trajectories": 0.6})


def test_without_a_summary_activities_are_means_over_time(tmp_path):
    busy = "utilisation__learning__busy_fraction"
    waits = "utilisation__learning__waiting_on__trajectories_fraction"
    records = [
        record(1, **{busy: 0.1, waits: 0.9}),  # how long it took is not known
        record(2, time_s=103.0, **{busy: 0.2, waits: 0.8}),
        record(3, time_s=106.0, **{busy: 0.8, waits: 0.2}),
    ]
    learning = read_run(write_run(tmp_path, records=records, summary=None)).activities()["learning"]
    assert learning.busy_fraction == pytest.approx((0.2 * 1 + 0.8 * 3) / 4)
    assert learning.waiting_fractions["trajectories"] == pytest.approx((0.8 * 1 + 0.2 * 3) / 4)


def test_broken_files_are_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json: not JSON.*Fix"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary.json: list, want an object"):
        read_run(tmp_path)


def test_steady_medians_leave_out_the_first_fifth():
    assert steady_median([record(i) for i in range(1, 11)], "rate/env_steps_per_s") == 6500.0
    assert steady_median([record(1), record(2)], "rate/env_steps_per_s") == 2000.0
    assert steady_median([record(1)], "rate/env_steps_per_s") == 1000.0
    assert math.isnan(steady_median([], "rate/env_steps_per_s"))
    assert math.isnan(steady_median([record(1)], "no/such_metric"))


def test_videos_are_found_in_folders_and_those_being_written_are_not(tmp_path):
    write_run(tmp_path)
    for name in ("videos/b.mp4", "videos/judge/a.mp4", "videos/.c.partial.mp4", "videos/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list(map(str, read_run(tmp_path).videos)) == ["videos/b.mp4", "videos/judge/a.mp4"]


def test_thread_times_give_each_moment_to_the_innermost_span(tmp_path):
    now = iter([0.0])
    tracer = Tracer(clock=lambda: next(now))
    tracer.name_thread("simulation", "group_0")
    tracer.add("render", 2.0, 3.0)  # spans are added when they end: inner ones first
    tracer.add("simulate", 1.0, 4.0)
    tracer.add("wait", 4.5, 5.0, on="inference")
    tracer.add("simulate", 5.0, 6.0)
    tracer.write(tmp_path / "trace.json")
    times = thread_times(read_trace(tmp_path))
    want = {"simulate": 3.0, "render": 1.0, "wait for inference": 0.5, "other": 0.5}
    assert times == {"simulation / group_0": pytest.approx(want)}


def test_a_trace_may_be_missing_but_not_broken(tmp_path):
    assert read_trace(tmp_path) == []
    (tmp_path / "trace.json").write_text(json.dumps({"events": []}))
    with pytest.raises(ValueError, match=r"trace.json: has no traceEvents"):
        read_trace(tmp_path)
