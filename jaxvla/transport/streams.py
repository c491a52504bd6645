"""Bytes over one connected TCP socket, plain or within TLS. No jax.

The socket does not block; who has to wait waits in poll(2), where `shutdown` from any other
thread wakes it. TLS needs that: OpenSSL allows one call at a time per connection, and a thread
that waits for bytes inside of such a call would keep others from sending.
"""

import array
import contextlib
import fcntl
import pathlib
import select
import socket
import ssl
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxvla.transport.frames import Buffer

_BUFFER_BYTES = 65_536
_MAX_PIECES = 512
"""Of one sendmsg; POSIX allows 1024 on Linux and macOS."""

_PEER_GONE = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)
"""POLLRDHUP, that the other side sends no more, exists on Linux only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Encryption of the connections: a listener shows a certificate, which clients check.

    A client accepts the certificates that `authority` contains or has signed. It compares no
    host names: processes are reached under addresses that are not known when certificates are
    made. So the authority must be one that signs for this purpose alone, or the server's own
    certificate; and the handshake of the channel is bound to the certificate in use.
    """

    certificate: str = ""
    """File of the listener's certificate, PEM."""
    key: str = ""
    """File of the certificate's private key, PEM without a password."""
    authority: str = ""
    """File of the certificates that clients trust, PEM."""

    def server_context(self) -> ssl.SSLContext:
        """Raises ValueError where a file is not named or cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # sessions are not resumed
        files = _named(self, "certificate"), _named(self, "key")
        try:
            # The function asks the terminal for a password unless it is given one.
            context.load_cert_chain(*files, password=lambda: "")
        except OSError as error:  # ssl.SSLError as well
            raise ValueError(f"tls: {files[0]} and {files[1]} cannot be used: {error}") from error
        return context

    def client_context(self) -> ssl.SSLContext:
        """Raises ValueError where a file is not named or cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # A certificate in the file is trusted itself, whoever has signed it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        file = _named(self, "authority")
        try:
            context.load_verify_locations(file)
        except OSError as error:
            raise ValueError(f"tls.authority: {file} cannot be used: {error}") from error
        return context

    def own_certificate(self) -> bytes:
        """The listener's certificate, DER: the first one of the file."""
        text = pathlib.Path(self.certificate).read_text("ascii")
        begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
        body = text[text.index(begin) : text.index(end) + len(end)]
        return ssl.PEM_cert_to_DER_cert(body)


def _named(tls: TlsConfig, name: str) -> str:
    path = getattr(tls, name)
    if not path:
        raise ValueError(f"tls.{name} is empty: name a PEM file")
    return path


class Stream:
    """One reader and one writer at a time, in two threads; the other methods from any thread."""

    def __init__(
        self,
        connected: socket.socket,
        tls: ssl.SSLContext | None = None,
        *,
        is_server: bool = False,
    ):
        """Takes the socket over.

        Args:
          connected: a TCP socket.
          tls: None for a plain stream; otherwise `secure` comes before everything else.
          is_server: the side that shows its certificate.

        Raises:
          OSError: the socket is not connected any more; it is closed.
        """
        connected.setblocking(False)
        if tls is not None:
            try:
                connected = tls.wrap_socket(
                    connected, server_side=is_server, do_handshake_on_connect=False
                )
            except (OSError, ValueError):
                connected.close()
                raise
        self._socket = connected
        # None for a plain socket, on which the kernel lets two threads work at once.
        self._tls_lock = threading.Lock() if tls is not None else contextlib.nullcontext()
        self._readable, self._writable = select.poll(), select.poll()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._stop = 0
        """What of the buffer has been received and not been read."""
        self.heard_s = time.monotonic()
        """When bytes came last."""
        self.deadline_s: float | None = None
        """Monotonic time after which `read` and `write` raise TimeoutError."""

    def secure(self) -> None:
        """Makes the TLS handshake, if there is TLS.

        Raises:
          OSError: it failed, or the connection broke; TimeoutError after the deadline.
        """
        if not isinstance(self._socket, ssl.SSLSocket):
            return
        while True:
            try:
                return self._socket.do_handshake()
            except ssl.SSLWantReadError:
                self._wait(self._readable, select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(self._writable, select.POLLOUT)

    def peer_certificate(self) -> bytes | None:
        """DER, of the other side; None without TLS."""
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.getpeercert(binary_form=True)
        return None

    def read(self, view: memoryview) -> None:
        """Fills `view`, which is one of bytes.

        Raises:
          EOFError: the other side, or `shutdown`, ended the stream.
          OSError: the connection broke; TimeoutError after the deadline.
        """
        while view:
            if self._start < self._stop:
                size = min(len(view), self._stop - self._start)
                view[:size] = self._buffer[self._start : self._start + size]
                self._start += size
            elif len(view) >= _BUFFER_BYTES:
                size = self._receive(view)
            else:
                self._start, self._stop = 0, self._receive(self._buffer)
                size = 0
            view = view[size:]

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Sends all bytes of the buffers, in order, without joining them.

        Raises:
          OSError: the connection broke, or the other side sends no more (BrokenPipeError) and is
            taken to be gone; TimeoutError after the deadline.
        """
        left = [memoryview(buffer) for buffer in buffers]
        left.reverse()  # what comes next is at the end
        if self._events(0) & _PEER_GONE:
            raise BrokenPipeError("the other side has closed the connection")
        while left:
            sent = self._send(left)
            while left and sent >= len(left[-1]):
                sent -= len(left.pop())
            if sent:
                left[-1] = left[-1][sent:]

    def try_write(self, data: bytes) -> int:
        """Sends what can be sent at once. Returns the number of bytes, 0 if none.

        Not while `write` is at work. Bytes that were not sent have to be the next ones.

        Raises:
          OSError: the connection broke.
        """
        if not self._events(select.POLLOUT) & select.POLLOUT:
            return 0
        try:
            with self._tls_lock:
                return self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def num_unread(self) -> int:
        """Bytes that have come and that nobody has asked the system for."""
        count = array.array("i", [0])
        fcntl.ioctl(self._socket, termios.FIONREAD, count)
        return count[0]

    def is_peer_gone(self) -> bool:
        """Whether the other side ended the stream or the connection broke."""
        return bool(self._events(0) & _PEER_GONE)

    def shutdown(self) -> None:
        """Ends both directions. Wakes `read` and `write`."""
        # SSLSocket.shutdown would leave TLS first, and a reader would get bytes that are encrypted.
        with contextlib.suppress(OSError):  # not connected any more
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back. Only when no other thread uses the stream."""
        self._socket.close()

    def _receive(self, view: memoryview) -> int:
        while True:
            try:
                with self._tls_lock:
                    size = self._socket.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait(self._readable, select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(self._readable, select.POLLOUT)
            else:
                if not size:
                    raise EOFError("the other side has closed the connection")
                self.heard_s = time.monotonic()
                return size

    def _send(self, left: list[memoryview]) -> int:
        """Sends some of the bytes; the last buffer comes first."""
        while True:
            try:
                if not isinstance(self._socket, ssl.SSLSocket):
                    return self._socket.sendmsg(left[: -_MAX_PIECES - 1 : -1])
                with self._tls_lock:
                    return self._socket.send(left[-1])
            except (BlockingIOError, ssl.SSLWantWriteError):
                events = self._wait(self._writable, select.POLLOUT)
            except ssl.SSLWantReadError:
                events = self._wait(self._writable, select.POLLIN)
            if events & _PEER_GONE:
                raise BrokenPipeError("the other side has closed the connection")

    def _wait(self, poller: select.poll, events: int) -> int:
        timeout_ms = None
        if self.deadline_s is not None:
            timeout_ms = max(0.0, self.deadline_s - time.monotonic()) * 1e3
        poller.register(self._socket, events | (_PEER_GONE if events & select.POLLOUT else 0))
        found = poller.poll(timeout_ms)
        if not found:
            raise TimeoutError("the other side takes too long")
        return found[0][1]

    def _events(self, events: int) -> int:
        """What holds now, of `events` and what tells that the other side is gone."""
        poller = select.poll()  # of its own: one must not be used by two threads
        poller.register(self._socket, events | _PEER_GONE)
        found = poller.poll(0)
        return found[0][1] if found else 0
