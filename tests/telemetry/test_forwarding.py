"""Telemetry of other processes: the records of programs that run here, or counted as lost."""

import json
import math
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_connections import TIMEOUT_S, listening

from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.clocks import RemoteClock
from jaxvla.telemetry.forwarding import (
    DROPPED,
    MALFORMED,
    ForwardingRecorder,
    TelemetryForwarder,
    TelemetrySink,
)
from jaxvla.telemetry.metrics import (
    REDUCTIONS,
    Distribution,
    Last,
    Max,
    Mean,
    MetricRecorder,
    Min,
    Rate,
    Record,
    Sum,
    Total,
)
from jaxvla.telemetry.tracing import NullTracer, Tracer
from jaxvla.transport.channel import Connection
from jaxvla.transport.dispatch import dispatch
from jaxvla.transport.frames import Frame


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, now_s: float = 1000.0):
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Learner:
    """The telemetry at which everything arrives."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.recorder = MetricRecorder(clock=self.clock)
        self.tracer = Tracer(clock=self.clock)
        self.meters = {
            role: ActivityMeter(role, tracer=self.tracer) for role in ("simulation", "serving")
        }
        self.sink = TelemetrySink(recorder=self.recorder, meters=self.meters, tracer=self.tracer)

    def flush(self) -> Record:
        self.clock.now_s += 2.0
        return self.recorder.flush(update=0, time_s=0.0, extra={})


class Remote:
    """A process whose forwarder ships to a learner; its clock is `ahead_s` ahead."""

    def __init__(
        self, learner: Learner, name: str = "simulator_0", ahead_s: float = 0.0, **options
    ):
        self.recorder = ForwardingRecorder(**options)
        self.clock = Clock(learner.clock.now_s + ahead_s)
        self.tracer = Tracer(clock=self.clock)
        self.meter = ActivityMeter("simulation", tracer=self.tracer)
        self.parcels: list[Any] = []
        self.answers_clock = True
        self._remote_clock = RemoteClock(self._ask_clock, clock=self.clock)
        self._ahead_s = ahead_s
        self.forwarder = TelemetryForwarder(
            self.ship,
            recorder=self.recorder,
            meters={"simulation": self.meter},
            tracer=self.tracer,
            clock=self._remote_clock,
            interval_s=0.01,
        )
        self._receive = lambda *parcel: learner.sink.receive(name, *parcel)

    def _ask_clock(self, asked_s: float) -> None:
        if self.answers_clock:
            self._remote_clock.answered(asked_s, asked_s - self._ahead_s)

    def ship(self, fields: dict[str, Any], arrays: list[np.ndarray]) -> None:
        self.parcels.append((fields, arrays))
        self._receive(json.loads(json.dumps(fields)), arrays)


# ------------------------------------------------------------------------------------ metrics

NAMES = {f"serving/{kind.lower()}": REDUCTIONS[kind] for kind in REDUCTIONS}
numbers = st.one_of(st.integers(-(2**40), 2**40), st.floats(-1e6, 1e6))
step = st.tuples(
    st.sampled_from(sorted(NAMES)), st.lists(numbers, max_size=4), st.sampled_from("afr")
)


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=30))
def test_records_are_those_of_programs_that_run_here(steps: Any) -> None:
    """Whenever parcels are shipped (f) and records made (r)."""
    learner, here = Learner(), Learner()
    remote = Remote(learner)
    for name, values, then in steps:
        remote.recorder.add(name, np.asarray(values), NAMES[name])
        here.recorder.add(name, np.asarray(values), NAMES[name])
        if then != "a":
            assert remote.forwarder.flush()
        if then == "r":
            assert_same(learner.flush(), here.flush())
    remote.forwarder.flush()
    assert_same(learner.flush(), here.flush())


def assert_same(got: Record, wanted: Record) -> None:
    """Sums in another order may differ by rounding: at most 120 values of 2**40."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-12, abs=2**40 * 1e-13, nan_ok=True), name


def test_counters_of_several_replicas_add_up_exactly() -> None:
    learner = Learner()
    remotes = [Remote(learner, f"simulator_{i}") for i in range(3)]
    for _ in range(2):
        for remote in remotes:
            remote.recorder.add("faults/invalid_samples", 2**52 + 1, Total)
            remote.recorder.add("rate/chunk_queries_per_s", 8, Rate)
            remote.forwarder.flush()
    record = learner.flush()
    assert record["faults/invalid_samples"] == 6 * (2**52 + 1)
    assert record["rate/chunk_queries_per_s"] == 24.0
    assert record[MALFORMED] == 0


def test_more_than_fits_is_dropped_and_counted_but_never_of_a_counter() -> None:
    learner = Learner()
    remote = Remote(learner, max_values=10)
    remote.recorder.add("serving/queue_wait_ms", np.arange(8), Mean)
    remote.recorder.add("serving/latency_ms", np.arange(8), Distribution)
    for _ in range(100):
        for kind in (Sum, Total, Rate, Max, Min, Last):
            remote.recorder.add(f"serving/{kind.__name__.lower()}", [1, 2, 3], kind)
    remote.forwarder.flush()
    record = learner.flush()
    assert record[DROPPED] == 6
    assert (record["serving/queue_wait_ms"], record["serving/latency_ms/max"]) == (3.5, 1)
    assert (record["serving/sum"], record["serving/total"]) == (600, 600)
    assert (record["serving/max"], record["serving/min"], record["serving/last"]) == (3, 1, 3)
    remote.recorder.add("serving/latency_ms", np.arange(10), Distribution)  # there is room again
    remote.forwarder.flush()
    assert learner.flush()[DROPPED] == 6


def test_what_is_lost_with_a_connection_is_counted_when_there_is_one_again() -> None:
    learner = Learner()
    remote = Remote(learner)
    receive = remote._receive

    def lose(*parcel: Any) -> None:
        raise RuntimeError("connection lost")

    remote._receive = lose
    remote.recorder.add("serving/latency_ms", np.arange(5), Distribution)
    remote.recorder.add("faults/invalid_samples", 7, Total)
    assert not remote.forwarder.flush()
    remote._receive = receive
    assert remote.forwarder.flush()
    assert learner.flush()[DROPPED] == 6


def test_names_follow_the_same_rules() -> None:
    recorder = ForwardingRecorder()
    with pytest.raises(ValueError, match="starts with none of"):
        recorder.add("server/latency_ms", 1, Mean)
    recorder.add("serving/latency_ms", 1, Mean)
    with pytest.raises(ValueError, match="is a Mean, not a Max"):
        recorder.add("serving/latency_ms", 1, Max)


# ----------------------------------------------------------------------------------- activity


def test_fractions_are_of_the_time_of_all_replicas_together() -> None:
    learner = Learner()
    remotes = [Remote(learner, f"simulator_{i}") for i in range(2)]
    for remote, busy_s, wait_s in zip(remotes, (3.0, 1.0), (1.0, 3.0), strict=True):
        with remote.meter.thread("group"):
            with remote.meter.busy("simulate"):
                remote.clock.now_s += busy_s
                remote.forwarder.flush()  # in the middle of a block: nothing counts twice
            with remote.meter.waiting("inference"):
                remote.clock.now_s += wait_s
        remote.forwarder.flush()
        remote.forwarder.flush()
    snapshot = learner.meters["simulation"].snapshot()
    assert snapshot.window.busy_s == {"simulate": 4.0, "other": 0.0}
    assert snapshot.window.waiting_s == {"inference": 4.0}
    assert snapshot.window.record("simulation") == {
        "utilisation/simulation/busy_fraction": 0.5,
        "utilisation/simulation/waiting_on/inference_fraction": 0.5,
    }
    assert snapshot.total == snapshot.window
    assert learner.meters["simulation"].snapshot().window.thread_s == 0.0
    assert learner.meters["serving"].snapshot().total.thread_s == 0.0


# -------------------------------------------------------------------------------------- spans


def spans_of(learner: Learner, path: Any) -> dict[tuple[str, str], list[Any]]:
    """(program, thread) -> [(name, start us, duration us, arguments)]."""
    learner.tracer.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    programs = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[tuple[str, str], list[Any]] = {
        (programs[e["pid"]], e["args"]["name"]): [] for e in events if e["name"] == "thread_name"
    }
    for e in events:
        if e["ph"] == "X":
            key = programs[e["pid"]], threads[e["tid"]]
            found[key].append((e["name"], e["ts"], e["dur"], e.get("args", {})))
    return found


@pytest.mark.parametrize("ahead_s", [0.0, 77.0, -50.0])
def test_spans_lie_where_they_happened_on_the_learners_clock(tmp_path: Any, ahead_s: float) -> None:
    learner = Learner()
    remotes = [Remote(learner, f"simulator_{i}", ahead_s=ahead_s) for i in range(2)]
    with learner.meters["simulation"].thread("local"):
        learner.tracer.add("render", 1000.0, 1001.0)
    for remote in remotes:
        for _ in range(2):
            with remote.meter.thread("group_0"), remote.meter.waiting("inference"):
                remote.clock.now_s += 1.5
            remote.forwarder.flush()
    waits = [("wait", 0.0, 1.5e6, {"on": "inference"}), ("wait", 1.5e6, 1.5e6, {"on": "inference"})]
    assert spans_of(learner, tmp_path / "trace.json") == {
        ("simulation", "local"): [("render", 0.0, 1e6, {})],
        ("simulation simulator_0", "group_0"): waits,
        ("simulation simulator_1", "group_0"): waits,
    }


def test_a_long_trace_crosses_in_pieces(tmp_path: Any) -> None:
    learner = Learner()
    remote = Remote(learner)
    for thread in ("a", "b"):
        remote.tracer.name_thread("simulation", thread)
        for index in range(7000):
            remote.tracer.add(f"s{index}", 1000.0 + index, 1000.5 + index)
    remote.forwarder.flush()
    assert len(remote.parcels) == 5
    found = spans_of(learner, tmp_path / "trace.json")
    for thread in ("a", "b"):
        names = [name for name, *_ in found["simulation simulator_0", thread]]
        assert names == [f"s{index}" for index in range(7000)]


def test_spans_that_were_let_go_are_counted_on_both_sides(tmp_path: Any) -> None:
    learner = Learner()
    learner.tracer = Tracer(clock=learner.clock, max_spans_per_track=4)
    learner.sink = TelemetrySink(
        recorder=learner.recorder, meters=learner.meters, tracer=learner.tracer
    )
    remote = Remote(learner)
    remote.tracer._max_spans = 3
    remote.tracer.name_thread("simulation", "group_0")
    for _ in range(2):
        for _ in range(5):
            remote.tracer.add("step", 1000.0, 1001.0)
        remote.forwarder.flush()
    learner.tracer.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (label,) = [e["args"] for e in events if e["name"] == "thread_name"]
    assert label["num_older_spans_lost"] == 6
    assert len([e for e in events if e["ph"] == "X"]) == 4


def test_a_learner_without_a_trace_takes_none() -> None:
    learner = Learner()
    learner.sink = TelemetrySink(
        recorder=learner.recorder, meters=learner.meters, tracer=NullTracer()
    )
    remote = Remote(learner)
    remote.tracer.name_thread("simulation", "group_0")
    remote.tracer.add("step", 1.0, 2.0)
    remote.forwarder.flush()
    assert learner.flush()[MALFORMED] == 0


def test_spans_wait_until_the_learners_clock_is_known(tmp_path: Any) -> None:
    learner = Learner()
    remote = Remote(learner, ahead_s=77.0)
    remote.answers_clock = False
    remote.tracer.name_thread("simulation", "group_0")
    remote.tracer.add("render", remote.clock.now_s, remote.clock.now_s + 1.0)
    remote.recorder.add("serving/latency_ms", 3, Mean)
    assert remote.forwarder.flush()
    assert learner.flush()["serving/latency_ms"] == 3.0
    assert not spans_of(learner, tmp_path / "early.json")
    remote.answers_clock = True
    assert remote.forwarder.flush()
    assert spans_of(learner, tmp_path / "late.json") == {
        ("simulation simulator_0", "group_0"): [("render", 0.0, 1e6, {})]
    }


# ----------------------------------------------------------------------------- what is refused

ONE = np.ones(1)
NAME = "serving/latency_ms"


def text(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def spans(*tracks: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    return {"has_spans": True}, [text(list(tracks))]


def activity(**parts: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    return {"activities": {"simulation": {"busy_s": {}, "waiting_s": {}} | parts}}, []


@pytest.mark.parametrize(
    ("fields", "arrays"),
    [
        ({"metrics": [[NAME, "Mean"]]}, []),
        ({"metrics": [[NAME, "Median"]]}, [ONE]),
        ({"metrics": [[NAME, "Reduction"]]}, [ONE]),
        ({"metrics": [[NAME]]}, [ONE]),
        ({"metrics": [NAME]}, [ONE]),
        ({"metrics": 3}, [ONE]),
        ({"metrics": [["queue/depth", "Last"]]}, [ONE]),
        ({"metrics": [["update", "Last"]]}, [ONE]),
        ({"metrics": [["serving/Latency", "Mean"]]}, [ONE]),
        ({"metrics": [[3, "Mean"]]}, [ONE]),
        ({"metrics": [[NAME, "Mean"]]}, [ONE.astype(np.float32)]),
        ({"metrics": [[NAME, "Mean"]]}, [ONE[None]]),
        ({"metrics": [["serving/known", "Mean"]]}, [ONE]),
        ({"activities": []}, []),
        ({"activities": {"learner": {"busy_s": {}, "waiting_s": {}}}}, []),
        ({"activities": {"simulation": {"busy_s": {}}}}, []),
        activity(busy_s=3),
        activity(busy_s={"Simulate": 1.0}),
        activity(busy_s={"a/b": 1.0}),
        activity(waiting_s={"inference": -1.0}),
        activity(waiting_s={"inference": math.inf}),
        activity(waiting_s={"inference": math.nan}),
        activity(waiting_s={"inference": "1"}),
        activity(busy_s={f"w{i}": 1.0 for i in range(65)}),
        ({"has_spans": True}, []),
        ({"has_spans": True}, [np.frombuffer(b"{[", np.uint8)]),
        ({"has_spans": True}, [np.frombuffer(b"[" * 100_000, np.uint8)]),
        ({"has_spans": True}, [ONE]),
        spans(3),
        spans(["p", "t", 0]),
        spans(["", "t", 0, []]),
        spans(["p", ["t"], 0, []]),
        spans(["p" * 200, "t", 0, []]),
        spans(["p", "t", math.inf, []]),
        spans(["p", "t", 0, [["a", 1.0, 2.0]]]),
        spans(["p", "t", 0, [["a", 2.0, 1.0, {}]]]),
        spans(["p", "t", 0, [["a", math.nan, 1.0, {}]]]),
        spans(["p", "t", 0, [["a", 1.0, math.inf, {}]]]),
        spans(["p", "t", 0, [["a", "1", 2.0, {}]]]),
        spans(["p", "t", 0, [[3, 1.0, 2.0, {}]]]),
        spans(["p", "t", 0, [["a", 1.0, 2.0, []]]]),
        spans(["p", "t", 0, [["a", 1.0, 2.0, {"x": [1]}]]]),
    ],
)
def test_malformed_parcels_are_counted_and_change_nothing(
    tmp_path: Any, fields: Any, arrays: Any
) -> None:
    learner = Learner()
    learner.recorder.add("serving/known", 1, Max)
    learner.sink.receive("simulator_0", fields, arrays)
    record = learner.flush()
    assert record[MALFORMED] == 1
    assert record.keys() == {"update", "time_s", MALFORMED, "serving/known"}
    assert learner.meters["simulation"].snapshot().total.thread_s == 0.0
    assert all(not found for found in spans_of(learner, tmp_path / "trace.json").values())


def test_one_wrong_metric_costs_only_itself() -> None:
    learner = Learner()
    fields = {"metrics": [["serving/a", "Mean"], ["oops", "Mean"], ["serving/b", "Mean"]]}
    learner.sink.receive("simulator_0", fields, [ONE, ONE, 2 * ONE])
    record = learner.flush()
    assert (record["serving/a"], record["serving/b"], record[MALFORMED]) == (1.0, 2.0, 1)


def test_names_and_threads_of_others_are_bounded() -> None:
    learner = Learner()
    for index in range(600):
        learner.sink.receive("s", {"metrics": [[f"serving/n{index}", "Mean"]]}, [ONE])
    assert learner.flush()[MALFORMED] == 600 - 512
    for index in range(70):
        learner.sink.receive("s", *spans(["p", f"t{index}", 0, [["a", 1.0, 2.0, {}]]]))
    assert learner.flush()[MALFORMED] == 600 - 512 + 70 - 64


# ------------------------------------------------------------------------------ over a connection


def test_over_a_connection_by_the_clock_and_at_the_end() -> None:
    learner, received = Learner(), threading.Semaphore(0)

    def serve(connection: Connection) -> None:
        def take(frame: Frame) -> None:
            learner.sink.receive(connection.peer, frame.fields, frame.arrays)
            received.release()

        dispatch(connection, {"telemetry": take})

    with listening(serve) as dial:
        connection = dial("simulator_0")
        remote = Remote(learner)
        remote._receive = lambda fields, arrays: connection.send(
            Frame(kind="telemetry", fields=fields, arrays=arrays)
        )
        remote.recorder.add("serving/recompiles", 0, Total)
        remote.recorder.add("faults/invalid_samples", 3, Total)
        remote.recorder.add(NAME, np.asarray([1.5, 2.5]), Distribution)
        remote.forwarder.start()
        for _ in range(3):
            assert received.acquire(timeout=TIMEOUT_S)
        record = learner.flush()
        assert record["faults/invalid_samples"] == 3 and record["serving/recompiles"] == 0
        assert record["serving/latency_ms/mean"] == 2.0
        with remote.meter.thread("group_0"), remote.meter.busy("simulate"):
            remote.clock.now_s += 1.0
        remote.forwarder.close()
        num_parcels = len(remote.parcels)
        for _ in range(num_parcels - 3):
            assert received.acquire(timeout=TIMEOUT_S)
        assert learner.meters["simulation"].snapshot().total.busy_s["simulate"] == 1.0
        connection.close()
        remote.recorder.add("faults/invalid_samples", 1, Total)
        assert not remote.forwarder.flush()
