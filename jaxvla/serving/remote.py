"""The policy server's side of chunk queries from other processes.

consumes    frames of simulators: join, leave, ask
produces    registrations and requests of the batcher; answers
waits for   the next frame of a connection; in a thread of its own, for answers to send
unblocked by  the simulator, the policy server, the loss of the connection

The policy server's thread only drops a finished request into the connection's outbox. The client
side is `serving.remote_client`.
"""

import functools
import logging
import queue
import threading
from concurrent.futures import Future
from typing import Any

from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy, Expired
from jaxvla.serving.client import Answer
from jaxvla.serving.remote_schema import InferenceSchema
from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.dispatch import Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import NAME, read_int, read_text

_LOG = logging.getLogger(__name__)

ERRORS: dict[str, type[Exception]] = {
    "busy": Busy,
    "expired": Expired,
    "closed": BatcherClosedError,
    "value": ValueError,
    "failed": RuntimeError,
}
"""Name of an error on its way -> what it is again for the client; the last one: an answer that
cannot be sent."""

_Finished = tuple[int, str, Future | Exception]
"""A request's number, its kind and what became of it: an exception if the batcher refused it."""

_MOST_WAITING = 1024
"""Requests of one connection that are not answered."""

_MOST_ERROR = 1000
"""Characters of an error that travel."""


class InferenceService:
    """Serves a batcher to the simulators of one session. Thread-safe."""

    def __init__(self, batcher: Batcher, schema: InferenceSchema, *, session: str):
        """Args:
        batcher: of the policy server.
        schema: of queries and answers.
        session: of the run; simulators of another one are refused.
        """
        self.batcher = batcher
        self.schema = schema
        self.session = session
        self._lock = threading.Lock()
        self._connections: set[_Simulator] = set()
        self._holders: dict[str, _Simulator] = {}
        """Client -> the connection that it joined over."""
        self._is_closed = False

    def serve(self, connection: Connection, hello: Frame | None = None) -> None:
        """Serves one simulator until its connection is lost, then takes its clients out of the
        batcher, with what they have waiting.

        Args:
          connection: of the simulator.
          hello: its first frame, if that was read already.
        """
        simulator = _Simulator(self, connection)
        with self._lock:
            is_closed = self._is_closed
            self._connections.add(simulator)
        try:
            if not is_closed and simulator.greet(hello):
                simulator.run()
        except ConnectionLostError as error:
            _LOG.info("%s: %s", connection.peer, error)
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(simulator)

    def close(self) -> None:
        """Ends all connections. Clients take the server for lost, and look for it again; if the
        run is over, close the batcher first: then they learn of it."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        for simulator in connections:
            simulator.connection.close()

    def join(self, client: str, simulator: "_Simulator") -> None:
        """Registers a client. One that joined over another connection has come back: that
        connection is dead.

        Raises:
          FrameError: it has joined over this one.
        """
        with self._lock:
            rival = self._holders.get(client)
            if rival is simulator:
                raise FrameError(f"client = {client!r} has joined already")
            if rival is not None:
                self.batcher.unregister(client)
            try:
                self.batcher.register(client)
            except ValueError as error:  # in use by someone in this process
                raise FrameError(str(error)) from error
            self._holders[client] = simulator
        if rival is not None:
            _LOG.warning("%s: %s replaces a connection", simulator.connection.peer, client)
            rival.connection.close()

    def leave(self, client: str, simulator: "_Simulator") -> None:
        """Unregisters a client, unless it has come back over another connection."""
        with self._lock:
            if self._holders.get(client) is simulator:
                del self._holders[client]
                self.batcher.unregister(client)

    def clients_of(self, simulator: "_Simulator") -> list[str]:
        """Who joined over a connection."""
        with self._lock:
            return [name for name, holder in self._holders.items() if holder is simulator]


class _Simulator:
    """One connection of an `InferenceService`."""

    def __init__(self, service: InferenceService, connection: Connection):
        self.connection = connection
        self._service = service
        self._outbox: queue.Queue[_Finished | None] = queue.Queue(_MOST_WAITING + 1)
        """None ends the sender."""
        self._lock = threading.Lock()
        self._num_waiting = 0
        """Requests that were not answered yet."""

    def greet(self, hello: Frame | None) -> bool:
        """Reads who is there; says whether it is welcome."""
        try:
            frame = hello or self.connection.receive()
            if frame.kind != "client":
                raise FrameError(f"kind = {frame.kind!r}, must be 'client'")
            session = read_text(frame.fields, "session", NAME)
        except FrameError as error:
            _LOG.error("%s: %s", self.connection.peer, error)
            return False
        is_ours = session == self._service.session
        self.connection.send(Frame(kind="welcome" if is_ours else "session"))
        if not is_ours:
            _LOG.info("%s: is of session %s", self.connection.peer, session)
        return is_ours

    def run(self) -> None:
        """Reads requests until the connection is lost."""
        handlers: Handlers = {"join": self._join, "leave": self._leave, "ask": self._ask}
        sender = threading.Thread(
            target=self._send_all, name=f"answers {self.connection.peer}", daemon=True
        )
        sender.start()
        try:
            dispatch(self.connection, handlers)
        finally:
            for client in self._service.clients_of(self):
                self._service.leave(client, self)
            self._outbox.put(None)
            sender.join()

    def _join(self, frame: Frame) -> None:
        self._check_session(frame)
        self._service.join(read_text(frame.fields, "client", NAME), self)

    def _leave(self, frame: Frame) -> None:
        self._check_session(frame)
        self._service.leave(read_text(frame.fields, "client", NAME), self)

    def _ask(self, frame: Frame) -> None:
        self._check_session(frame)
        number, client = read_int(frame.fields, "number"), read_text(frame.fields, "client", NAME)
        kind = read_text(frame.fields, "kind")
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting > _MOST_WAITING:
                raise FrameError(f"more than {_MOST_WAITING} requests wait")
        try:
            query = self._service.schema.unpack_query(kind, frame.arrays)
            future = self._service.batcher.submit(
                rows=len(query.keys), client=client, kind=kind, payload=query
            )
        except (ValueError, Busy, BatcherClosedError) as refusal:
            self._finished(number, kind, refusal)
        else:
            future.add_done_callback(functools.partial(self._finished, number, kind))

    def _check_session(self, frame: Frame) -> None:
        session = read_text(frame.fields, "session")
        if session != self._service.session:
            raise FrameError(f"session = {session!r:.80}, this is {self._service.session}")

    def _finished(self, number: int, kind: str, outcome: Future | Exception) -> None:
        """Called by whoever finishes the request, most often the policy server's thread."""
        # There is room: no more requests wait than the outbox holds, with one place for the end.
        self._outbox.put_nowait((number, kind, outcome))

    def _send_all(self) -> None:
        """Sends what is finished, in order. A lost connection leaves only counting to do."""
        while (item := self._outbox.get()) is not None:
            with self._lock:
                self._num_waiting -= 1
            try:
                self._send(*item)
            except ConnectionLostError:
                continue

    def _send(self, number: int, kind: str, outcome: Future | Exception) -> None:
        if isinstance(outcome, Exception):
            self._refuse(number, outcome)
        elif outcome.cancelled():
            self.connection.send(Frame(kind="cancelled", fields={"number": number}))
        elif isinstance(error := outcome.exception(), (Busy, Expired, BatcherClosedError)):
            self._refuse(number, error)
        elif error is not None:
            # It is the server that has failed, not the request, which its successor will answer.
            _LOG.error("%s: no answer: %s: %s", self.connection.peer, type(error).__name__, error)
            self.connection.close()
        else:
            self._send_answer(number, kind, outcome.result())

    def _send_answer(self, number: int, kind: str, answer: Answer) -> None:
        fields = {"number": number, "version": answer.policy_version}
        try:
            arrays = self._service.schema.pack_result(kind, answer.result)
            self.connection.send(Frame(kind="answer", fields=fields, arrays=arrays))
        except FrameError as mistake:  # not what the schema promises, or beyond the limit
            _LOG.error("%s: %s", self.connection.peer, mistake)
            self._refuse(number, RuntimeError(str(mistake)))

    def _refuse(self, number: int, error: Exception) -> None:
        fields = {"number": number, **_error_fields(error)}
        self.connection.send(Frame(kind="refused", fields=fields))


def _error_fields(error: BaseException) -> dict[str, Any]:
    """An error in words."""
    for name, kind in ERRORS.items():
        if isinstance(error, kind) and kind is not RuntimeError:
            return {"error": name, "text": str(error)[:_MOST_ERROR]}
    return {"error": "failed", "text": f"{type(error).__name__}: {error}"[:_MOST_ERROR]}
