"""The screen of a run whose learner is in another process than the one the user looks at."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from jaxvla.telemetry.metrics import Number, Record
from jaxvla.telemetry.progress import RunSummary, Screen, SupervisedSummary
from jaxvla.transport.frames import Frame


class ScreenForwarder:
    """What the learner's process has for a screen. Implements RunScreen.

    Frames that cannot be sent are lost: nobody is there to look.
    """

    def __init__(self, send: Callable[[Frame], None]):
        """Args: sends a frame to the process with the screen; never raises."""
        self._send = send

    def message(self, text: str) -> None:
        """See `Screen.message`."""
        self._show("message", text=text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Screen.phase`."""
        self._show("phase_begins", name=name)
        has_failed = True
        try:
            yield
            has_failed = False
        finally:
            self._show("phase_ends", name=name, has_failed=has_failed)

    def evaluated(self, record: Mapping[str, Number], *, update: int) -> None:
        """See `Screen.evaluated`."""
        self._show("evaluated", record=dict(record), update=update)

    def update(self, record: Record) -> None:
        """See `Screen.update`."""
        self._show("update", record=dict(record))

    def final_summary(self, summary: RunSummary | SupervisedSummary) -> None:
        """See `Screen.final_summary`."""
        self.message("\n".join(summary.lines()))

    def _show(self, kind: str, **fields: object) -> None:
        self._send(Frame(kind=kind, fields=fields, arrays=()))


class _PhaseFailedError(Exception):
    """Leaves the block of a phase that has failed elsewhere."""


class ScreenReceiver:
    """Shows on a screen what `ScreenForwarder` has sent. One phase is in progress at a time."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self._lock = threading.Lock()
        self._phase: contextlib.AbstractContextManager[None] | None = None

    def message(self, text: str) -> None:
        """Shows text of this process."""
        self._screen.message(text)

    def show(self, frame: Frame) -> None:
        """Shows what a frame says; a frame of another kind shows nothing."""
        fields = frame.fields
        with self._lock:
            match frame.kind:
                case "message":
                    self._screen.message(fields["text"])
                case "phase_begins":
                    self._end_phase(has_failed=True)
                    self._phase = self._screen.phase(fields["name"])
                    self._phase.__enter__()
                case "phase_ends":
                    self._end_phase(has_failed=fields["has_failed"])
                case "evaluated":
                    self._screen.evaluated(fields["record"], update=fields["update"])
                case "update":
                    self._screen.update(fields["record"])

    def close(self) -> None:
        """Ends a phase whose end was never told: the process is gone."""
        with self._lock:
            self._end_phase(has_failed=True)

    def _end_phase(self, *, has_failed: bool) -> None:
        phase, self._phase = self._phase, None
        if phase is None:
            return
        if not has_failed:
            phase.__exit__(None, None, None)
            return
        error = _PhaseFailedError()
        with contextlib.suppress(_PhaseFailedError):
            phase.__exit__(_PhaseFailedError, error, None)
