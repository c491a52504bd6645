"""The credit rule and the ticket book, by hand-computed cases."""

import json
import math
from typing import Any

import pytest
from fault_rows import FaultRow

from jaxvla.transport.base import Ledger, QueueItem, Ticket
from jaxvla.transport.staleness import CreditRule, StalenessViolation, TicketBook


def make_book(*, lease_s=math.inf, max_bytes=None, **rule) -> Any:
    rule = {"trajectories_per_update": 2, "max_staleness": 1} | rule
    return TicketBook(CreditRule(**rule), lease_s=lease_s, max_bytes=max_bytes)


def admit(book: Any, count: int, now_s: float = 0.0) -> list[Ticket]:
    tickets = [book.admit(f"simulator {i}", now_s) for i in range(count)]
    assert None not in tickets
    return tickets


def item(ticket: Ticket, version: int | None = None, nbytes: int = 1) -> QueueItem:
    version = ticket.admission_version if version is None else version
    return QueueItem(
        ticket=ticket,
        payload=None,
        policy_version_min=version,
        policy_version_max=version,
        nbytes=nbytes,
    )


def ids(items: list[QueueItem]) -> list[int]:
    return [x.ticket.id for x in items]


@pytest.mark.parametrize(
    ("per_update", "max_staleness", "window", "bound"),
    [(2, 1, 1, 1), (2, 0, 1, 0), (2, 1, 2, 2), (2, 1, 3, 2), (2, 1, 4, 3), (8, 2, 9, 3)],
)
def test_bound_is_s_plus_the_window_in_updates(per_update, max_staleness, window, bound):
    rule = CreditRule(
        trajectories_per_update=per_update, max_staleness=max_staleness, window=window
    )
    assert rule.bound == bound


def test_limit_grows_by_one_batch_per_version_and_stops_at_the_end_of_the_run():
    rule = CreditRule(trajectories_per_update=3, max_staleness=2, num_updates=4)
    assert [rule.limit(version) for version in range(4)] == [9, 12, 12, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trajectories_per_update": 0}, "trajectories_per_update = 0"),
        ({"max_staleness": -1}, "max_staleness = -1"),
        ({"window": 0}, "window = 0"),
        ({"publish_interval": 0}, "publish_interval = 0"),
        ({"publish_interval": 3}, "publish_interval = 3 exceeds max_staleness"),
    ],
)
def test_rule_refuses_constants_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        CreditRule(**({"trajectories_per_update": 2, "max_staleness": 1} | change))


def test_publish_interval_of_s_plus_one_is_allowed():
    CreditRule(trajectories_per_update=2, max_staleness=1, publish_interval=2)


@pytest.mark.parametrize("lease_s", [0.0, -1.0])
def test_lease_must_be_positive(lease_s):
    with pytest.raises(ValueError, match="lease_s"):
        make_book(lease_s=lease_s)


def test_credit_counts_outstanding_ready_and_taken():
    book = make_book()  # P = 2, S = 1: 4 tickets at version 0
    tickets = admit(book, 4)
    assert book.admit("simulator", 0.0) is None
    for ticket in tickets[:2]:
        book.put(item(ticket))
    assert book.admit("simulator", 0.0) is None
    assert ids(book.take(2, learner_version=0)) == [0, 1]
    assert book.admit("simulator", 0.0) is None
    book.advance(1)
    assert [x.admission_version for x in admit(book, 2)] == [1, 1]
    assert book.admit("simulator", 0.0) is None


def test_pulled_version_never_goes_back():
    book = make_book()
    book.advance(3)
    book.advance(1)
    assert book.admit("simulator", 0.0).admission_version == 3


def test_failed_ticket_returns_its_credit_and_its_late_payload_is_refused():
    book = make_book(max_staleness=0)
    first, _ = admit(book, 2)
    assert book.admit("simulator", 0.0) is None
    assert book.fail(first, "sim_nan")
    assert not book.fail(first, "sim_nan")
    assert book.admit("simulator", 0.0).id == 2
    assert not book.put(item(first))
    assert book.ledger() == Ledger(
        admitted=3, late=1, in_flight=2, dropped_by_reason={"sim_nan": 1}
    )


def test_second_put_of_a_ticket_is_refused_even_after_it_was_taken():
    book = make_book(trajectories_per_update=1)
    (ticket,) = admit(book, 1)
    assert book.put(item(ticket))
    assert not book.put(item(ticket))
    assert not book.fail(ticket, "late failure")
    book.take(1, learner_version=0)
    assert not book.put(item(ticket))
    ledger = book.ledger()
    assert (ledger.completed, ledger.consumed, ledger.late, ledger.dropped) == (1, 1, 2, 0)


def test_ticket_that_was_never_issued_is_an_error():
    book = make_book()
    with pytest.raises(ValueError, match="ticket 7 was never issued"):
        book.put(item(Ticket(id=7, admission_version=0, owner="simulator")))


def test_ticket_of_an_earlier_life_with_the_same_id_is_late():
    book = make_book()
    (ticket,) = admit(book, 1)
    stranger = Ticket(id=ticket.id, admission_version=0, owner="someone else")
    assert not book.put(item(stranger))
    assert not book.fail(stranger, "crash")
    assert book.put(item(ticket))


def test_lease_fails_only_the_tickets_that_are_too_old():
    book = make_book(lease_s=10.0)
    old = admit(book, 1, now_s=0.0)[0]
    young = admit(book, 1, now_s=4.0)[0]
    done = admit(book, 1, now_s=0.0)[0]
    book.put(item(done))
    assert book.next_deadline_s() == 10.0
    assert book.expire(9.9) == 0
    assert book.expire(10.0) == 1
    assert book.next_deadline_s() == 14.0
    assert not book.put(item(old))
    assert book.put(item(young))
    assert book.next_deadline_s() == math.inf
    assert book.ledger().dropped_by_reason == {"lease": 1}


def test_dead_owner_loses_its_outstanding_tickets_only():
    book = make_book(max_staleness=2)
    mine = [book.admit("dead", 0.0) for _ in range(3)]
    other = book.admit("alive", 0.0)
    book.put(item(mine[0]))
    assert book.fail_owner("dead", "crash") == 2
    assert book.put(item(other))
    assert ids(book.take(2, learner_version=0)) == [0, 3]
    assert book.ledger().dropped_by_reason == {"crash": 2}


@pytest.mark.fault(4)
def test_take_waits_for_the_oldest_ticket_unless_it_fails():
    book = make_book()
    tickets = admit(book, 4)
    for ticket in tickets[:0:-1]:
        book.put(item(ticket))
    assert book.takable() == []
    assert book.take(1, learner_version=0) is None
    book.fail(tickets[0], "crash")
    assert ids(book.take(2, learner_version=0)) == [1, 2]


def test_take_is_all_or_none():
    book = make_book()
    book.put(item(admit(book, 1)[0]))
    assert book.take(2, learner_version=0) is None
    assert book.ledger().depth == 1


def test_window_counts_from_the_oldest_outstanding_and_includes_taken_ones():
    book = make_book(window=3, max_staleness=3)
    tickets = admit(book, 6)  # 0 is the straggler
    for ticket in tickets[1:]:
        book.put(item(ticket))
    assert book.takable() == [1, 2]
    assert ids(book.take(2, learner_version=0)) == [1, 2]
    assert book.takable() == []  # 1 and 2 fill the window for ever
    book.put(item(tickets[0]))
    assert book.takable() == [0, 3, 4, 5]
    assert ids(book.take(2, learner_version=1)) == [0, 3]


def test_window_slides_over_failed_tickets():
    book = make_book(window=3, max_staleness=3)
    tickets = admit(book, 5)
    book.fail(tickets[1], "crash")
    for ticket in tickets[2:]:
        book.put(item(ticket))
    assert book.takable() == [2, 3]


def test_window_remembers_who_overtook_a_second_straggler():
    book = make_book(window=3, max_staleness=3, trajectories_per_update=1)
    tickets = admit(book, 4)  # 0 and 1 are slow, 2 overtakes both
    book.put(item(tickets[2]))
    assert ids(book.take(1, learner_version=0)) == [2]
    book.put(item(tickets[0]))
    assert ids(book.take(1, learner_version=1)) == [0]
    book.put(item(tickets[3]))
    assert ids(book.take(1, learner_version=2)) == [3]  # the second and last to overtake 1
    book.advance(3)
    (late,) = admit(book, 1)
    book.put(item(late))
    assert book.takable() == []


def test_violation_stops_the_take_and_takes_nothing():
    book = make_book()
    for ticket in admit(book, 2):
        book.put(item(ticket, version=0))
    with pytest.raises(StalenessViolation, match="ticket 0 of simulator 0: staleness 2 exceeds"):
        book.take(2, learner_version=2)
    assert book.ledger().depth == 2
    assert len(book.take(2, learner_version=1)) == 2


@pytest.mark.fault(12)
def test_trajectory_from_the_future_is_dropped_and_its_credit_returned():
    book = make_book(max_staleness=0)
    first, second = admit(book, 2)
    book.put(item(first, version=5))
    book.put(item(second, version=4))
    assert book.drop_future(learner_version=4) == 1
    assert book.takable() == [second.id]
    assert len(admit(book, 1)) == 1
    assert book.ledger().dropped_by_reason == {"future": 1}


def test_mixed_versions_are_judged_by_the_oldest_for_age_and_the_newest_for_future():
    book = make_book(trajectories_per_update=1, max_staleness=1)
    (ticket,) = admit(book, 1)
    book.put(
        QueueItem(ticket=ticket, payload=0, policy_version_min=1, policy_version_max=3, nbytes=1)
    )
    with pytest.raises(StalenessViolation):
        book.take(1, learner_version=3)
    assert book.drop_future(learner_version=2) == 1


def test_an_update_cannot_take_more_than_p():
    book = make_book()
    for ticket in admit(book, 4):
        book.put(item(ticket))
    assert len(book.take(1, learner_version=0)) == 1
    with pytest.raises(ValueError, match="trajectories_per_update = 2"):
        book.take(2, learner_version=0)
    assert len(book.take(1, learner_version=0)) == 1
    assert len(book.take(2, learner_version=1)) == 2


def test_requests_that_would_wait_for_ever_are_errors():
    book = make_book(num_updates=3)
    with pytest.raises(ValueError, match="take of 0"):
        book.take(0, learner_version=0)
    with pytest.raises(ValueError, match="of 3 updates"):
        book.take(2, learner_version=3)


def test_no_ticket_is_admitted_beyond_the_last_update():
    book = make_book(num_updates=1)
    admit(book, 2)
    assert book.admit("simulator", 0.0) is None


@pytest.mark.fault(22)
def test_memory_limit_reckons_with_the_largest_payload_seen(fault_row: FaultRow):
    book = make_book(max_staleness=4, max_bytes=100)
    first = admit(book, 1)[0]
    book.put(item(first, nbytes=30))
    admit(book, 2)  # 3 * 30 <= 100
    assert book.admit("simulator", 0.0) is None
    assert len(book.take(1, learner_version=0)) == 1
    admit(book, 1)
    assert book.admit("simulator", 0.0) is None
    fault_row(survived=True)


@pytest.mark.fault(22)
def test_memory_limit_does_not_forget_a_large_payload():
    book = make_book(max_staleness=4, max_bytes=100)
    for ticket, nbytes in zip(admit(book, 2), (40, 10), strict=True):
        book.put(item(ticket, nbytes=nbytes))
    assert book.admit("simulator", 0.0) is None  # 3 * 40 > 100


def test_memory_limit_that_cannot_work_is_an_error():
    book = make_book(max_bytes=100)
    first, second = admit(book, 2)
    with pytest.raises(ValueError, match="101 bytes"):
        book.put(item(first, nbytes=101))
    book.put(item(second, nbytes=51))
    with pytest.raises(ValueError, match="max_bytes = 100"):
        book.take(2, learner_version=0)


@pytest.mark.fault(12)
def test_restart_gives_no_burst_and_counts_what_was_lost():
    book = make_book(max_staleness=1)
    tickets = admit(book, 4)
    for ticket in tickets[:3]:
        book.put(item(ticket))
    book.take(2, learner_version=0)
    book.advance(1)
    admit(book, 1)
    state = json.loads(json.dumps(book.state_dict()))  # 2 in flight, 1 ready, 2 consumed

    restored = make_book(max_staleness=1)
    restored.load_state_dict(state, version=1)
    assert restored.ledger() == Ledger(
        admitted=5, completed=3, consumed=2, dropped_by_reason={"restart": 3}
    )
    assert restored.ledger().is_balanced
    fresh = admit(restored, 4)  # (1 + 1 + 1) * 2 - 1 * 2, not 6
    assert restored.admit("simulator", 0.0) is None
    assert [x.id for x in fresh] == [5, 6, 7, 8]
    assert {x.admission_version for x in fresh} == {1}
    assert not restored.put(item(tickets[3]))


def test_restart_is_refused_by_a_book_in_use():
    book = make_book()
    state = book.state_dict()
    admit(book, 1)
    with pytest.raises(ValueError, match="before the first admission"):
        book.load_state_dict(state, version=0)


def test_drop_all_closes_the_balance():
    book = make_book()
    tickets = admit(book, 3)
    book.put(item(tickets[0]))
    book.drop_all("preempted")
    ledger = book.ledger()
    assert ledger.is_balanced
    assert (ledger.in_flight, ledger.depth, ledger.dropped) == (0, 0, 3)
    assert not book.put(item(tickets[1]))


def test_what_an_incomplete_update_took_is_not_consumed():
    """P = 2, taken one by one: the third waits for a fourth, which never comes."""
    book = make_book()
    for ticket in admit(book, 3):
        book.put(item(ticket))
    counts = []
    for version in (0, 0, 1):
        book.take(1, version)
        ledger = book.ledger()
        assert ledger.is_balanced
        counts.append((ledger.consumed, ledger.depth))
    assert counts == [(0, 3), (2, 1), (2, 1)]

    restored = make_book()
    restored.load_state_dict(book.state_dict(), version=1)
    assert restored.ledger().dropped_by_reason == {"restart": 1}

    for _ in range(2):  # closed by whoever stops first, and once more at the end
        book.drop_all("shutdown")
    for ledger in (book.ledger(), restored.ledger()):
        assert ledger.is_balanced
        assert (ledger.consumed, ledger.dropped, ledger.depth) == (2, 1, 0)


@pytest.mark.parametrize(("oldest", "newest"), [(-1, 0), (3, 2)])
def test_versions_must_be_a_range(oldest, newest):
    with pytest.raises(ValueError, match="policy versions"):
        QueueItem(
            ticket=Ticket(id=0, admission_version=0, owner="simulator"),
            payload=None,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=0,
        )
