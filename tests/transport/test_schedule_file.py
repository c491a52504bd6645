"""Files of schedules: what is written, what is refused, and who is waited for in a replay."""

import dataclasses
import json
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import UsageError
from jaxvla.transport.base import Ticket
from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore
from jaxvla.transport.schedule import Schedule, ScheduleDivergedError, Served
from jaxvla.transport.schedule_file import ScheduleRecorder, ScheduleReplay, settings_of
from jaxvla.transport.staleness import CreditRule

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""


def make_config(**sections: Any) -> c.ExperimentConfig:
    defaults: dict[str, Any] = {
        "env": c.EnvConfig(name="counter"),
        "model": c.ModelConfig(name="tiny"),
        "algorithm": PPOConfig(),
        "learning": c.LearningConfig(num_updates=2, trajectories_per_update=2),
    }
    return c.ExperimentConfig(name="tiny", **(defaults | sections))


def ticket(number: int, owner: str) -> Ticket:
    return Ticket(id=number, admission_version=0, owner=owner)


def serve(schedule: Schedule, server: str, *clients: str, kind: str = "explore") -> None:
    requests = tuple((client, 2) for client in clients)
    schedule.server(server).running(Served(kind=kind, version=0, requests=requests))


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run of one update: b is first, though a came first, and is alone in its batch."""
    path = tmp_path / "deep" / "schedule.jsonl"
    recorder = ScheduleRecorder(path, make_config())
    recorder.server("server_0").pull([0])
    for number, owner in enumerate("bab"):
        recorder.admitted(ticket(number, owner))
    for client, server in (("a", 1), ("b", 0)):
        assert recorder.joined(client, server) == server
    serve(recorder, "server_0", "b")
    serve(recorder, "server_0", "b", "a")
    recorder.left("b")
    recorder.taken([0, 2])
    recorder.ended()
    recorder.left("a")  # a consequence of the end
    recorder.close()
    return path


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_a_line_per_event_in_their_order(path: pathlib.Path) -> None:
    header, *events = map(json.loads, lines(path))
    assert header["format"] == 1 and header["num_updates"] == 2
    assert header["settings"] == settings_of(make_config())
    assert events == [
        {"swap": 0, "server": "server_0"},
        {"admit": "b", "ticket": 0},
        {"admit": "a", "ticket": 1},
        {"admit": "b", "ticket": 2},
        {"join": "a", "server": 1},
        {"join": "b", "server": 0},
        {"batch": [["b", 0, 2]], "kind": "explore", "version": 0, "server": "server_0"},
        {"batch": [["b", 1, 2], ["a", 0, 2]]}
        | {"kind": "explore", "version": 0, "server": "server_0"},
        {"leave": "b"},
        {"take": [0, 2]},
    ]


def test_every_line_is_on_disk_at_once(tmp_path: pathlib.Path) -> None:
    recorder = ScheduleRecorder(tmp_path / "schedule.jsonl", make_config())
    for number in range(3):
        recorder.admitted(ticket(number, "a"))
        assert len(lines(tmp_path / "schedule.jsonl")) == 2 + number
    recorder.close()


def test_a_recorder_overwrites_nothing(path: pathlib.Path) -> None:
    before = path.read_text()
    with pytest.raises(FileExistsError):
        ScheduleRecorder(path, make_config())
    assert path.read_text() == before


# ------------------------------------------------------------------------- refusals


def test_the_same_config_is_accepted_whatever_it_shows_and_keeps(path: pathlib.Path) -> None:
    config = make_config(
        evaluation=c.EvaluationConfig(num_episodes=0),
        checkpoint=c.CheckpointConfig(interval=1),
        telemetry=c.TelemetryConfig(trace=False),
        runtime=c.RuntimeConfig(grace_s=1.0, compilation_cache=""),
    )
    ScheduleReplay(path).require(dataclasses.replace(config, name="other"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "config.seed = 1, recorded with 0"),
        (
            {"serving": c.ServingConfig(buckets=(4,))},
            r"serving.buckets = \[4\], recorded with \[\]",
        ),
        (
            {"algorithm": c.AlgorithmConfig(name="ppo")},
            "config.algorithm.* = None, recorded with .* and [0-9]+ more",
        ),
    ],
)
def test_another_config_is_refused_by_name(
    path: pathlib.Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ScheduleReplay(path).require(make_config(**other))


_HEADER = json.dumps({"format": 1, "num_updates": 2, "settings": {}}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no complete update"),
        ("not json\n", "is no schedule"),
        ('{"a": 1}\n', "is no schedule"),
        (_HEADER.replace("1", "9", 1), "has format 9, this version reads 1"),
        (_HEADER, "holds no complete update"),
        (_HEADER + "{\n", "line 2 is damaged"),
        (_HEADER + '{"admit": "a", "ticket": 1}\n', "line 2 is damaged"),
        (_HEADER + '{"go": 1}\n', "line 2 is damaged"),
        (
            _HEADER + '{"batch": [["a", 3, 2]], "kind": "value", "version": 0, "server": "s"}\n',
            "line 2 is damaged",
        ),
        (
            _HEADER + '{"fail": 5, "owner": "a", "reason": "lease"}\n',
            "ticket 5 of a failed in the recorded run, reason 'lease'",
        ),
        (_HEADER + '{"restart": "env 3"}\n', "the recorded run restarted env 3"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    tmp_path: pathlib.Path, text: str | None, message: str
) -> None:
    path = tmp_path / "schedule.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=rf"^--replay_schedule=.*: .*{message}.* Fix: "):
        ScheduleReplay(path)


def test_updates_are_complete_when_all_was_taken_for_them(path: pathlib.Path) -> None:
    assert ScheduleReplay(path).num_updates(planned=2) == 1
    with path.open("a") as file:
        file.write('{"take": [1]}\n{"take": [3')
    assert ScheduleReplay(path).num_updates(planned=2) == 1
    with path.open("a") as file:
        file.write("]}\n")
    assert ScheduleReplay(path).num_updates(planned=2) == 2


# --------------------------------------------------------------------------- replay


def in_thread(function: Any) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def make_queue(schedule: Schedule, window: int = 1) -> InProcessQueue:
    rule = CreditRule(trajectories_per_update=2, max_staleness=1, window=window)
    return InProcessQueue(rule, schedule=schedule)


def put(queue: InProcessQueue, made: Ticket) -> None:
    assert queue.put(made, None, policy_version_min=0, policy_version_max=0, nbytes=1)


def test_tickets_go_to_the_recorded_owners(path: pathlib.Path) -> None:
    """a has come first, and waits for b."""
    queue = make_queue(ScheduleReplay(path))
    assert queue.admit("a", timeout_s=0.0) is None
    got: list[Ticket | None] = []
    waiting = in_thread(lambda: got.append(queue.admit("a", TIMEOUT_S)))
    first = queue.admit("b", TIMEOUT_S)
    waiting.join(TIMEOUT_S)
    assert [x and (x.id, x.owner) for x in (first, *got)] == [(0, "b"), (1, "a")]
    assert queue.admit("a", timeout_s=0.0) is None
    assert queue.admit("b", timeout_s=0.0) is not None
    assert queue.admit("b", timeout_s=0.0) is None  # the recording has no more


def test_a_take_waits_for_the_recorded_tickets(path: pathlib.Path) -> None:
    """Tickets 0 and 2 were taken; the order rule alone would take 0 and 1."""
    queue = make_queue(ScheduleReplay(path), window=3)
    tickets = [queue.admit(owner, TIMEOUT_S) for owner in "bab"]
    first, second, third = [x for x in tickets if x is not None]
    put(queue, second)
    put(queue, first)
    assert queue.take(2, 0, timeout_s=0.0) is None
    put(queue, third)
    taken = queue.take(2, 0, timeout_s=TIMEOUT_S)
    assert taken is not None and [x.ticket.id for x in taken] == [0, 2]
    with pytest.raises(ScheduleDivergedError, match=r"takes 1 trajectories; .* has: tickets"):
        queue.take(1, 1, timeout_s=0.0)


def test_a_server_swaps_in_the_recorded_versions(tmp_path: pathlib.Path) -> None:
    """Versions 0 and 2, though 3 is published when it asks for 2; version 1 it never had."""
    path = tmp_path / "schedule.jsonl"
    recorder = ScheduleRecorder(path, make_config())
    part = recorder.server("server_0")
    for staged in ([0], [2]):
        part.pull(staged)
    serve(recorder, "server_0", "a")
    part.pull([3])
    recorder.taken([0, 1])
    recorder.close()
    replay = ScheduleReplay(path)
    store = InProcessWeightStore(schedule=replay)
    shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    subscription = store.subscribe("server_0", shardings)
    assert subscription.poll() is None
    pulled = []
    for version in range(4):
        store.publish(version, {"kernel": jnp.full(1, float(version))})
    while (found := subscription.poll()) is not None:
        pulled.append((found[0], float(found[1]["kernel"][0])))
        subscription.acknowledge(found[0])
    assert pulled == [(0, 0.0), (2, 2.0)]
    assert store.acknowledged_version == 2
    replay.server("server_0").running(Served(kind="explore", version=0, requests=(("a", 2),)))
    found = subscription.poll()
    assert found is not None and found[0] == 3


def test_a_batch_is_the_recorded_one(path: pathlib.Path) -> None:
    part = ScheduleReplay(path).server("server_0")
    assert list(part.pick(["a", "b"])) == []  # the server swaps weights in before
    assert part.pull({0: None}) == 0
    assert list(part.pick(["a"])) == []
    assert list(part.pick(["a", "b"])) == ["b"]
    part.running(Served(kind="explore", version=0, requests=(("b", 2),)))
    assert list(part.pick(["b"])) == []
    assert list(part.pick(["a", "b"])) == ["b", "a"]
    other = Served(kind="explore", version=1, requests=(("b", 2), ("a", 2)))
    with pytest.raises(ScheduleDivergedError, match=r"server_0 runs .*version=1"):
        part.running(other)


def test_a_client_does_what_is_recorded_or_the_replay_stops(path: pathlib.Path) -> None:
    replay = ScheduleReplay(path)
    assert replay.joined("a", 0) == 1
    replay.asked("b", "explore", 2)
    with pytest.raises(ScheduleDivergedError, match=r"b leaves its server; .* has: b asks for"):
        replay.left("b")
    with pytest.raises(ScheduleDivergedError, match=r"b asks for 'value' .*has: b leaves"):
        replay.asked("b", "value", 2)
    replay.asked("b", "explore", 2)  # the recording ends before
    replay.ended()
    replay.left("a")  # so does this one


def test_a_restart_stops_the_replay(path: pathlib.Path) -> None:
    with pytest.raises(ScheduleDivergedError, match=r"restarted env 3; .* has: no restart"):
        ScheduleReplay(path).restarted("env 3")
