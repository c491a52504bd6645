"""Both ends of a connection in one process, the network between them, and certificates."""

import contextlib
import pathlib
import queue
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from jaxvla.transport.channel import ChannelConfig, Connection, Listener, TlsConfig, connect
from jaxvla.transport.frames import Limits

TOKEN = b"0123456789abcdef"

TIMEOUT_S = 60.0
"""Of what must happen; reached only by a test that fails."""


def channel_config(**settings: Any) -> ChannelConfig:
    """Of a connection for tests, with changes."""
    return ChannelConfig(**{"token": TOKEN, "limits": Limits(max_payload_bytes=2**26)} | settings)


class Task:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]):
        self._future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def result(self) -> Any:
        """What the call returned or raised."""
        return self._future.result(TIMEOUT_S)

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:
            self._future.set_exception(error)


class Acceptor:
    """A listener that hands out its connections and leaves them open until it is closed."""

    def __init__(self, config: ChannelConfig, port: int = 0):
        self.accepted: queue.Queue[Connection] = queue.Queue()
        self._is_over = threading.Event()
        self.listener = Listener("127.0.0.1", port, config, self._serve, name="learner")
        self.listener.start()

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.address

    def next(self) -> Connection:
        """The connection that came first, of those not handed out."""
        return self.accepted.get(timeout=TIMEOUT_S)

    def _serve(self, connection: Connection) -> None:
        self.accepted.put(connection)
        self._is_over.wait()

    def __enter__(self) -> "Acceptor":
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self.listener.close()


@contextlib.contextmanager
def served(
    config: ChannelConfig, client: ChannelConfig | None = None
) -> Iterator[tuple[Connection, Connection]]:
    """Both ends of one connection: (the listener's, the client's)."""
    with Acceptor(config) as acceptor, dial(acceptor.address, client or config) as ours:
        yield acceptor.next(), ours


@contextlib.contextmanager
def served_through(config: ChannelConfig) -> Iterator[tuple[Connection, Connection, "Proxy"]]:
    """Both ends, and what lies between."""
    with (
        Acceptor(config) as acceptor,
        Proxy(acceptor.address) as proxy,
        dial(proxy.address, config) as ours,
    ):
        yield acceptor.next(), ours, proxy


def dial(address: tuple[str, int], config: ChannelConfig) -> Connection:
    """The client's end."""
    return connect(address, config, name="sim-0", timeout_s=TIMEOUT_S)


class Proxy:
    """A network that one connection goes through, which can fail."""

    def __init__(self, target: tuple[str, int]):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._target = target
        self._is_cut = threading.Event()
        self._is_over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.from_client = bytearray()
        """All that the client has sent so far."""
        self._start(self._accept)

    def cut(self) -> None:
        """Forwards nothing any more; both sides' sockets stay open, and fill up."""
        self._is_cut.set()

    def reset(self) -> None:
        """Both sides get a TCP reset."""
        for each in self._sockets:
            abort(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            self._start(self._forward, near, far, self.from_client)
            self._start(self._forward, far, near, bytearray())

    def _forward(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if self._is_cut.is_set():
                    self._is_over.wait()
                    return
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()


def abort(connected: socket.socket) -> None:
    """Closes with a TCP reset, as the system of a killed process may do."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):  # wakes a thread that is reading: it holds the socket open
        connected.shutdown(socket.SHUT_RD)
    connected.close()


def make_certificates(folder: pathlib.Path) -> dict[str, TlsConfig]:
    """An authority, and certificates for listeners, made by openssl.

    Returns:
      "signed" and "other": two certificates of the same authority, which clients trust; "own": one
      that clients trust itself.
    """
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")

    def make(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=100
        )

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    plain = ("-subj", "/CN=jaxvla", "-days", "2")
    for name in ("authority", "own"):
        make("req", "-x509", *key, *plain, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name in ("signed", "other"):
        make("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-days", "2")
        make("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    return {
        name: TlsConfig(
            certificate=str(folder / f"{name}.pem"),
            key=str(folder / f"{name}.key"),
            authority=str(folder / ("own.pem" if name == "own" else "authority.pem")),
        )
        for name in ("signed", "other", "own")
    }
