"""Two clocks for emulated stages: a real one that runs faster, and one that waits for the host.

A stage asks what time it is and sleeps until it would be done. Emulated seconds are those of
the machine that is emulated.
"""

import contextlib
import heapq
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

_THREADS = "/proc/self/task"


class EmulatedTime(Protocol):
    """A clock, and a way to wait on it. Used as a context while the programs run."""

    def now_s(self) -> float:
        """Emulated seconds."""
        ...

    def sleep_until(self, end_s: float) -> None:
        """Returns at or after the emulated time `end_s`."""
        ...

    def wait(self, condition: threading.Condition, span_s: float | None) -> None:
        """Waits on a condition that the caller holds, as `Condition.wait` with emulated seconds.

        May return early, and for no reason.
        """
        ...

    def __enter__(self) -> "EmulatedTime": ...

    def __exit__(self, *exception: object) -> None: ...


class FastTime(EmulatedTime):
    """The real clock, made faster. What the host does takes `speed` times too long."""

    def __init__(self, speed: float):
        """Args: emulated seconds per second, above 0."""
        if speed <= 0.0:
            raise ValueError(f"speed = {speed}, must be positive")
        self._speed = speed

    def now_s(self) -> float:
        """See EmulatedTime.now_s."""
        return self._speed * time.monotonic()

    def sleep_until(self, end_s: float) -> None:
        """See EmulatedTime.sleep_until."""
        left_s = end_s - self.now_s()
        if left_s > 0.0:
            time.sleep(left_s / self._speed)

    def wait(self, condition: threading.Condition, span_s: float | None) -> None:
        """See EmulatedTime.wait."""
        condition.wait(None if span_s is None else span_s / self._speed)

    def __enter__(self) -> "FastTime":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class IdleTime(EmulatedTime):
    """Time that passes only while no other thread of the process runs. Linux only.

    A thread of its own watches the others in /proc. When none has run between two looks, and
    none can run, nothing will happen before the first sleeper wakes: time jumps there. So what
    the host does takes no time, and the load of the machine has no influence.

    Between the looks the watcher lets go of Python's global lock. A thread that waits for that
    lock thus runs, if only to find it taken again, and is not mistaken for one that sleeps.
    Only what the kernel wakes for other reasons (time-outs, sockets) can be overlooked.
    """

    _PAUSE_S = 1e-4
    """Between two looks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Guards what follows."""
        self._now_s = 0.0
        self._sleepers: list[tuple[float, int, Callable[[], None]]] = []
        """Heap of (wake time, order of arrival, what wakes it)."""
        self._numbers = itertools.count()
        self._has_sleepers = threading.Event()
        self._is_closed = False
        self._watcher = threading.Thread(target=self._watch, name="idle time", daemon=True)

    def now_s(self) -> float:
        """See EmulatedTime.now_s. Starts at 0."""
        with self._lock:
            return self._now_s

    def sleep_until(self, end_s: float) -> None:
        """See EmulatedTime.sleep_until."""
        with self._lock:
            if end_s <= self._now_s:
                return
            woken = threading.Event()
            self._push(end_s, woken.set)
        woken.wait()

    def wait(self, condition: threading.Condition, span_s: float | None) -> None:
        """See EmulatedTime.wait."""

        def notify() -> None:
            with condition:
                condition.notify_all()

        if span_s is not None:
            with self._lock:
                # A span too short to change the time would be waited for again and again.
                self._push(max(self._now_s + span_s, math.nextafter(self._now_s, math.inf)), notify)
        condition.wait()

    def __enter__(self) -> "IdleTime":
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._is_closed = True
            self._has_sleepers.set()
        self._watcher.join()

    def _watch(self) -> None:
        """Moves the time on, until closed."""
        with contextlib.closing(OtherThreads()) as threads:
            self._watch_over(threads)

    def _watch_over(self, threads: "OtherThreads") -> None:
        while True:
            self._has_sleepers.wait()
            if self._is_closed:
                return
            seen = threads.look()
            time.sleep(self._PAUSE_S)
            if seen is not None and seen == threads.look():
                self._advance()

    def _push(self, end_s: float, wake: Callable[[], None]) -> None:
        """Adds a sleeper. Callers hold the lock."""
        heapq.heappush(self._sleepers, (end_s, next(self._numbers), wake))
        self._has_sleepers.set()

    def _advance(self) -> None:
        """Wakes those who sleep until the earliest time."""
        due = []
        with self._lock:
            self._now_s = self._sleepers[0][0]
            while self._sleepers and self._sleepers[0][0] <= self._now_s:
                due.append(heapq.heappop(self._sleepers)[2])
            if not self._sleepers and not self._is_closed:
                self._has_sleepers.clear()
        for wake in due:  # a condition's lock may be held by somebody who asks for the time
            wake()


class OtherThreads:
    """The threads of this process but the calling one, as the kernel sees them."""

    def __init__(self) -> None:
        self._own = str(threading.get_native_id())
        self._files: dict[str, tuple[int, int]] = {}
        """Thread -> descriptors of its stat and schedstat. Opening them takes longest."""

    def look(self) -> dict[str, bytes] | None:
        """How much every thread has run so far; None if one runs or could run right now."""
        seen = {}
        # Those that were started last are the likeliest to run.
        for thread in reversed(os.listdir(_THREADS)):
            if thread == self._own:
                continue
            try:
                state, seen[thread] = self._read(thread)
            except OSError:  # it has just ended
                self._forget(thread)
                return None
            if state != b"S":
                return None
        return seen

    def close(self) -> None:
        """Closes the files."""
        for thread in list(self._files):
            self._forget(thread)

    def _read(self, thread: str) -> tuple[bytes, bytes]:
        """State of a thread, as ps shows it, and its counts of run time and time slices."""
        if thread not in self._files:
            stat = os.open(f"{_THREADS}/{thread}/stat", os.O_RDONLY)
            self._files[thread] = stat, os.open(f"{_THREADS}/{thread}/schedstat", os.O_RDONLY)
        stat, schedstat = self._files[thread]
        text = os.pread(stat, 512, 0)
        # The state follows the name, in parentheses, which may hold anything:
        # https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        return text[text.rindex(b")") + 2 :][:1], os.pread(schedstat, 512, 0)

    def _forget(self, thread: str) -> None:
        for file in self._files.pop(thread, ()):
            os.close(file)
