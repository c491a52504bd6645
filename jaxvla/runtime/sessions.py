"""A program of a process that lives in sessions: it runs until the learner is lost."""

import logging
import threading
from collections.abc import Callable, Iterator

from jaxvla.runtime.control import Control
from jaxvla.runtime.directory import Directory
from jaxvla.runtime.local import ProgramFailedError
from jaxvla.runtime.program import Program, ProgramThreads
from jaxvla.telemetry.activity import ActivityMeter

_LOG = logging.getLogger("jaxvla.runtime")

_PAUSE_S = 0.5
"""Before a learner that was lost is looked for again."""


class Session:
    """One start of the learner, as another process sees it."""

    def __init__(self, directory: Directory):
        """Args: a directory with a learner."""
        self.name = directory.session
        assert directory.learner is not None, "a session has a learner"
        self.learner = directory.learner
        self.given_up = directory.given_up
        self.is_over = threading.Event()
        """The learner was lost, the program has ended, or a stop was asked for."""
        self.is_finished = False
        """The program has ended by itself while the learner was there: so has the run."""
        self._is_lost = False

    def lose(self) -> None:
        """The connection to the learner is gone."""
        self._is_lost = True
        self.is_over.set()

    def run(
        self,
        program: Program,
        meter: ActivityMeter,
        *,
        close: Callable[[], None],
        grace_s: float,
    ) -> None:
        """Runs a program until the session is over.

        Args:
          program: closed when this returns.
          meter: its accounting.
          close: makes the program's threads return; called once.
          grace_s: seconds that they get for it.

        Raises:
          ProgramFailedError: the program failed, and not because the learner was lost.
        """
        threads = ProgramThreads(program, meter, lambda _: self.is_over.set())
        threads.start()
        self.is_over.wait()
        # What fails from now on fails for want of the learner.
        error, self.is_finished = threads.error, not self._is_lost
        close()
        if not threads.join(grace_s):
            _LOG.error("%s did not stop within %.0f s", program.role, grace_s)
        program.close()
        if error is not None:
            raise ProgramFailedError(program.role, error) from error


def sessions(control: Control) -> Iterator[Session]:
    """One after the other, until a stop is asked for.

    One that was lost is begun again while its learner is there: it may have been the network.
    """
    finished = ""
    while True:
        directory = control.wait_for(
            lambda known, finished=finished: known.learner is not None and known.session != finished
        )
        if directory is None:
            return
        session = Session(directory)
        with control.ending(session.is_over):
            yield session
        if session.is_finished:
            finished = session.name
        else:
            control.stop_requested.wait(_PAUSE_S)
