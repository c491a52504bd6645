"""How jaxvla's processes reach each other: frames over TCP, after a mutual handshake. No jax.

A `Listener` accepts connections and `connect` makes them. Both ends have to hold one token, which
is proven in both directions (`handshake`) before a frame is read; TLS lies outside of that. Who
does not get through the handshake is told nothing and costs a thread for `handshake_s` at most.
"""

import contextlib
import logging
import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping

from jaxvla.endpoint import is_loopback
from jaxvla.transport import handshake
from jaxvla.transport.connection import ChannelConfig, Connection, ConnectionLostError
from jaxvla.transport.handshake import Party
from jaxvla.transport.streams import Stream, TlsConfig

__all__ = [
    "ChannelConfig",
    "Connection",
    "ConnectionLostError",
    "Listener",
    "TlsConfig",
    "connect",
]

_LOG = logging.getLogger(__name__)

_JOIN_S = 5.0
_RETRY_MS = 100
_BACKLOG = 128


class Listener:
    """Accepts connections and serves each in a thread of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        config: ChannelConfig,
        serve: Callable[[Connection], None],
        *,
        name: str = "listener",
    ):
        """Takes the address; nobody can connect before `start`.

        Args:
          host: an address of this machine.
          port: 0 for any that is free.
          config: its `tls`, if there is one, names certificate and key.
          serve: called in the connection's thread; the connection is closed when it returns. A
            ConnectionLostError that it lets through is the usual end, other exceptions are logged.
          name: what clients get to know as `Connection.peer`.

        Raises:
          ValueError: the name is none, or the TLS files cannot be used.
          OSError: the address is not this machine's, or is in use.
        """
        self._config = config
        self._serve = serve
        self._own = _party(name, config)
        self._tls = config.tls.server_context() if config.tls else None
        self._certificate = config.tls.own_certificate() if config.tls else None
        self._state = threading.Lock()
        """Guards what follows, up to the counts."""
        self._is_closed = False
        self._greeting: dict[Stream, None] = {}
        """In their handshake, oldest first."""
        self._connections: dict[Stream, Connection | None] = {}
        """After it; None until they are told."""
        self._threads: set[threading.Thread] = set()
        self._counts: dict[str, int] = dict.fromkeys(
            ("accepted", "refused", "turned_away", "malformed"), 0
        )
        self._acceptor: threading.Thread | None = None
        self._socket = _bound(host, port)
        self._address: tuple[str, int] = self._socket.getsockname()[:2]
        self._wake, self._woken = socket.socketpair()
        if not is_loopback(host) and not config.tls:
            _LOG.warning("%s: no TLS: the network can read and change what is sent", host)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that were bound."""
        return self._address

    @property
    def counts(self) -> Mapping[str, int]:
        """Connections by what became of them: "accepted"; "refused", whose handshake failed or
        took too long; "turned_away" by a limit; "malformed", accepted and then ended by bytes
        that are no frame."""
        with self._state:
            return dict(self._counts)

    def start(self) -> None:
        """Accepts connections from now on. Once."""
        self._socket.listen(_BACKLOG)
        self._acceptor = threading.Thread(
            target=self._accept_all, name="transport/accept", daemon=True
        )
        self._acceptor.start()

    def close(self) -> None:
        """Accepts no connections any more, ends those that exist, and waits for their threads,
        for seconds at most. From any thread."""
        with self._state:
            if self._is_closed:
                return
            self._is_closed = True
        self._wake.close()
        if self._acceptor is not None:
            self._acceptor.join()
        self._socket.close()
        self._woken.close()
        with self._state:
            connections, threads = list(self._connections.values()), list(self._threads)
            for stream in (*self._greeting, *self._connections):
                stream.shutdown()
        for connection in connections:
            if connection is not None:
                connection.close()
        end_s = time.monotonic() + _JOIN_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end_s - time.monotonic()))
                if thread.is_alive():
                    _LOG.warning("%s still works, after its connection was closed", thread.name)

    def _accept_all(self) -> None:
        poller = select.poll()
        for waited in (self._socket, self._woken):
            poller.register(waited, select.POLLIN)
        closing = select.poll()
        closing.register(self._woken, select.POLLIN)
        while not self._is_closed:
            poller.poll()
            try:
                connected, address = self._socket.accept()
            except BlockingIOError:
                continue  # `close` woke us, or the client has gone already
            except OSError as error:  # such as: the process has no more file descriptors
                self._note("turned_away", "the next client", error)
                closing.poll(_RETRY_MS)
                continue
            try:
                self._admit(connected, f"{address[0]}:{address[1]}")
            except OSError as error:
                self._note("refused", str(address[0]), error)

    def _admit(self, connected: socket.socket, address: str) -> None:
        """Gives a new connection its thread."""
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = Stream(connected, self._tls, is_server=True)
        stream.deadline_s = time.monotonic() + self._config.handshake_s
        thread = threading.Thread(
            target=self._handle, args=(stream, address), name="transport/handshake", daemon=True
        )
        with self._state:
            if len(self._greeting) >= self._config.max_handshakes:
                oldest = next(iter(self._greeting))
                del self._greeting[oldest]
                oldest.shutdown()
            self._greeting[stream] = None
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._forget(stream)
            with self._state:
                self._threads.discard(thread)
            self._note("turned_away", address, error)

    def _handle(self, stream: Stream, address: str) -> None:
        """A connection's life."""
        thread = threading.current_thread()
        try:
            connection = self._greeted(stream, address)
            if connection is not None:
                thread.name = f"transport/{connection.peer}"
                self._converse(connection)
        finally:
            self._forget(stream)
            with self._state:
                self._threads.discard(thread)

    def _greeted(self, stream: Stream, address: str) -> Connection | None:
        """The connection after its handshake, or None when it has to go."""
        try:
            stream.secure()
            shake = handshake.ListenerHandshake(stream, self._config.token, self._certificate)
            peer = shake.read_claim()
            status = self._place(stream, peer)
            shake.answer(status, self._own)
        except (OSError, EOFError) as error:
            with self._state:
                is_expected = stream in self._greeting or stream in self._connections
            self._note("refused" if is_expected else "turned_away", address, error)
            return None
        if status != handshake.ACCEPTED:
            self._note("turned_away", address, _reason(status))
            return None
        stream.deadline_s = None
        connection = Connection(stream, peer=peer.name, config=self._config)
        with self._state:
            self._counts["accepted"] += 1
            self._connections[stream] = connection
            is_closed = self._is_closed
        if is_closed:
            connection.close()
        return connection

    def _place(self, stream: Stream, peer: Party) -> int:
        """Status for one that holds the token; takes a place for it if it may stay."""
        if not _fits(peer, self._config):
            return handshake.MISMATCH
        with self._state:
            if len(self._connections) >= self._config.max_connections:
                return handshake.FULL
            self._greeting.pop(stream, None)
            self._connections[stream] = None
        return handshake.ACCEPTED

    def _converse(self, connection: Connection) -> None:
        try:
            with connection:
                self._serve(connection)
        except ConnectionLostError as error:
            _LOG.debug("%s", error)
        except Exception:
            _LOG.exception("serving %s failed", connection.peer)
        if connection.is_malformed:
            self._note("malformed", connection.peer, "bytes that are refused")

    def _forget(self, stream: Stream) -> None:
        with self._state:
            self._greeting.pop(stream, None)
            self._connections.pop(stream, None)
        stream.close()

    def _note(self, what: str, who: str, reason: object) -> None:
        """Counts. Logs ever more rarely: strangers must not fill the log."""
        with self._state:
            self._counts[what] += 1
            count = self._counts[what]
        if count & (count - 1) == 0:
            _LOG.warning("%d connections %s, the last one of %s: %s", count, what, who, reason)


def connect(
    address: tuple[str, int], config: ChannelConfig, *, name: str, timeout_s: float
) -> Connection:
    """Connects to a listener. One try.

    Args:
      address: host and port.
      config: its `tls`, if there is one, names the authority.
      name: what the listener gets to know as `Connection.peer`, see `Party`.
      timeout_s: for connection and handshake together.

    Raises:
      ValueError: the name is none, or the TLS files cannot be used.
      ConnectionLostError: nobody listens there, or not one with the same token and TLS, or it
        has its most connections.
    """
    own = _party(name, config)
    tls = config.tls.client_context() if config.tls else None
    deadline_s = time.monotonic() + timeout_s
    where = f"{address[0]}:{address[1]}"
    with contextlib.ExitStack() as undo:
        try:
            connected = socket.create_connection(address, timeout_s)
            undo.callback(connected.close)
            _refuse_itself(connected)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(connected, tls)
            undo.callback(stream.close)
            stream.deadline_s = deadline_s
            stream.secure()
            shake = handshake.ClientHandshake(stream, config.token, stream.peer_certificate())
            status, peer = shake.run(own)
        except ssl.SSLError as error:
            raise ConnectionLostError(f"{where}: TLS failed: {error}") from error
        except (OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            hint = "; do both sides have the same token?" if isinstance(error, EOFError) else ""
            raise ConnectionLostError(f"{where}: {reason}{hint}") from error
        if status != handshake.ACCEPTED or not _fits(peer, config):
            reason = _reason(status if status != handshake.ACCEPTED else handshake.MISMATCH)
            raise ConnectionLostError(f"{where}: turned away: {reason}")
        undo.pop_all()
    stream.deadline_s = None
    return Connection(stream, peer=peer.name, config=config)


def _party(name: str, config: ChannelConfig) -> Party:
    return Party(name=name, ping_ms=math.ceil(1e3 * config.ping_s))


def _fits(peer: Party, config: ChannelConfig) -> bool:
    """Whether the other side pings often enough not to be taken for dead."""
    return 2 * peer.ping_ms <= math.ceil(1e3 * config.silence_s) + 1  # each rounded up


def _reason(status: int) -> str:
    reasons = {
        handshake.FULL: "the listener has its most connections",
        handshake.MISMATCH: "ping_s of one side is more than half of the other's silence_s",
    }
    return reasons.get(status, f"unknown status {status}")


def _refuse_itself(connected: socket.socket) -> None:
    """TCP connects a socket to itself when the port that is called is free and happens to be the
    one that the system picks for the caller. It would keep a listener from coming back."""
    if connected.getsockname() == connected.getpeername():
        raise ConnectionRefusedError("nobody listens there")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet, so that clients are refused."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # One that restarts need not wait for connections of the last one to time out.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound
