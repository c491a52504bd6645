"""Busy / wait accounting on a clock that passes only when told to."""

import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import check_name
from jaxvla.telemetry.tracing import NullTracer, Tracer


class FakeClock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s

    def advance(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def meter(clock):
    return ActivityMeter("simulation", tracer=NullTracer(clock=clock))


def test_time_goes_to_the_innermost_block(clock, meter):
    with meter.thread("group 0"):
        clock.advance(1.0)
        with meter.busy("simulate"):
            clock.advance(2.0)
            with meter.busy("render"):
                clock.advance(3.0)
                with meter.waiting("device"):
                    clock.advance(4.0)
                clock.advance(5.0)
            clock.advance(6.0)
        with meter.waiting("inference"):
            clock.advance(7.0)
        clock.advance(8.0)
    total = meter.snapshot().total
    assert total.busy_s == {"other": 9.0, "simulate": 8.0, "render": 8.0}
    assert total.waiting_s == {"device": 4.0, "inference": 7.0}
    assert total.thread_s == 36.0
    assert total.busy_fraction == 25 / 36
    assert list(total.waiting_fractions.items()) == [("inference", 7 / 36), ("device", 4 / 36)]


def test_snapshot_counts_blocks_in_progress_and_windows_add_up(clock, meter):
    with meter.thread("group 0"), meter.waiting("inference"):
        clock.advance(3.0)
        first = meter.snapshot()
        clock.advance(1.0)
        with meter.busy("simulate"):
            clock.advance(1.0)
            second = meter.snapshot()
    assert first.window.waiting_s == first.total.waiting_s == {"inference": 3.0}
    assert second.window.waiting_s == {"inference": 1.0}
    assert second.window.busy_s == {"other": 0.0, "simulate": 1.0}
    assert second.total.waiting_s == {"inference": 4.0}


def test_threads_of_a_program_average(clock, meter):
    # Both threads sit in their block while the clock moves.
    inside, leave = threading.Barrier(3), threading.Event()

    def life(block):
        with meter.thread(threading.current_thread().name), block:
            inside.wait(timeout=30)
            assert leave.wait(timeout=30)

    blocks = [meter.busy("simulate"), meter.waiting("inference")]
    threads = [threading.Thread(target=life, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    inside.wait(timeout=30)
    clock.advance(10.0)
    total = meter.snapshot().total
    leave.set()
    for thread in threads:
        thread.join(timeout=30)
    assert total.thread_s == 20.0
    assert total.busy_fraction == 0.5
    assert total.waiting_fractions == {"inference": 0.5}


def test_a_thread_counts_only_while_it_lives(clock, meter):
    clock.advance(100.0)
    with meter.thread("group 0"), meter.waiting("start"):
        clock.advance(1.0)
    clock.advance(100.0)
    assert meter.snapshot().total.thread_s == 1.0
    clock.advance(1.0)
    window = meter.snapshot().window
    assert math.isnan(window.busy_fraction)
    assert all(math.isnan(value) for value in window.record("simulation").values())
    with meter.thread("group 0 restarted"):
        clock.advance(1.0)
    assert meter.snapshot().total.thread_s == 2.0


step = st.sampled_from(["busy simulate", "busy render", "wait inference", "wait slot", "leave"])
seconds = st.floats(0.0, 1e4)


@settings(deadline=None)  # no timed assertions
@given(steps=st.lists(st.tuples(step, seconds, st.booleans()), max_size=40))
def test_every_moment_is_accounted_for_once(steps):
    clock = FakeClock()
    meter = ActivityMeter("simulation", tracer=NullTracer(clock=clock))
    blocks, elapsed, windows = [], 0.0, []
    with meter.thread("group 0"):
        for action, advance, snapshot in steps:
            kind, _, name = action.partition(" ")
            if kind != "leave":
                blocks.append(meter.busy(name) if kind == "busy" else meter.waiting(name))
                blocks[-1].__enter__()
            elif blocks:
                blocks.pop().__exit__(None, None, None)
            clock.advance(advance)
            elapsed += advance
            if snapshot:
                windows.append(meter.snapshot().window)
        while blocks:
            blocks.pop().__exit__(None, None, None)
    last = meter.snapshot()
    windows.append(last.window)
    # Sums of at most 40 float64 terms of 1e4 s, measured on a clock of up to 4e5 s.
    assert last.total.thread_s == pytest.approx(elapsed, rel=1e-9, abs=1e-6)
    assert sum(w.thread_s for w in windows) == pytest.approx(elapsed, rel=1e-9, abs=1e-6)
    for activity in (*windows, last.total):
        record = activity.record("simulation")
        if activity.thread_s:
            assert all(0.0 <= share <= 1.0 for share in record.values())
            assert sum(record.values()) == pytest.approx(1.0, abs=1e-12)


def test_record_has_contract_names(clock, meter):
    with meter.thread("group 0"), meter.busy("simulate"):
        clock.advance(3.0)
        with meter.waiting("inference"):
            clock.advance(1.0)
    record = meter.snapshot().window.record("simulation")
    assert record == {
        "utilisation/simulation/busy_fraction": 0.75,
        "utilisation/simulation/waiting_on/inference_fraction": 0.25,
    }
    assert all(check_name(name) for name in record)


def test_a_block_that_raises_is_left(clock, meter):
    with meter.thread("group 0"):
        with pytest.raises(KeyError), meter.waiting("slot"):
            clock.advance(1.0)
            raise KeyError
        clock.advance(2.0)
    total = meter.snapshot().total
    assert (total.waiting_s, total.busy_s) == ({"slot": 1.0}, {"other": 2.0})


def test_blocks_become_spans(clock, tmp_path):
    tracer = Tracer(clock=clock)
    meter = ActivityMeter("learning", tracer=tracer)
    with meter.thread("learner"):
        with meter.waiting("trajectories"):
            clock.advance(2.0)
        with meter.busy("train"):
            clock.advance(1.0)
    tracer.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    labels = [e["args"]["name"] for e in events if e["ph"] == "M"]
    spans = [(e["name"], e["ts"], e["dur"], e.get("args")) for e in events if e["ph"] == "X"]
    assert labels == ["learning", "learner"]
    assert spans == [("wait", 0.0, 2e6, {"on": "trajectories"}), ("train", 2e6, 1e6, None)]


def test_busy_spans_tell_arguments_and_processor_seconds(clock, tmp_path):
    tracer, processor = Tracer(clock=clock), FakeClock()
    meter = ActivityMeter("serving", tracer=tracer, processor_clock=processor)
    with meter.thread("server"):
        with meter.waiting("requests"):
            clock.advance(2.0)
            processor.advance(9.0)
        with meter.busy("infer", rows=3):
            clock.advance(1.0)
            processor.advance(1.5)
    tracer.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [(e["name"], e["args"]) for e in events if e["ph"] == "X"]
    assert spans == [("wait", {"on": "requests"}), ("infer", {"rows": 3, "cpu_s": 1.5})]


def test_misuse_is_refused(meter):
    with pytest.raises(RuntimeError, match=r"outside of ActivityMeter\.thread"), meter.busy("x"):
        pass
    with meter.thread("group 0"):
        with pytest.raises(RuntimeError, match="already"), meter.thread("group 0"):
            pass
        with meter.busy("x"):  # the refused call left the accounting alone
            pass
    with meter.thread("group 0"):  # and a thread may come back
        pass
