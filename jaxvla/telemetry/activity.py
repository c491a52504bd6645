"""Who works and who waits: every moment of a program's threads, accounted for once.

A thread is busy with something named, waits for a reason, or does neither of these
explicitly, which counts as busy with "other". Nested blocks give the time to the
innermost. Hence, over any window in which a thread lived,
busy_fraction + sum of waiting_on/*_fraction = 1.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxvla.telemetry.metrics import Record
from jaxvla.telemetry.tracing import Tracer

OTHER = "other"
"""What a thread is busy with outside every block."""

_State = tuple[str, str]
"""("busy", what) or ("waiting", reason)."""

_Seconds = dict[_State, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Time of a program's threads over a window, added up over the threads."""

    busy_s: dict[str, float]
    """Seconds by what the threads were busy with."""
    waiting_s: dict[str, float]
    """Seconds by the reason of waiting."""

    @property
    def thread_s(self) -> float:
        """Seconds that the threads lived inside the window."""
        return sum(self.busy_s.values()) + sum(self.waiting_s.values())

    @property
    def busy_fraction(self) -> float:
        """Share of `thread_s` in [0, 1]; NaN when no thread lived in the window."""
        return sum(self.busy_s.values()) / (self.thread_s or math.nan)

    @property
    def waiting_fractions(self) -> dict[str, float]:
        """Share of `thread_s` by reason, largest first."""
        whole_s = self.thread_s or math.nan
        shares = {reason: s / whole_s for reason, s in self.waiting_s.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def record(self, role: str) -> Record:
        """The contract's `utilisation/ROLE/*` values."""
        prefix = f"utilisation/{role}"
        waiting = self.waiting_fractions.items()
        return {f"{prefix}/busy_fraction": self.busy_fraction} | {
            f"{prefix}/waiting_on/{reason}_fraction": share for reason, share in waiting
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivitySnapshot:
    """A meter's reading."""

    window: Activity
    """Since the previous snapshot."""
    total: Activity
    """Since the meter was made."""


class _Ledger:
    """Time of one thread by state. Callers hold the meter's lock."""

    def __init__(self, now_s: float, seconds: _Seconds):
        self.states: list[_State] = [("busy", OTHER)]
        self._since_s = now_s
        self._seconds = seconds

    def settle(self, now_s: float) -> None:
        """Books the time up to now under the innermost state."""
        state = self.states[-1]
        self._seconds[state] = self._seconds.get(state, 0.0) + (now_s - self._since_s)
        self._since_s = now_s


class ActivityMeter:
    """Busy / wait accounting of one program; several threads of it add up.

    Blocks also become spans of the tracer: a busy block under its own name, a waiting one
    as "wait" with the reason as argument `on`.

    Args:
      role: of the program.
      tracer: whose clock counts.
      processor_clock: processor seconds of the whole process, such as `time.process_time`. If
        given, busy spans say as `cpu_s` how many passed: those of the block itself where
        nothing else of the process runs meanwhile.
    """

    def __init__(
        self, role: str, *, tracer: Tracer, processor_clock: Callable[[], float] | None = None
    ):
        self.role = role
        self._tracer = tracer
        self._processor_clock = processor_clock
        self._lock = threading.Lock()
        self._local = threading.local()
        self._ledgers: set[_Ledger] = set()
        self._seconds: _Seconds = {}
        self._reported: _Seconds = {}

    @contextlib.contextmanager
    def thread(self, name: str) -> Iterator[None]:
        """Accounts for the calling thread, named `name`, while the block runs.

        Raises:
          RuntimeError: the thread is accounted for already.
        """
        if getattr(self._local, "ledger", None) is not None:
            raise RuntimeError(f"{self.role}: the thread is accounted for already")
        self._tracer.name_thread(self.role, name)
        with self._lock:
            ledger = _Ledger(self._tracer.clock(), self._seconds)
            self._ledgers.add(ledger)
        self._local.ledger = ledger
        try:
            yield
        finally:
            self._local.ledger = None
            with self._lock:
                ledger.settle(self._tracer.clock())
                self._ledgers.remove(ledger)

    def busy(self, what: str, **args: Any) -> contextlib.AbstractContextManager[None]:
        """The block is work, e.g. "simulate"; `args` are shown with its span. To be used inside
        `thread`."""
        return self._block(("busy", what), args)

    def waiting(self, reason: str) -> contextlib.AbstractContextManager[None]:
        """The block waits for `reason`, e.g. "inference". To be used inside `thread`."""
        return self._block(("waiting", reason), {})

    def snapshot(self) -> ActivitySnapshot:
        """Activity up to now, blocks in progress included. May be called by any thread."""
        with self._lock:
            now_s = self._tracer.clock()
            for ledger in self._ledgers:
                ledger.settle(now_s)
            total = dict(self._seconds)
            window = {state: s - self._reported.get(state, 0.0) for state, s in total.items()}
            self._reported = total
        return ActivitySnapshot(window=_activity(window), total=_activity(total))

    def absorb(self, activity: Activity) -> None:
        """Adds time of threads of another process, as if they had lived here."""
        with self._lock:
            for kind, seconds in (("busy", activity.busy_s), ("waiting", activity.waiting_s)):
                for name, spent_s in seconds.items():
                    state = kind, name
                    self._seconds[state] = self._seconds.get(state, 0.0) + spent_s

    @contextlib.contextmanager
    def _block(self, state: _State, args: dict[str, Any]) -> Iterator[None]:
        ledger = getattr(self._local, "ledger", None)
        if ledger is None:
            raise RuntimeError(f"{self.role}: {state} outside of ActivityMeter.thread")
        kind, name = state
        clock = self._processor_clock if kind == "busy" else None
        start_cpu_s = clock() if clock else 0.0
        start_s = self._switch(ledger, enter=state)
        try:
            yield
        finally:
            end_s = self._switch(ledger, enter=None)
            if clock:
                args = args | {"cpu_s": round(clock() - start_cpu_s, 6)}
            if kind == "busy":
                self._tracer.add(name, start_s, end_s, **args)
            else:
                self._tracer.add("wait", start_s, end_s, on=name)

    def _switch(self, ledger: _Ledger, *, enter: _State | None) -> float:
        """Enters a state or leaves the innermost one; returns the time of the change."""
        with self._lock:
            # Read under the lock: a snapshot taken meanwhile may not run ahead of it.
            now_s = self._tracer.clock()
            ledger.settle(now_s)
            if enter is None:
                ledger.states.pop()
            else:
                ledger.states.append(enter)
        return now_s


def _activity(seconds: _Seconds) -> Activity:
    """Splits booked seconds into busy and waiting."""
    return Activity(
        busy_s={name: s for (kind, name), s in seconds.items() if kind == "busy"},
        waiting_s={name: s for (kind, name), s in seconds.items() if kind == "waiting"},
    )
