"""Firing rules of the dynamic batcher, on a clock that stands still unless told otherwise."""

import math
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxvla.serving.adaptive import Setting
from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy, Expired

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""


class FakeClock:
    """Seconds that pass only when told to; reports that it was read.

    The batcher reads its clock with its lock held, just before it waits.
    """

    def __init__(self):
        self.now_s = 0.0
        self.was_read = threading.Event()

    def __call__(self) -> float:
        self.was_read.set()
        return self.now_s


def make_batcher(*, num_clients=4, **options) -> Any:
    """Four clients, no trigger and no timer within reach, unless told otherwise."""
    defaults: Any = {
        "trigger_rows": 8,
        "max_wait_s": math.inf,
        "max_rows": 8,
        "capacity_rows": 100,
    }
    batcher = Batcher(**(defaults | {"clock": FakeClock()} | options))
    for i in range(num_clients):
        batcher.register(f"c{i}")
    return batcher


def submit(batcher, client, rows=1, kind="sample") -> Any:
    return batcher.submit(rows=rows, client=f"c{client}", kind=kind, payload=f"{kind} of c{client}")


def fire(batcher) -> list[str] | None:
    """Clients of the batch that is due now, or None."""
    batch = batcher.next_batch(timeout_s=0.0)
    return None if batch is None else [request.client for request in batch.requests]


def blocked(batcher, call, pool):
    """Runs `call()` in a thread and returns once it waits inside the batcher."""
    batcher.clock.was_read.clear()
    future = pool.submit(call)
    assert batcher.clock.was_read.wait(TIMEOUT_S)
    with batcher._changed:
        pass
    assert not future.done()
    return future


def test_trigger_counts_rows_not_requests():
    batcher = make_batcher(trigger_rows=4)
    submit(batcher, 0, rows=3)
    assert fire(batcher) is None
    submit(batcher, 1, rows=1)
    assert fire(batcher) == ["c0", "c1"]


def test_firing_drains_the_queue_beyond_the_trigger():
    batcher = make_batcher(trigger_rows=2)
    for client in range(3):
        submit(batcher, client)
    assert fire(batcher) == ["c0", "c1", "c2"]
    assert batcher.waiting_rows == 0


def test_batch_holds_at_most_max_rows_and_the_rest_follows_at_once():
    batcher = make_batcher(trigger_rows=4, max_rows=4)
    for client in range(3):
        submit(batcher, client, rows=2)
    assert fire(batcher) == ["c0", "c1"]
    assert fire(batcher) == ["c2"]
    assert fire(batcher) is None


def test_request_is_never_split_and_never_overtaken_by_a_smaller_one():
    batcher = make_batcher(trigger_rows=4, max_rows=4)
    submit(batcher, 0, rows=2)
    submit(batcher, 1, rows=3)
    submit(batcher, 2, rows=1)
    assert fire(batcher) == ["c0"]  # c1 does not fit, c2 would
    assert fire(batcher) == ["c1", "c2"]


def test_request_larger_than_a_batch_is_refused():
    batcher = make_batcher(max_rows=8)
    with pytest.raises(ValueError, match="9 rows; a batch has 1 to 8"):
        submit(batcher, 0, rows=9)
    with pytest.raises(ValueError, match="0 rows"):
        submit(batcher, 0, rows=0)
    assert batcher.waiting_rows == 0


def test_timer_runs_from_the_oldest_request_not_from_the_wait_or_the_newest():
    batcher = make_batcher(max_wait_s=10.0)
    clock = batcher.clock
    clock.now_s = 100.0
    submit(batcher, 0)
    clock.now_s = 106.0
    assert fire(batcher) is None  # the server comes back late: 4 s are left, not 10
    submit(batcher, 1)
    clock.now_s = 109.9
    assert fire(batcher) is None
    clock.now_s = 110.0
    batch = batcher.next_batch(timeout_s=0.0)
    assert batch.waits_s == (10.0, 4.0)


def test_timer_starts_afresh_for_a_request_that_came_after_a_batch():
    batcher = make_batcher(max_wait_s=10.0)
    submit(batcher, 0)
    batcher.clock.now_s = 10.0
    assert fire(batcher) == ["c0"]
    batcher.clock.now_s = 15.0
    submit(batcher, 0)
    batcher.clock.now_s = 20.0
    assert fire(batcher) is None
    batcher.clock.now_s = 25.0
    assert fire(batcher) == ["c0"]


def test_timer_wakes_a_waiting_server():
    batcher = make_batcher(max_wait_s=0.02, clock=time.monotonic)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.next_batch)
        submit(batcher, 0)
        assert waiting.result(TIMEOUT_S).rows == 1


def test_fires_early_when_every_live_client_waits():
    batcher = make_batcher(num_clients=3)
    submit(batcher, 0)
    submit(batcher, 1)
    assert fire(batcher) is None
    submit(batcher, 2)
    assert fire(batcher) == ["c0", "c1", "c2"]


def test_two_requests_of_one_client_do_not_stand_for_two_clients():
    batcher = make_batcher(num_clients=2)
    submit(batcher, 0)
    submit(batcher, 0)
    assert fire(batcher) is None


def test_client_that_leaves_is_not_waited_for_and_its_request_is_cancelled():
    batcher = make_batcher(num_clients=3)
    kept = submit(batcher, 0)
    orphan = submit(batcher, 1)
    batcher.unregister("c1")
    assert orphan.cancelled() and not kept.done()
    assert batcher.waiting_rows == 1
    assert fire(batcher) is None
    batcher.unregister("c2")
    assert fire(batcher) == ["c0"]


def test_client_that_joins_is_waited_for():
    batcher = make_batcher(num_clients=1)
    batcher.register("c1")
    submit(batcher, 0)
    assert fire(batcher) is None
    submit(batcher, 1)
    assert fire(batcher) == ["c0", "c1"]


def test_clients_are_known_by_name():
    batcher = make_batcher(num_clients=1)
    with pytest.raises(ValueError, match="'c0' is registered already"):
        batcher.register("c0")
    with pytest.raises(ValueError, match="'c1' is not registered"):
        batcher.unregister("c1")
    with pytest.raises(ValueError, match="'c1' is not registered"):
        submit(batcher, 1)


def test_kinds_are_not_mixed_and_the_oldest_requests_kind_goes_first():
    batcher = make_batcher(trigger_rows=4)
    submit(batcher, 0, kind="value")
    submit(batcher, 1, kind="sample")
    submit(batcher, 2, kind="value")
    submit(batcher, 3, kind="sample")
    first = batcher.next_batch(timeout_s=0.0)
    assert (first.kind, [x.client for x in first.requests]) == ("value", ["c0", "c2"])
    second = batcher.next_batch(timeout_s=0.0)  # left behind, hence due
    assert (second.kind, [x.client for x in second.requests]) == ("sample", ["c1", "c3"])


def test_request_left_behind_takes_newcomers_of_its_kind_along():
    batcher = make_batcher(trigger_rows=2)
    submit(batcher, 0, kind="value")
    submit(batcher, 1, kind="sample")
    assert fire(batcher) == ["c0"]
    submit(batcher, 2, kind="sample")
    assert fire(batcher) == ["c1", "c2"]
    submit(batcher, 3, kind="sample")
    assert fire(batcher) is None


def test_full_trigger_and_endless_wait_is_lockstep():
    batcher = make_batcher(num_clients=4, trigger_rows=12, max_rows=12)
    for order in [(2, 0, 3, 1), (1, 3, 0, 2), (0, 1, 2, 3)]:
        for client in order[:3]:
            submit(batcher, client, rows=3)
            batcher.clock.now_s += 1e9
            assert fire(batcher) is None
        submit(batcher, order[3], rows=3)
        assert fire(batcher) == [f"c{client}" for client in order]


def test_lockstep_round_of_two_kinds_serves_everybody_without_another_request():
    batcher = make_batcher(num_clients=4, trigger_rows=4, max_rows=4)
    for client, kind in enumerate(["sample", "value", "sample", "value"]):
        assert fire(batcher) is None
        submit(batcher, client, kind=kind)
    assert fire(batcher) == ["c0", "c2"]
    assert fire(batcher) == ["c1", "c3"]
    submit(batcher, 0)
    batcher.clock.now_s += 1e9
    assert fire(batcher) is None


@pytest.mark.fault(26)
def test_over_capacity_answers_busy_and_recovers():
    batcher = make_batcher(trigger_rows=8, capacity_rows=8)
    submit(batcher, 0, rows=7)
    with pytest.raises(Busy, match="7 rows are waiting of at most 8"):
        submit(batcher, 1, rows=2)
    submit(batcher, 1, rows=1)
    assert fire(batcher) == ["c0", "c1"]
    submit(batcher, 1, rows=8)


def test_expired_request_is_answered_with_an_error_and_not_computed():
    batcher = make_batcher(deadline_s=5.0)
    late, also_late = submit(batcher, 0), submit(batcher, 1)
    batcher.clock.now_s = 2.0
    fresh = submit(batcher, 2)
    batcher.clock.now_s = 5.0
    assert fire(batcher) is None
    for future, client in ((late, "c0"), (also_late, "c1")):
        with pytest.raises(Expired, match=f"'{client}' waited 5 s, the deadline is 5 s"):
            future.result(0.0)
    assert not fresh.done() and batcher.waiting_rows == 1
    submit(batcher, 3)
    submit(batcher, 0)
    assert fire(batcher) is None  # the expired ones of c0 and c1 wait no more
    submit(batcher, 1)
    assert fire(batcher) == ["c2", "c3", "c0", "c1"]


def test_request_expires_only_while_it_waits():
    batcher = make_batcher(num_clients=1, deadline_s=5.0)
    future = submit(batcher, 0)
    batcher.clock.now_s = 4.9
    assert fire(batcher) == ["c0"]
    batcher.clock.now_s = 9.0
    assert fire(batcher) is None
    future.set_result("actions")
    assert future.result(0.0) == "actions"


def test_expired_requests_make_room():
    batcher = make_batcher(deadline_s=5.0, capacity_rows=8)
    late = submit(batcher, 0, rows=8)
    with pytest.raises(Busy):
        submit(batcher, 1)
    batcher.clock.now_s = 5.0
    submit(batcher, 1)
    assert isinstance(late.exception(0.0), Expired)


def test_turned_away_requests_are_counted_once():
    batcher = make_batcher(deadline_s=5.0, capacity_rows=8)
    assert batcher.take_turned_away() == (0, 0)
    submit(batcher, 0, rows=7)
    submit(batcher, 2, rows=1).cancel()
    for _ in range(2):
        with pytest.raises(Busy):
            submit(batcher, 1, rows=2)
    batcher.clock.now_s = 5.0
    assert fire(batcher) is None
    assert batcher.take_turned_away() == (2, 1)
    assert batcher.take_turned_away() == (0, 0)


def test_deadline_wakes_a_waiting_server():
    """It answers and goes on waiting."""
    batcher = make_batcher(deadline_s=0.02, clock=time.monotonic)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.next_batch)
        error = submit(batcher, 0).exception(TIMEOUT_S / 4)
        assert not waiting.done()
        batcher.close("finished")
        assert waiting.result(TIMEOUT_S) is None
    assert isinstance(error, Expired)


def test_due_time_is_that_of_the_timer_or_of_a_deadline():
    batcher = make_batcher(max_wait_s=10.0, deadline_s=12.0)
    assert batcher.due_s == math.inf
    batcher.clock.now_s = 1.0
    submit(batcher, 0)
    batcher.clock.now_s = 3.0
    submit(batcher, 1)
    assert batcher.due_s == 11.0
    assert make_batcher(max_wait_s=10.0).setting == Setting(trigger_rows=8, max_wait_s=10.0)
    hurried = make_batcher(max_wait_s=10.0, deadline_s=4.0)
    submit(hurried, 0)
    assert hurried.due_s == 4.0


def test_cancelled_requests_are_neither_served_nor_counted():
    batcher = make_batcher(num_clients=2, trigger_rows=3, capacity_rows=8)
    submit(batcher, 0, rows=7).cancel()
    submit(batcher, 0, rows=2)  # would be over capacity
    assert fire(batcher) is None
    submit(batcher, 1, rows=1)
    batch = batcher.next_batch(timeout_s=0.0)
    assert [request.rows for request in batch.requests] == [2, 1]
    assert not any(request.future.cancel() for request in batch.requests)


def test_request_cancelled_at_the_last_moment_does_not_make_an_empty_batch():
    batcher = make_batcher(num_clients=2, trigger_rows=2)
    batcher._drop_dead = lambda now_s: None  # the client is faster than the check
    submit(batcher, 0, rows=2, kind="value").cancel()
    submit(batcher, 1, rows=2)
    assert fire(batcher) == ["c1"]


def test_batch_carries_payload_kind_rows_and_waits():
    batcher = make_batcher(trigger_rows=5)
    submit(batcher, 0, rows=2)
    batcher.clock.now_s = 3.0
    future = submit(batcher, 1, rows=3)
    batch = batcher.next_batch(timeout_s=0.0)
    assert (batch.kind, batch.rows, batch.waits_s) == ("sample", 5, (3.0, 0.0))
    assert [request.payload for request in batch.requests] == ["sample of c0", "sample of c1"]
    batch.requests[1].future.set_result("actions")
    assert future.result(0.0) == "actions"


def test_close_fails_what_waits_and_wakes_the_server():
    batcher = make_batcher()
    future, cancelled = submit(batcher, 0), submit(batcher, 1)
    cancelled.cancel()
    with ThreadPoolExecutor(1) as pool:
        waiting = blocked(batcher, batcher.next_batch, pool)
        batcher.close("server ran out of memory")
        assert waiting.result(TIMEOUT_S) is None
    with pytest.raises(BatcherClosedError, match="server ran out of memory"):
        future.result(0.0)
    with pytest.raises(CancelledError):
        cancelled.result(0.0)
    with pytest.raises(BatcherClosedError, match="server ran out of memory"):
        submit(batcher, 0)
    batcher.close("second reason")
    assert batcher.is_closed
    assert batcher.next_batch() is None


def test_close_leaves_a_batch_in_service_alone():
    batcher = make_batcher(trigger_rows=1)
    future = submit(batcher, 0)
    batch = batcher.next_batch(timeout_s=0.0)
    batcher.close("preempted")
    batch.requests[0].future.set_result("actions")
    assert future.result(0.0) == "actions"


@pytest.mark.parametrize("event", ["submit", "unregister", "wake"])
def test_waiting_server_is_woken(event):
    batcher = make_batcher(num_clients=2)
    submit(batcher, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = blocked(batcher, batcher.next_batch, pool)
        if event == "submit":
            submit(batcher, 1)
        elif event == "unregister":
            batcher.unregister("c1")
        else:
            batcher.wake()
        batch = waiting.result(TIMEOUT_S)
    assert (batch is None) == (event == "wake")


def test_wake_is_remembered_once():
    batcher = make_batcher(num_clients=2)
    batcher.wake()
    assert batcher.next_batch() is None
    with ThreadPoolExecutor(1) as pool:
        waiting = blocked(batcher, batcher.next_batch, pool)
        batcher.wake()
        assert waiting.result(TIMEOUT_S) is None


@pytest.mark.parametrize(
    "options",
    [
        {"trigger_rows": 0},
        {"trigger_rows": 9},
        {"capacity_rows": 7},
        {"max_wait_s": -1.0},
        {"max_wait_s": math.nan},
        {"deadline_s": 0.0},
        {"deadline_s": math.nan},
    ],
)
def test_knobs_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError, match=r"need 1 <=|max_wait_s|deadline_s"):
        make_batcher(**options)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    trigger_rows=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 6), st.sampled_from(["sample", "value"]))
        | st.sampled_from(["fire", "tick"]),
        max_size=40,
    ),
)
def test_every_request_is_served_once_in_order_within_its_kind(trigger_rows, steps):
    batcher = make_batcher(trigger_rows=trigger_rows, max_rows=6, max_wait_s=2.0)
    submitted, served = [], []

    def serve():
        batch = batcher.next_batch(timeout_s=0.0)
        if batch is None:
            return False
        assert {request.kind for request in batch.requests} == {batch.kind}
        assert 1 <= batch.rows <= 6
        waiting_before = [x for x in submitted if x not in served]
        assert batch.requests[0].number == waiting_before[0][0]  # the oldest of all
        served.extend((request.number, request.kind) for request in batch.requests)
        return True

    for step in steps:
        if step == "tick":
            batcher.clock.now_s += 1.0
        elif step == "fire":
            serve()
        else:
            client, rows, kind = step
            submit(batcher, client, rows, kind)
            submitted.append((len(submitted), kind))
    batcher.clock.now_s += 2.0
    while serve():
        pass
    assert Counter(served) == Counter(submitted)
    for kind in ("sample", "value"):
        numbers = [number for number, k in served if k == kind]
        assert numbers == sorted(numbers)
    assert batcher.waiting_rows == 0


def test_closed_loop_clients_in_threads_are_all_served():
    num_clients, num_rounds = 5, 40
    batcher = make_batcher(
        num_clients=num_clients, trigger_rows=3, max_rows=4, max_wait_s=0.001, clock=time.monotonic
    )

    def ask(client):
        answers = [submit(batcher, client).result(TIMEOUT_S) for _ in range(num_rounds)]
        batcher.unregister(f"c{client}")
        return answers

    def serve():
        while (batch := batcher.next_batch()) is not None:
            for request in batch.requests:
                request.future.set_result(request.payload)

    with ThreadPoolExecutor(num_clients + 1) as pool:
        server = pool.submit(serve)
        clients = [pool.submit(ask, i) for i in range(num_clients)]
        answers = [future.result(TIMEOUT_S) for future in clients]
        batcher.close("finished")
        server.result(TIMEOUT_S)
    assert answers == [[f"sample of c{i}"] * num_rounds for i in range(num_clients)]
