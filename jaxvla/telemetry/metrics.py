"""Assembly of metric records: one flat dict of numbers per learner update.

Programs add values under contract names (`role/subject/name_unit`) together with the
reduction that turns the values of one window, the time between two records, into a
number. A window without values gives NaN for the reductions that need one. In a record
NaN and infinity stay floats; written as JSON they become null, which therefore reads
"no value, or not a finite one".
"""

import abc
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxvla.registry import nearest

Number = int | float
Record = dict[str, Number]
"""Contract name -> value."""

PREFIXES = (
    "eval",
    "faults",
    "learner",
    "queue",
    "rate",
    "serving",
    "train",
    "utilisation",
    "weights",
)
"""First segment of every name but `update` and `time_s`."""

# Names are lower snake case; only a task, below success_rate, brings its own spelling.
_NAME = re.compile(
    rf"(?:{'|'.join(PREFIXES)})(?:/[a-z][a-z0-9_]*)+(?:(?<=/success_rate)/[A-Za-z0-9_.\-]+)?"
)


def check_name(name: str) -> str:
    """Returns `name` when it follows the contract's grammar.

    Raises:
      ValueError: the first segment is no known prefix or a segment is not lower snake case.
    """
    if name in ("update", "time_s") or _NAME.fullmatch(name):
        return name
    prefix = name.partition("/")[0]
    if prefix not in PREFIXES:
        hint = nearest(prefix, list(PREFIXES))
        raise ValueError(f"metric {name!r} starts with none of {', '.join(PREFIXES)}{hint}")
    raise ValueError(f"metric {name!r} is not PREFIX/lower_snake[/lower_snake...]")


class Reduction(abc.ABC):
    """Turns the values of a window into numbers."""

    @abc.abstractmethod
    def add(self, values: np.ndarray) -> None:
        """Takes values, int64 or float64 [n], n >= 1."""

    @abc.abstractmethod
    def take(self, elapsed_s: float) -> dict[str, Number]:
        """Ends a window of `elapsed_s` seconds: name suffix -> number ("" for the name itself)."""


class _Single(Reduction):
    """A reduction with one number, which is NaN in a window without values."""

    def __init__(self) -> None:
        self._value: Number = math.nan
        self._count = 0

    def take(self, elapsed_s: float) -> dict[str, Number]:
        del elapsed_s
        value, self._value, self._count = self._value, math.nan, 0
        return {"": value}


class Mean(_Single):
    """Arithmetic mean of the window's values."""

    def add(self, values: np.ndarray) -> None:
        total = (self._value * self._count if self._count else 0.0) + float(values.sum())
        self._count += values.size
        self._value = total / self._count


class Max(_Single):
    """Largest of the window's values; NaN if one of them is NaN."""

    def add(self, values: np.ndarray) -> None:
        values = np.append(values, self._value) if self._count else values
        self._count += 1
        self._value = values.max().item()


class Min(_Single):
    """Smallest of the window's values; NaN if one of them is NaN."""

    def add(self, values: np.ndarray) -> None:
        values = np.append(values, self._value) if self._count else values
        self._count += 1
        self._value = values.min().item()


class Last(_Single):
    """Newest value; kept over windows without one. For states such as a queue's depth."""

    def add(self, values: np.ndarray) -> None:
        self._value = values[-1].item()

    def take(self, elapsed_s: float) -> dict[str, Number]:
        del elapsed_s
        return {"": self._value}


class Sum(Reduction):
    """Sum of the window's values; 0 without any."""

    def __init__(self) -> None:
        self._value: Number = 0

    def add(self, values: np.ndarray) -> None:
        self._value += values.sum().item()

    def take(self, elapsed_s: float) -> dict[str, Number]:
        del elapsed_s
        value, self._value = self._value, 0
        return {"": value}


class Total(Sum):
    """Sum of all values since the run began. For counters such as faults."""

    def take(self, elapsed_s: float) -> dict[str, Number]:
        del elapsed_s
        return {"": self._value}


class Rate(Sum):
    """Sum of the window's values per second of wall time."""

    def take(self, elapsed_s: float) -> dict[str, Number]:
        total = super().take(elapsed_s)[""]
        return {"": total / elapsed_s if elapsed_s > 0 else math.nan}


class Distribution(Reduction):
    """Extremes, mean and percentiles of the window's values, each under its own suffix.

    Minimum, mean and maximum are exact. Percentiles are exact up to `CAPACITY` values a
    window and beyond that come from a uniform sample of that many (Vitter 1985, algorithm
    R, https://doi.org/10.1145/3147.3165).
    """

    CAPACITY = 4096
    PERCENTILES = (50, 95, 99)

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._exact = {"/min": Min(), "/mean": Mean(), "/max": Max()}
        self._sample: list[Number] = []
        self._seen = 0

    def add(self, values: np.ndarray) -> None:
        for reduction in self._exact.values():
            reduction.add(values)
        for value in values.tolist():
            self._seen += 1
            if len(self._sample) < self.CAPACITY:
                self._sample.append(value)
            elif (index := self._random.randrange(self._seen)) < self.CAPACITY:
                self._sample[index] = value

    def take(self, elapsed_s: float) -> dict[str, Number]:
        exact = {key: value.take(elapsed_s)[""] for key, value in self._exact.items()}
        sample, self._sample, self._seen = self._sample or [math.nan], [], 0
        quantiles = np.percentile(np.asarray(sample, np.float64), self.PERCENTILES)
        names = (f"/p{percent}" for percent in self.PERCENTILES)
        return exact | dict(zip(names, quantiles.tolist(), strict=True))


REDUCTIONS: Mapping[str, type[Reduction]] = {
    kind.__name__: kind for kind in (Mean, Max, Min, Last, Sum, Total, Rate, Distribution)
}
"""By name."""


class Recorder(Protocol):
    """Where a program's values go, be it to the records themselves or on a way there."""

    def add(self, name: str, value: Any, reduction: type[Reduction]) -> None:
        """See `MetricRecorder.add`."""
        ...


class MetricRecorder(Recorder):
    """Gathers the values of all programs into records. Every method may be called by any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._reductions: dict[str, Reduction] = {}
        self._window_start_s = clock()

    def add(self, name: str, value: Any, reduction: type[Reduction]) -> None:
        """Adds a number, or every element of an array, to the current window.

        Args:
          name: contract name.
          value: number or array of numbers of any shape; an empty one only declares the name.
          reduction: how values under this name become a number; the same one in every call.

        Raises:
          ValueError: `name` breaks the contract, or has another reduction already.
        """
        values = flat(value)
        with self._lock:
            held = self._reduction(name, reduction)
            if values.size:
                held.add(values)

    def totals(self) -> Record:
        """Values of every `Total`, to be saved in a checkpoint."""
        with self._lock:
            held = self._reductions.items()
            return {name: r.take(0.0)[""] for name, r in held if isinstance(r, Total)}

    def restore(self, totals: Mapping[str, Number]) -> None:
        """Continues the counters of an earlier run from its `totals()`.

        Raises:
          ValueError: a counter was added to before.
        """
        with self._lock:
            for name, value in totals.items():
                if name in self._reductions:
                    raise ValueError(f"metric {name!r} was counted before it was restored")
                self._reduction(name, Total).add(flat(value))

    def flush(self, *, update: int, time_s: float, extra: Mapping[str, Number]) -> Record:
        """Ends the window and returns its record.

        Args:
          update: learner update, i.e. version published.
          time_s: seconds since the run began, earlier runs of the work directory included.
          extra: finished values that belong to this record only, such as an evaluation.

        Returns:
          `update` and `time_s`, then every name ever added and those of `extra`, sorted.

        Raises:
          ValueError: a name of `extra` breaks the contract or is added to as well.
        """
        values: Record = {}
        with self._lock:
            now_s = self._clock()
            elapsed_s, self._window_start_s = now_s - self._window_start_s, now_s
            for name, reduction in self._reductions.items():
                taken = reduction.take(elapsed_s)
                values.update({name + suffix: number for suffix, number in taken.items()})
        for name, value in extra.items():
            if check_name(name) in values:
                raise ValueError(f"metric {name!r} is both accumulated and given as extra")
            values[name] = value
        return {"update": update, "time_s": time_s} | dict(sorted(values.items()))

    def _reduction(self, name: str, kind: type[Reduction]) -> Reduction:
        """The reduction held under `name`, made on first use. The lock is held."""
        held = self._reductions.get(name)
        if held is None:
            held = self._reductions[check_name(name)] = kind()
        if type(held) is not kind:
            raise ValueError(f"metric {name!r} is a {type(held).__name__}, not a {kind.__name__}")
        return held


def flat(value: Any) -> np.ndarray:
    """`value` as int64 [n] when integer or boolean, else as float64 [n]."""
    values = np.ravel(np.asarray(value))
    return values.astype(np.int64 if values.dtype.kind in "biu" else np.float64)
