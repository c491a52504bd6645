"""Dynamic batching of policy requests: which requests go into which forward pass. No jax.

Consumes requests from the threads of the clients, produces batches for the one thread of the
policy server. `next_batch` waits for a reason to fire and is unblocked by `submit`,
`unregister`, `wake` and `close`; a client waits on the future of its request.

A batch fires when any of these holds:
  * the waiting rows, of all kinds, reach `trigger_rows`;
  * the oldest waiting request is `max_wait_s` old;
  * every registered client has a request waiting, so that nothing more can come;
  * the oldest waiting request was left behind by an earlier batch.
It then takes everything queued of the oldest request's kind, in order of arrival, up to
`max_rows`. A request is never split, and none overtakes an older one of its kind.

`trigger_rows` and `max_wait_s` are fixed, or follow a tuner (`serving.adaptive`). In a replay
(`transport.schedule`) the recorded requests make a batch as soon as they all wait, and no other.

A request that is `deadline_s` old and not in a batch yet is answered with `Expired`, by whoever
calls `next_batch` or `submit` next, and never computed. A busy server does not call, so the
answer may come late; a stuck one is for the runtime to notice.

With `trigger_rows` = the rows of all clients and `max_wait_s` = inf this is lockstep: a batch
fires when all have asked, and serves everybody. If they ask for different kinds, the batches
of the other kinds follow without waiting for anyone.

Clients are closed-loop: one request at a time, the next one after the answer. A client that
is about to wait for anything else (such as a ticket) unregisters for that time, because
others may wait for its request.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxvla.serving.adaptive import Setting, Tuner
from jaxvla.transport.schedule import FREE_SERVER, ServerSchedule


class Busy(RuntimeError):  # noqa: N818 - an answer to the client, not a defect
    """The request was refused because too many rows are waiting. Try again later."""


class Expired(RuntimeError):  # noqa: N818 - an answer to the client, not a defect
    """The request waited beyond its deadline and was not computed. Try again."""


class BatcherClosedError(RuntimeError):
    """The policy server has stopped; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One client's query for `rows` rows."""

    rows: int
    """Batch entries; one row is one env's query."""
    client: str
    kind: str
    """Which function is asked for, such as "sample" or "value"."""
    payload: Any
    submitted_s: float
    """Clock reading at submission."""
    expires_s: float
    """Clock reading from which on it is no longer wanted; may be inf."""
    number: int
    """Order of arrival, from 0."""
    future: Future = field(default_factory=Future)
    """Set by whoever runs the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Requests for one forward pass, all of one kind, oldest first."""

    kind: str
    requests: tuple[Request, ...]
    waits_s: tuple[float, ...]
    """Seconds from submission to firing, per request."""

    @property
    def rows(self) -> int:
        """Rows of all requests."""
        return sum(request.rows for request in self.requests)


class Batcher:
    """Queue of requests with the firing rules of the module docstring. Thread-safe.

    Args:
      trigger_rows: waiting rows that start a batch at once.
      max_wait_s: longest time that the oldest waiting request is held back; may be inf.
      max_rows: rows per batch.
      capacity_rows: waiting rows beyond which `submit` refuses.
      deadline_s: age at which a waiting request expires; may be inf.
      tuner: chooses other values of `trigger_rows` and `max_wait_s` than those to start with.
      schedule: of the server; a replay wants no limit on times and no tuner.
      clock: monotonic seconds.
      wait: waits on a held condition for so many seconds of the clock at most, None: for ever.

    Raises:
      ValueError: unless 1 <= trigger_rows <= max_rows <= capacity_rows, max_wait_s >= 0 and
        deadline_s > 0.
    """

    def __init__(
        self,
        *,
        trigger_rows: int,
        max_wait_s: float,
        max_rows: int,
        capacity_rows: int,
        deadline_s: float = math.inf,
        tuner: Tuner | None = None,
        schedule: ServerSchedule = FREE_SERVER,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float | None], object] = threading.Condition.wait,
    ):
        if not 1 <= trigger_rows <= max_rows <= capacity_rows:
            raise ValueError(
                f"need 1 <= trigger_rows <= max_rows <= capacity_rows, got {trigger_rows}, "
                f"{max_rows}, {capacity_rows}"
            )
        if not max_wait_s >= 0:
            raise ValueError(f"max_wait_s = {max_wait_s}, must be at least 0")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s = {deadline_s}, must be positive")
        self._trigger_rows = trigger_rows
        self._max_wait_s = max_wait_s
        self._max_rows = max_rows
        self._capacity_rows = capacity_rows
        self._deadline_s = deadline_s
        self._tuner = tuner
        self._schedule = schedule
        self.clock = clock
        """Monotonic seconds; `Request.submitted_s` is measured with it."""
        self._wait = wait
        self._changed = threading.Condition()
        self._clients: set[str] = set()
        self._waiting: list[Request] = []
        """In order of arrival."""
        self._num_submitted = 0
        self._num_due = 0
        """Requests with a smaller number have been left behind by a batch."""
        self._num_refused = 0
        self._num_expired = 0
        self._is_woken = False
        self._closed_reason: str | None = None

    @property
    def is_closed(self) -> bool:
        """True after `close`: `next_batch` will never return a batch again."""
        with self._changed:
            return self._closed_reason is not None

    @property
    def waiting_rows(self) -> int:
        """Rows that wait to be batched."""
        with self._changed:
            return self._rows()

    @property
    def setting(self) -> Setting:
        """When a batch fires at present."""
        with self._changed:
            return Setting(trigger_rows=self._trigger_rows, max_wait_s=self._max_wait_s)

    @property
    def due_s(self) -> float:
        """Clock reading at which `next_batch` has something to do if nothing happens before."""
        with self._changed:
            return self._due_s()

    def take_turned_away(self) -> tuple[int, int]:
        """Requests refused and requests expired since the last call."""
        with self._changed:
            counts = self._num_refused, self._num_expired
            self._num_refused = self._num_expired = 0
        return counts

    def register(self, client: str) -> None:
        """Adds a live client. Others are held back for its requests.

        Raises:
          ValueError: the name is taken.
        """
        with self._changed:
            if client in self._clients:
                raise ValueError(f"client {client!r} is registered already")
            self._clients.add(client)
            if self._tuner is not None:
                self._tuner.measurements.joined(client)

    def unregister(self, client: str) -> None:
        """Removes a client and cancels what it has waiting.

        Raises:
          ValueError: no such client.
        """
        with self._changed:
            if client not in self._clients:
                raise ValueError(f"client {client!r} is not registered")
            self._clients.remove(client)
            if self._tuner is not None:
                self._tuner.measurements.left(client)
            orphans = [request for request in self._waiting if request.client == client]
            self._waiting = [request for request in self._waiting if request.client != client]
            self._changed.notify_all()
        for request in orphans:
            request.future.cancel()

    def submit(self, *, rows: int, client: str, kind: str, payload: Any) -> Future:
        """Queues a request; its future gets the answer, or an error, or is cancelled.

        Raises:
          ValueError: rows is not in [1, max_rows], or the client is not registered.
          Busy: `capacity_rows` would be exceeded.
          BatcherClosedError: after `close`.
        """
        if not 1 <= rows <= self._max_rows:
            raise ValueError(f"a request of {rows} rows; a batch has 1 to {self._max_rows}")
        with self._changed:
            if self._closed_reason is not None:
                raise BatcherClosedError(self._closed_reason)
            if client not in self._clients:
                raise ValueError(f"client {client!r} is not registered")
            now_s = self.clock()
            self._drop_dead(now_s)
            if self._rows() + rows > self._capacity_rows:
                self._num_refused += 1
                raise Busy(f"{self._rows()} rows are waiting of at most {self._capacity_rows}")
            request = Request(
                rows=rows,
                client=client,
                kind=kind,
                payload=payload,
                submitted_s=now_s,
                expires_s=now_s + self._deadline_s,
                number=self._num_submitted,
            )
            self._num_submitted += 1
            self._waiting.append(request)
            if self._tuner is not None:
                self._tuner.measurements.asked(client, rows=rows, kind=kind, now_s=now_s)
            self._changed.notify_all()
        return request.future

    def next_batch(self, timeout_s: float | None = None) -> Batch | None:
        """Waits for a batch to fire. For one thread, the policy server's.

        The futures of the batch are in state RUNNING, so clients can no longer cancel them.

        Returns:
          The batch, or None on time-out, after `wake`, or when closed.
        """
        self._tune()
        with self._changed:
            end_s = math.inf if timeout_s is None else self.clock() + timeout_s
            while self._closed_reason is None:
                now_s = self.clock()
                batch = self._due_batch(now_s)
                if batch is not None or self._is_woken or now_s >= end_s:
                    self._is_woken = False
                    return batch
                wake_s = min(end_s, self._due_s())
                span_s = None if wake_s == math.inf else max(0.0, wake_s - now_s)
                self._wait(self._changed, span_s)
            return None

    def wake(self) -> None:
        """Makes the present or else the next `next_batch` return without waiting.

        Meant for new weights: the server swaps them in although no request is due.
        """
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Fails every waiting future with BatcherClosedError(reason) and wakes the server."""
        with self._changed:
            if self._closed_reason is None:
                self._closed_reason = reason
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(BatcherClosedError(reason))

    def _tune(self) -> None:
        """Tells the tuner that the server is back, and follows what it says."""
        if self._tuner is None:
            return
        with self._changed:
            now_s = self.clock()
            self._tuner.measurements.finished(now_s)
            present = Setting(trigger_rows=self._trigger_rows, max_wait_s=self._max_wait_s)
            has_work = self._tuner.prepare(present, now_s)
        setting = self._tuner.step() if has_work else None  # clients may submit meanwhile
        if setting is not None:
            with self._changed:
                if setting.trigger_rows != self._trigger_rows:
                    self._tuner.measurements.setting_changed()
                self._trigger_rows = setting.trigger_rows
                self._max_wait_s = setting.max_wait_s

    def _due_batch(self, now_s: float) -> Batch | None:
        """The batch that fires now, if any."""
        self._drop_dead(now_s)
        while chosen := self._choose(now_s):
            batch = self._fire(chosen, now_s)
            # A client may cancel between the line above and the one that locks its future.
            if batch.requests:
                return batch
        return None

    def _choose(self, now_s: float) -> list[Request]:
        """The requests of the batch that fires now; none if there is no reason to."""
        if self._schedule.is_replay:
            waiting = {request.client: request for request in self._waiting}
            return [waiting[client] for client in self._schedule.pick(waiting)]
        return self._fitting() if self._is_due(now_s) else []

    def _is_due(self, now_s: float) -> bool:
        """The firing rules."""
        return bool(self._waiting) and (
            self._rows() >= self._trigger_rows
            or now_s >= self._oldest_s() + self._max_wait_s
            or self._clients == {request.client for request in self._waiting}
            or self._waiting[0].number < self._num_due
        )

    def _fitting(self) -> list[Request]:
        """What a batch of the oldest request's kind takes."""
        kind, rows = self._waiting[0].kind, 0
        fitting: list[Request] = []
        for request in self._waiting:
            if request.kind == kind:
                rows += request.rows
                # Once one does not fit, younger ones must not overtake it.
                if rows <= self._max_rows:
                    fitting.append(request)
        return fitting

    def _fire(self, chosen: list[Request], now_s: float) -> Batch:
        """Takes requests of one kind out of the queue."""
        kind, fired = chosen[0].kind, set(chosen)
        self._waiting = [request for request in self._waiting if request not in fired]
        self._num_due = self._num_submitted
        running = tuple(x for x in chosen if x.future.set_running_or_notify_cancel())
        waits_s = tuple(now_s - request.submitted_s for request in running)
        if self._tuner is not None and running:
            self._tuner.measurements.fired(
                kind=kind,
                rows=sum(request.rows for request in running),
                clients=[request.client for request in running],
                now_s=now_s,
            )
        return Batch(kind=kind, requests=running, waits_s=waits_s)

    def _drop_dead(self, now_s: float) -> None:
        """Forgets cancelled requests, and answers the expired ones."""
        waiting = [request for request in self._waiting if not request.future.cancelled()]
        self._waiting = [request for request in waiting if now_s < request.expires_s]
        for request in waiting:
            if now_s >= request.expires_s and request.future.set_running_or_notify_cancel():
                self._num_expired += 1
                waited_s = now_s - request.submitted_s
                request.future.set_exception(
                    Expired(
                        f"a request of {request.client!r} waited {waited_s:.3g} s, the deadline "
                        f"is {self._deadline_s:.3g} s"
                    )
                )

    def _rows(self) -> int:
        return sum(request.rows for request in self._waiting)

    def _oldest_s(self) -> float:
        return self._waiting[0].submitted_s if self._waiting else math.inf

    def _due_s(self) -> float:
        """When the timer runs out or a request expires."""
        return min(
            self._oldest_s() + self._max_wait_s,
            min((request.expires_s for request in self._waiting), default=math.inf),
        )
