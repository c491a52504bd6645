"""The staleness bound: credit rule and ticket book. No locks, no clock.

The proofs, and the tests that go with them, are in docs/staleness.md.

Words
  P  trajectories per update; S  max_staleness; W  window; k  publish_interval.
  learner version  completed updates. Every batch taken counts as an update, also one whose
            optimizer step was skipped as non-finite: its credit is spent.
  pulled version v  newest version that all live policy servers have swapped in.
  staleness  learner version when a trajectory is taken, minus the oldest version that made
            any of its samples.
  live ticket  admitted and not failed: outstanding (being made), ready or taken. Its rank is
            its place among the live tickets in admission order, from 1.

Rules
  credit    a ticket is admitted only if afterwards outstanding + ready + taken
            <= (v + S + 1) * P. A ticket that fails, for whatever reason, is no longer counted.
  order     the learner takes the oldest trajectory that it may take, and it may take one that
            is among the first W live tickets counted from the oldest outstanding one (that
            one included, and trajectories already taken from behind it included). W = 1 is
            plain admission order; a larger W lets up to W - 1 trajectories overtake a straggler.
  lease     a ticket that is outstanding for longer fails.
  restart   at version v, taken starts from v * P.

Bound: staleness <= S + ceil((W - 1) / P). With k <= S + 1 the learner always gets its next batch.
At most (S + 1) * P trajectories are outstanding, ready, or taken by an update in progress.

The credit rule alone, without the order rule and its proof, is AReaL's (arXiv:2505.24298,
staleness-aware training; https://github.com/inclusionAI/AReaL, staleness_manager.py).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxvla.config import ExperimentConfig
from jaxvla.transport.base import Ledger, QueueItem, Ticket


class StalenessViolation(RuntimeError):  # noqa: N818 - the word for it in the docs
    """A trajectory is staler than the bound: an assumption of the proof is broken.

    The run must stop with exit code 4.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditRule:
    """The constants of the bound and its arithmetic.

    Raises:
      ValueError: a constant is out of range, or publish_interval > max_staleness + 1.
    """

    trajectories_per_update: int
    """P, at least 1."""
    max_staleness: int
    """S, at least 0."""
    publish_interval: int = 1
    """Updates between publications, k."""
    window: int = 1
    """W, at least 1."""
    num_updates: int | None = None
    """Updates of the whole run: no ticket is admitted that no update would take."""

    def __post_init__(self):
        for name, least in (
            ("trajectories_per_update", 1),
            ("max_staleness", 0),
            ("publish_interval", 1),
            ("window", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}, must be at least {least}")
        if self.publish_interval > self.max_staleness + 1:
            raise ValueError(
                f"publish_interval = {self.publish_interval} exceeds max_staleness + 1 = "
                f"{self.max_staleness + 1}: the credit would run out between publications"
            )

    @property
    def bound(self) -> int:
        """Largest staleness a trajectory can have when it is taken."""
        return self.max_staleness + math.ceil((self.window - 1) / self.trajectories_per_update)

    @property
    def most_present(self) -> int:
        """Largest number of trajectories outstanding, ready, or taken by an update in progress."""
        return (self.max_staleness + 1) * self.trajectories_per_update

    def limit(self, pulled_version: int) -> int:
        """Largest allowed outstanding + ready + taken."""
        versions = pulled_version + self.max_staleness + 1
        if self.num_updates is not None:
            versions = min(versions, self.num_updates)
        return versions * self.trajectories_per_update

    def check(self, item: QueueItem, learner_version: int) -> None:
        """Raises StalenessViolation when `item` is too stale for `learner_version`."""
        staleness = learner_version - item.policy_version_min
        if staleness > self.bound:
            raise StalenessViolation(
                f"ticket {item.ticket.id} of {item.ticket.owner}: staleness {staleness} exceeds "
                f"the bound {self.bound} (learner version {learner_version}, policy version "
                f"{item.policy_version_min}, admitted at {item.ticket.admission_version})"
            )


def credit_rule(config: ExperimentConfig) -> CreditRule:
    """The rule of a validated config."""
    schedule, learning = config.schedule, config.learning
    return CreditRule(
        trajectories_per_update=learning.trajectories_per_update,
        max_staleness=schedule.staleness_in_force,
        publish_interval=schedule.publish_interval,
        window=schedule.window_in_force,
        num_updates=learning.num_updates,
    )


class TicketBook:
    """Every ticket from its admission to its end, exactly once.

    A ticket is outstanding until it is put (ready) or dropped (failed); a ready one is taken
    or dropped. Not thread-safe. Times are arguments, in seconds of any monotonic clock.

    Args:
      rule: constants of the bound.
      lease_s: age at which an outstanding ticket is failed.
      max_bytes: second limit on admission; every ticket that is outstanding or ready is
        reckoned at the largest payload seen so far. The first tickets of a run, given out
        before any payload is known, are limited by credit alone.
      on_failed: called with every ticket that is dropped one by one, and the reason.
    """

    def __init__(
        self,
        rule: CreditRule,
        *,
        lease_s: float,
        max_bytes: int | None,
        on_failed: Callable[[Ticket, str], None] = lambda ticket, reason: None,
    ):
        if lease_s <= 0:
            raise ValueError(f"lease_s = {lease_s}, must be positive")
        self.rule = rule
        self._lease_s = lease_s
        self._max_bytes = max_bytes
        self._on_failed = on_failed
        self._largest_nbytes = 0
        self._pulled_version = 0
        self._next_id = 0
        self._taken = 0
        """Charged against the credit; after a restart it differs from `_consumed`."""
        self._outstanding: dict[int, Ticket] = {}
        """By ticket id. Insertion order is admission order, and so the order of the leases."""
        self._since_s: dict[int, float] = {}
        """When each outstanding ticket was admitted."""
        self._ready: dict[int, QueueItem] = {}
        self._overtakers: list[int] = []
        """Ids of taken tickets younger than the oldest outstanding one."""
        self._admitted = 0
        self._completed = 0
        self._consumed = 0
        self._late = 0
        self._dropped: Counter[str] = Counter()

    @property
    def _num_gathered(self) -> int:
        """Taken for an update that lacks further trajectories. Such an update may never happen."""
        return self._taken % self.rule.trajectories_per_update

    @property
    def num_charged(self) -> int:
        """Outstanding + ready + taken: what the credit rule limits."""
        return len(self._outstanding) + len(self._ready) + self._taken

    def admit(self, owner: str, now_s: float) -> Ticket | None:
        """Gives out a ticket, or None when credit or memory is used up."""
        if self.num_charged >= self.rule.limit(self._pulled_version):
            return None
        present = len(self._outstanding) + len(self._ready)
        if self._max_bytes is not None and (present + 1) * self._largest_nbytes > self._max_bytes:
            return None
        ticket = Ticket(id=self._next_id, admission_version=self._pulled_version, owner=owner)
        self._next_id += 1
        self._admitted += 1
        self._outstanding[ticket.id] = ticket
        self._since_s[ticket.id] = now_s
        return ticket

    def put(self, item: QueueItem) -> bool:
        """Makes an outstanding ticket ready; False (counted as late) when it had ended.

        Raises:
          ValueError: the ticket was never issued or the payload alone exceeds `max_bytes`.
        """
        ticket = item.ticket
        if ticket.id >= self._next_id:
            raise ValueError(f"ticket {ticket.id} was never issued")
        if self._outstanding.get(ticket.id) != ticket:
            self._late += 1
            return False
        if self._max_bytes is not None and item.nbytes > self._max_bytes:
            raise ValueError(
                f"one trajectory has {item.nbytes} bytes, the queue holds max_bytes = "
                f"{self._max_bytes}"
            )
        self._end_lease(ticket.id)
        self._ready[ticket.id] = item
        self._largest_nbytes = max(self._largest_nbytes, item.nbytes)
        self._completed += 1
        return True

    def fail(self, ticket: Ticket, reason: str) -> bool:
        """Drops an outstanding ticket; False when it had already ended."""
        if self._outstanding.get(ticket.id) != ticket:
            return False
        self._end_lease(ticket.id)
        self._dropped[reason] += 1
        self._on_failed(ticket, reason)
        return True

    def fail_owner(self, owner: str, reason: str) -> int:
        """Drops every outstanding ticket of an owner; returns how many."""
        lost = [ticket for ticket in self._outstanding.values() if ticket.owner == owner]
        return sum(self.fail(ticket, reason) for ticket in lost)

    def expire(self, now_s: float) -> int:
        """Drops the tickets whose lease has run out, reason "lease"; returns how many."""
        lease_s = self._lease_s
        lost = [self._outstanding[i] for i, s in self._since_s.items() if s + lease_s <= now_s]
        return sum(self.fail(ticket, "lease") for ticket in lost)

    def drop_future(self, learner_version: int) -> int:
        """Drops ready trajectories of versions that the learner has not reached.

        A learner that fell back to an older checkpoint may meet them. The reason is "future".

        Returns:
          How many were dropped, and so how much credit came free.
        """
        future = [i for i, x in self._ready.items() if x.policy_version_max > learner_version]
        for i in future:
            self._on_failed(self._ready.pop(i).ticket, "future")
        self._dropped["future"] += len(future)
        return len(future)

    def outstanding(self, now_s: float) -> list[tuple[Ticket, float]]:
        """Tickets whose trajectory is being made, oldest first, and their ages in seconds."""
        return [(ticket, now_s - self._since_s[i]) for i, ticket in self._outstanding.items()]

    def next_deadline_s(self) -> float:
        """When the next lease runs out; inf without any."""
        return next(iter(self._since_s.values()), math.inf) + self._lease_s

    def takable(self) -> list[int]:
        """Ids of the ready tickets that the order rule allows to take, oldest first."""
        ready = sorted(self._ready)
        anchor = next(iter(self._outstanding), None)
        if anchor is None:
            return ready
        live = sorted({*self._outstanding, *self._ready, *self._overtakers})
        window = [i for i in live if i >= anchor][: self.rule.window]
        return [i for i in ready if i <= window[-1]]

    def take(
        self, count: int, learner_version: int, wanted: Sequence[int] | None = None
    ) -> list[QueueItem] | None:
        """Takes `count` trajectories, oldest first, or None while there are too few.

        With `wanted`, the ids of `count` tickets, it takes these, or None while it may not.

        Raises:
          StalenessViolation: nothing was taken.
          ValueError: the request can never be served.
        """
        self._check_request(count, learner_version)
        takable = self.takable()
        ids = takable[:count] if wanted is None else [i for i in wanted if i in takable]
        if len(ids) < count:
            return None
        for i in ids:
            self.rule.check(self._ready[i], learner_version)
        items = [self._ready.pop(i) for i in ids]
        self._taken += count
        self._consumed += count
        anchor = next(iter(self._outstanding), math.inf)
        self._overtakers = [i for i in (*self._overtakers, *ids) if i > anchor]
        return items

    def advance(self, version: int) -> None:
        """Notes the version that all live policy servers have swapped in."""
        self._pulled_version = max(self._pulled_version, version)

    def drop_all(self, reason: str) -> None:
        """Drops every ticket that no complete update has used."""
        gathered = self._num_gathered
        self._taken -= gathered
        self._consumed -= gathered
        self._dropped[reason] += len(self._outstanding) + len(self._ready) + gathered
        self._outstanding.clear()
        self._since_s.clear()
        self._ready.clear()

    def ledger(self) -> Ledger:
        """The counts at this moment."""
        return Ledger(
            admitted=self._admitted,
            completed=self._completed,
            consumed=self._consumed - self._num_gathered,
            dropped_by_reason={reason: n for reason, n in self._dropped.items() if n},
            late=self._late,
            in_flight=len(self._outstanding),
            depth=len(self._ready) + self._num_gathered,
        )

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint: {"next_id": int, "ledger": the fields of Ledger}."""
        return {"next_id": self._next_id, "ledger": dataclasses.asdict(self.ledger())}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Continues the counts of a run whose learner restarts at `version`.

        Raises:
          ValueError: this book is already in use.
        """
        if self._next_id:
            raise ValueError("counters can only be loaded before the first admission")
        ledger = Ledger(**state["ledger"])
        self._next_id = state["next_id"]
        self._admitted = ledger.admitted
        self._completed = ledger.completed
        self._consumed = ledger.consumed
        self._late = ledger.late
        self._dropped = Counter(ledger.dropped_by_reason)
        self._dropped["restart"] += ledger.in_flight + ledger.depth
        self._taken = version * self.rule.trajectories_per_update
        self._pulled_version = version

    def _end_lease(self, ticket_id: int) -> None:
        del self._outstanding[ticket_id]
        del self._since_s[ticket_id]

    def _check_request(self, count: int, learner_version: int) -> None:
        """Refuses what would wait for ever or would spend the credit of later updates."""
        if count < 1:
            raise ValueError(f"take of {count} trajectories")
        per_update = self.rule.trajectories_per_update
        if self._taken + count > (learner_version + 1) * per_update:
            raise ValueError(
                f"take of {count} at learner version {learner_version} after {self._taken} taken: "
                f"an update consumes trajectories_per_update = {per_update}"
            )
        num_updates = self.rule.num_updates
        if num_updates is not None and learner_version >= num_updates:
            raise ValueError(f"take at learner version {learner_version} of {num_updates} updates")
        if self._max_bytes is not None and count * self._largest_nbytes > self._max_bytes:
            raise ValueError(
                f"{count} trajectories of {self._largest_nbytes} bytes exceed the queue's "
                f"max_bytes = {self._max_bytes}: the take would wait for ever"
            )
