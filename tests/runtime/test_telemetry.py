"""What a run reports: records, summary.json, counters over restarts. Time stands still."""

import io
import json
import math
import pathlib
from typing import Any

import pytest

from jaxvla.layout import ROLES
from jaxvla.runtime import telemetry as telemetry_module
from jaxvla.runtime.telemetry import Telemetry, queue_record
from jaxvla.telemetry import get_logger
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Last, MetricRecorder, Rate, Total, check_name
from jaxvla.telemetry.progress import RunSummary, Screen
from jaxvla.telemetry.tracing import Tracer
from jaxvla.telemetry.writers import RunInfo
from jaxvla.transport.base import Ledger, WeightMetrics

LEDGER = Ledger(
    admitted=20,
    completed=15,
    consumed=12,
    dropped_by_reason={"lease": 2, "restart": 1},
    in_flight=3,
    depth=2,
)


class Clock:
    """Takes the place of the module `time`; passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    process_time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of everything that `make` makes."""
    clock = Clock()
    monkeypatch.setattr(telemetry_module, "time", clock)
    return clock


def make(workdir: pathlib.Path, clock: Clock, *, is_tracing: bool = True) -> Telemetry:
    """Telemetry whose parts all read the clock of the test."""
    screen = Screen(io.StringIO(), num_updates=5)
    made = Telemetry(workdir=workdir, screen=screen, is_tracing=is_tracing)
    made.recorder = MetricRecorder(clock=clock.monotonic)
    tracer = Tracer(clock=clock.monotonic)
    made.meters = {role: ActivityMeter(role, tracer=tracer) for role in ROLES}
    return made


class FakeQueue:
    def __init__(self, ledger: Ledger = LEDGER):
        self._ledger = ledger

    def ledger(self) -> Ledger:
        return self._ledger


class FakeStore:
    def metrics(self) -> WeightMetrics:
        return WeightMetrics(publish_ms=1.5, pull_ms=2.5, nbytes=4096)


def record_update(telemetry: Telemetry, version: int = 1, **changes: Any) -> None:
    given: Any = {
        "staleness": [0, 1],
        "bound": 1,
        "queue": FakeQueue(),
        "store": FakeStore(),
        "num_env_steps": 0,
        "evaluation": {},
    }
    telemetry.record_update(version=version, **(given | changes))


def run_info(workdir: pathlib.Path, resume_update: int | None = None) -> RunInfo:
    return RunInfo(workdir=workdir, name="test", config={}, resume_update=resume_update)


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_record_holds_the_queue_the_weights_and_the_evaluation(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    telemetry = make(tmp_path, clock)
    with telemetry.open(run_info(tmp_path), ()):
        telemetry.begin_training()
        clock.now_s += 7.0
        record_update(telemetry, 3, evaluation={"eval/success_rate": 0.5})
    (record,) = lines(tmp_path)
    assert record["update"] == 3 and record["time_s"] == 7.0
    expected = {
        "queue/admitted": 20,
        "queue/completed": 15,
        "queue/consumed": 12,
        "queue/dropped": 3,
        "queue/dropped/lease": 2,
        "queue/dropped/restart": 1,
        "queue/in_flight": 3,
        "queue/depth": 2,
        "weights/publish_ms": 1.5,
        "weights/pull_ms": 2.5,
        "weights/bytes": 4096,
        "eval/success_rate": 0.5,
    }
    assert {name: record[name] for name in expected} == expected
    ended = record["queue/consumed"] + record["queue/dropped"]
    assert record["queue/admitted"] == ended + record["queue/in_flight"] + record["queue/depth"]
    assert all(check_name(name) for name in record)


def test_staleness_by_hand(tmp_path: pathlib.Path, clock: Clock) -> None:
    telemetry = make(tmp_path, clock)
    telemetry.begin_training()
    record_update(telemetry, staleness=[1, 0, 3, 1, 0], bound=4)
    record = telemetry.last_record
    assert record["queue/staleness/min"] == 0
    assert record["queue/staleness/mean"] == 1.0
    # Linear between the ranks 0..4: 95 % is at rank 3.8, between 1 and 3.
    assert record["queue/staleness/p95"] == pytest.approx(2.6)
    assert record["queue/staleness/max"] == 3
    assert record["queue/staleness/bound"] == 4


def test_the_greatest_staleness_of_the_run_is_kept(tmp_path: pathlib.Path, clock: Clock) -> None:
    telemetry = make(tmp_path, clock)
    telemetry.begin_training()
    for version, staleness in enumerate(([0, 0], [2, 1], [1, 0]), start=1):
        record_update(telemetry, version, staleness=staleness, bound=2)
    assert telemetry.max_staleness == 2
    assert telemetry.last_record["queue/staleness/max"] == 1


def test_every_record_goes_to_the_file_and_to_the_screen(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    telemetry, output = make(tmp_path, clock), io.StringIO()
    telemetry.screen = Screen(output, num_updates=5)
    with telemetry.open(run_info(tmp_path), ()):
        telemetry.begin_training()
        for version in (1, 2, 3):
            telemetry.recorder.add("learner/loss/total", version / 8, Last)
            record_update(telemetry, version)
        assert len(lines(tmp_path)) == 3  # each at once, not at the end
    shown = output.getvalue().splitlines()
    assert [line.split(" |")[0] for line in shown] == ["update 1/5", "update 2/5", "update 3/5"]
    assert [x["learner/loss/total"] for x in lines(tmp_path)] == [0.125, 0.25, 0.375]
    assert lines(tmp_path)[-1] == {
        name: None if isinstance(x, float) and math.isnan(x) else x
        for name, x in telemetry.last_record.items()
    }


def test_what_came_before_training_is_not_in_its_rates(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    """Compilation and the first evaluation: neither their time nor their values."""
    telemetry = make(tmp_path, clock)
    meter = telemetry.meters["learning"]
    with meter.thread("learner"):
        telemetry.recorder.add("rate/env_steps_per_s", 1_000_000, Rate)
        telemetry.recorder.add("faults/invalid_samples", 3, Total)
        with meter.busy("compile"):
            clock.now_s += 100.0
        telemetry.begin_training()
        with meter.busy("train"):
            clock.now_s += 3.0
        with meter.waiting("trajectories"):
            clock.now_s += 1.0
        telemetry.recorder.add("rate/env_steps_per_s", 20, Rate)
        record_update(telemetry, num_env_steps=20)
    record = telemetry.last_record
    assert record["rate/env_steps_per_s"] == pytest.approx(5.0)
    assert record["utilisation/learning/busy_fraction"] == pytest.approx(0.75)
    waiting = record["utilisation/learning/waiting_on/trajectories_fraction"]
    assert waiting == pytest.approx(0.25)
    assert math.isnan(record["utilisation/serving/busy_fraction"])  # no thread of it ran
    assert record["faults/invalid_samples"] == 3  # counters do not begin anew
    assert record["time_s"] == 104.0  # nor does the time of the run


def test_env_steps_per_second_over_the_training(tmp_path: pathlib.Path, clock: Clock) -> None:
    """From the beginning of the training to the newest update, not to the end of the run."""
    telemetry = make(tmp_path, clock)
    assert math.isnan(telemetry.env_steps_per_s())
    clock.now_s += 50.0
    telemetry.begin_training()
    for version, (seconds, steps) in enumerate(((10.0, 100), (30.0, 300)), start=1):
        clock.now_s += seconds
        record_update(telemetry, version, num_env_steps=steps)
    clock.now_s += 1000.0
    assert telemetry.env_steps_per_s() == pytest.approx(400 / 40)


def test_counters_continue_after_a_restart(tmp_path: pathlib.Path, clock: Clock) -> None:
    first = make(tmp_path, clock)
    with first.open(run_info(tmp_path), ()):
        first.recorder.add("faults/invalid_samples", 3, Total)
        first.begin_training()
        clock.now_s += 60.0
        record_update(first, 1, staleness=[2, 0], bound=2)
        state = json.loads(json.dumps(first.state()))  # as a checkpoint keeps it
    clock.now_s += 10_000.0
    second = make(tmp_path, clock)
    second.restore(state)
    with second.open(run_info(tmp_path, resume_update=1), ()):
        second.begin_training()
        clock.now_s += 5.0
        second.recorder.add("faults/invalid_samples", 1, Total)
        record_update(second, 2, staleness=[0, 0], bound=2)
    assert [x["update"] for x in lines(tmp_path)] == [1, 2]
    assert [x["time_s"] for x in lines(tmp_path)] == [60.0, 65.0]
    assert [x["faults/invalid_samples"] for x in lines(tmp_path)] == [3, 4]
    assert second.max_staleness == 2
    assert write_summary(second)["staleness_counts"] == {"0": 3, "2": 1}


def test_a_checkpoint_of_before_staleness_was_counted(tmp_path: pathlib.Path, clock: Clock) -> None:
    older = make(tmp_path, clock).state()
    del older["staleness_counts"]
    telemetry = make(tmp_path, clock)
    telemetry.restore(older)
    telemetry.begin_training()
    record_update(telemetry, 1, staleness=[1, 0, 1], bound=2)
    assert write_summary(telemetry)["staleness_counts"] == {"0": 1, "1": 2}


def test_updates_made_again_replace_their_records(tmp_path: pathlib.Path, clock: Clock) -> None:
    """The checkpoint was of update 1; update 2 was lost with the process."""
    for resume_update, versions in ((None, (1, 2)), (1, (2, 3))):
        telemetry = make(tmp_path, clock)
        with telemetry.open(run_info(tmp_path, resume_update), ()):
            telemetry.begin_training()
            for version in versions:
                record_update(telemetry, version)
    assert [x["update"] for x in lines(tmp_path)] == [1, 2, 3]


EVALUATION = {
    "eval/success_rate": 0.5,
    "eval/ci95_low": 0.1,
    "eval/ci95_high": 0.9,
    "eval/episodes": 4,
}


def write_summary(telemetry: Telemetry, ledger: Ledger = LEDGER, **changes: Any) -> dict[str, Any]:
    given: Any = {
        "before": None,
        "after": EVALUATION,
        "env_steps_per_s": telemetry.env_steps_per_s(),
        "activities": telemetry.activities(),
        "max_staleness": telemetry.max_staleness,
        "staleness_bound": 2,
        "workdir": telemetry.workdir,
        "next_command": "python",
    }
    telemetry.write_summary(
        outcome="finished", detail="", ledger=ledger, summary=RunSummary(**given)
    )
    return json.loads((telemetry.workdir / "summary.json").read_text())


def test_summary(tmp_path: pathlib.Path, clock: Clock) -> None:
    telemetry = make(tmp_path, clock)
    meter = telemetry.meters["serving"]
    with meter.thread("server"), telemetry.open(run_info(tmp_path), ()):
        telemetry.begin_training()
        telemetry.recorder.add("faults/invalid_samples", 3, Total)
        with meter.busy("infer"):
            clock.now_s += 6.0
        with meter.waiting("requests"):
            clock.now_s += 2.0
        record_update(telemetry, 7, staleness=[1, 2], bound=2, num_env_steps=80)
        clock.now_s += 2.0
        summary = write_summary(telemetry)
    assert summary.pop("last_record") == lines(tmp_path)[-1]
    utilisation = summary.pop("utilisation")
    assert set(utilisation) == set(ROLES)
    assert utilisation["serving"]["busy_fraction"] == pytest.approx(0.8)
    assert utilisation["serving"]["waiting_on"] == {"requests": pytest.approx(0.2)}
    assert utilisation["learning"] == {"busy_fraction": None, "waiting_on": {}}
    assert summary == {
        "outcome": "finished",
        "detail": "",
        "update": 7,
        "time_s": 10.0,
        "env_steps_per_s": 10.0,
        "max_staleness": 2,
        "staleness_bound": 2,
        "staleness_counts": {"1": 1, "2": 1},
        "ledger_closes": True,
        "evaluation_before": None,
        "evaluation_after": EVALUATION,
        "totals": {"faults/invalid_samples": 3, **queue_record(LEDGER)},
    }


def test_summary_of_a_run_that_made_no_update(tmp_path: pathlib.Path, clock: Clock) -> None:
    summary = write_summary(make(tmp_path, clock), after=None)
    assert summary["env_steps_per_s"] is None  # not NaN, which is no JSON
    assert summary["last_record"] == {} and summary["max_staleness"] == 0
    assert summary["update"] == 0
    telemetry = make(tmp_path, clock)
    with telemetry.open(run_info(tmp_path, resume_update=7), ()):
        assert write_summary(telemetry)["update"] == 7  # made by an earlier process


def test_summary_says_when_the_ledger_does_not_close(tmp_path: pathlib.Path, clock: Clock) -> None:
    lost = Ledger(admitted=5, consumed=3, dropped_by_reason={}, in_flight=1)
    assert write_summary(make(tmp_path, clock), ledger=lost)["ledger_closes"] is False


def test_queue_record_names_every_reason() -> None:
    record = queue_record(LEDGER)
    assert record["queue/dropped"] == 3
    assert record["queue/dropped/lease"] == 2 and record["queue/dropped/restart"] == 1
    assert queue_record(Ledger(dropped_by_reason={}))["queue/dropped"] == 0


@pytest.mark.parametrize("program", [*ROLES, "runtime", "checkpoint", "evaluation"])
def test_every_program_has_a_log(tmp_path: pathlib.Path, clock: Clock, program: str) -> None:
    telemetry = make(tmp_path, clock)
    with telemetry.open(run_info(tmp_path), ()):
        get_logger(f"{program}.module").warning("something happened")
    get_logger(program).warning("afterwards")
    text = (tmp_path / "logs" / f"{program}.log").read_text()
    assert "something happened" in text and "afterwards" not in text


@pytest.mark.parametrize("is_tracing", [True, False])
def test_a_trace_is_written_when_asked_for(tmp_path: pathlib.Path, is_tracing: bool) -> None:
    screen = Screen(io.StringIO(), num_updates=1)
    telemetry = Telemetry(workdir=tmp_path, screen=screen, is_tracing=is_tracing)
    with telemetry.meters["serving"].thread("server"), telemetry.meters["serving"].busy("infer"):
        pass
    telemetry.write_trace()
    path = tmp_path / "trace.json"
    assert path.is_file() == is_tracing
    if is_tracing:
        events = json.loads(path.read_text())["traceEvents"]
        assert "infer" in {event["name"] for event in events}
