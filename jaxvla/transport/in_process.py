"""Transport between the threads of one process.

InProcessQueue: simulators wait for a ticket and are unblocked by the learner's progress (a
swapped-in version or a failure gives credit); the learner waits for trajectories and is
unblocked by `put`. InProcessWeightStore: the learner publishes and never waits for a server;
servers pull when they like and unblock the simulators by acknowledging.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from jaxvla.transport.base import (
    Ledger,
    QueueItem,
    Ticket,
    TrajectoryQueue,
    WeightSubscription,
)
from jaxvla.transport.schedule import FREE, Schedule, ServerSchedule
from jaxvla.transport.staleness import CreditRule, TicketBook
from jaxvla.transport.weight_accounts import Account, AccountingStore
from jaxvla.transport.weight_copy import Copier, params_copier
from jaxvla.types import Params

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Turn:
    """A place in the line of threads that wait for a ticket."""

    owner: str
    is_given_up: bool = False


class InProcessQueue(TrajectoryQueue):
    """A queue behind one lock.

    Tickets are given out in the order of the calls of `admit`, so no owner is starved, unless
    the schedule says otherwise.
    Waiting threads sleep on a condition until something changes, their own time-out, or the
    next lease runs out.

    Args:
      rule: constants of the staleness bound.
      lease_s: age in seconds at which a ticket that was not put is failed; far above the
        slowest healthy trajectory.
      max_bytes: limit on what the queue may hold, see `TicketBook`; None for no limit.
      schedule: of a run that is recorded or replayed.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        rule: CreditRule,
        *,
        lease_s: float = math.inf,
        max_bytes: int | None = None,
        schedule: Schedule = FREE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._book = TicketBook(
            rule, lease_s=lease_s, max_bytes=max_bytes, on_failed=schedule.failed
        )
        self._schedule = schedule
        self._clock = clock
        self._changed = threading.Condition()
        self._line: deque[_Turn] = deque()
        """One per thread that waits for a ticket, first come first."""
        self._is_closed = False

    def admit(self, owner: str, timeout_s: float | None = None) -> Ticket | None:
        """See `TrajectoryQueue.admit`."""
        turn = _Turn(owner)

        def attempt(now_s: float) -> Ticket | None:
            if not self._schedule.may_admit(owner, is_first=self._line[0] is turn):
                return None
            ticket = self._book.admit(owner, now_s)
            if ticket is not None:
                self._schedule.admitted(ticket)
            return ticket

        with self._changed:
            self._line.append(turn)
            try:
                return self._wait(attempt, timeout_s, lambda: turn.is_given_up)
            finally:
                self._line.remove(turn)
                self._changed.notify_all()

    def put(
        self,
        ticket: Ticket,
        payload: Any,
        *,
        policy_version_min: int,
        policy_version_max: int,
        nbytes: int,
        info: Any = None,
    ) -> bool:
        """See `TrajectoryQueue.put`."""
        item = QueueItem(
            ticket=ticket,
            payload=payload,
            policy_version_min=policy_version_min,
            policy_version_max=policy_version_max,
            nbytes=nbytes,
            info=info,
        )
        with self._changed:
            self._expire()
            is_accepted = self._book.put(item)
            self._changed.notify_all()
        return is_accepted

    def fail(self, ticket: Ticket, reason: str) -> bool:
        """See `TrajectoryQueue.fail`."""
        with self._changed:
            self._expire()
            has_failed = self._book.fail(ticket, reason)
            self._changed.notify_all()
        return has_failed

    def fail_owner(self, owner: str, reason: str) -> int:
        """See `TrajectoryQueue.fail_owner`."""
        with self._changed:
            self._expire()
            num_failed = self._book.fail_owner(owner, reason)
            for turn in self._line:
                turn.is_given_up |= turn.owner == owner
            self._changed.notify_all()
        return num_failed

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        """See `TrajectoryQueue.take`."""

        def attempt(_: float) -> list[QueueItem] | None:
            if self._book.drop_future(learner_version):
                self._changed.notify_all()
            items = self._book.take(count, learner_version, self._schedule.next_take(count))
            if items is not None:
                self._schedule.taken([item.ticket.id for item in items])
            return items

        with self._changed:
            return self._wait(attempt, timeout_s)

    def advance(self, version: int) -> None:
        """See `TrajectoryQueue.advance`."""
        with self._changed:
            self._book.advance(version)
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """See `TrajectoryQueue.close`."""
        with self._changed:
            self._is_closed = True
            self._schedule.ended()
            self._book.drop_all(reason)
            self._changed.notify_all()

    def outstanding(self) -> list[tuple[Ticket, float]]:
        """Tickets whose trajectory is being made, oldest first, and their ages in seconds."""
        with self._changed:
            return self._book.outstanding(self._clock())

    def ledger(self) -> Ledger:
        """See `TrajectoryQueue.ledger`."""
        with self._changed:
            self._expire()
            return self._book.ledger()

    def state_dict(self) -> dict[str, Any]:
        """See `TrajectoryQueue.state_dict`."""
        with self._changed:
            return self._book.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, version: int) -> None:
        """See `TrajectoryQueue.load_state_dict`."""
        with self._changed:
            self._book.load_state_dict(state, version)
            self._changed.notify_all()

    def _wait(
        self,
        attempt: Callable[[float], T | None],
        timeout_s: float | None,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Repeats `attempt(now_s)` after every change until it gives a result, with the lock held.

        Returns None on time-out, on close, or once the caller is given up.
        """
        end_s = math.inf if timeout_s is None else self._clock() + timeout_s
        while not (self._is_closed or is_given_up()):
            self._expire()
            now_s = self._clock()
            result = attempt(now_s)
            if result is not None or now_s >= end_s:
                return result
            wake_s = min(end_s, self._book.next_deadline_s())
            self._changed.wait(None if wake_s == math.inf else max(0.0, wake_s - now_s))
        return None

    def _expire(self) -> None:
        if self._book.expire(self._clock()):
            self._changed.notify_all()


class InProcessWeightStore(AccountingStore):
    """A store that copies from the learner's devices to each server's.

    Publishing has two phases: all copies are made and awaited first, then one short critical
    section swaps the references, so a reader sees a whole version or the one before it, and a
    copy that fails leaves the old version in place. The newest copy is kept for servers that
    subscribe later; servers must therefore not donate what they pull.

    Args:
      on_acknowledged: called with the new `acknowledged_version` whenever it rises, without
        locks held, so that calls of two threads may overtake each other. Meant for
        `TrajectoryQueue.advance`.
      trainable: regular expression over leaf paths. Other leaves must be the same in every
        version: each server gets them once, with the first version it gets.
      schedule: of a run that is recorded or replayed.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        on_acknowledged: Callable[[int], None] | None = None,
        trainable: str = ".*",
        schedule: Schedule = FREE,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(on_acknowledged, clock)
        self._trainable = trainable
        self._schedule = schedule
        self._publishing = threading.Lock()
        """Serialises `publish` and `subscribe`; taken before `changed`, held while copying."""
        self._subscriptions: dict[str, InProcessSubscription] = {}
        self._newest: tuple[int, Params] | None = None

    def subscribe(
        self, name: str, shardings: Any, on_publish: Callable[[], None] | None = None
    ) -> "InProcessSubscription":
        """See `WeightStore.subscribe`."""
        with self._publishing:
            with self.changed:
                self._require_free(name)
            schedule = self._schedule.server(name)
            copy = params_copier(shardings, self._trainable)
            subscription = InProcessSubscription(self, name, copy, on_publish, schedule)
            if self._newest is not None:
                version, params = self._newest
                subscription.stage(version, subscription.copy(params)[0])
            with self.changed:
                self.open_account(subscription)
                self._subscriptions[name] = subscription
        return subscription

    def publish(self, version: int, params: Params) -> None:
        """See `WeightStore.publish`."""
        with self._publishing:
            start_s = self.clock()
            self._check(version, params)
            with self.changed:
                live = list(self._subscriptions.values())
            copiers = [x.copy for x in live] or [
                params_copier(jax.tree.map(lambda x: x.sharding, params))
            ]
            made = jax.block_until_ready([copy(params) for copy in copiers])
            self._stage(version, live, made, start_s)
        for subscription in live:
            if subscription.on_publish is not None:
                subscription.on_publish()

    def _stage(
        self,
        version: int,
        live: "list[InProcessSubscription]",
        made: list[tuple[Params, int]],
        start_s: float,
    ) -> None:
        """Second phase of a publication: hands copy i to subscription i, if there are any."""
        with self.changed:
            for subscription, (params, _) in zip(live, made, strict=bool(live)):
                subscription.stage(version, params)
            self._newest = version, made[0][0]
            nbytes = sum(nbytes for _, nbytes in made)
            self._published(version, start_s=start_s, nbytes=nbytes)


class InProcessSubscription(Account, WeightSubscription):
    """A subscription of an `InProcessWeightStore`, whose lock guards the attributes."""

    def __init__(
        self,
        store: InProcessWeightStore,
        name: str,
        copy: Copier,
        on_publish: Callable[[], None] | None,
        schedule: ServerSchedule,
    ):
        super().__init__(name)
        self._store = store
        self.copy = copy
        self.on_publish = on_publish
        self._schedule = schedule
        self._staged: dict[int, Params] = {}
        """The newest version, unless it was pulled; in a replay all that were not."""

    def stage(self, version: int, params: Params) -> None:
        """Makes a version ready to be pulled."""
        if not self._schedule.is_replay:
            self._staged.clear()
        self._staged[version] = params

    def poll(self) -> tuple[int, Params] | None:
        """See `WeightSubscription.poll`."""
        with self._store.changed:
            version = self._schedule.pull(self._staged)
            if version is None:
                return None
            self.pulled_version, params = version, self._staged[version]
            self._staged = {v: x for v, x in self._staged.items() if v > version}
            return version, params

    def acknowledge(self, version: int) -> None:
        """See `WeightSubscription.acknowledge`."""
        self._store.acknowledge(self, version)

    def close(self) -> None:
        """See `WeightSubscription.close`. Closing twice changes nothing."""
        with self._store.changed:
            if self._store._subscriptions.get(self.name) is self:
                del self._store._subscriptions[self.name]
            self._staged.clear()
        self._store.close_account(self)
