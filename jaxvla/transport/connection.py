"""One end of a connection between jaxvla's processes; `channel` makes them. No jax.

consumes    frames to send; frames of the other side
produces    frames; `ConnectionLostError` to whoever sends or receives when there is no other side
waits for   the other side to read what is sent, and to send what is received
unblocked by  the other side, its end, its silence, `close`

Each side sends a ping when it has sent nothing for a while, from one thread per process. Nothing
heard for `silence_s` means that the other side hangs, or that the network between is cut. A side
that pings but does not read is alive: `send` waits for it without limit.

Wall clocks are not used.
"""

import contextlib
import logging
import math
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxvla.transport import handshake
from jaxvla.transport.frames import Frame, FrameError, Limits, encode, read_frame
from jaxvla.transport.streams import Stream, TlsConfig

_LOG = logging.getLogger(__name__)

_PING = "ping"
_MANY_UNREAD = 16_384
"""Bytes. Where nobody receives, nothing more may come because there is no room for it: pings
alone do not fill so much within hours."""
_PING_BYTES = b"".join(encode(Frame(kind=_PING), Limits()))


class ConnectionLostError(RuntimeError):
    """There is no other side any more, or never was. The text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """What both sides of a connection agree on, and limits of this one."""

    token: bytes = field(repr=False)
    """Secret that both sides hold, at least 16 random bytes."""
    tls: TlsConfig | None = None
    """Encryption, on both sides or on none."""
    limits: Limits = field(default_factory=Limits)
    """Of frames, sent and received."""
    silence_s: float = 30.0
    """A connection on which nothing was heard for so long is lost."""
    ping_s: float = 5.0
    """Longest time without sending; at most half of the other side's `silence_s`."""
    handshake_s: float = 10.0
    """Time a new connection has to prove that it holds the token."""
    max_connections: int = 64
    """Of a listener, after their handshake."""
    max_handshakes: int = 16
    """Connections of a listener in their handshake. When one more comes, the oldest has to go."""

    def __post_init__(self):
        if len(self.token) < handshake.MIN_TOKEN_BYTES:
            least = handshake.MIN_TOKEN_BYTES
            raise ValueError(f"the token has {len(self.token)} bytes, fewer than {least}")
        for name in ("silence_s", "ping_s", "handshake_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 1e-3 <= value <= 86_400):
                raise ValueError(f"{name} = {value}: must be in [0.001, 86400]")
        for name in ("max_connections", "max_handshakes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if 2 * self.ping_s > self.silence_s:
            raise ValueError(
                f"ping_s = {self.ping_s}: must be at most half of silence_s = {self.silence_s}"
            )


class Connection:
    """One end of a connection. `close` it, or leave its `with` block, in any case."""

    def __init__(self, stream: Stream, *, peer: str, config: ChannelConfig):
        """Made by `Listener` and `connect`. The stream is the connection's from here on."""
        self.peer = peer
        """What the other side said its name is."""
        self.is_malformed = False
        """Whether it ended because the other side sent what is no frame."""
        self._stream = stream
        self._config = config
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._tail = b""
        """Rest of a ping; guarded by `_sending`, as is what follows."""
        self._sent_s = time.monotonic()
        self._state = threading.Lock()
        """Guards what follows."""
        self._num_users = 0
        """Threads within the stream: the last one out closes it."""
        self._lost: str | None = None
        """Why nothing is sent nor received any more."""
        self._num_unread = 0
        """When the pinger looked last."""
        self._is_mute = False
        """The other side is gone, but what it sent before can still be received."""
        _PINGER.add(self)

    def send(self, frame: Frame) -> None:
        """Sends a frame, from any thread. The arrays may be changed when it returns.

        It returns when the operating system has the bytes, which is no proof that the other side
        gets them: only an answer is.

        Raises:
          FrameError: it cannot be sent or is beyond a limit; the connection goes on.
          ConnectionLostError: the connection is lost, or was closed.
        """
        if frame.kind == _PING:
            raise FrameError(f"kind {_PING!r} belongs to the channel itself")
        buffers = encode(frame, self._config.limits)
        with self._use(), self._sending:
            self._require_alive()
            try:
                self._stream.write([self._tail, *buffers] if self._tail else buffers)
            except OSError as error:
                if isinstance(error, ssl.SSLError):
                    self._lose(f"TLS failed: {error}")
                self._mute()
                raise ConnectionLostError(self._why(error)) from error
            except BaseException:  # the other side has got a part of the frame
                self._lose("a frame was interrupted")
                raise
            self._tail, self._sent_s = b"", time.monotonic()

    def receive(self) -> Frame:
        """Waits for the next frame, in one thread.

        What the other side sent before it closed the connection is still received.

        Raises:
          ConnectionLostError: the connection is lost or was closed, or the other side sent bytes
            that are no frame or beyond a limit.
        """
        with self._use(), self._receiving:
            while True:
                frame = self._read()
                if frame.kind != _PING:
                    return frame

    def close(self) -> None:
        """Ends the connection, from any thread, and wakes those that send or receive.

        What was sent before may be lost.
        """
        self._lose("it was closed here")

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._lost is not None or self._is_mute

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> Frame:
        try:
            return read_frame(self._stream.read, self._config.limits)
        except FrameError as error:
            self.is_malformed = True
            self._lose(f"it sent bytes that are refused: {error}")
            raise ConnectionLostError(self._why(error)) from error
        except (OSError, EOFError, MemoryError) as error:
            self._lose(str(error) or type(error).__name__)
            raise ConnectionLostError(self._why(error)) from error
        except BaseException:  # a part of the frame is read
            self._lose("a frame was interrupted")
            raise

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """While it lasts, the stream's file descriptor stays what it is."""
        with self._state:
            self._require_not_lost()
            self._num_users += 1
        try:
            yield
        finally:
            with self._state:
                self._num_users -= 1
                if self._lost is not None and not self._num_users:
                    self._stream.close()

    def _require_not_lost(self) -> None:
        if self._lost is not None:
            raise ConnectionLostError(self._why())

    def _require_alive(self) -> None:
        self._require_not_lost()
        if self._is_mute:
            raise ConnectionLostError(self._why(BrokenPipeError("the other side is gone")))

    def _why(self, error: BaseException | None = None) -> str:
        """One line; the first reason is the true one."""
        return f"the connection to {self.peer} is lost: {self._lost or error}"

    def _mute(self) -> None:
        with self._state:
            self._is_mute = True

    def _lose(self, reason: str) -> None:
        with self._state:
            if self._lost is not None:
                return
            self._lost = reason
            self._stream.shutdown()
            if not self._num_users:
                self._stream.close()
        _PINGER.discard(self)

    # ------------------------------------------------------------------ by the pinger

    @property
    def period_s(self) -> float:
        return self._config.ping_s / 2

    def look_after(self) -> None:
        """Pings when it is time, and finds out whether the other side still is there."""
        try:
            with self._use():
                self._watch()
        except ConnectionLostError:
            pass
        except OSError as error:
            _LOG.debug("no ping to %s: %s", self.peer, error)
            self._mute()
        except Exception as error:  # the pings of all the other connections go on
            _LOG.exception("the connection to %s cannot be looked after", self.peer)
            self._lose(f"{type(error).__name__}: {error}")

    def _watch(self) -> None:
        if self._stream.is_peer_gone():
            self._mute()
        num_unread = self._stream.num_unread()
        if num_unread != self._num_unread or num_unread >= _MANY_UNREAD:
            self._stream.heard_s = time.monotonic()
        self._num_unread = num_unread
        silence_s = self._config.silence_s
        if time.monotonic() - self._stream.heard_s > silence_s:
            self._lose(f"nothing was heard for {silence_s:g} s")
        elif not self._is_mute and time.monotonic() - self._sent_s >= self.period_s:
            self._ping()

    def _ping(self) -> None:
        """Sends a ping if that needs no waiting: where it does, bytes are on their way."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            data = self._tail or _PING_BYTES
            self._tail = data
            self._tail = data[self._stream.try_write(data) :]
            if not self._tail:
                self._sent_s = time.monotonic()
        finally:
            self._sending.release()


class _Pinger:
    """Looks after all connections of the process, in one thread that exists as long as they."""

    def __init__(self):
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._thread: threading.Thread | None = None

    def add(self, connection: Connection) -> None:
        with self._changed:
            self._connections.add(connection)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="transport/pings", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def discard(self, connection: Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._connections:
                    self._changed.wait(min(x.period_s for x in self._connections))
                if not self._connections:
                    self._thread = None
                    return
                connections = list(self._connections)
            for connection in connections:
                connection.look_after()


_PINGER = _Pinger()
