"""Exhaustive check of the protocol: every interleaving of a small world.

The world drives the real ticket book. Slots ask for tickets, finish in any order (with the
oldest weights that the rules allow) or fail; the learner takes a batch as soon as it may;
the servers swap in the published version at any later moment.
"""

import copy
from dataclasses import dataclass, replace

import pytest

from jaxvla.transport.base import QueueItem
from jaxvla.transport.staleness import CreditRule, StalenessViolation, TicketBook

NUM_SLOTS = 4
MAX_FAILURES = 3
HORIZON = 4
"""Updates after which the world stops."""


class NoOrderBook(TicketBook):
    """Broken on purpose: whatever is ready may be taken."""

    def takable(self) -> list[int]:
        return sorted(self._ready)


class NoRefundBook(TicketBook):
    """Broken on purpose: a failed ticket keeps its credit."""

    @property
    def num_charged(self) -> int:
        return super().num_charged + self._dropped.total()


@dataclass(frozen=True)
class World:
    """One state: the book, the learner, the weights on their way, failures still to come."""

    book: TicketBook
    num_taken: int = 0
    """Trajectories that the learner has taken."""
    pulled: int = 0
    failures_left: int = MAX_FAILURES

    @property
    def learner_version(self) -> int:
        return self.num_taken // self.book.rule.trajectories_per_update

    @property
    def published(self) -> int:
        """Newest published version."""
        interval = self.book.rule.publish_interval
        return self.learner_version // interval * interval

    def key(self) -> tuple:
        """What distinguishes two states; ticket ids count by their order only."""
        book = self.book
        live = sorted({*book._outstanding, *book._ready, *book._overtakers})
        tickets = tuple(
            (i in book._outstanding, i in book._ready, self._version_of(i)) for i in live
        )
        return self.num_taken, self.pulled, self.failures_left, book.num_charged, tickets

    def _version_of(self, i: int) -> int:
        """Admission version; irrelevant once taken."""
        book = self.book
        if i in book._outstanding:
            return book._outstanding[i].admission_version
        return book._ready[i].policy_version_min if i in book._ready else -1

    def fork(self, **changes) -> "World":
        """An independent copy."""
        book = copy.copy(self.book)
        for name, value in vars(book).items():
            if isinstance(value, dict | list):
                setattr(book, name, copy.copy(value))
        return replace(self, book=book, **changes)


def successors(world: World, take_count: int):
    """Yields (is_failure, staleness or None, next world)."""
    outstanding = list(world.book._outstanding.values())
    if len(outstanding) < NUM_SLOTS:
        after = world.fork()
        if after.book.admit("slot", 0.0) is not None:
            yield False, None, after
    for ticket in outstanding:
        after = world.fork()
        assert after.book.put(
            QueueItem(
                ticket=ticket,
                payload=None,
                policy_version_min=ticket.admission_version,
                policy_version_max=world.published,
                nbytes=1,
            )
        )
        yield False, None, after
        if world.failures_left:
            after = world.fork(failures_left=world.failures_left - 1)
            after.book.fail(ticket, "crash")
            yield True, None, after
    if world.pulled < world.published:
        after = world.fork(pulled=world.published)
        after.book.advance(world.published)
        yield False, None, after
    after = world.fork(num_taken=world.num_taken + take_count)
    items = after.book.take(take_count, world.learner_version)
    if items is not None:
        oldest = min(x.policy_version_min for x in items)
        yield False, world.learner_version - oldest, after


def explore(book_class: type, rule: CreditRule, take_count: int | None = None):
    """Visits every reachable state.

    Returns:
      (number of states, worst staleness, number of states from which nothing but a failure
      leads on before the horizon).
    """
    take_count = take_count or rule.trajectories_per_update
    start = World(book=book_class(rule, lease_s=1.0, max_bytes=None))
    seen, stack, worst, num_stuck = {start.key()}, [start], 0, 0
    while stack:
        world = stack.pop()
        if world.learner_version >= HORIZON:
            continue
        is_stuck = True
        for is_failure, staleness, after in successors(world, take_count):
            is_stuck &= is_failure
            worst = max(worst, staleness or 0)
            assert after.book.ledger().is_balanced
            key = after.key()
            if key not in seen:
                seen.add(key)
                stack.append(after)
        num_stuck += is_stuck
    return len(seen), worst, num_stuck


def make_rule(**changes) -> CreditRule:
    return CreditRule(**({"trajectories_per_update": 2, "max_staleness": 1} | changes))


@pytest.mark.parametrize(
    ("rule", "take_count"),
    [
        (make_rule(), 2),
        (make_rule(), 1),
        (make_rule(max_staleness=0), 2),
        (make_rule(publish_interval=2), 2),
        (make_rule(window=2), 2),
        (make_rule(window=3), 1),
        (make_rule(num_updates=HORIZON), 2),
    ],
    ids=["plain", "streamed", "synchronous", "interval2", "window2", "window3", "capped"],
)
def test_bound_is_kept_and_reached_and_nothing_gets_stuck(rule, take_count):
    num_states, worst, num_stuck = explore(TicketBook, rule, take_count)
    assert num_states > 100
    assert worst == rule.bound
    assert num_stuck == 0


def test_bound_is_broken_without_the_order_rule():
    with pytest.raises(StalenessViolation):
        explore(NoOrderBook, make_rule())


def test_run_gets_stuck_when_failures_keep_their_credit():
    _, worst, num_stuck = explore(NoRefundBook, make_rule())
    assert worst <= 1
    assert num_stuck > 0
