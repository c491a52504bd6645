"""The queue between threads: blocking, waking, leases. The rules are tested in test_staleness."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from jaxvla.transport import TRANSPORTS
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.staleness import CreditRule

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SignallingClock:
    """Stands still and reports that it was read.

    The queue reads its clock with its lock held, just before it waits. So whoever sees the
    signal and then gets the lock knows that the reader is waiting (or has returned).
    """

    def __init__(self):
        self.was_read = threading.Event()

    def __call__(self) -> float:
        self.was_read.set()
        return 0.0


def make_queue(*, per_update=2, max_staleness=1, **options) -> Any:
    rule = CreditRule(trajectories_per_update=per_update, max_staleness=max_staleness)
    return InProcessQueue(rule, **options)


def put(queue, ticket, version=None, **options) -> bool:
    version = ticket.admission_version if version is None else version
    versions = {"policy_version_min": version, "policy_version_max": version}
    return queue.put(ticket, payload=ticket.id, nbytes=8, **(versions | options))


def in_thread(call) -> Future:
    """Runs `call()` in a daemon thread."""
    future = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def blocked(queue: Any, call) -> Future:
    """Runs `call()` in a thread and returns once it waits inside the queue."""
    queue._clock.was_read.clear()
    future = in_thread(call)
    assert queue._clock.was_read.wait(TIMEOUT_S)
    with queue._changed:
        pass
    assert not future.done()
    return future


def test_registry_names_the_queue():
    assert TRANSPORTS.get("in_process") is InProcessQueue


def test_item_carries_what_was_put():
    queue = make_queue(per_update=1)
    ticket = queue.admit("simulator 3")
    info = {"episodes": 2}
    assert put(queue, ticket, info=info, policy_version_max=0)
    (item,) = queue.take(1, 0)
    assert (item.ticket, item.payload, item.info, item.nbytes) == (ticket, ticket.id, info, 8)
    assert (ticket.owner, ticket.admission_version) == ("simulator 3", 0)


def test_bad_put_leaves_the_ticket_in_flight():
    queue = make_queue()
    ticket = queue.admit("simulator")
    with pytest.raises(ValueError, match="policy versions"):
        put(queue, ticket, policy_version_min=2, policy_version_max=1)
    assert queue.ledger().in_flight == 1
    assert put(queue, ticket)


def test_zero_timeout_does_not_wait():
    queue = make_queue(per_update=1, max_staleness=0)
    assert queue.take(1, 0, timeout_s=0.0) is None
    assert queue.admit("simulator", timeout_s=0.0) is not None
    assert queue.admit("simulator", timeout_s=0.0) is None


def test_timeout_ends_a_wait():
    queue = make_queue(per_update=1, max_staleness=0)
    assert queue.take(1, 0, timeout_s=0.01) is None
    queue.admit("simulator")
    assert queue.admit("simulator", timeout_s=0.01) is None
    queue.advance(1)
    assert queue.admit("simulator", timeout_s=0.01) is not None  # the line is empty again


@pytest.mark.parametrize("event", ["advance", "fail", "fail_owner"])
def test_credit_wakes_a_waiting_admit(event):
    queue = make_queue(per_update=1, max_staleness=0, clock=SignallingClock())
    ticket = queue.admit("first")
    waiting = blocked(queue, lambda: queue.admit("second"))
    if event == "advance":
        queue.advance(1)
    elif event == "fail":
        queue.fail(ticket, "crash")
    else:
        assert queue.fail_owner("first", "crash") == 1
    assert waiting.result(TIMEOUT_S).id == 1


def test_credit_of_a_trajectory_from_the_future_wakes_a_waiting_admit():
    queue = make_queue(per_update=1, max_staleness=0, clock=SignallingClock())
    put(queue, queue.admit("first"), version=1)
    waiting = blocked(queue, lambda: queue.admit("second"))
    assert queue.take(1, 0, timeout_s=0.0) is None
    assert waiting.result(TIMEOUT_S).id == 1


@pytest.mark.parametrize("event", ["put", "fail the older one"])
def test_progress_wakes_a_waiting_take(event):
    queue = make_queue(per_update=1, clock=SignallingClock())
    first, second = queue.admit("simulator"), queue.admit("simulator")
    put(queue, second)
    waiting = blocked(queue, lambda: queue.take(1, 0))
    if event == "put":
        put(queue, first)
    else:
        queue.fail(first, "crash")
    expected = first if event == "put" else second
    assert [item.ticket for item in waiting.result(TIMEOUT_S)] == [expected]


def test_tickets_go_to_waiting_owners_in_order_of_their_calls():
    queue = make_queue(per_update=1, max_staleness=0, clock=SignallingClock())
    queue.admit("first")
    waiting = [blocked(queue, lambda i=i: queue.admit(f"waiter {i}")) for i in range(4)]
    for version, future in enumerate(waiting, start=1):
        with queue._changed:  # credit comes, and nobody in the line has had time to wake
            queue.advance(version)
            assert queue.admit("pusher", timeout_s=0.0) is None
        assert future.result(TIMEOUT_S).owner == f"waiter {version - 1}"
        assert not any(later.done() for later in waiting[version:])


def test_owner_that_gets_a_ticket_wakes_the_next_one():
    """The next one may have looked before it was its turn, when credit for both had come."""
    queue = make_queue(per_update=2, max_staleness=0, clock=SignallingClock())
    queue.admit("simulator")
    queue.admit("simulator")
    head = blocked(queue, lambda: queue.admit("head", timeout_s=0.05))  # looks again in 0.05 s
    follower = blocked(queue, lambda: queue.admit("follower"))
    with queue._changed:
        queue._book.advance(1)  # credit for both, of which only the head learns
    assert head.result(TIMEOUT_S).owner == "head"
    assert follower.result(TIMEOUT_S).owner == "follower"


def test_owner_that_gives_up_waiting_lets_the_next_one_pass():
    queue = make_queue(per_update=1, max_staleness=0)
    queue.admit("first")
    impatient = in_thread(lambda: queue.admit("impatient", timeout_s=0.02))
    patient = in_thread(lambda: queue.admit("patient"))
    assert impatient.result(TIMEOUT_S) is None
    queue.advance(1)
    assert patient.result(TIMEOUT_S).owner == "patient"


def test_owner_that_is_given_up_waits_no_longer():
    queue = make_queue(per_update=1, max_staleness=0, clock=SignallingClock())
    queue.admit("first")
    dead = blocked(queue, lambda: queue.admit("dead"))
    alive = blocked(queue, lambda: queue.admit("alive"))
    assert queue.fail_owner("dead", "crash") == 0
    assert dead.result(TIMEOUT_S) is None and not alive.done()
    queue.advance(1)
    assert alive.result(TIMEOUT_S).id == 1
    queue.advance(2)
    assert queue.admit("dead", timeout_s=0.0) is not None  # a successor may ask


def test_close_wakes_every_blocked_call():
    queue = make_queue(per_update=1, max_staleness=0, clock=SignallingClock())
    ticket = queue.admit("first")
    calls = [
        lambda: queue.admit("second"),
        lambda: queue.admit("third", timeout_s=1e6),
        lambda: queue.take(1, 0),
        lambda: queue.take(1, 0, timeout_s=1e6),
    ]
    waiting = [blocked(queue, call) for call in calls]
    queue.close("preempted")
    assert [future.result(TIMEOUT_S) for future in waiting] == [None] * 4
    assert queue.admit("late") is None
    assert queue.take(1, 0) is None
    assert not put(queue, ticket)
    ledger = queue.ledger()
    assert ledger.is_balanced
    assert (ledger.dropped_by_reason, ledger.late) == ({"preempted": 1}, 1)


@pytest.mark.fault(3)
def test_lease_of_a_dead_owner_runs_out_at_its_time():
    clock = FakeClock()
    queue = make_queue(per_update=1, max_staleness=0, lease_s=10.0, clock=clock)
    dead = queue.admit("dead")
    clock.now_s = 9.0
    assert queue.admit("alive", timeout_s=0.0) is None
    clock.now_s = 10.0
    assert queue.admit("alive", timeout_s=0.0) is not None
    assert not put(queue, dead)
    ledger = queue.ledger()
    assert (ledger.dropped_by_reason, ledger.late, ledger.in_flight) == ({"lease": 1}, 1, 1)


@pytest.mark.fault(32)
@pytest.mark.parametrize("call", ["put", "fail", "fail_owner", "ledger"])
def test_lease_is_judged_by_the_clock_not_by_who_looks_first(call):
    clock = FakeClock()
    queue = make_queue(lease_s=10.0, clock=clock)
    ticket = queue.admit("slow")
    clock.now_s = 10.0
    if call == "put":
        assert not put(queue, ticket)
    elif call == "fail":
        assert not queue.fail(ticket, "crash")
    elif call == "fail_owner":
        assert queue.fail_owner("slow", "crash") == 0
    assert queue.ledger().dropped_by_reason == {"lease": 1}


def test_lease_wakes_waiting_threads_without_help():
    queue = make_queue(per_update=1, max_staleness=0, lease_s=0.05)
    queue.admit("dead")
    waiting = in_thread(lambda: queue.admit("alive"))
    assert waiting.result(TIMEOUT_S).id == 1

    queue = make_queue(per_update=1, max_staleness=1, lease_s=0.05)
    queue.admit("dead")
    put(queue, queue.admit("alive"))
    taking = in_thread(lambda: queue.take(1, 0))
    assert [item.ticket.owner for item in taking.result(TIMEOUT_S)] == ["alive"]


def test_error_in_take_does_not_block_the_queue():
    queue = make_queue(per_update=1)
    with pytest.raises(ValueError, match="take of 2"):
        queue.take(2, 0)
    assert queue.admit("simulator", timeout_s=0.0) is not None
