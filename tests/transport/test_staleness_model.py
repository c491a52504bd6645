"""Exhaustive check of the protocol: every interleaving of a small world, failures included.

The world drives the real ticket book. Simulators ask for tickets, finish in any order (with the
oldest weights that any policy server may have used) or fail; the learner takes a batch as soon
as it may; servers swap in what is published, one by one, at any later moment; the queue hears of
it later still. A process may die, and continue from its newest checkpoint.

`explore` visits every state that can be reached, and then asks from which of them the last update
can no longer be reached without a further failure: none, or the protocol can stand still.
"""

import copy
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.transport.staleness import CreditRule, StalenessViolation, TicketBook

HORIZON = 5
"""Updates after which the world stops."""
CHECKPOINT_INTERVAL = 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a world is made of, and which failures can happen in it."""

    rule: CreditRule
    failures: str = "crash"
    """Any of: crash, owner, hang, lease, server, restart."""
    num_failures: int = 2
    """Failures on any one path."""
    num_slots: int = 4
    """Tickets outstanding at most."""
    num_servers: int = 1
    take_count: int = 0
    """Trajectories per take; 0: the batch of an update."""
    book_class: type[TicketBook] = TicketBook
    acknowledge: Callable[..., int] = min
    """Makes one version of those that the live servers have swapped in."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One state."""

    setup: Setup
    book: TicketBook
    served: tuple[int, ...]
    """Version that each live policy server answers with, ascending: servers are alike."""
    published: int = 0
    num_taken: int = 0
    """Trajectories of complete updates and of the one in progress."""
    oldest: dict[int, int] = field(default_factory=dict)
    """Outstanding ticket -> oldest version that can have made a sample of it."""
    hung: frozenset[int] = frozenset()
    """Tickets whose maker has died and nobody noticed."""
    saved: tuple[int, str] = (0, "")
    """Newest checkpoint: its version, the state of the book."""
    failures_left: int = 0

    @property
    def learner_version(self) -> int:
        return self.num_taken // self.setup.rule.trajectories_per_update

    def key(self) -> tuple:
        """What distinguishes two states; ticket ids count by their order only."""
        book, live = self.book, []
        for i in sorted({*book._outstanding, *book._ready, *book._overtakers}):
            if i in book._outstanding:
                owner = book._outstanding[i].owner
                live.append((owner, self.oldest[i], i in self.hung))
            else:
                live.append(book._ready[i].policy_version_min if i in book._ready else -1)
        return (
            self.num_taken,
            self.published,
            self.served,
            book._pulled_version,
            book.num_charged,
            self.saved[0],
            self.failures_left,
            *live,
        )

    def fork(self, **changes: Any) -> "World":
        """An independent copy."""
        book = copy.copy(self.book)
        for name in ("_outstanding", "_since_s", "_ready", "_overtakers", "_dropped"):
            setattr(book, name, getattr(book, name).copy())
        return replace(self, book=book, **changes)


def first_world(setup: Setup) -> World:
    book = setup.book_class(setup.rule, lease_s=1.0, max_bytes=None)
    return World(
        setup=setup,
        book=book,
        served=(0,) * setup.num_servers,
        saved=(0, json.dumps(book.state_dict())),
        failures_left=setup.num_failures,
    )


# --------------------------------------------------------------------- what goes on


def steps(world: World) -> Iterator[World]:
    """What can happen next if nothing fails."""
    yield from admissions(world)
    yield from puts(world)
    yield from expiries_of_the_dead(world)
    yield from swaps(world)
    yield from takes(world)


def admissions(world: World) -> Iterator[World]:
    if len(world.book._outstanding) < world.setup.num_slots:
        after = world.fork()
        number = after.book._next_id
        # Later tickets have later deadlines, and two simulators take turns.
        ticket = after.book.admit(f"simulator {number % 2}", now_s=float(number))
        if ticket is not None:
            # The slowest server may answer the first query at once, and none goes back.
            yield replace(after, oldest=world.oldest | {ticket.id: min(world.served)})


def puts(world: World) -> Iterator[World]:
    for ticket in world.book._outstanding.values():
        if ticket.id not in world.hung:
            after = world.fork()
            assert hand_in(world, after.book, ticket)
            yield after


def hand_in(world: World, book: TicketBook, ticket: Ticket) -> bool:
    oldest = world.oldest[ticket.id]
    newest = max(oldest, *world.served)
    return book.put(
        QueueItem(
            ticket=ticket,
            payload=None,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=1,
        )
    )


def expiries_of_the_dead(world: World) -> Iterator[World]:
    """Healthy trajectories are made long before their lease runs out; dead ones never."""
    if next(iter(world.book._outstanding), None) in world.hung:
        yield expired(world.fork())


def expired(after: World) -> World:
    """The lease of the oldest outstanding ticket runs out; its maker comes too late."""
    ticket = next(iter(after.book._outstanding.values()))
    after.book.expire(after.book.next_deadline_s())
    return ended(after, ticket)


def ended(after: World, *tickets: Ticket) -> World:
    """These tickets have failed: what their makers may still hand in is refused."""
    for ticket in tickets:
        if ticket.id not in after.book._outstanding:
            depth = after.book.ledger().depth
            assert not hand_in(after, after.book, ticket)
            assert after.book.ledger().depth == depth
    return after


def swaps(world: World) -> Iterator[World]:
    """A server swaps in the newest version; or the queue hears what all of them have."""
    for i, version in enumerate(world.served):
        if version < world.published:
            others = world.served[:i] + world.served[i + 1 :]
            yield world.fork(served=tuple(sorted((*others, world.published))))
    version = world.setup.acknowledge(world.served)
    if version > world.book._pulled_version:
        after = world.fork()
        after.book.advance(version)
        yield after
    if len(world.served) < world.setup.num_servers:  # a successor of one that died
        yield world.fork(served=tuple(sorted((*world.served, world.published))))


def takes(world: World) -> Iterator[World]:
    rule = world.setup.rule
    count = world.setup.take_count or rule.trajectories_per_update
    after = world.fork(num_taken=world.num_taken + count)
    if after.book.take(count, world.learner_version) is None:
        return
    version = after.learner_version
    if version > world.learner_version:  # an update is complete
        if version % rule.publish_interval == 0:
            after = replace(after, published=version)
        if version % CHECKPOINT_INTERVAL == 0:
            after = replace(after, saved=(version, json.dumps(after.book.state_dict())))
    yield after


# ----------------------------------------------------------------------- what fails


def failures(world: World) -> Iterator[World]:
    """What can go wrong next."""
    if not world.failures_left:
        return
    kinds, left = world.setup.failures, world.failures_left - 1
    outstanding = list(world.book._outstanding.values())
    for ticket in outstanding:
        if "crash" in kinds:
            after = world.fork(failures_left=left)
            assert after.book.fail(ticket, "crash")
            yield ended(after, ticket)
        if "hang" in kinds and ticket.id not in world.hung:
            yield world.fork(failures_left=left, hung=world.hung | {ticket.id})
    if "owner" in kinds and outstanding:
        after = world.fork(failures_left=left)
        assert after.book.fail_owner(outstanding[0].owner, "crash")
        yield ended(after, *outstanding)
    if "lease" in kinds and outstanding:
        yield expired(world.fork(failures_left=left))
    if "server" in kinds and len(world.served) > 1:
        for i in range(len(world.served)):
            others = world.served[:i] + world.served[i + 1 :]
            yield world.fork(failures_left=left, served=others)
    if "restart" in kinds:
        yield restarted(world, left)


def restarted(world: World, failures_left: int) -> World:
    """A new process continues from the checkpoint; the old one's trajectories are gone."""
    version, state = world.saved
    setup = world.setup
    book = setup.book_class(setup.rule, lease_s=1.0, max_bytes=None)
    book.load_state_dict(json.loads(state), version)
    return World(
        setup=setup,
        book=book,
        served=(version,) * setup.num_servers,
        published=version,
        num_taken=version * setup.rule.trajectories_per_update,
        saved=world.saved,
        failures_left=failures_left,
    )


# ---------------------------------------------------------------------- exploration


@dataclass(frozen=True, kw_only=True)
class Findings:
    num_states: int
    worst: int
    """Largest staleness taken."""
    present: int
    """Largest number of trajectories in flight, ready, or taken by an update in progress."""
    num_stuck: int
    """States from which the last update cannot be reached unless something fails."""


def explore(setup: Setup) -> Findings:
    """Visits every reachable state, and checks the ledger in each.

    Raises:
      StalenessViolation: the book found a trajectory that is too stale.
    """
    start = first_world(setup)
    seen, todo, goals = {start.key(): 0}, deque([start]), []
    worst = present = 0
    origins: list[list[int]] = [[]]
    """State -> states that lead to it without a failure."""
    while todo:
        world = todo.popleft()
        number = seen[world.key()]
        ledger = world.book.ledger()
        assert ledger.is_balanced, ledger
        present = max(present, ledger.in_flight + ledger.depth)
        if world.learner_version >= HORIZON:
            goals.append(number)
            continue
        for is_failure, generator in ((False, steps), (True, failures)):
            for after in generator(world):
                worst = max(worst, staleness_of_take(world, after))
                key = after.key()
                if key not in seen:
                    seen[key] = len(seen)
                    origins.append([])
                    todo.append(after)
                if not is_failure:
                    origins[seen[key]].append(number)
    return Findings(
        num_states=len(seen),
        worst=worst,
        present=present,
        num_stuck=len(seen) - count_leading_to(goals, origins),
    )


def staleness_of_take(world: World, after: World) -> int:
    """Of the oldest sample taken on the way between two worlds; 0 when none was."""
    taken = world.book._ready.keys() - after.book._ready.keys()
    if after.num_taken <= world.num_taken or not taken:
        return 0
    oldest = min(world.book._ready[i].policy_version_min for i in taken)
    return world.learner_version - oldest


def count_leading_to(goals: list[int], origins: list[list[int]]) -> int:
    """Number of states from which a goal can be reached, the goals included."""
    reached, todo = set(goals), list(goals)
    while todo:
        fresh = set(origins[todo.pop()]) - reached
        reached |= fresh
        todo += fresh
    return len(reached)


def make_rule(**changes: Any) -> CreditRule:
    return CreditRule(**({"trajectories_per_update": 2, "max_staleness": 1} | changes))


ALL_OF_A_TICKET = "crash owner hang lease"


@pytest.mark.parametrize(
    ("setup", "at_least"),
    [
        (Setup(rule=make_rule(), failures=ALL_OF_A_TICKET), 1000),
        (Setup(rule=make_rule(), failures="crash restart"), 1000),
        (Setup(rule=make_rule(), failures="crash server", num_servers=2), 1000),
        (Setup(rule=make_rule(), take_count=1), 1000),
        (Setup(rule=make_rule(max_staleness=0), failures=ALL_OF_A_TICKET + " restart"), 200),
        (Setup(rule=make_rule(publish_interval=2), failures=ALL_OF_A_TICKET + " restart"), 1000),
        (Setup(rule=make_rule(window=2), failures="crash hang", num_failures=1), 1000),
        (Setup(rule=make_rule(window=3), take_count=1, num_failures=1), 1000),
        (Setup(rule=make_rule(num_updates=HORIZON), failures=ALL_OF_A_TICKET), 1000),
        (
            Setup(
                rule=make_rule(
                    trajectories_per_update=1, max_staleness=2, publish_interval=2, window=2
                ),
                failures=ALL_OF_A_TICKET + " restart server",
                num_servers=2,
            ),
            1000,
        ),
    ],
    ids=[
        "tickets",
        "restart",
        "two_servers",
        "streamed",
        "synchronous",
        "interval2",
        "window2",
        "window3",
        "capped",
        "everything",
    ],
)
def test_bound_is_kept_and_reached_and_nothing_gets_stuck(setup: Setup, at_least: int):
    findings = explore(setup)
    assert findings.num_states >= at_least
    assert findings.worst == setup.rule.bound
    assert findings.present == setup.rule.most_present
    assert findings.num_stuck == 0


# ------------------------------------------------------------- it finds what is broken


class NoOrderBook(TicketBook):
    """Whatever is ready may be taken."""

    def takable(self) -> list[int]:
        return sorted(self._ready)


class NoRefundBook(TicketBook):
    """A failed ticket keeps its credit."""

    @property
    def num_charged(self) -> int:
        return super().num_charged + self._dropped.total()


class NoLeaseBook(TicketBook):
    """A ticket whose maker is silent stays."""

    def expire(self, now_s: float) -> int:
        return 0


class BurstBook(TicketBook):
    """After a restart nothing counts as taken."""

    def load_state_dict(self, state: Any, version: int) -> None:
        super().load_state_dict(state, version)
        self._taken = 0


class ForgetfulBook(TicketBook):
    """Trajectories that have overtaken the oldest ticket leave room in the window."""

    def takable(self) -> list[int]:
        self._overtakers = []
        return super().takable()


def unchecked_rule(**changes: Any) -> CreditRule:
    """A rule that its own checks would refuse."""
    rule = make_rule()
    for name, value in changes.items():
        object.__setattr__(rule, name, value)
    return rule


@pytest.mark.parametrize(
    "setup",
    [
        Setup(rule=make_rule(), book_class=NoOrderBook, num_failures=0),
        Setup(rule=make_rule(window=2), take_count=1, book_class=ForgetfulBook, num_failures=0),
        Setup(rule=make_rule(), num_servers=2, acknowledge=max, num_failures=0),
        Setup(rule=make_rule(), failures="restart", num_failures=1, book_class=BurstBook),
    ],
    ids=["no_order", "window_forgets", "newest_server_counts", "burst_after_restart"],
)
def test_bound_is_broken(setup: Setup):
    with pytest.raises(StalenessViolation):
        explore(setup)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(rule=make_rule(), book_class=NoRefundBook, num_failures=3),
        Setup(rule=make_rule(), failures="hang", book_class=NoLeaseBook),
        Setup(rule=unchecked_rule(publish_interval=3)),
    ],
    ids=["credit_kept_on_failure", "no_lease", "published_too_rarely"],
)
def test_run_gets_stuck(setup: Setup):
    findings = explore(setup)
    assert findings.worst <= setup.rule.bound
    assert findings.num_stuck > 0
