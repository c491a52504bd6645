"""Recorded runs, replayed under other delays: same losses, same parameters, to the bit."""

import json
import pathlib
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tiny_run import LOSSES, NO_EVALUATION, TIMEOUT_S, Run, make_blueprint, quick_jit

from jaxvla import config as c
from jaxvla.config import UsageError
from jaxvla.runtime.build import Blueprint
from jaxvla.serving.batcher import Batcher, Busy
from jaxvla.simulation.group import Cursor, EnvGroup
from jaxvla.telemetry.metrics import Total
from jaxvla.transport.schedule import Schedule
from jaxvla.transport.schedule_file import ScheduleRecorder, ScheduleReplay

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

NUM_UPDATES = 5
BeforeStep = Callable[[str, Cursor], None]
"""Called by an env group before each of its chunks."""


def blueprint(**sections: Any) -> Blueprint:
    """Four groups on two servers that they are given as they come, two updates ahead."""
    defaults: dict[str, Any] = {
        "simulation": c.SimulationConfig(num_groups=4, envs_per_group=2, segment_length=2),
        "serving": c.ServingConfig(
            num_servers=2,
            assignment="greedy",
            trigger_size=4,
            max_wait_ms=2.0,
            max_batch=8,
            buckets=(2, 4, 8),
        ),
        "schedule": c.ScheduleConfig(max_staleness=2),
        "learning": c.LearningConfig(num_updates=NUM_UPDATES, trajectories_per_update=2),
        "evaluation": NO_EVALUATION,
    }
    return make_blueprint(**(defaults | sections))


class Pace:
    """All groups begin their first segment; then two of the four wait until the others have begun
    their second.

    So the fifth and the sixth ticket are certain to go to those others.
    """

    def __init__(self, *fast: str):
        self._fast = fast
        self._begun = {(f"group_{i}", 0): threading.Event() for i in range(4)}
        self._ahead = {(name, 1): threading.Event() for name in fast}

    def __call__(self, group: str, cursor: Cursor) -> None:
        event = (self._begun | self._ahead).get((group, cursor.segment))
        if event is not None:
            event.set()
        awaited = list(self._begun.values())
        if group not in self._fast or cursor.segment:
            # A fast one, too: it could take the sixth ticket before the other has the fifth.
            awaited += self._ahead.values()
        for event in awaited:
            assert event.wait(TIMEOUT_S)


class Jitter:
    """Random delays, other ones for every seed. Waits for nothing."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def __call__(self, group: str, cursor: Cursor) -> None:
        time.sleep(self._random.choice((0.0, 0.0, 0.003, 0.02)))


def run(workdir: pathlib.Path, plan: Blueprint, before_step: BeforeStep, schedule: Schedule) -> Run:
    """A run that calls `before_step`, not begun yet."""
    made = Run(workdir, plan, schedule=schedule)
    make_groups = made.controller._groups.training

    def slowed(group: EnvGroup) -> EnvGroup:
        step_chunk = group.step_chunk

        def step(actions: Any, cursor: Cursor) -> Any:
            before_step(group.name, cursor)
            return step_chunk(actions, cursor)

        group.step_chunk = step
        return group

    made.controller._groups.training = lambda index: [slowed(x) for x in make_groups(index)]
    return made


def record(
    directory: pathlib.Path, before_step: BeforeStep, plan: Blueprint | None = None, code: int = 0
) -> Run:
    """A whole run; its schedule is beside its work directory."""
    plan = plan or blueprint()
    schedule = ScheduleRecorder(directory / "schedule.jsonl", plan.config)
    return run(directory / "recorded", plan, before_step, schedule).expect(code)


def replay(
    directory: pathlib.Path, name: str, before_step: BeforeStep, plan: Blueprint | None = None
) -> Run:
    plan = plan or blueprint()
    schedule = ScheduleReplay(directory / "schedule.jsonl")
    schedule.require(plan.config)
    return run(directory / name, plan, before_step, schedule)


def losses(made: Run) -> list[dict[str, Any]]:
    return [
        {name: x for name, x in record.items() if name.startswith("learner/")}
        for record in made.records()
    ]


def events(directory: pathlib.Path) -> list[dict[str, Any]]:
    lines = (directory / "schedule.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def owners(directory: pathlib.Path) -> list[str]:
    """Who got the tickets, in order."""
    return [event["admit"] for event in events(directory) if "admit" in event]


def require_equal(recorded: Run, replayed: Run) -> None:
    """To the bit: JSON holds every digit of a float."""
    assert set(LOSSES) <= set(losses(recorded)[0])
    assert losses(replayed) == losses(recorded)
    step = recorded.steps()[-1]
    assert replayed.steps()[-1] == step
    assert replayed.digests(step) == recorded.digests(step)


# ---------------------------------------------------------------- an asynchronous run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def recorded(directory: pathlib.Path) -> Run:
    """Groups 2 and 3 run ahead."""
    return record(directory, Pace("group_2", "group_3"))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_replay_has_the_same_losses_and_parameters(
    recorded: Run, directory: pathlib.Path, seed: int
) -> None:
    require_equal(recorded, replay(directory, f"replay_{seed}", Jitter(seed)).expect(0))


def test_without_a_replay_the_losses_depend_on_who_is_fast(
    recorded: Run, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Same config, same seed."""
    other = record(tmp_path, Pace("group_0", "group_1"))
    assert set(owners(directory)[4:6]) <= {"group_2", "group_3"}
    assert set(owners(tmp_path)[4:6]) <= {"group_0", "group_1"}
    assert losses(other) != losses(recorded)


def test_a_recording_holds_the_whole_run(recorded: Run, directory: pathlib.Path) -> None:
    found = events(directory)
    tickets = [event["ticket"] for event in found if "admit" in event]
    assert tickets == list(range(2 * NUM_UPDATES))
    assert [event["take"] for event in found if "take" in event] == [
        [2 * i, 2 * i + 1] for i in range(NUM_UPDATES)
    ]
    assert {event["server"] for event in found if "batch" in event} == {"server_0", "server_1"}
    assert {event["server"] for event in found if "join" in event} == {0, 1}
    rows = sum(rows for event in found if "batch" in event for _, _, rows in event["batch"])
    assert rows >= 2 * NUM_UPDATES * (2 + 1) * 2  # two chunks and a bootstrap value, two envs


def refuse_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request in eight is told that the server is busy."""
    submit, draw = Batcher.submit, random.Random(0)

    def refusing(self: Batcher, **request: Any) -> Any:
        if draw.random() < 1 / 8:
            raise Busy("by chance")
        return submit(self, **request)

    monkeypatch.setattr(Batcher, "submit", refusing)


_VARIANTS: dict[str, dict[str, Any]] = {
    "streamed": {
        "schedule": c.ScheduleConfig(
            max_staleness=2, publish_interval=2, window=3, stream_microbatches=True
        ),
        "serving": c.ServingConfig(
            num_servers=2,
            assignment="0,0,0,1",
            batching="adaptive",
            trigger_size=6,
            max_wait_ms=4.0,
            max_batch=6,
            buckets=(2, 4, 6),
        ),
    },
    "synchronous": {
        "schedule": c.ScheduleConfig(overlap_training=False, overlap_rollout=False),
        "learning": c.LearningConfig(num_updates=3, trajectories_per_update=4),
    },
}


@pytest.mark.parametrize("variant", list(_VARIANTS))
def test_replays_under_random_delays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Requests that are turned away and asked again count once."""
    refuse_some(monkeypatch)
    plan = blueprint(**_VARIANTS[variant])
    made = record(tmp_path, Jitter(1), plan)
    require_equal(made, replay(tmp_path, "replay", Jitter(2), plan).expect(0))


# ------------------------------------------------------------- recordings that end early


def require_beginning(recorded: Run, replayed: Run, num_updates: int) -> None:
    """The replay ends after an update, and says so; up to there it is the same run."""
    message = f"the schedule ends after update {num_updates} of {NUM_UPDATES}"
    assert message in replayed.lines
    assert len(replayed.records()) == num_updates
    assert losses(replayed) == losses(recorded)[:num_updates]
    assert replayed.digests(num_updates) == recorded.digests(num_updates)


def test_a_killed_recording_replays_up_to_its_last_complete_update(
    recorded: Run, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Killed after it took the fourth batch, in the middle of a line."""
    lines = (directory / "schedule.jsonl").read_text().splitlines(keepends=True)
    last = [i for i, line in enumerate(lines) if "take" in line][3]
    cut = "".join(lines[: last + 1]) + lines[last + 1][:7]
    (tmp_path / "schedule.jsonl").write_text(cut)
    replayed = replay(tmp_path, "replay", Jitter(3)).expect(0)
    require_beginning(recorded, replayed, 4)


def test_a_stopped_recording_replays_what_it_did(tmp_path: pathlib.Path) -> None:
    """The interrupted trajectories are no failures."""
    plan = blueprint()
    schedule = ScheduleRecorder(tmp_path / "schedule.jsonl", plan.config)
    stopped = run(tmp_path / "recorded", plan, Jitter(1), schedule)
    stopped.stop_after(2)
    stopped.expect(3)
    done = len(stopped.records())
    assert 2 <= done < NUM_UPDATES
    require_beginning(stopped, replay(tmp_path, "replay", Jitter(2)).expect(0), done)


# -------------------------------------------------------------- what cannot be replayed


class Broken:
    """An env group that fails in its second segment."""

    def __call__(self, group: str, cursor: Cursor) -> None:
        if group == "group_1" and cursor.segment == 1:
            raise ZeroDivisionError("broken")


def test_a_recording_with_failed_tickets_is_refused(tmp_path: pathlib.Path) -> None:
    record(tmp_path, Broken(), code=1)
    with pytest.raises(UsageError, match=r"ticket \d+ of group_1 failed .*'simulator_failed'"):
        ScheduleReplay(tmp_path / "schedule.jsonl")


def test_a_recording_with_restarted_processes_is_refused(tmp_path: pathlib.Path) -> None:
    plan = blueprint()
    schedule = ScheduleRecorder(tmp_path / "schedule.jsonl", plan.config)
    made = run(tmp_path / "recorded", plan, Jitter(1), schedule)
    made.controller._telemetry.recorder.add("faults/simulator_restarts/signal", 2, Total)
    made.expect(0)
    with pytest.raises(UsageError, match=r"restarted 2 env processes .*simulator_restarts/signal"):
        ScheduleReplay(tmp_path / "schedule.jsonl")


def altered(directory: pathlib.Path, target: pathlib.Path, old: str, new: str) -> None:
    """A copy of the schedule in which the first line that has `old` says `new`."""
    text = (directory / "schedule.jsonl").read_text()
    assert old in text
    (target / "schedule.jsonl").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ", 0, 2]",
            ", 0, 1]",
            r"simulation: ScheduleDivergedError: group_\d asks for 'explore' of 2 rows; "
            r".*schedule.jsonl has: group_\d asks for 'explore' of 1 rows",
        ),
        (
            '{"take": [0, 1]}',
            '{"take": [0]}\n{"take": [1]}',
            "learning: ScheduleDivergedError: the learner takes 2 trajectories; .* tickets [0]",
        ),
    ],
)
def test_a_replay_that_does_something_else_stops_and_says_where(
    recorded: Run, directory: pathlib.Path, tmp_path: pathlib.Path, old: str, new: str, message: str
) -> None:
    altered(directory, tmp_path, old, new)
    replayed = replay(tmp_path, "replay", Jitter(1)).expect(1)
    assert re.search(message.replace("[0]", r"\[0\]"), replayed.summary()["detail"])
