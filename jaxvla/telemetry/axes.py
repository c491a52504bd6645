"""Axes of charts: from values to pixels, with ticks at round values."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    """Values at the two ends; low < high, both positive when logarithmic."""
    start_px: float
    end_px: float
    """Where `low` and `high` are drawn. Pixels grow downwards, so a y axis has start > end."""
    ticks: tuple[float, ...]
    """Ascending, within the ends."""
    is_log: bool = False
    is_percent: bool = False
    """Labels are percentages of 1."""

    def __call__(self, value: float) -> float:
        """Pixel of a value, which may lie beyond the ends."""
        if self.is_log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start_px + part * (self.end_px - self.start_px)

    def can_show(self, value: float) -> bool:
        """Whether a value has a place: finite, and positive when logarithmic."""
        return can_show(value, is_log=self.is_log)

    def labels(self) -> list[str]:
        """Text of each tick."""
        if self.is_percent:
            return [f"{100 * tick:.4g}%" for tick in self.ticks]
        if self.is_log or len(self.ticks) < 2:
            return [short_number(tick) for tick in self.ticks]
        return _linear_labels(self.ticks)


def can_show(value: float, *, is_log: bool) -> bool:
    """Whether a value is finite, and positive if logarithmic; short of where ranges overflow."""
    return abs(value) <= 1e300 and (value > (1e-300 if is_log else -math.inf))


def fit_axis(
    values: Iterable[float],
    *,
    start_px: float,
    end_px: float,
    limits: tuple[float, float] | None = None,
    is_log: bool = False,
    is_snug: bool = False,
    is_percent: bool = False,
    max_ticks: int = 6,
    ticks: Sequence[float] | None = None,
) -> Axis:
    """An axis that shows all values.

    Args:
      values: at least one that `can_show`; the others are ignored.
      start_px, end_px: see `Axis`.
      limits: to be shown at least.
      is_log: logarithmic.
      is_snug: end at the outermost values instead of the next ticks.
      is_percent: see `Axis`.
      max_ticks: at most about as many.
      ticks: at these values instead of round ones, as far as they lie within.

    Raises:
      ValueError: no value to show.
    """
    shown = [float(x) for x in (*values, *(limits or ())) if can_show(x, is_log=is_log)]
    if not shown:
        raise ValueError("an axis needs a value")
    low, high = _spread(min(shown), max(shown), is_log=is_log)
    if not is_log and limits is None and not is_snug and 0 < low <= high / 2:
        low = 0.0  # lengths compare better from zero when little room is lost by it
    found = _log_ticks(low, high, max_ticks) if is_log else round_ticks(low, high, max_ticks)
    if not is_snug:
        low, high = min(low, found[0]), max(high, found[-1])
    chosen = found if ticks is None else sorted(ticks)
    margin = 1e-9 * (high - low)
    inside = tuple(tick for tick in chosen if low - margin <= tick <= high + margin)
    return Axis(
        low=low,
        high=high,
        start_px=start_px,
        end_px=end_px,
        ticks=inside,
        is_log=is_log,
        is_percent=is_percent,
    )


def round_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, the first <= low and the last >= high.

    Args:
      low, high: finite, low < high.
      max_ticks: at least 2; the step is the smallest that needs no more ticks than this between
        low and high.
    """
    exponent = math.floor(math.log10((high - low) / max_ticks))
    for factor, power in ((f, p) for p in range(exponent, exponent + 3) for f in (1, 2, 5)):
        first = math.floor(_over(low, factor, power) + 1e-9)
        last = math.ceil(_over(high, factor, power) - 1e-9)
        if last - first + 1 <= max_ticks + 1:
            return [_times(k * factor, power) for k in range(first, last + 1)]
    raise AssertionError(f"no step for {low}..{high}")


def _times(number: int, power: int) -> float:
    """number * 10^power, correctly rounded: 3 * 10^-1 is 0.3."""
    return float(number * 10**power) if power >= 0 else number / 10**-power


def _over(value: float, factor: int, power: int) -> float:
    """value / (factor * 10^power)."""
    return value / factor / 10.0**power


def _log_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Of 1, 2, 5 per decade, or of every n-th decade; the ends enclose low..high."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    fine = [_times(f, p) for p in range(first, last + 1) for f in (1, 2, 5)]
    coarse = ([_times(1, p) for p in range(first, last + n, n)] for n in itertools.count(1))
    for candidates in itertools.chain([fine], coarse):
        start = max(i for i, tick in enumerate(candidates) if tick <= low * (1 + 1e-9))
        stop = min(i for i, tick in enumerate(candidates) if tick >= high * (1 - 1e-9))
        if stop - start + 1 <= max_ticks + 1:
            return candidates[start : stop + 1]
    raise AssertionError(f"no ticks for {low}..{high}")


def _spread(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    """The range with some width: around a single value, or what floats can tell apart."""
    if is_log:
        return (low, high) if high > low * (1 + 1e-9) else (low / 2, high * 2)
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-300):
        return low, high
    half = abs(low) / 10 if abs(low) > 1e-290 else 0.5
    return low - half, high + half


def _linear_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with the decimals that the step needs, in thousands or millions for large ones."""
    largest, step = max(map(abs, ticks)), ticks[1] - ticks[0]
    if largest < 1e-3 or largest >= 1e10:
        return [short_number(tick) for tick in ticks]
    scale, suffix = _scale(largest)
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    return [f"{tick / scale:.{decimals}f}{suffix if tick else ''}" for tick in ticks]


def _scale(value: float) -> tuple[float, str]:
    """Unit in which a magnitude reads well; thousands from ten thousand on."""
    scales = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    found = (unit for smallest, *unit in scales if value >= smallest)
    scale, suffix = next(found, (1.0, ""))
    return float(scale), str(suffix)


def short_number(value: float) -> str:
    """Four significant digits at most, e.g. "0.25", "812", "12.3k", "2e-05"; "-" if not finite."""
    if not math.isfinite(value):
        return "-"
    scale, suffix = _scale(abs(value))
    return f"{value / scale:.4g}{suffix}"
