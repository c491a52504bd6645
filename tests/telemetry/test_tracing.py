"""The trace file as a viewer reads it."""

import json
import threading
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry.tracing import NullTracer, Tracer


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def spans_by_track(events):
    """(process name, thread name) -> [(name, start ns, end ns)] of complete events."""
    programs = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            start = round(e["ts"] * 1000)
            end = start + round(e["dur"] * 1000)
            tracks[programs[e["pid"]], threads[e["tid"]]].append((e["name"], start, end))
    return tracks


def assert_nested(spans):
    """Spans of a track are disjoint or one inside the other."""
    open_ends = []
    for _, start, end in sorted(spans, key=lambda span: (span[1], -span[2])):
        assert start <= end
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1]
        open_ends.append(end)


def run_all(*targets):
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_threads_become_named_tracks_with_nested_spans(tmp_path):
    tracer = Tracer()
    together = threading.Barrier(3)

    def program(role, outer, inner):
        tracer.name_thread(role, f"{role} 0")
        together.wait(timeout=30)
        for _ in range(20):
            with tracer.span(outer), tracer.span(inner, rows=3):
                pass

    run_all(
        lambda: program("simulation", "simulate", "render"),
        lambda: program("serving", "infer", "pull"),
        lambda: program("learning", "train", "publish"),
    )
    tracer.write(tmp_path / "trace.json")
    events = read(tmp_path / "trace.json")
    tracks = spans_by_track(events)
    assert set(tracks) == {(r, f"{r} 0") for r in ("simulation", "serving", "learning")}
    for spans in tracks.values():
        assert len(spans) == 40
        assert_nested(spans)
    assert {name for name, _, _ in tracks["learning", "learning 0"]} == {"train", "publish"}
    assert {e["args"]["rows"] for e in events if e["name"] == "render"} == {3}
    assert "args" not in next(e for e in events if e["name"] == "simulate")


def test_times_are_microseconds_since_the_tracer_was_made(tmp_path):
    now = iter([50.0, 50.5, 50.75])
    tracer = Tracer(clock=lambda: next(now))
    with tracer.span("train"):
        pass
    tracer.write(tmp_path / "trace.json")
    (event,) = [e for e in read(tmp_path / "trace.json") if e["ph"] == "X"]
    assert (event["ts"], event["dur"]) == (500_000.0, 250_000.0)


def test_threads_share_one_clock(tmp_path):
    tracer = Tracer()
    first_is_done = threading.Event()

    def first():
        with tracer.span("first"):
            pass
        first_is_done.set()

    def second():
        assert first_is_done.wait(timeout=30)
        with tracer.span("second"):
            pass

    run_all(second, first)
    tracer.write(tmp_path / "trace.json")
    (one,), (two,) = spans_by_track(read(tmp_path / "trace.json")).values()
    by_name = {span[0]: span for span in (one, two)}
    assert by_name["first"][2] <= by_name["second"][1]


@settings(deadline=None)  # no timed assertions
@given(ends=st.lists(st.floats(0, 1e-6), min_size=4, max_size=4))
def test_rounding_keeps_touching_and_nested_spans_nested(ends, tmp_path_factory):
    a, b, c, d = sorted(1e5 + end for end in ends)
    tracer = Tracer(clock=lambda: 1e5)
    tracer.add("parent", a, d)
    tracer.add("left", a, b)
    tracer.add("middle", b, c)
    tracer.add("right", c, d)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    tracer.write(path)
    (spans,) = spans_by_track(read(path)).values()
    assert_nested(spans)


def test_a_span_is_kept_when_its_block_raises(tmp_path):
    tracer = Tracer()
    with pytest.raises(KeyError), tracer.span("train"):
        raise KeyError
    tracer.write(tmp_path / "trace.json")
    assert [e["name"] for e in read(tmp_path / "trace.json") if e["ph"] == "X"] == ["train"]


def test_memory_is_bounded_and_the_loss_is_stated(tmp_path):
    tracer = Tracer(max_spans_per_track=10)
    for index in range(25):
        with tracer.span("step", index=index):
            pass
    tracer.write(tmp_path / "trace.json")
    events = read(tmp_path / "trace.json")
    assert [e["args"]["index"] for e in events if e["ph"] == "X"] == list(range(15, 25))
    (label,) = [e["args"] for e in events if e["name"] == "thread_name"]
    assert label["num_older_spans_lost"] == 15


def test_a_restarted_thread_continues_its_track_and_a_namesake_gets_its_own(tmp_path):
    tracer = Tracer()
    both_live = threading.Barrier(2)

    def life(name, barrier=None):
        tracer.name_thread("simulation", "group 0")
        if barrier is not None:
            barrier.wait(timeout=30)
        with tracer.span(name):
            pass

    run_all(lambda: life("before the restart"))
    run_all(lambda: life("namesake", both_live), lambda: life("namesake", both_live))
    tracer.write(tmp_path / "trace.json")
    tracks = spans_by_track(read(tmp_path / "trace.json"))
    names = {track: [span[0] for span in spans] for track, spans in tracks.items()}
    assert names == {
        ("simulation", "group 0"): ["before the restart", "namesake"],
        ("simulation", "group 0 (2)"): ["namesake"],
    }


def test_writing_while_spans_arrive(tmp_path):
    tracer = Tracer(max_spans_per_track=100)
    stop = threading.Event()
    running = threading.Event()

    def work():
        while not stop.is_set():
            with tracer.span("step"):
                running.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert running.wait(timeout=30)
        for _ in range(20):
            tracer.write(tmp_path / "trace.json")
            (spans,) = spans_by_track(read(tmp_path / "trace.json")).values()
            assert_nested(spans)
    finally:
        stop.set()
        thread.join(timeout=30)


def test_a_failed_write_leaves_the_earlier_trace_alone(tmp_path):
    tracer = Tracer()
    tracer.write(tmp_path / "trace.json")
    before = (tmp_path / "trace.json").read_bytes()
    with tracer.span("train", what=object()):  # not JSON
        pass
    with pytest.raises(TypeError):
        tracer.write(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_null_tracer_reads_no_clock_and_writes_nothing(tmp_path):
    readings = []
    tracer = NullTracer(clock=lambda: readings.append(0) or 0.0)
    readings.clear()
    tracer.name_thread("learning", "learner")
    with tracer.span("train", update=1):
        pass
    tracer.add("wait", 0.0, 1.0)
    tracer.write(tmp_path / "trace.json")
    assert not readings
    assert not list(tmp_path.iterdir())
