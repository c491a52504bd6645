"""A simulator's way to a policy server of another process.

ServerLink keeps one connection to one server, for all clients of the simulator
  consumes    requests of the clients; answers of the server
  produces    frames; results of futures
  waits for   answers; without a connection, for the server to come back
  unblocked by  the server, `close`

When the connection is lost, what was asked over it fails with `ServerLostError`. What is asked
while there is none waits until there is one again, and the clients that had joined join anew. A
client that cannot get an answer for `patience_s`, counted from the first loss, gets a
`ServerGoneError`, which nobody asks again for.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np

from jaxvla.serving.batcher import BatcherClosedError
from jaxvla.serving.client import Answer, QueryClient, ServerLostError
from jaxvla.serving.remote import ERRORS
from jaxvla.serving.remote_schema import InferenceSchema
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.dispatch import Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import read_int, read_text
from jaxvla.types import Observation

_LOG = logging.getLogger(__name__)

Address = tuple[str, int]
"""Host and port."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
"""Between two attempts to connect; every one is twice the one before."""

_CONNECT_S = 10.0


class ServerGoneError(RuntimeError):
    """The policy server did not come back in time."""


@dataclass(kw_only=True, eq=False)
class _Ask:
    """A request without an answer."""

    client: str
    kind: str
    rows: int
    arrays: Sequence[np.ndarray]
    is_sent: bool = False
    future: Future = field(default_factory=Future)


class ServerLink:
    """A connection to one policy server that is made again whenever it is lost. Thread-safe."""

    def __init__(
        self,
        find_address: Callable[[], Address | None],
        config: ChannelConfig,
        schema: InferenceSchema,
        *,
        name: str,
        session: str,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        find_address: where the server listens at present; None if nobody knows. Called before
          every attempt to connect.
        config: of the connection.
        schema: of queries and answers.
        name: of the simulator.
        session: of the run.
        patience_s: see the module docstring.
        clock: monotonic seconds.
        """
        self._find_address = find_address
        self._config = config
        self._schema = schema
        self._name = name
        self._session = session
        self._patience_s = patience_s
        self._clock = clock
        self._sending = threading.Lock()
        """Held while frames are sent, so that a client's join comes before what it asks. Taken
        before `_state`."""
        self._state = threading.Lock()
        """Guards everything below; never held while anything is sent or waited for."""
        self._connection: Connection | None = None
        self._greeting: Connection | None = None
        """Made, but not welcomed yet."""
        self._joined: dict[str, None] = {}
        """Clients in the order in which they joined."""
        self._asks: dict[int, _Ask] = {}
        """By number."""
        self._numbers = itertools.count()
        self._without_since_s: dict[str, float] = {}
        """Client -> when it lost its first request, or asked in vain, since its last answer."""
        self._closed_reason: str | None = None
        self._was_answered = False
        """Over this connection. For the link's thread alone."""
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link of {name}", daemon=True)

    def start(self) -> None:
        """Connects from now on. Once."""
        self._thread.start()

    def close(self, reason: str) -> None:
        """Ends the connection; requests fail with BatcherClosedError(reason), now and from now
        on. From any thread but the link's."""
        with self._state:
            if self._closed_reason is None:
                self._closed_reason = reason
            asks, self._asks = list(self._asks.values()), {}
            connections = [x for x in (self._connection, self._greeting) if x is not None]
        self._has_ended.set()
        for connection in connections:
            connection.close()
        _fail(asks, lambda ask: BatcherClosedError(reason))
        if self._thread.is_alive():
            self._thread.join()

    def join(self, client: str) -> None:
        """See `QueryClient.join`.

        Raises:
          ValueError: the client has joined already.
        """
        with self._sending:
            with self._state:
                if client in self._joined:
                    raise ValueError(f"client {client!r} is registered already")
                self._joined[client] = None
                connection = self._connection
            self._send(connection, [self._frame("join", client)])

    def leave(self, client: str) -> None:
        """See `QueryClient.leave`. Cancels what the client waits for.

        Raises:
          ValueError: it has not joined.
        """
        with self._sending:
            with self._state:
                if client not in self._joined:
                    raise ValueError(f"client {client!r} is not registered")
                del self._joined[client]
                self._without_since_s.pop(client, None)
                left = {number: ask for number, ask in self._asks.items() if ask.client == client}
                for number in left:
                    del self._asks[number]
                connection = self._connection
            self._send(connection, [self._frame("leave", client)])
        for ask in left.values():
            ask.future.cancel()

    def submit(
        self, client: str, kind: str, observation: Observation, keys: np.ndarray
    ) -> Future[Answer]:
        """Asks, or waits for the connection to do so.

        Raises:
          ValueError: the client has not joined, or the query is none.
          BatcherClosedError: after `close`.
        """
        arrays = self._schema.pack_query(kind, observation, keys)
        ask = _Ask(client=client, kind=kind, rows=len(keys), arrays=arrays)
        with self._sending:
            with self._state:
                if self._closed_reason is not None:
                    raise BatcherClosedError(self._closed_reason)
                if client not in self._joined:
                    raise ValueError(f"client {client!r} is not registered")
                number, connection = next(self._numbers), self._connection
                self._asks[number] = ask
                ask.is_sent = connection is not None
                if connection is None:
                    self._without_since_s.setdefault(client, self._clock())
            self._send(connection, [self._ask_frame(number, ask)])
        return ask.future

    def _run(self) -> None:
        """Connects, receives until the connection is lost, and starts again."""
        pause_s = _FIRST_PAUSE_S
        handlers: Handlers = {
            "answer": self._on_answer,
            "refused": self._on_refused,
            "cancelled": self._on_cancelled,
        }
        while not self._has_ended.is_set():
            connection = self._connect()
            if connection is None:
                self._give_up_old()
            elif self._resume(connection):
                self._was_answered = False
                dispatch(connection, handlers)
                self._lose()
                if self._was_answered:  # else it may be a server that dies of what we ask
                    pause_s = _FIRST_PAUSE_S
            if connection is not None:
                connection.close()
            self._has_ended.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _connect(self) -> Connection | None:
        """A connection to a server of this session; None if there is none at present."""
        address = self._find_address()
        if address is None:
            return None
        try:
            connection = connect(address, self._config, name=self._name, timeout_s=_CONNECT_S)
        except ConnectionLostError as error:
            _LOG.info("%s: %s", self._name, error)
            return None
        with self._state:
            self._greeting = connection
            is_closed = self._closed_reason is not None
        if not is_closed and self._is_welcome(connection):
            return connection
        connection.close()
        return None

    def _is_welcome(self, connection: Connection) -> bool:
        try:
            connection.send(Frame(kind="client", fields={"session": self._session}))
            answer = connection.receive().kind
        except ConnectionLostError as error:
            _LOG.info("%s: %s", self._name, error)
            return False
        if answer != "welcome":
            _LOG.info("%s: %s answers %r", self._name, connection.peer, answer)
        return answer == "welcome"

    def _resume(self, connection: Connection) -> bool:
        """Joins again, and asks what waits. False after `close`."""
        with self._sending:
            with self._state:
                if self._closed_reason is not None:
                    return False
                self._connection, self._greeting = connection, None
                joined, asks = list(self._joined), dict(self._asks)
                for ask in asks.values():
                    ask.is_sent = True
            frames = [self._frame("join", client) for client in joined]
            frames += [self._ask_frame(number, ask) for number, ask in asks.items()]
            self._send(connection, frames)
        return True

    def _lose(self) -> None:
        """Fails what was asked over the connection that is lost."""
        with self._state:
            self._connection = None
            now_s = self._clock()
            lost = {number: ask for number, ask in self._asks.items() if ask.is_sent}
            for number, ask in lost.items():
                del self._asks[number]
                self._without_since_s.setdefault(ask.client, now_s)
            gone = {client for client in self._without_since_s if self._is_gone(client, now_s)}
        _fail(
            lost.values(),
            lambda ask: _gone(self._patience_s) if ask.client in gone else _lost(self._name),
        )

    def _give_up_old(self) -> None:
        """Fails what has waited for a server for too long."""
        with self._state:
            now_s = self._clock()
            old = {n: ask for n, ask in self._asks.items() if self._is_gone(ask.client, now_s)}
            for number in old:
                del self._asks[number]
        _fail(old.values(), lambda ask: _gone(self._patience_s))

    def _is_gone(self, client: str, now_s: float) -> bool:
        since_s = self._without_since_s.get(client)
        return since_s is not None and now_s - since_s >= self._patience_s

    def _on_answer(self, frame: Frame) -> None:
        number, version = read_int(frame.fields, "number"), read_int(frame.fields, "version")
        with self._state:
            ask = self._asks.get(number)
        if ask is None:
            return  # the client has left meanwhile
        result = self._schema.unpack_result(ask.kind, ask.rows, frame.arrays)
        if self._take(number) and ask.future.set_running_or_notify_cancel():
            ask.future.set_result(Answer(result=result, policy_version=version))

    def _on_refused(self, frame: Frame) -> None:
        name, text = read_text(frame.fields, "error"), read_text(frame.fields, "text")
        if name not in ERRORS:
            raise FrameError(f"error = {name!r:.80}, must be one of {sorted(ERRORS)}")
        ask = self._take(read_int(frame.fields, "number"))
        if ask is not None:
            _fail([ask], lambda _: ERRORS[name](text))

    def _on_cancelled(self, frame: Frame) -> None:
        ask = self._take(read_int(frame.fields, "number"))
        if ask is not None:
            _fail([ask], lambda _: CancelledError())

    def _take(self, number: int) -> _Ask | None:
        """The request that the server has answered, if its client still waits for that."""
        self._was_answered = True
        with self._state:
            ask = self._asks.pop(number, None)
            if ask is not None:
                self._without_since_s.pop(ask.client, None)
        return ask

    def _send(self, connection: Connection | None, frames: Iterable[Frame]) -> None:
        """Sends over the connection, if there is one. `_run` notices when it is lost."""
        if connection is None:
            return
        try:
            for frame in frames:
                connection.send(frame)
        except ConnectionLostError as error:
            _LOG.info("%s: %s", self._name, error)

    def _frame(self, kind: str, client: str) -> Frame:
        return Frame(kind=kind, fields={"session": self._session, "client": client})

    def _ask_frame(self, number: int, ask: _Ask) -> Frame:
        fields = {
            "session": self._session,
            "client": ask.client,
            "number": number,
            "kind": ask.kind,
        }
        return Frame(kind="ask", fields=fields, arrays=ask.arrays)


class RemoteInferenceClient(QueryClient):
    """Sends chunk queries under one name over a link."""

    def __init__(self, link: ServerLink, name: str):
        self.name = name
        self._link = link

    def join(self) -> None:
        """See `QueryClient.join`."""
        self._link.join(self.name)

    def leave(self) -> None:
        """See `QueryClient.leave`."""
        self._link.leave(self.name)

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        """See `QueryClient.submit`."""
        return self._link.submit(self.name, kind, observation, keys)


def _fail(asks: Iterable[_Ask], error: Callable[[_Ask], BaseException]) -> None:
    """Ends requests that nobody else can reach any more."""
    for ask in asks:
        if ask.future.set_running_or_notify_cancel():
            ask.future.set_exception(error(ask))


def _lost(name: str) -> ServerLostError:
    return ServerLostError(f"{name}: the policy server was lost before it answered")


def _gone(patience_s: float) -> ServerGoneError:
    return ServerGoneError(f"no policy server answered for {patience_s:g} s")
