"""Interfaces of the transport layer and the records that cross them.

`TrajectoryQueue` paces the simulators and hands trajectories to the learner in
admission order; `WeightStore` hands weights to the policy servers. Every blocking
call takes a time-out in seconds (None waits without limit) and returns at once when
the object is closed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxvla.types import Params


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """The right to make one trajectory."""

    id: int
    """Position in the order of admission, from 0, never reused within a run."""
    admission_version: int
    """Newest version that all live policy servers had swapped in at admission."""
    owner: str
    """Who asked, such as a simulator's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueItem:
    """A finished trajectory."""

    ticket: Ticket
    payload: Any
    """Device pytree, a `jaxvla.types.Trajectory`."""
    policy_version_min: int
    """Oldest version that made any of its samples."""
    policy_version_max: int
    """Newest version that made any of its samples."""
    nbytes: int
    """Size of the payload."""
    info: Any = None
    """Host record of the simulator, opaque to the queue."""

    def __post_init__(self):
        if not 0 <= self.policy_version_min <= self.policy_version_max:
            raise ValueError(
                f"ticket {self.ticket.id}: policy versions "
                f"[{self.policy_version_min}, {self.policy_version_max}] are no range from 0 up"
            )
        if self.nbytes < 0:
            raise ValueError(f"ticket {self.ticket.id}: nbytes = {self.nbytes} is negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Counts of trajectories: totals of the run (restarts included) and the present state."""

    admitted: int = 0
    """Tickets given out."""
    completed: int = 0
    """Trajectories put and accepted."""
    consumed: int = 0
    """Trajectories taken for updates that got all of theirs."""
    dropped_by_reason: Mapping[str, int]
    """Tickets and trajectories that were given up, by reason."""
    late: int = 0
    """Payloads refused because their ticket had ended; not part of the balance."""
    in_flight: int = 0
    """Tickets whose trajectory is being made."""
    depth: int = 0
    """Trajectories that are ready, and those taken for an update that lacks some still."""

    @property
    def dropped(self) -> int:
        """Tickets and trajectories given up for any reason."""
        return sum(self.dropped_by_reason.values())

    @property
    def is_balanced(self) -> bool:
        """True when every admitted ticket is accounted for exactly once."""
        return self.admitted == self.consumed + self.dropped + self.in_flight + self.depth


class TrajectorySink(Protocol):
    """What a simulator needs of a queue: a ticket, and where the trajectory goes."""

    def admit(self, owner: str, timeout_s: float | None = None) -> Ticket | None:
        """Waits for credit. Returns None on time-out, when the queue is closed, or when the owner
        is given up meanwhile."""
        ...

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
        """Hands in a finished trajectory.

        Returns:
          False when the ticket had already ended (failed, lease run out, put before, queue
          closed): the payload is counted as late and thrown away.

        Raises:
          ValueError: the ticket was never issued, the versions are no range, or the payload
            alone exceeds the queue's byte limit.
        """
        ...

    def fail(self, ticket: Ticket, reason: str) -> bool:
        """Gives a ticket up and returns its credit. False when it had already ended."""
        ...


class TrajectoryQueue(TrajectorySink, Protocol):
    """Staleness-bounded queue; the rules and the proof are in `transport.staleness`."""

    def fail_owner(self, owner: str, reason: str) -> int:
        """Gives up every ticket in flight of a dead owner. Returns how many.

        Its calls of `admit` that wait for credit return None.
        """
        ...

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        """Waits for `count` trajectories and takes them in admission order, all or none.

        Args:
          count: trajectories wanted; the takes of one update must not exceed P in total.
          learner_version: completed updates of the learner.
          timeout_s: longest wait.

        Returns:
          The trajectories, or None on time-out or when the queue is closed.

        Raises:
          StalenessViolation: a trajectory is staler than the bound; nothing was taken.
          ValueError: the request can never be served.
        """
        ...

    def advance(self, version: int) -> None:
        """Notes the newest version that all live policy servers have swapped in.

        An older version than already noted changes nothing.
        """
        ...

    def close(self, reason: str) -> None:
        """Drops under `reason` what is in flight, ready, or taken for an update that will now
        never have all of its trajectories, and wakes every blocked call."""
        ...

    def ledger(self) -> Ledger:
        """A consistent snapshot of the counts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint, of types that JSON knows. Payloads are not part of it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], *, version: int) -> None:
        """Restores the counters into an unused queue whose learner continues at `version`.

        Raises:
          ValueError: the queue has already admitted a ticket.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMetrics:
    """Cost of the latest transfer."""

    publish_ms: float
    """From the call of `publish` until every copy was complete."""
    pull_ms: float
    """From then until the slowest live policy server had swapped the version in."""
    nbytes: int
    """Bytes copied by the latest publication, over all subscriptions."""


class WeightSubscription(Protocol):
    """One policy server's end of a `WeightStore`."""

    def poll(self) -> tuple[int, Params] | None:
        """The newest version not yet pulled, or None. Versions in between are skipped."""
        ...

    def acknowledge(self, version: int) -> None:
        """Says that `version` has been swapped in and nothing older will be served.

        Raises:
          ValueError: `version` is not the one pulled last.
        """
        ...

    def close(self) -> None:
        """Ends the subscription: the server serves no more and is no longer waited for."""
        ...


class WeightStore(Protocol):
    """Versioned weights, from the learner to any number of policy servers."""

    @property
    def latest_version(self) -> int | None:
        """Newest published version; None before the first."""
        ...

    @property
    def acknowledged_version(self) -> int | None:
        """Newest version that every live subscription has swapped in. Never goes back."""
        ...

    def subscribe(
        self, name: str, shardings: Any, on_publish: Callable[[], None] | None = None
    ) -> WeightSubscription:
        """Adds a policy server; the latest version, if any, is staged for it at once.

        A server must subscribe before it can be asked anything, and answer only with what it
        has pulled: one that is not waited for may serve older weights than the others.

        Args:
          name: unique among the live subscriptions.
          shardings: one sharding, or a pytree of them that matches the parameters.
          on_publish: called in the publisher's thread whenever a version has been staged, to
            wake a server that waits for requests.

        Raises:
          ValueError: the name is taken.
        """
        ...

    def publish(self, version: int, params: Params) -> None:
        """Copies the parameters for every subscription, then swaps all copies in.

        The caller may donate `params` as soon as this returns.

        Raises:
          ValueError: the version is not newer than the latest, or a leaf's name, shape or
            dtype differs from the first version's.
        """
        ...

    def wait_for(self, version: int, timeout_s: float | None = None) -> bool:
        """Waits until `version` or a newer one is published. False on time-out or close."""
        ...

    def metrics(self) -> WeightMetrics:
        """Cost of the latest transfer."""
        ...

    def lagging(self) -> list[tuple[str, int, float]]:
        """Policy servers that have not swapped in what is published: name, version in use (-1:
        none yet), and for how many seconds there has been a newer one."""
        ...

    def close(self) -> None:
        """Wakes every blocked call."""
        ...


class TrajectorySource(Protocol):
    """What a learner needs of a `TrajectoryQueue`."""

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        """See `TrajectoryQueue.take`."""
        ...

    def close(self, reason: str) -> None:
        """See `TrajectoryQueue.close`."""
        ...


class WeightSink(Protocol):
    """What a learner needs of a `WeightStore`."""

    def publish(self, version: int, params: Params) -> None:
        """See `WeightStore.publish`."""
        ...
