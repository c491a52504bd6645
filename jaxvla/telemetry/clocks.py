"""The learner's clock as another process sees it: readings asked for and answered.

Monotonic clocks of two machines differ by any amount and run apart slowly. A reading of the other
clock lies between our asking and its answer, so it tells the offset to half of the time between
(RFC 5905, section 8, with T2 = T3). The answer that came back fastest tells it best; while it ages
it may have drifted by more than a slower new one is wrong by, which then takes its place.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_DRIFT = 1e-4
"""Seconds per second by which two clocks run apart: each is right to 50 ppm, as quartz is."""
_MOST_WAITING = 64
"""Readings that were asked for and not answered."""


def clock_offset_s(asked_s: float, remote_s: float, answered_s: float) -> float:
    """What to add to readings of this process's clock to get the other one's.

    Half way between our two readings is the best guess for when the other one was taken, and
    wrong by half of the time between at most. If the other reading lies between ours the offset
    counts as none: processes of one host share CLOCK_MONOTONIC.

    Args:
      asked_s: our clock when we asked.
      remote_s: the other clock's reading.
      answered_s: our clock when the answer was there.
    """
    if asked_s <= remote_s <= answered_s:
        return 0.0
    return remote_s - (asked_s + answered_s) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Best:
    """The answer that tells most."""

    offset_s: float
    error_s: float
    """Most that it was wrong by, drift aside."""
    asked_s: float
    """When."""


class RemoteClock:
    """Estimates the offset to another process's clock. Thread-safe."""

    def __init__(
        self, ask: Callable[[float], None], *, clock: Callable[[], float] = time.monotonic
    ):
        """Args:
        ask: sends a reading of `clock`, with which the answer is to come back. May raise.
        clock: seconds; our own.
        """
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[float, None] = {}
        """Readings without an answer, oldest first."""
        self._best: _Best | None = None

    def ask(self) -> None:
        """Asks for one more reading; raises what `ask` of the constructor raises."""
        asked_s = self._clock()
        with self._lock:
            self._waiting[asked_s] = None
            if len(self._waiting) > _MOST_WAITING:
                del self._waiting[next(iter(self._waiting))]
        self._ask(asked_s)

    def answered(self, asked_s: float, remote_s: float) -> None:
        """Takes an answer; one that nobody waits for any more tells nothing.

        Args:
          asked_s: what it was asked for with.
          remote_s: the other clock's reading, finite.
        """
        answered_s = self._clock()
        with self._lock:
            if asked_s not in self._waiting:
                return
            del self._waiting[asked_s]
            offset_s = clock_offset_s(asked_s, remote_s, answered_s)
            # The true offset lies between the two differences.
            error_s = max(remote_s - asked_s - offset_s, offset_s - (remote_s - answered_s))
            new = _Best(offset_s=offset_s, error_s=error_s, asked_s=asked_s)
            if self._best is None or self._error_s(new, answered_s) <= self._error_s(
                self._best, answered_s
            ):
                self._best = new

    @property
    def offset_s(self) -> float | None:
        """What to add to our clock's readings to get the other one's; None while unknown."""
        with self._lock:
            return self._best.offset_s if self._best else None

    @property
    def error_s(self) -> float:
        """Most that `offset_s` is wrong by now: half of the best round trip, and its drift since
        (`MAX_DRIFT`). The whole round trip where the offset counts as none."""
        with self._lock:
            return self._error_s(self._best, self._clock()) if self._best else math.inf

    @staticmethod
    def _error_s(best: _Best, now_s: float) -> float:
        return best.error_s + MAX_DRIFT * (now_s - best.asked_s)
