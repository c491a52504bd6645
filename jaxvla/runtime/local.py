"""The local runtime: all programs as threads of this process.

waits for   the learner to finish, any program to fail, or a request to stop
unblocked by  the programs' threads, signals
"""

import logging
import threading
import time
from collections.abc import Sequence

from jaxvla.runtime.program import Program, ProgramState, ProgramThreads
from jaxvla.telemetry.activity import ActivityMeter

_LOG = logging.getLogger(__name__)


class ProgramFailedError(RuntimeError):
    """A program failed; `__cause__` is its exception."""

    def __init__(self, role: str, cause: BaseException):
        super().__init__(f"{role}: {type(cause).__name__}: {cause}")
        self.role = role


class LocalRuntime:
    """Starts programs, waits, and stops them all when the first one ends or fails."""

    def __init__(self, stop_requested: threading.Event):
        """Args: an event that, once set, makes `run` stop everything and return."""
        self._stop_requested = stop_requested
        self._changed = threading.Condition()
        self._failed: ProgramThreads | None = None
        """The program that failed first: others may then fail for want of it."""

    def run(
        self,
        programs: Sequence[Program],
        meters: dict[str, ActivityMeter],
        main: Program,
        grace_s: float,
    ) -> bool:
        """Runs programs until `main` has ended.

        Args:
          programs: started in this order, stopped in reverse.
          meters: role -> accounting.
          main: the program whose end is the end of the run.
          grace_s: seconds that threads get to end once told to stop.

        Returns:
          Whether `main` has ended. Otherwise it is still at work on what it holds.

        Raises:
          ProgramFailedError: one failed, or could not be started; all others were stopped.
        """
        running = [ProgramThreads(x, meters[x.role], self._notify) for x in programs]
        main_threads = next(x for x in running if x.program is main)
        if all(self._start(threads) for threads in running):
            self._wait(main_threads)
        # Programs that were never started are stopped too: others may wait for what that closes.
        reason = self._reason()
        for threads in reversed(running):
            threads.program.stop(reason)
        deadline_s = time.monotonic() + grace_s
        for threads in reversed(running):
            if not threads.join(max(0.0, deadline_s - time.monotonic())):
                _LOG.error("%s did not stop within %.0f s", threads.program.role, grace_s)
        failed = self._failed
        if failed is not None and failed.error is not None:
            raise ProgramFailedError(failed.program.role, failed.error) from failed.error
        return main_threads.state is ProgramState.STOPPED

    def _start(self, threads: ProgramThreads) -> bool:
        """False when the program cannot be started, whatever it raises; it has failed then."""
        try:
            threads.start()
        except Exception as error:
            _LOG.exception("%s could not be started", threads.program.role)
            threads.error, threads.state = error, ProgramState.FAILED
            self._notify(threads)
            return False
        return True

    def _notify(self, ended: ProgramThreads | None) -> None:
        with self._changed:
            if self._failed is None and ended is not None and ended.error is not None:
                self._failed = ended
            self._changed.notify_all()

    def _wait(self, main: ProgramThreads) -> None:
        """Returns when main has ended, a program has failed, or a stop was asked for."""

        def is_over() -> bool:
            has_ended = main.state is ProgramState.STOPPED
            return has_ended or self._failed is not None or self._stop_requested.is_set()

        with self._changed:
            # The signal handler cannot take the lock, so a stop is also looked for regularly.
            while not is_over():
                self._changed.wait(timeout=0.2)

    def _reason(self) -> str:
        if self._failed is not None:
            return "failure"
        return "shutdown" if self._stop_requested.is_set() else "finished"
