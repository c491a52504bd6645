"""A process's line to the supervisor."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxvla.runtime.directory import Address, Directory
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame

_LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0


class Control:
    """Tells the supervisor about this process, and knows what it has said.

    When the line is lost, so is the supervisor: the process is asked to stop, and is ended when
    it has not done so after its grace.
    """

    def __init__(self, spec: ReplicaSpec, channel: ChannelConfig, grace_s: float):
        """Connects.

        Args:
          spec: of this process.
          channel: of the run.
          grace_s: for a stop without a supervisor.

        Raises:
          ConnectionLostError: the supervisor cannot be reached.
        """
        self.stop_requested = threading.Event()
        self.on_restarts: Callable[[Mapping[str, int]], None] = lambda restarts: None
        """Called with the number of restarts by role whenever it changes."""
        self._grace_s = grace_s
        self._changed = threading.Condition()
        self._directory = Directory()
        self._is_closed = False
        self._endings: list[threading.Event] = []
        self._connection: Connection = connect(
            spec.control,
            channel,
            name=f"{spec.name}.{spec.launch}",
            timeout_s=CONNECT_TIMEOUT_S,
        )
        threading.Thread(target=self._listen, name="runtime/control", daemon=True).start()

    def tell(self, kind: str, **fields: Any) -> None:
        """Says something, unless nobody hears it."""
        self.send(Frame(kind=kind, fields=fields, arrays=()))

    def send(self, frame: Frame) -> None:
        """As `tell`, of a frame."""
        try:
            self._connection.send(frame)
        except ConnectionLostError:
            _LOG.warning("the supervisor does not hear %r", frame.kind)

    def wait_for(self, holds: Callable[[Directory], bool]) -> Directory | None:
        """The directory once something holds for it; None once a stop is asked for."""
        with self._changed:
            self._changed.wait_for(lambda: self.stop_requested.is_set() or holds(self._directory))
            return None if self.stop_requested.is_set() else self._directory

    @contextlib.contextmanager
    def ending(self, event: threading.Event) -> Iterator[None]:
        """Sets an event when a stop is asked for while the block runs."""
        with self._changed:
            self._endings.append(event)
            if self.stop_requested.is_set():
                event.set()
        try:
            yield
        finally:
            with self._changed:
                self._endings.remove(event)

    def server(self, session: str, index: int) -> Address | None:
        """Where a policy server of a session listens, if it does now."""
        with self._changed:
            known = self._directory
            return known.servers.get(index) if known.session == session else None

    def close(self) -> None:
        """Ends the line, for a process that is about to end."""
        self._is_closed = True
        self._connection.close()

    def _listen(self) -> None:
        try:
            while True:
                self._heard(self._connection.receive())
        except ConnectionLostError:
            if self._is_closed:
                return
            self._stop()
            time.sleep(self._grace_s)
            os._exit(1)

    def _heard(self, frame: Frame) -> None:
        if frame.kind == "directory":
            with self._changed:
                self._directory = Directory.from_fields(frame.fields)
                self._changed.notify_all()
        elif frame.kind == "restarts":
            self.on_restarts(frame.fields["restarts"])
        elif frame.kind == "stop":
            self._stop()
        else:
            _LOG.error("the supervisor said %r, which is unknown", frame.kind)

    def _stop(self) -> None:
        with self._changed:
            self.stop_requested.set()
            for event in self._endings:
                event.set()
            self._changed.notify_all()
