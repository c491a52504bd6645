"""SIGTERM and SIGINT: the first asks for a clean stop, the second exits at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 3


@contextlib.contextmanager
def stop_on_signals(stop_requested: threading.Event) -> Iterator[None]:
    """Sets the event at the first signal while the block runs, exits with 3 at the second.

    Only callable from the main thread.
    """
    # The event does not tell: a second signal may arrive while it is being set.
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(EXIT_STOPPED)
        stop_requested.set()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
