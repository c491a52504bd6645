"""The queue over real connections: like the one in process, and whole when connections die."""

import contextlib
import logging
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import test_in_process_queue as in_process
from local_connections import TIMEOUT_S, in_thread
from remote_pair import RemotePair, Served, greet, serving

from jaxvla.transport.base import Ticket
from jaxvla.transport.channel import Connection
from jaxvla.transport.frames import Frame
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.remote_queue import RemoteQueue
from jaxvla.transport.staleness import CreditRule


def make_queue(per_update: int = 2, max_staleness: int = 1, **options: Any) -> InProcessQueue:
    rule = CreditRule(trajectories_per_update=per_update, max_staleness=max_staleness)
    return InProcessQueue(rule, **options)


def put(queue: Any, ticket: Ticket, payload: int = 0, info: Any = None) -> bool:
    version = ticket.admission_version
    return queue.put(
        ticket,
        payload,
        policy_version_min=version,
        policy_version_max=version,
        nbytes=8,
        info=info,
    )


# ------------------------------------------------- what holds in process holds here as well

_OWNERS = ["simulator", "simulator 3", "first", "second", "third", "dead", "alive", "slow"]
_OWNERS += ["impatient", "patient", "late"]
_SHARED = [
    (in_process.test_item_carries_what_was_put, []),
    (in_process.test_zero_timeout_does_not_wait, []),
    (in_process.test_timeout_ends_a_wait, []),
    *((in_process.test_credit_wakes_a_waiting_admit, [x]) for x in ("advance", "fail")),
    (in_process.test_credit_wakes_a_waiting_admit, ["fail_owner"]),
    (in_process.test_credit_of_a_trajectory_from_the_future_wakes_a_waiting_admit, []),
    *((in_process.test_progress_wakes_a_waiting_take, [x]) for x in ("put", "fail the older one")),
    (in_process.test_owner_that_gives_up_waiting_lets_the_next_one_pass, []),
    (in_process.test_close_wakes_every_blocked_call, []),
    (in_process.test_lease_of_a_dead_owner_runs_out_at_its_time, []),
    *(
        (in_process.test_lease_is_judged_by_the_clock_not_by_who_looks_first, [x])
        for x in ("put", "fail", "fail_owner", "ledger")
    ),
    (in_process.test_lease_wakes_waiting_threads_without_help, []),
    (in_process.test_error_in_take_does_not_block_the_queue, []),
]


@pytest.mark.parametrize(
    ("test", "arguments"), _SHARED, ids=lambda x: "_".join(x) if isinstance(x, list) else x.__name__
)
def test_like_the_queue_in_process(monkeypatch: Any, test: Any, arguments: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        make = in_process.make_queue

        def make_remote(**options: Any) -> RemotePair:
            queue = make(**options)
            served = stack.enter_context(serving(queue))
            return RemotePair(queue, served.join("all", _OWNERS)[0])

        monkeypatch.setattr(in_process, "make_queue", make_remote)
        test(*arguments)


# ------------------------------------------------------------------------ loss of connections


@pytest.mark.fault(31)
def test_what_a_lost_simulator_had_is_given_up_and_no_more() -> None:
    queue = make_queue()
    with serving(queue) as served:
        lost, _ = served.join("lost", ["a", "b"])
        other, _ = served.join("other", ["c"])
        for owner in "ab":
            assert lost.admit(owner) is not None
        ready, kept = lost.admit("a"), other.admit("c")
        assert ready is not None and kept is not None
        assert put(lost, ready)
        waiting = in_thread(lambda: other.admit("c"))  # the credit is used up
        lost.close()
        assert waiting.result(TIMEOUT_S).owner == "c"
        assert put(other, kept)
    ledger = queue.ledger()
    assert ledger.is_balanced
    assert ledger.dropped_by_reason["simulator_lost"] >= 2
    assert ledger.completed == 2


def test_lost_connection_ends_every_call_quietly() -> None:
    queue = make_queue(per_update=1, max_staleness=0, clock=in_process.SignallingClock())
    with serving(queue) as served:
        remote, _ = served.join("simulator", ["a", "b"])
        ticket = remote.admit("a")
        assert ticket is not None
        waiting = in_process.blocked(queue, lambda: remote.admit("b"))
        remote.close()
        assert waiting.result(TIMEOUT_S) is None
        assert remote.admit("a") is None
        assert not put(remote, ticket)
        assert not remote.fail(ticket, "crash")
    ledger = queue.ledger()
    assert (ledger.admitted, ledger.dropped_by_reason) == (1, {"simulator_lost": 1})


def test_learner_that_hangs_up_ends_every_call_quietly() -> None:
    queue = make_queue(per_update=1, max_staleness=0, clock=in_process.SignallingClock())
    with contextlib.ExitStack() as learner:
        served = learner.enter_context(serving(queue))
        remote, _ = served.join("simulator", ["a", "b"])
        assert remote.admit("a") is not None
        waiting = in_process.blocked(queue, lambda: remote.admit("b"))
        learner.close()
        assert waiting.result(TIMEOUT_S) is None


def test_simulator_that_dies_while_it_waits_leaves_the_line() -> None:
    """Else it would get the next ticket, and its successor would wait behind it."""
    queue = make_queue(per_update=1, max_staleness=0, clock=in_process.SignallingClock())
    with serving(queue) as served:
        first, _ = served.join("first", ["a"])
        assert first.admit("a") is not None
        second, _ = served.join("second", ["b"])
        dead = in_process.blocked(queue, lambda: second.admit("b"))
        second.close()
        assert dead.result(TIMEOUT_S) is None
        successor, _ = served.join("second", ["b"])
        waiting = in_process.blocked(queue, lambda: successor.admit("b"))
        queue.advance(1)
        assert waiting.result(TIMEOUT_S).id == 1
    assert queue.ledger().admitted == 2


@pytest.mark.fault(31)
def test_restarted_simulator_goes_on_behind_what_was_accepted() -> None:
    queue = make_queue(per_update=4)
    with serving(queue) as served:
        remote, newest = served.join("simulator", ["a", "b"])
        assert newest == {}
        for segment in (1, 2):
            ticket = remote.admit("a")
            assert ticket is not None and put(remote, ticket, info={"next_segment": segment})
        late = remote.admit("a")
        assert late is not None and remote.fail(late, "simulator_failed")
        assert not put(remote, late, info={"next_segment": 3})
        remote.close()
        _, newest = served.join("simulator", ["a", "b"])
        assert newest == {"a": {"next_segment": 2}} == served.service.newest(["a", "b"])


def test_simulator_that_comes_back_replaces_its_half_open_connection() -> None:
    queue = make_queue()
    with serving(queue) as served:
        old, _ = served.join("simulator", ["a", "b"])
        assert old.admit("a") is not None
        new, _ = served.join("simulator", ["b", "a"])
        assert queue.ledger().dropped_by_reason == {"simulator_lost": 1}
        assert new.admit("a") is not None
        assert old.admit("a", timeout_s=0.0) is None


def test_waiting_for_a_ticket_holds_up_nothing_else_on_the_connection() -> None:
    queue = make_queue(per_update=1, max_staleness=0, clock=in_process.SignallingClock())
    read = threading.Event()
    with serving(queue, {"news": lambda frame: read.set()}) as served:
        remote, _ = served.join("simulator", ["a", "b"])
        ticket = remote.admit("a")
        assert ticket is not None
        waiting = in_process.blocked(queue, lambda: remote.admit("b"))
        remote._connection.send(Frame(kind="news"))
        assert read.wait(TIMEOUT_S)
        assert put(remote, ticket) and not waiting.done()
        queue.advance(1)
        assert waiting.result(TIMEOUT_S) is not None


# ---------------------------------------------------------------------------- what is refused


@contextlib.contextmanager
def raw_simulator(queue: InProcessQueue) -> Iterator[tuple[Connection, Any]]:
    """A connection that can send anything, and another simulator."""
    with serving(queue) as served:
        other, _ = served.join("other", ["b"])
        connection = greet(served.dial("raw"), ["a"])
        assert connection.receive().kind == "welcome"
        yield connection, other


def ask(connection: Connection, kind: str, arrays: Any = (), **fields: Any) -> dict[str, Any]:
    connection.send(Frame(kind=kind, fields={"number": 7, **fields}, arrays=list(arrays)))
    answer = connection.receive()
    assert answer.kind == "answer" and answer.fields["number"] == 7
    return dict(answer.fields)


PAYLOAD = np.zeros((), np.int64)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ({}, [np.zeros((), np.int32)], "payload is int32"),
        ({}, [np.zeros(2, np.int64)], r"payload is int64\[2\]"),
        ({}, [], "0 arrays"),
        ({"item": None}, [PAYLOAD], "item = None"),
        ({"policy_version_min": -1}, [PAYLOAD], "policy_version_min = -1"),
        ({"policy_version_min": True}, [PAYLOAD], "policy_version_min = True"),
        ({"policy_version_max": "4"}, [PAYLOAD], "policy_version_max = '4'"),
        ({"policy_version_min": 3}, [PAYLOAD], "policy versions"),
    ],
)
def test_malformed_put_fails_its_ticket_and_nothing_else(
    caplog: Any, change: dict[str, Any], arrays: Any, message: str
) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, other), caplog.at_level(logging.ERROR):
        kept = other.admit("b")
        ticket = ask(connection, "admit", owner="a", timeout_s=None)["ticket"]
        fields = {"ticket": ticket, "policy_version_min": 0, "policy_version_max": 0, "item": {}}
        answer = ask(connection, "put", arrays, **(fields | change))
        assert answer["result"] is False
        assert re.search(message, answer["error"])
        assert any(answer["error"] in record.getMessage() for record in caplog.records)
        assert queue.ledger().dropped_by_reason == {"malformed": 1}
        assert put(other, kept)
        assert ask(connection, "admit", owner="a", timeout_s=0)["ticket"] is not None


def test_payload_beyond_the_queues_limit_is_malformed() -> None:
    queue = make_queue(max_bytes=7)
    with serving(queue) as served:
        remote, _ = served.join("simulator", ["a"])
        ticket = remote.admit("a")
        assert ticket is not None
        with pytest.raises(ValueError, match="max_bytes = 7"):
            put(remote, ticket)
    assert queue.ledger().dropped_by_reason == {"malformed": 1}


@pytest.mark.parametrize("kind", ["put", "fail"])
def test_tickets_of_others_are_out_of_reach(kind: str) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, other):
        kept = other.admit("b")
        fields: dict[str, Any] = {"policy_version_min": 0, "policy_version_max": 0, "item": {}}
        fields["reason"] = "crash"
        stolen = {"id": kept.id, "admission_version": 0, "owner": "b"}
        answer = ask(connection, kind, [PAYLOAD], ticket=stolen, **fields)
        assert not answer["result"] and "owner = 'b'" in answer["error"]
        forged = stolen | {"owner": "a"}
        assert not ask(connection, kind, [PAYLOAD], ticket=forged, **fields)["result"]
        assert queue.ledger().in_flight == 1
        assert put(other, kept)


@pytest.mark.parametrize("field", ["id", "admission_version", "owner"])
def test_ticket_that_cannot_be_read_is_refused(field: str) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, _):
        ticket = ask(connection, "admit", owner="a", timeout_s=None)["ticket"] | {field: None}
        answer = ask(connection, "fail", ticket=ticket, reason="crash")
        assert f"{field} = None" in answer["error"]


@pytest.mark.parametrize("reason", ["", "Crash", "a/b", "x" * 33, 3])
def test_reasons_become_metric_names(reason: Any) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, _):
        ticket = ask(connection, "admit", owner="a", timeout_s=None)["ticket"]
        assert "reason = " in ask(connection, "fail", ticket=ticket, reason=reason)["error"]
        assert ask(connection, "fail", ticket=ticket, reason="crash")["result"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"owner": "b", "timeout_s": None}, "owner = 'b'"),
        ({"owner": 3, "timeout_s": None}, "owner = 3"),
        ({"owner": "a", "timeout_s": -1.0}, "timeout_s = -1.0"),
        ({"owner": "a", "timeout_s": float("nan")}, "timeout_s = nan"),
        ({"owner": "a"}, "timeout_s"),
    ],
)
def test_wrong_admit_gets_no_ticket(fields: dict[str, Any], message: str) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, _):
        answer = ask(connection, "admit", **fields)
        assert answer["ticket"] is None and message in answer["error"]
        assert queue.ledger().admitted == 0
        assert ask(connection, "admit", owner="a", timeout_s=None)["ticket"] is not None


def test_an_owner_waits_for_one_ticket_at_a_time() -> None:
    queue = make_queue(per_update=1, max_staleness=0, clock=in_process.SignallingClock())
    with serving(queue) as served:
        remote, _ = served.join("simulator", ["a"])
        assert remote.admit("a") is not None
        waiting = in_process.blocked(queue, lambda: remote.admit("a"))
        with pytest.raises(ValueError, match="asks for another one"):
            remote.admit("a")
        queue.advance(1)
        assert waiting.result(TIMEOUT_S) is not None


@pytest.mark.parametrize(
    "frame", [Frame(kind="unknown"), Frame(kind="admit"), Frame(kind="put", fields={"number": "x"})]
)
def test_frame_that_cannot_be_answered_ends_the_connection(frame: Frame) -> None:
    queue = make_queue()
    with raw_simulator(queue) as (connection, other):
        kept = other.admit("b")
        remote = RemoteQueue(connection, None)  # type: ignore[arg-type]
        running = in_thread(remote.run)
        connection.send(frame)
        running.result(TIMEOUT_S)
        assert remote.admit("a") is None
        assert put(other, kept)


def test_samples_older_than_their_ticket_are_given_up() -> None:
    """The bound rests on it: a server that lost the learner may go on with old weights."""
    queue = make_queue()
    queue.advance(2)
    with serving(queue) as served:
        remote, _ = served.join("simulator", ["a"])
        versions: dict[str, Any] = {"policy_version_min": 1, "policy_version_max": 2, "nbytes": 8}
        ticket = remote.admit("a")
        assert ticket is not None and ticket.admission_version == 2
        assert not remote.put(ticket, 0, **versions)
        assert not remote.put(ticket, 0, **versions)
    ledger = queue.ledger()
    assert (ledger.dropped_by_reason, ledger.late) == ({"outdated": 1}, 1)


# ------------------------------------------------------------------------------------ a storm

NUM_SIMULATORS, NUM_UPDATES, PER_UPDATE = 4, 8, 4


class Storm:
    """Simulators that die, or whose connections do, at points that a seed chooses."""

    def __init__(self, seed: int, max_staleness: int):
        self.rule = CreditRule(
            trajectories_per_update=PER_UPDATE,
            max_staleness=max_staleness,
            num_updates=NUM_UPDATES,
        )
        self.queue = InProcessQueue(self.rule)
        self.seed = seed
        self.is_over = threading.Event()

    def simulate(self, number: int, served: Served) -> int:
        """Lives one life after the other; returns how many."""
        draw, owner = random.Random(f"{self.seed} {number}"), f"group_{number}"
        lives = 0
        while not self.is_over.is_set():
            remote, newest = served.join(f"simulator_{number}", [owner])
            lives += 1
            self.live(remote, owner, newest.get(owner, {"next": 0})["next"], draw)
            remote.close()
        return lives

    def live(self, remote: RemoteQueue, owner: str, segment: int, draw: random.Random) -> None:
        while (ticket := remote.admit(owner)) is not None:
            fate = draw.random()
            if fate < 0.1:
                return
            if fate < 0.2:  # the connection dies somewhere around the put
                in_thread(remote.close)
            if 0.2 <= fate < 0.3:
                remote.fail(ticket, "simulator_failed")
                continue
            is_accepted = put(remote, ticket, segment, info={"next": segment + 1})
            if fate >= 0.2:
                assert is_accepted or self.is_over.is_set()
                assert not put(remote, ticket, segment)  # again: late
            segment += 1

    def learn(self) -> list[tuple[str, int]]:
        """Returns owner and segment of everything consumed, in order."""
        consumed = []
        for version in range(NUM_UPDATES):
            items = self.queue.take(PER_UPDATE, version, timeout_s=TIMEOUT_S)
            assert items is not None, f"update {version} starved: {self.queue.ledger()}"
            assert all(version - x.policy_version_min <= self.rule.bound for x in items)
            assert self.queue.ledger().is_balanced
            consumed += [(x.ticket.owner, x.payload) for x in items]
            self.queue.advance(version + 1)
        return consumed


@pytest.mark.fault(31)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_books_close_although_connections_die(seed: int, max_staleness: int) -> None:
    storm = Storm(seed, max_staleness)
    with serving(storm.queue) as served, ThreadPoolExecutor(NUM_SIMULATORS) as pool:
        lives = [pool.submit(storm.simulate, i, served) for i in range(NUM_SIMULATORS)]
        try:
            consumed = storm.learn()
        finally:
            storm.is_over.set()
            storm.queue.close("finished")
        assert sum(future.result(TIMEOUT_S) for future in lives) > NUM_SIMULATORS
    assert len(set(consumed)) == len(consumed) == NUM_UPDATES * PER_UPDATE
    for owner in {owner for owner, _ in consumed}:
        segments = [segment for name, segment in consumed if name == owner]
        # No segment twice, and none left out: a successor goes on where the last one was heard.
        assert segments == list(range(len(segments)))
    ledger = storm.queue.ledger()
    assert ledger.is_balanced
    assert (ledger.consumed, ledger.in_flight, ledger.depth) == (len(consumed), 0, 0)
    assert ledger.dropped_by_reason["simulator_lost"] > 0
