"""Real connections between threads of this process."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from jaxvla.transport.channel import ChannelConfig, Connection, Listener, connect

TIMEOUT_S = 120.0
"""For waits that end at once unless the code is broken."""
CONFIG = ChannelConfig(token=b"0123456789abcdef0123456789abcdef")


class Dial:
    """Makes connections to a listener; called with the name of who calls."""

    def __init__(self, address: tuple[str, int]):
        self.address = address
        self.made: list[Connection] = []

    def __call__(self, name: str) -> Connection:
        self.made.append(connect(self.address, CONFIG, name=name, timeout_s=TIMEOUT_S))
        return self.made[-1]


@contextlib.contextmanager
def listening(
    serve: Callable[[Connection], None], config: ChannelConfig = CONFIG
) -> Iterator[Dial]:
    """Serves connections while the block runs."""
    listener = Listener("127.0.0.1", 0, config, serve)
    listener.start()
    dial = Dial(listener.address)
    try:
        yield dial
    finally:
        for connection in dial.made:
            connection.close()
        listener.close()


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs `call()` in a daemon thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
