"""The trajectory queue for simulators of other processes.

QueueService, on the learner's side
  consumes    requests of simulators: admit, put, fail
  produces    calls of the queue that it stands in front of, and their results
  waits for   the next frame of a connection; per owner, for credit
  unblocked by  the simulator, the loss of its connection, close of the queue

RemoteQueue, on the simulator's side, passes every call on and waits for its result; the loss of
the connection ends all of them.

A request has a number, which its answer repeats. A ticket is given out over one connection and
dies with it: a simulator that comes back gets new ones.
"""

import concurrent.futures
import itertools
import logging
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from jaxvla.transport.base import Ticket, TrajectoryQueue, TrajectorySink
from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.dispatch import Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import (
    read_bool,
    read_fields,
    read_int,
    read_seconds,
    read_text,
)

_LOG = logging.getLogger(__name__)

LOST, MALFORMED, OUTDATED = "simulator_lost", "malformed", "outdated"
"""Reasons for which the service gives tickets up: the connection is gone; a request breaks the
schema; a sample is older than the version that the ticket was admitted for."""

_OWNER = re.compile(r"[ -~]{1,64}")

_REASON = re.compile(r"[a-z][a-z0-9_]{0,31}")
"""It becomes part of a metric's name."""

_RETRY_S = 0.05
"""Between two looks whether the admissions of a lost simulator have ended."""

_MOST_ERROR = 1000
"""Characters of an error that travel."""


class ItemCodec(Protocol):
    """How a payload and its info cross. The service and the simulators have the same one."""

    def encode(self, payload: Any, info: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Fields and arrays of a frame. Raises FrameError for what `decode` would refuse."""
        ...

    def decode(
        self, owner: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> tuple[Any, Any]:
        """Payload and info of an owner. Raises FrameError, which names the field."""
        ...


class QueueService:
    """Serves a queue to the simulators of other processes. Thread-safe."""

    def __init__(self, queue: TrajectoryQueue, codec: ItemCodec):
        """Args:
        queue: the queue.
        codec: of its payloads.
        """
        self.queue = queue
        self.codec = codec
        self._changed = threading.Condition()
        self._holders: dict[str, _Simulator] = {}
        """Owner -> the simulator that it belongs to."""
        self._newest: dict[str, Any] = {}

    def newest(self, owners: Collection[str]) -> dict[str, Any]:
        """Owner -> info of its newest accepted put, for those that have one: where a restarted
        simulator goes on."""
        with self._changed:
            return {name: self._newest[name] for name in owners if name in self._newest}

    def serve(
        self,
        connection: Connection,
        owners: Collection[str],
        *,
        welcome: Callable[[Mapping[str, Any]], None],
        others: Handlers | None = None,
    ) -> None:
        """Serves one simulator until its connection is lost, then gives its tickets up.

        A simulator that already serves one of the owners is taken for dead: its connection is
        closed first.

        Args:
          connection: after the simulator said who it is.
          owners: whose tickets it may ask for.
          welcome: called with `newest(owners)` once no other simulator can change it any more,
            before the first request is read.
          others: functions for frames of other conversations on the connection.

        Raises:
          ValueError: an owner's name is none.
        """
        for owner in owners:
            if not _OWNER.fullmatch(owner):
                raise ValueError(f"owner {owner!r} is no name like {_OWNER.pattern}")
        simulator = _Simulator(self, connection, frozenset(owners))
        self._claim(simulator)
        try:
            welcome(self.newest(owners))
            dispatch(connection, {**(others or {}), **simulator.handlers})
        except ConnectionLostError as error:
            _LOG.info("%s: %s", connection.peer, error)
        finally:
            connection.close()
            simulator.end()
            self._release(simulator)

    def accepted(self, owner: str, info: Any) -> None:
        """Notes the newest put of an owner."""
        with self._changed:
            self._newest[owner] = info

    def _claim(self, simulator: "_Simulator") -> None:
        with self._changed:
            while True:
                rivals = {self._holders[x] for x in simulator.owners if x in self._holders}
                if not rivals:
                    break
                for rival in rivals:
                    _LOG.warning("%s replaces a connection", simulator.connection.peer)
                    rival.connection.close()
                self._changed.wait_for(lambda rivals=rivals: not rivals & {*self._holders.values()})
            self._holders |= dict.fromkeys(simulator.owners, simulator)

    def _release(self, simulator: "_Simulator") -> None:
        with self._changed:
            self._holders = {k: v for k, v in self._holders.items() if v is not simulator}
            self._changed.notify_all()


class _Simulator:
    """One connection of a `QueueService`. All but `_admit` runs in the connection's thread."""

    def __init__(self, service: QueueService, connection: Connection, owners: frozenset[str]):
        self.connection = connection
        self.owners = owners
        self._service = service
        self._queue = service.queue
        self._is_over = False
        self._admissions: dict[str, Future[None]] = {}
        """The latest of each owner, which may still wait."""
        self._asking: set[str] = set()
        """Owners that have not been answered."""
        self._pool = ThreadPoolExecutor(
            max_workers=max(len(owners), 1), thread_name_prefix=f"admit {connection.peer}"
        )
        self.handlers: Handlers = {
            "admit": self._on_admit,
            "put": self._on_put,
            "fail": self._on_fail,
        }

    def end(self) -> None:
        """Gives up the owners' tickets, and those that they still wait for."""
        self._is_over = True
        while True:
            waiting = [x for x in self._admissions.values() if not x.done()]
            for owner in self.owners:
                self._queue.fail_owner(owner, LOST)
            if not waiting:
                break
            # One that had not begun to wait when it was given up is given up the next time.
            concurrent.futures.wait(waiting, timeout=_RETRY_S)
        self._pool.shutdown()

    def _on_admit(self, frame: Frame) -> None:
        number = read_int(frame.fields, "number")
        try:
            owner, timeout_s = self._owner(frame.fields), read_seconds(frame.fields, "timeout_s")
            if owner in self._asking:
                raise FrameError(f"owner {owner!r} waits for a ticket, and asks for another one")
        except FrameError as error:
            self._refuse(number, "admit", error, ticket=None)
            return
        self._asking.add(owner)
        self._admissions[owner] = self._pool.submit(self._admit, number, owner, timeout_s)

    def _admit(self, number: int, owner: str, timeout_s: float | None) -> None:
        """Waits for a ticket and sends it, in a thread of its own."""
        if self._is_over:
            return
        ticket = self._queue.admit(owner, timeout_s)
        self._asking.discard(owner)  # before it can ask again
        try:
            fields = None if ticket is None else _ticket_fields(ticket)
            self._answer(number, ticket=fields, error=None)
        except ConnectionLostError:
            _LOG.info("%s: lost before it got its ticket", self.connection.peer)
        # `end` gives the ticket up, as it waits for this function.

    def _on_put(self, frame: Frame) -> None:
        number = read_int(frame.fields, "number")
        ticket = None
        try:
            ticket = self._ticket(frame.fields)
            is_accepted = self._put(ticket, frame)
        except ValueError as error:  # a FrameError, or what the queue says
            if ticket is not None:
                self._queue.fail(ticket, MALFORMED)
            self._refuse(number, f"put of {ticket}", error, result=False)
            return
        self._answer(number, result=is_accepted, error=None)

    def _put(self, ticket: Ticket, frame: Frame) -> bool:
        oldest = read_int(frame.fields, "policy_version_min")
        newest = read_int(frame.fields, "policy_version_max")
        item = read_fields(frame.fields, "item")
        payload, info = self._service.codec.decode(ticket.owner, item, frame.arrays)
        if oldest < ticket.admission_version and self._queue.fail(ticket, OUTDATED):
            # A server that has lost the learner may answer for a moment more. The bound rests on
            # samples that are no older than their ticket.
            _LOG.warning("%s: version %d made samples of %s", self.connection.peer, oldest, ticket)
            return False
        is_accepted = self._queue.put(
            ticket,
            payload,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=sum(array.nbytes for array in frame.arrays),
            info=info,
        )
        if is_accepted:
            self._service.accepted(ticket.owner, info)
        return is_accepted

    def _on_fail(self, frame: Frame) -> None:
        number = read_int(frame.fields, "number")
        try:
            ticket = self._ticket(frame.fields)
            reason = read_text(frame.fields, "reason", _REASON)
        except FrameError as error:
            self._refuse(number, "fail", error, result=False)
            return
        self._answer(number, result=self._queue.fail(ticket, reason), error=None)

    def _refuse(self, number: int, what: str, error: ValueError, **fields: Any) -> None:
        _LOG.error("%s: %s: %s", self.connection.peer, what, error)
        self._answer(number, error=str(error)[:_MOST_ERROR], **fields)

    def _answer(self, number: int, **fields: Any) -> None:
        answer = Frame(kind="answer", fields={"number": number, **fields}, arrays=[])
        self.connection.send(answer)

    def _owner(self, fields: Mapping[str, Any]) -> str:
        owner = read_text(fields, "owner")
        if owner not in self.owners:
            raise FrameError(f"owner = {owner!r:.80}, the simulator has {sorted(self.owners)}")
        return owner

    def _ticket(self, fields: Mapping[str, Any]) -> Ticket:
        ticket = _read_ticket(read_fields(fields, "ticket"))
        self._owner({"owner": ticket.owner})
        return ticket


class RemoteQueue(TrajectorySink):
    """A simulator's end of a `QueueService`. Thread-safe."""

    def __init__(self, connection: Connection, codec: ItemCodec):
        """Args:
        connection: to the learner, which has welcomed the simulator.
        codec: of payloads.
        """
        self._connection = connection
        self._codec = codec
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Mapping[str, Any] | None]] = {}
        """Requests without an answer, by number."""
        self._is_closed = False
        self.handlers: Handlers = {"answer": self._on_answer}
        """For `dispatch`; `run` calls it."""

    def run(self, others: Handlers | None = None) -> None:
        """Receives until the connection is lost, then ends every call. For one thread.

        Args:
          others: functions for frames of other conversations on the connection.
        """
        try:
            dispatch(self._connection, {**(others or {}), **self.handlers})
        finally:
            self.close()

    def admit(self, owner: str, timeout_s: float | None = None) -> Ticket | None:
        """See `TrajectorySink.admit`. None also when the connection is lost.

        Raises:
          ValueError: the simulator has no such owner, or waits for a ticket of it already.
        """
        answer = self._call("admit", {"owner": owner, "timeout_s": timeout_s}, [])
        if answer is None or answer["ticket"] is None:
            return None
        return _read_ticket(answer["ticket"])

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
        """See `TrajectorySink.put`. False also when the connection is lost.

        The service measures the size of the payload by itself.
        """
        del nbytes
        item, arrays = self._codec.encode(payload, info)
        fields = {
            "ticket": _ticket_fields(ticket),
            "policy_version_min": policy_version_min,
            "policy_version_max": policy_version_max,
            "item": item,
        }
        return self._ask("put", fields, arrays)

    def fail(self, ticket: Ticket, reason: str) -> bool:
        """See `TrajectorySink.fail`. False also when the connection is lost."""
        return self._ask("fail", {"ticket": _ticket_fields(ticket), "reason": reason}, [])

    def close(self) -> None:
        """Ends the connection: calls of `admit` give None, others False, now and from now on."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, {}
        self._connection.close()
        for future in waiting.values():
            future.set_result(None)

    def _ask(self, kind: str, fields: dict[str, Any], arrays: list[np.ndarray]) -> bool:
        """A request with a yes or no for an answer."""
        answer = self._call(kind, fields, arrays)
        return answer is not None and answer["result"]

    def _call(
        self, kind: str, fields: dict[str, Any], arrays: list[np.ndarray]
    ) -> Mapping[str, Any] | None:
        """Sends a request and waits for the fields of its answer; None without a connection.

        Raises:
          ValueError: the service refuses it.
        """
        number, future = next(self._numbers), Future()
        with self._lock:
            if self._is_closed:
                return None
            self._waiting[number] = future
        try:
            self._connection.send(
                Frame(kind=kind, fields={"number": number, **fields}, arrays=arrays)
            )
        except ConnectionLostError:
            self.close()
        except BaseException:
            with self._lock:
                self._waiting.pop(number, None)
            raise
        answer = future.result()
        if answer is not None and answer["error"] is not None:
            raise ValueError(answer["error"])
        return answer

    def _on_answer(self, frame: Frame) -> None:
        fields = frame.fields
        number = read_int(fields, "number")
        if "ticket" in fields:
            if fields["ticket"] is not None:
                _read_ticket(read_fields(fields, "ticket"))
        else:
            read_bool(fields, "result")
        if fields.get("error", "") is not None:
            read_text(fields, "error")
        with self._lock:
            future, is_closed = self._waiting.pop(number, None), self._is_closed
        if is_closed:
            return
        if future is None:
            raise FrameError(f"number = {number}: no request waits for this answer")
        future.set_result(fields)


def _ticket_fields(ticket: Ticket) -> dict[str, Any]:
    return {
        "id": ticket.id,
        "admission_version": ticket.admission_version,
        "owner": ticket.owner,
    }


def _read_ticket(fields: Mapping[str, Any]) -> Ticket:
    return Ticket(
        id=read_int(fields, "id"),
        admission_version=read_int(fields, "admission_version"),
        owner=read_text(fields, "owner", _OWNER),
    )
