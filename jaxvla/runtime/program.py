"""Programs and their life cycle.

PENDING -> RUNNING -> STOPPED
                 \\-> FAILED      an exception left one of its threads
"""

import enum
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from jaxvla.telemetry.activity import ActivityMeter


class ProgramState(enum.Enum):
    """Where a program is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"


class Program(Protocol):
    """What the runtime needs of a program."""

    role: str

    def threads(self) -> dict[str, Callable[[], None]]:
        """Thread name -> function that returns when the program is done or stopped."""
        ...

    def stop(self, reason: str) -> None:
        """Makes the functions return soon. May be called more than once."""
        ...

    def close(self) -> None:
        """Frees what the program holds, after its threads have ended."""
        ...


class ProgramThreads:
    """Runs one program in threads and remembers how it ended."""

    def __init__(
        self, program: Program, meter: ActivityMeter, on_end: Callable[["ProgramThreads"], None]
    ):
        """Args: the program, its accounting, and what to call when its last thread has ended
        or any thread has failed."""
        self.program = program
        self.state = ProgramState.PENDING
        self.error: BaseException | None = None
        """First exception that left a thread."""
        self._meter = meter
        self._on_end = on_end
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_running = 0

    def start(self) -> None:
        """Starts all threads."""
        functions = self.program.threads()
        self.state = ProgramState.RUNNING
        self._num_running = len(functions)
        for name, function in functions.items():
            # Daemons: a thread that hangs must not keep the process from exiting.
            thread = threading.Thread(
                target=self._run,
                args=(name, function),
                name=f"{self.program.role}/{name}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)

    def join(self, timeout_s: float) -> bool:
        """Waits for all threads; False when one is still running after the time-out."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, name: str, function: Callable[[], None]) -> None:
        try:
            with self._meter.thread(name):
                function()
        except BaseException as error:
            logging.getLogger(f"jaxvla.{self.program.role}").exception("thread %s failed", name)
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self._num_running -= 1
            if error is not None and self.error is None:
                self.error = error
                self.state = ProgramState.FAILED
            is_over = self._num_running == 0
            if is_over and self.error is None:
                self.state = ProgramState.STOPPED
        if is_over or error is not None:
            self._on_end(self)
