"""A policy server's websocket, as openpi's clients expect it (openpi, commit 15a9616).

consumes    connections; one request at a time from each
produces    the metadata on connection, then an answer for every request
waits for   requests; the answers
unblocked by  clients, the policy server, deadlines, `stop`

Messages are msgpack (`wire`), uncompressed. An answer carries "server_timing": "infer_ms", from
the receipt of the request to its answer, and from the second answer on "prev_total_ms", from one
answer to the next. An error is one line of text, after which the connection is closed with
code 1011; openpi sends a traceback there, which would show strangers how we are made.
GET /healthz answers 200 while the server listens.

Browsers are refused (they send an Origin): a web page must not drive a robot behind its user's
back. With a token, every connection must bring it; /healthz needs none.
"""

import asyncio
import contextlib
import hmac
import http
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any

from jaxvla.config import WebsocketConfig
from jaxvla.serving import wire
from jaxvla.serving.requests import RequestError
from jaxvla.telemetry.metrics import Distribution, MetricRecorder, Rate, Total

_LOG = logging.getLogger(__name__)

HEALTH_PATH = "/healthz"

OPEN_TIMEOUT_S = 10.0
"""For the handshake of a new connection."""

CLOSE_TIMEOUT_S = 1.0
"""For a client's part in the end of a connection."""

_MAX_ERROR = 500
"""Characters of an error's text."""

_GOING_AWAY, _INTERNAL_ERROR = 1001, 1011
_START_TIMEOUT_S = 60.0


class WebsocketServer:
    """Serves one policy to any number of connections. One thread of its own."""

    def __init__(
        self,
        answer: Callable[[bytes], Awaitable[dict[str, Any]]],
        *,
        settings: WebsocketConfig,
        metadata: Mapping[str, Any],
        token: str | None,
        recorder: MetricRecorder,
    ):
        """Args:
          answer: of a request's bytes; raises RequestError with a text for the client.
          settings: limits; the address is that of the socket that `start` gets.
          metadata: first message of every connection, see `wire.pack`.
          token: what clients must send, None if nothing.
          recorder: metrics.

        Raises:
          ValueError: the package websockets is not installed.
        """
        self._websockets = load_websockets()
        self._answer = answer
        self._settings = settings
        self._metadata = wire.pack(metadata)
        self._token = token
        self._recorder = recorder
        self._admitted: set[Any] = set()
        """Connections from their handshake to their end."""
        self._idle: set[Any] = set()
        """Those of them without a request in work."""
        self._handlers: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._has_started = threading.Event()
        self.error: BaseException | None = None
        """What ended the server's thread, if not `stop`."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked: asyncio.Event | None = None
        self._grace_s = 0.0
        for name in ("serving/requests", "serving/request_errors"):
            recorder.add(name, 0, Total)

    def start(self, listener: socket.socket, on_end: Callable[[], None] = lambda: None) -> None:
        """Accepts connections from now on.

        Args:
          listener: bound; belongs to the server from here on.
          on_end: called by the server's thread when it ends, for whatever reason.

        Raises:
          OSError: the socket cannot listen.
        """
        self._thread = threading.Thread(
            target=self._run, args=(listener, on_end), name="serving/websocket", daemon=True
        )
        self._thread.start()
        if not self._has_started.wait(_START_TIMEOUT_S):
            raise TimeoutError("the websocket server did not start")
        if self.error is not None:
            raise self.error

    def stop(self, grace_s: float) -> None:
        """Accepts no connections and no requests any more, and waits for the answers on the way.

        Args:
          grace_s: seconds after which requests without an answer are given up.
        """
        if self._thread is None or self._loop is None or self._stop_asked is None:
            return
        self._grace_s = grace_s
        try:
            self._loop.call_soon_threadsafe(self._stop_asked.set)
        except RuntimeError:  # stopped already
            return
        self._thread.join()

    def _run(self, listener: socket.socket, on_end: Callable[[], None]) -> None:
        try:
            asyncio.run(self._serve(listener))
        except BaseException as error:
            self.error = error
            if self._has_started.is_set():
                _LOG.exception("the websocket server failed")
        finally:
            self._has_started.set()
            on_end()

    async def _serve(self, listener: socket.socket) -> None:
        self._loop, self._stop_asked = asyncio.get_running_loop(), asyncio.Event()
        settings = self._settings
        server = await self._websockets.serve(
            self._handle,
            sock=listener,
            process_request=self._admit,
            compression=None,
            origins=[None],
            server_header=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=settings.ping_interval_s,
            ping_timeout=settings.ping_timeout_s,
            max_size=settings.max_message_mib * 2**20,
            max_queue=1,
            logger=_quiet(),
        )
        self._has_started.set()
        await self._stop_asked.wait()
        await self._drain(server)

    async def _drain(self, server: Any) -> None:
        """Ends the connections: idle ones now, the others when their request is answered."""
        self._is_stopping = True
        server.close(close_connections=False)
        closing = [asyncio.ensure_future(x.close(_GOING_AWAY, "stopping")) for x in self._idle]
        handlers = list(self._handlers)
        if handlers:
            await asyncio.wait(handlers, timeout=self._grace_s)
        for connection in list(self._admitted):
            connection.transport.abort()
        for task in (*closing, *handlers):
            task.cancel()
        with contextlib.suppress(TimeoutError):  # a handshake that never ends
            await asyncio.wait_for(server.wait_closed(), 2 * CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------------- one connection

    def _admit(self, connection: Any, request: Any) -> Any:
        """An HTTP response that ends the handshake, or None to go on."""
        if request.path.partition("?")[0] == HEALTH_PATH:
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._is_authorized(request.headers.get_all("Authorization")):
            text = "send the header 'Authorization: Api-Key TOKEN' with the server's token\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        most = self._settings.max_connections
        if len(self._admitted) >= most:
            text = f"{most} clients are connected, which is the most: try again later\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        self._admitted.add(connection)
        end = asyncio.ensure_future(connection.wait_closed())
        end.add_done_callback(lambda _: self._admitted.discard(connection))
        return None

    def _is_authorized(self, given: list[str]) -> bool:
        if self._token is None:
            return True
        expected = f"Api-Key {self._token}".encode()
        sent = given[0].encode(errors="surrogateescape") if len(given) == 1 else b""
        return hmac.compare_digest(sent, expected)  # in constant time

    async def _handle(self, connection: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            await connection.send(self._metadata)
            await self._converse(connection)
        except self._websockets.ConnectionClosed:
            pass  # the client went away, or said too much at a time (code 1009)
        except TimeoutError:
            connection.transport.abort()  # the client does not read
        finally:
            self._idle.discard(connection)
            self._handlers.discard(task)

    async def _converse(self, connection: Any) -> None:
        """Request, answer, until one side ends it."""
        timing: dict[str, float] = {}
        while not self._is_stopping:
            start_s = time.monotonic()
            self._idle.add(connection)
            data = await connection.recv()
            self._idle.discard(connection)
            received_s = time.monotonic()
            try:
                answer = await self._answer_in_time(data)
                timing["infer_ms"] = 1e3 * (time.monotonic() - received_s)
                packed = wire.pack(answer | {"server_timing": timing})
            except RequestError as error:
                return await self._refuse(connection, str(error))
            except Exception:
                _LOG.exception("a request failed")
                return await self._refuse(connection, "internal error: see the server's log")
            # First, because a client that has its answer may look at the counts.
            self._count(received_s, num_errors=0)
            async with asyncio.timeout(self._settings.deadline_s):
                await connection.send(packed)
            timing["prev_total_ms"] = 1e3 * (time.monotonic() - start_s)
        await connection.close(_GOING_AWAY, "stopping")

    async def _answer_in_time(self, data: bytes | str) -> dict[str, Any]:
        """Raises RequestError also for text and after the deadline."""
        if isinstance(data, str):
            raise RequestError(
                "the request is a text message: send a binary one, packed by msgpack"
            )
        deadline_s = self._settings.deadline_s
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                return await self._answer(data)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise RequestError(
                f"no answer within config.websocket.deadline_s = {deadline_s:g} s: ask less often"
            ) from error

    async def _refuse(self, connection: Any, text: str) -> None:
        """One line of text, then the end, as openpi's clients expect it."""
        self._count(None, num_errors=1)
        line = " ".join(text.split())
        if len(line) > _MAX_ERROR:
            line = line[:_MAX_ERROR] + " ..."
        async with asyncio.timeout(self._settings.deadline_s):
            await connection.send(line)
        await connection.close(_INTERNAL_ERROR, "see the message before")

    def _count(self, received_s: float | None, *, num_errors: int) -> None:
        add = self._recorder.add
        add("serving/requests", 1, Total)
        add("rate/requests_per_s", 1, Rate)
        add("serving/request_errors", num_errors, Total)
        if received_s is not None:
            add("serving/request_ms", 1e3 * (time.monotonic() - received_s), Distribution)


class _Websockets:
    """What we use of the package, which is optional."""

    def __init__(self, server: ModuleType, exceptions: ModuleType):
        self.serve: Any = server.serve
        self.ConnectionClosed: type[Exception] = exceptions.ConnectionClosed


def load_websockets() -> _Websockets:
    """Raises ValueError where the package is missing."""
    try:
        import websockets.asyncio.server  # pyright: ignore[reportMissingImports]
        import websockets.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "the websocket server needs the package websockets: pip install 'jaxvla[openpi]'"
        ) from error
    return _Websockets(websockets.asyncio.server, websockets.exceptions)


def open_listener(settings: WebsocketConfig) -> socket.socket:
    """A socket that has the address and does not listen yet, so that clients are refused.

    Raises:
      OSError: the address is not this machine's, or is in use.
    """
    found = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A server that restarts need not wait for connections of the last one to time out.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _quiet() -> logging.Logger:
    """For the package: what strangers send must not fill the log."""
    logger = _LOG.getChild("protocol")
    logger.setLevel(logging.CRITICAL)
    return logger
