"""The simulator program: tickets it holds, and every way in which its threads end."""

import math
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from scripted_group import TRUNCATED, ScriptedGroup
from simulator_run import CALM, TIMEOUT_S, E, FakeClient, FakeQueue, T, answer, make, real_queue

from jaxvla.runtime.program import ProgramState
from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy
from jaxvla.serving.client import Answer, InferenceClient
from jaxvla.transport.base import Ticket
from jaxvla.types import Observation


class FailingClient(FakeClient):
    """Gives `error` to its query number `at`: as an answer, or instead of taking it."""

    def __init__(self, name: str, error: BaseException, *, at: int = 1, refuses: bool = False):
        super().__init__(name)
        self._error, self._at, self._refuses = error, at, refuses

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        if self._refuses and len(self.queries) == self._at:
            raise self._error
        return super().submit(kind, observation, keys)

    def respond(self, future: Future, answer: Answer) -> None:
        if len(self.queries) == self._at + 1:
            future.set_exception(self._error)
        else:
            future.set_result(answer)


class GatedGroup(ScriptedGroup):
    """Stops inside chunk `at` until it is let go."""

    def __init__(self, name: str, at: int = 1):
        super().__init__(name, CALM)
        self.entered, self.gate = threading.Event(), threading.Event()
        self._at = at

    def step_chunk(self, actions: np.ndarray, cursor: Any) -> Any:
        if self.chunk == self._at:
            self.entered.set()
            assert self.gate.wait(TIMEOUT_S)
        return super().step_chunk(actions, cursor)


class BrokenGroup(ScriptedGroup):
    """Breaks in chunk `at`."""

    def __init__(self, name: str, at: int = 1):
        super().__init__(name, CALM)
        self._at = at

    def step_chunk(self, actions: np.ndarray, cursor: Any) -> Any:
        if self.chunk == self._at:
            raise ArithmeticError("the gripper left the table")
        return super().step_chunk(actions, cursor)


class Server:
    """A policy server's thread, until its batcher is closed."""

    def __init__(self, batcher: Batcher):
        self.version = 0
        self._batcher = batcher
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def join(self) -> bool:
        self._thread.join(TIMEOUT_S)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (batch := self._batcher.next_batch()) is not None:
            for request in batch.requests:
                said = answer(batch.kind, request.payload.observation, self.version)
                request.future.set_result(said)


def lockstep_batcher(num_clients: int) -> Batcher:
    """Fires only when every live client has asked."""
    rows = num_clients * E
    return Batcher(trigger_rows=rows, max_wait_s=math.inf, max_rows=rows, capacity_rows=rows)


# --- tickets ----------------------------------------------------------------------------------


def test_a_ticket_is_held_while_its_trajectory_is_made() -> None:
    queue, group = real_queue(), GatedGroup("a")
    threads = make([group], queue).start()
    assert group.entered.wait(TIMEOUT_S)
    ledger = queue.ledger()
    assert (ledger.admitted, ledger.in_flight, ledger.depth) == (1, 1, 0)
    assert queue.admit("other", timeout_s=0.0) is None  # all credit is out
    group.gate.set()
    taken = queue.take(1, 0, TIMEOUT_S)
    assert taken is not None and taken[0].ticket.owner == "a"
    queue.close("finished")
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED
    ledger = queue.ledger()
    assert (ledger.admitted, ledger.consumed, ledger.dropped) == (1, 1, 0)


def test_no_trajectory_without_credit() -> None:
    """One update's worth of credit: the next segment begins when the learner has moved on."""
    queue, group = real_queue(), GatedGroup("a", at=T)
    threads = make([group], queue).start()
    assert queue.take(1, 0, TIMEOUT_S) is not None
    assert group.chunk == T and not group.entered.is_set()
    queue.advance(1)
    assert group.entered.wait(TIMEOUT_S)
    assert queue.ledger().in_flight == 1
    queue.close("finished")
    group.gate.set()
    assert threads.join(TIMEOUT_S)


@pytest.mark.parametrize("at", [0, T - 1, T + 1])
def test_a_group_that_fails_gives_its_ticket_back(at: int) -> None:
    queue = real_queue(per_update=2)
    made = make([BrokenGroup("a", at)], queue)
    threads = made.start()
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.FAILED
    assert isinstance(threads.error, ArithmeticError)
    ledger = queue.ledger()
    assert ledger.dropped_by_reason == {"simulator_failed": 1} and ledger.in_flight == 0
    assert ledger.depth == at // T
    assert not made.clients[0].is_joined
    # The credit is there for others.
    while queue.admit("other", timeout_s=0.0) is not None:
        pass
    assert queue.ledger().in_flight == 2 - at // T


def test_in_lockstep_a_failure_gives_all_tickets_back() -> None:
    queue = real_queue(per_update=2)
    made = make([ScriptedGroup("a", CALM), BrokenGroup("b")], queue, overlap=False)
    threads = made.start()
    assert threads.join(TIMEOUT_S) and isinstance(threads.error, ArithmeticError)
    ledger = queue.ledger()
    assert ledger.dropped_by_reason == {"simulator_failed": 2}
    assert ledger.in_flight == ledger.depth == 0
    assert not any(client.is_joined for client in made.clients)


def test_a_failure_leaves_other_groups_alone() -> None:
    """Until the runtime stops them."""
    queue, has_failed = real_queue(per_update=8), threading.Event()
    healthy = GatedGroup("b")
    threads = make([BrokenGroup("a"), healthy], queue).start(lambda _: has_failed.set())
    assert has_failed.wait(TIMEOUT_S) and healthy.entered.wait(TIMEOUT_S)
    healthy.gate.set()
    assert queue.take(8, 0, TIMEOUT_S) is not None  # the lost ticket's credit included
    queue.close("finished")
    assert threads.join(TIMEOUT_S) and isinstance(threads.error, ArithmeticError)
    ledger = queue.ledger()
    assert ledger.dropped_by_reason == {"simulator_failed": 1} and ledger.consumed == 8


class BrokenQueue(FakeQueue):
    """Refuses the trajectory of its second ticket."""

    def put(self, ticket: Ticket, payload: Any, **about: Any) -> bool:
        if ticket.id == 1:
            raise ValueError("too large")
        return super().put(ticket, payload, **about)


def test_a_trajectory_that_is_refused_fails_its_ticket() -> None:
    queue = BrokenQueue(2)
    made = make([ScriptedGroup("a", CALM)], queue)
    with pytest.raises(ValueError, match="too large"):
        made.run()
    assert queue.failed == [(1, "simulator_failed")]
    assert len(queue.items) == 1 and not made.clients[0].is_joined


def test_a_ticket_that_ended_meanwhile_stops_nobody() -> None:
    """Such as one whose lease ran out: its trajectory comes late, the next one may not."""
    queue = FakeQueue(2, is_late=True)
    group = ScriptedGroup("a", CALM)
    make([group], queue).run()
    assert [item.info.next_segment for item in queue.items] == [1, 2]
    assert group.chunk == 2 * T and not queue.failed


# --- inference --------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(2, 1), (0, 3), (3, 0), (2, 2)])
def test_lockstep_outlasts_unlike_numbers_of_time_limits(ends: tuple[int, int]) -> None:
    """A batch fires when all clients have asked; who needs no more values asks no more."""
    scripts = []
    for count in ends:
        script = CALM.copy()
        script.flat[:count] = TRUNCATED
        scripts.append(script)
    queue, batcher = FakeQueue(4), lockstep_batcher(2)
    server = Server(batcher)
    clients = [InferenceClient(batcher, name) for name in "ab"]
    groups = [ScriptedGroup(name, script) for name, script in zip("ab", scripts, strict=True)]
    threads = make(groups, queue, clients=clients, overlap=False).start()
    has_ended = threads.join(TIMEOUT_S)
    batcher.close("finished")
    assert has_ended and threads.error is None and server.join()
    assert len(queue.items) == 4 and not queue.failed
    for item, count in zip(queue.items, 2 * ends, strict=True):
        assert item.payload.truncated.sum() == count


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("at", [0, T - 1, T])
def test_a_policy_server_that_closes_ends_the_threads_quietly(at: int, refuses: bool) -> None:
    """Before a query, while one waits, and in the value pass."""
    queue = real_queue()
    client = FailingClient("a", BatcherClosedError("finished"), at=at, refuses=refuses)
    threads = make([ScriptedGroup("a", CALM)], queue, clients=[client]).start()
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED and threads.error is None
    assert queue.ledger().dropped_by_reason == {"shutdown": 1}
    assert not client.is_joined


def test_a_cancelled_query_is_no_failure() -> None:
    class Cancelling(FakeClient):
        def respond(self, future: Future, answer: Answer) -> None:
            future.cancel()

    queue = real_queue()
    threads = make([ScriptedGroup("a", CALM)], queue, clients=[Cancelling("a")]).start()
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED
    assert queue.ledger().dropped_by_reason == {"shutdown": 1}


@pytest.mark.parametrize(
    ("error", "refuses"), [(ArithmeticError("NaN"), False), (Busy("4 rows are waiting"), True)]
)
def test_an_error_of_the_server_is_a_failure(error: Exception, refuses: bool) -> None:
    """Busy as well: the server holds the rows of all groups, so it can only be a defect."""
    queue = real_queue()
    client = FailingClient("a", error, refuses=refuses)
    threads = make([ScriptedGroup("a", CALM)], queue, clients=[client]).start()
    assert threads.join(TIMEOUT_S)
    assert threads.error is error
    assert queue.ledger().dropped_by_reason == {"simulator_failed": 1}
    assert not client.is_joined


def test_who_waits_for_a_ticket_holds_up_no_batch() -> None:
    """Credit for one of two groups, and a server that waits until every live client asks."""
    queue, batcher = real_queue(), lockstep_batcher(2)
    groups = [ScriptedGroup(name, CALM) for name in "ab"]
    clients = [InferenceClient(batcher, group.name) for group in groups]
    threads = make(groups, queue, clients=clients).start()
    server = Server(batcher)
    for version in range(4):
        assert queue.take(1, version, TIMEOUT_S) is not None
        server.version = version + 1
        queue.advance(version + 1)
    queue.close("finished")
    batcher.close("finished")
    assert threads.join(TIMEOUT_S) and server.join()
    assert threads.state is ProgramState.STOPPED


# --- the end ----------------------------------------------------------------------------------


def test_closing_the_queue_ends_a_wait_for_a_ticket() -> None:
    has_waited = threading.Event()

    def clock() -> float:
        """Read by the queue with its lock held, just before it waits."""
        has_waited.set()
        return 0.0

    queue = real_queue(clock=clock)
    assert queue.admit("other") is not None  # all there is
    has_waited.clear()
    made = make([ScriptedGroup("a", CALM)], queue)
    threads = made.start()
    assert has_waited.wait(TIMEOUT_S)
    queue.close("finished")
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED
    assert not made.clients[0].queries and queue.ledger().admitted == 1


def test_closing_the_queue_in_the_middle_of_a_segment() -> None:
    """The segment is finished, its trajectory comes too late, and the thread ends."""
    queue, group = real_queue(), GatedGroup("a")
    threads = make([group], queue).start()
    assert group.entered.wait(TIMEOUT_S)
    queue.close("finished")
    group.gate.set()
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED
    ledger = queue.ledger()
    assert ledger.dropped_by_reason == {"finished": 1} and ledger.late == 1


class SignallingBatcher(Batcher):
    """Tells how many requests it has been given. Nobody serves them."""

    def __init__(self, num_clients: int):
        rows = num_clients * E
        super().__init__(trigger_rows=rows, max_wait_s=0.0, max_rows=rows, capacity_rows=rows)
        self.asked = threading.Semaphore(0)

    def submit(self, **request: Any) -> Future:
        future = super().submit(**request)
        self.asked.release()
        return future


@pytest.mark.parametrize("queue_first", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_closing_everything_while_queries_wait(overlap: bool, queue_first: bool) -> None:
    """As at the end of a run; nobody answers any more."""
    queue, batcher = real_queue(per_update=2), SignallingBatcher(2)
    groups = [ScriptedGroup(name, CALM) for name in "ab"]
    clients = [InferenceClient(batcher, group.name) for group in groups]
    made = make(groups, queue, clients=clients, overlap=overlap)
    threads = made.start()
    for _ in groups:
        assert batcher.asked.acquire(timeout=TIMEOUT_S)
    made.simulator.stop("finished")
    ends: list[Any] = [queue, batcher]
    for program in ends if queue_first else ends[::-1]:
        program.close("finished")
    assert threads.join(TIMEOUT_S)
    assert threads.state is ProgramState.STOPPED
    ledger = queue.ledger()
    assert (ledger.admitted, ledger.dropped, ledger.in_flight) == (2, 2, 0)
    if queue_first:
        assert ledger.dropped_by_reason == {"finished": 2}


def test_close_frees_every_group() -> None:
    groups = [ScriptedGroup(name, CALM) for name in "ab"]
    make(groups, FakeQueue(0)).simulator.close()
    assert all(group.is_closed for group in groups)


def test_time_is_booked() -> None:
    """What the contract reports of a simulator."""
    queue, group = real_queue(), GatedGroup("a")
    made = make([group], queue)
    threads = made.start()
    assert group.entered.wait(TIMEOUT_S)
    during = made.meter.snapshot().total
    assert set(during.busy_s) == {"other", "reset", "simulate"}
    assert set(during.waiting_s) == {"learner", "inference"}
    group.gate.set()
    queue.close("finished")
    assert threads.join(TIMEOUT_S)
