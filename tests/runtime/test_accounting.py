"""Where the time of a run goes: shares that add up, a named bottleneck, spans that overlap."""

import json
import math
import pathlib
import threading
from typing import Any

import pytest
from tiny_run import NO_EVALUATION, SYNCHRONOUS, TIMEOUT_S, Run, make_blueprint, quick_jit

from jaxvla import config as c
from jaxvla.layout import ROLES
from jaxvla.simulation.group import DeviceEnvGroup

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

REASONS = {
    "simulation": {"learner", "inference"},
    "serving": {"requests"},
    "learning": {"trajectories", "evaluation", "checkpoint"},
}
"""What each role can wait for."""


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three threads simulate and two serve; evaluations and checkpoints come in between."""
    blueprint = make_blueprint(
        simulation=c.SimulationConfig(num_groups=3, envs_per_group=2, segment_length=2),
        serving=c.ServingConfig(num_servers=2, trigger_size=2, max_batch=4, buckets=(2, 4)),
        evaluation=c.EvaluationConfig(num_episodes=4, num_videos=0, interval=2),
    )
    return Run(tmp_path_factory.mktemp("asynchronous"), blueprint).expect(0)


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Run:
    blueprint = make_blueprint(**SYNCHRONOUS, evaluation=NO_EVALUATION)
    return Run(tmp_path_factory.mktemp("synchronous"), blueprint).expect(0)


@pytest.fixture(params=["asynchronous", "synchronous"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def shares(record: dict[str, Any], role: str) -> tuple[float, dict[str, float]]:
    """Busy fraction, and reason -> waiting fraction."""
    start, end = f"utilisation/{role}/waiting_on/", "_fraction"
    waiting = {
        name.removeprefix(start).removesuffix(end): share
        for name, share in record.items()
        if name.startswith(start)
    }
    return record[f"utilisation/{role}/busy_fraction"], waiting


def test_every_second_of_every_role_is_work_or_waiting_for_something(run: Run) -> None:
    for record in run.records():
        for role in ROLES:
            busy, waiting = shares(record, role)
            assert all(0.0 <= share <= 1.0 for share in (busy, *waiting.values()))
            assert math.isclose(busy + sum(waiting.values()), 1.0, abs_tol=1e-6), (role, record)
            assert waiting.keys() <= REASONS[role]
    for activity in run.summary()["utilisation"].values():
        whole = activity["busy_fraction"] + sum(activity["waiting_on"].values())
        assert math.isclose(whole, 1.0, abs_tol=1e-6)


def test_the_last_lines_name_the_busiest_role(run: Run) -> None:
    utilisation = run.summary()["utilisation"]
    busiest = max(utilisation, key=lambda role: utilisation[role]["busy_fraction"])
    (line,) = (line for line in run.lines if line.startswith("bottleneck "))
    percent = f"{100 * utilisation[busiest]['busy_fraction']:.0f}%"
    assert line.split("; ")[0].split() == ["bottleneck", busiest, percent, "busy"]


def test_evaluations_and_checkpoints_are_not_the_learners_work(asynchronous: Run) -> None:
    """Both after update 2: before its record the one, after it the other."""
    waiting = [shares(record, "learning")[1] for record in asynchronous.records()]
    assert [x.get("evaluation", 0.0) > 0.0 for x in waiting] == [False, True, False, False]
    assert [x.get("checkpoint", 0.0) > 0.0 for x in waiting] == [False, False, True, False]


# ------------------------------------------------------------------------------- spans


def spans(run: Run, program: str, name: str) -> list[tuple[float, float]]:
    """(start, end) in microseconds, by start."""
    events = json.loads((run.workdir / "trace.json").read_text())["traceEvents"]
    (pid,) = (
        event["pid"]
        for event in events
        if event["name"] == "process_name" and event["args"]["name"] == program
    )
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and event["pid"] == pid and event["name"] == name
    )


def num_overlaps(run: Run) -> int:
    """Pairs of a training and a simulation span that share time."""
    return sum(
        start < trained and begun < end
        for begun, trained in spans(run, "learning", "train")
        for start, end in spans(run, "simulation", "simulate")
    )


def test_overlap_shows_in_the_trace(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second trajectory's first step does not end before the first update has begun, which does
    not end before that step has begun."""
    run = Run(
        tmp_path,
        make_blueprint(
            simulation=c.SimulationConfig(num_groups=1, envs_per_group=2, segment_length=2),
            serving=c.ServingConfig(trigger_size=2, max_batch=2, buckets=(2,)),
            learning=c.LearningConfig(num_updates=2, trajectories_per_update=1),
            evaluation=NO_EVALUATION,
        ),
    )
    is_stepping, has_begun = threading.Event(), threading.Event()
    functions: Any = run.controller._training.functions
    place, step_chunk = functions.place, DeviceEnvGroup.step_chunk

    def noted_place(trajectory: Any) -> Any:
        has_begun.set()
        assert is_stepping.wait(TIMEOUT_S)
        return place(trajectory)

    def held_step(self: DeviceEnvGroup, actions: Any, cursor: Any) -> Any:
        if cursor.segment == 1:
            is_stepping.set()
            assert has_begun.wait(TIMEOUT_S)
        return step_chunk(self, actions, cursor)

    functions.place = noted_place
    monkeypatch.setattr(DeviceEnvGroup, "step_chunk", held_step)
    run.expect(0)
    assert num_overlaps(run) > 0


def test_a_synchronous_run_shows_no_overlap(synchronous: Run) -> None:
    assert len(spans(synchronous, "learning", "train")) == 4
    assert len(spans(synchronous, "simulation", "simulate")) >= 4 * 2 * 2  # trajectories x chunks
    assert num_overlaps(synchronous) == 0
