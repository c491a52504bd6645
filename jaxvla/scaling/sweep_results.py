"""What a sweep found, in numbers and in sentences. No jax."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvla.layout import ROLES, parse_layout
from jaxvla.scaling.sweep_plan import Trial
from jaxvla.scaling.trial_run import Measurement
from jaxvla.telemetry.progress import format_rate

THROUGHPUT = "env_steps_per_s"
"""What trials are ranked by."""
ENOUGH_REPEATS = 3
"""With 3 repeats each, all of one trial are faster than all of an equal one with a chance of 1 in
20, and either is so with 1 in 10; with 2 repeats 1 in 6 (ranks of exchangeable values:
1 / binomial(2n, n))."""


@dataclass(kw_only=True, slots=True)
class TrialResult:
    """A trial and its runs."""

    layout: str
    overrides: dict[str, str]
    num_updates: int
    samples_per_update: int
    repeats: list[Measurement] = field(default_factory=list)
    """One per run that gave numbers, in order."""
    failed: str | None = None
    """Why its last run gave none; it is not run again."""

    @classmethod
    def of(cls, trial: Trial) -> "TrialResult":
        """Of a trial that has not been run."""
        return cls(
            layout=trial.layout.text,
            overrides=trial.overrides,
            num_updates=trial.num_updates,
            samples_per_update=trial.samples_per_update,
        )

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "TrialResult":
        """From an entry of sweep.json."""
        return cls(
            layout=record["layout"],
            overrides=dict(record["overrides"]),
            num_updates=record["num_updates"],
            samples_per_update=record["samples_per_update"],
            repeats=[
                {name: math.nan if x is None else x for name, x in repeat.items()}
                for repeat in record["repeats"]
            ],
            failed=record["failed"],
        )

    def record(self) -> dict[str, Any]:
        """Entry of sweep.json."""
        names = list(dict.fromkeys(name for repeat in self.repeats for name in repeat))
        return {
            "layout": self.layout,
            "placement": parse_layout(self.layout).placement,
            "num_devices": self.num_devices,
            "overrides": self.overrides,
            "num_updates": self.num_updates,
            "samples_per_update": self.samples_per_update,
            "directory": self.directory,
            "failed": self.failed,
            "median": {name: self.median(name) for name in names},
            "spread": {name: self.spread(name) for name in names},
            "repeats": self.repeats,
        }

    @property
    def title(self) -> str:
        """See `Trial.title`."""
        return " ".join([self.layout, *(f"{k}={v}" for k, v in self.overrides.items())])

    @property
    def directory(self) -> str:
        """Of its runs, in the work directory of the sweep."""
        return f"trials/{zlib.crc32(self.title.encode()):08x}"

    @property
    def num_devices(self) -> int:
        """Devices of the layout."""
        return parse_layout(self.layout).num_devices

    def values(self, name: str) -> list[float]:
        """Of all runs; a reason of waiting that a run did not have is 0 there."""
        missing = 0.0 if "/waiting_on/" in name else math.nan
        return [repeat.get(name, missing) for repeat in self.repeats]

    def median(self, name: str) -> float:
        """Over the runs; NaN without any."""
        return float(np.median(self.values(name))) if self.repeats else math.nan

    def spread(self, name: str) -> tuple[float, float]:
        """Smallest and largest of the runs; NaN without any."""
        values = self.values(name) or [math.nan]
        return min(values), max(values)


def rank(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Trials with numbers, the highest median throughput first."""
    counted = [x for x in results if x.failed is None and math.isfinite(x.median(THROUGHPUT))]
    return sorted(counted, key=lambda x: -x.median(THROUGHPUT))


def is_faster(one: TrialResult, other: TrialResult) -> bool:
    """Whether the runs tell that `one` is faster: all of its runs are, and there are enough."""
    count = min(len(one.repeats), len(other.repeats))
    return count >= ENOUGH_REPEATS and one.spread(THROUGHPUT)[0] > other.spread(THROUGHPUT)[1]


def speed_text(result: TrialResult) -> str:
    """Median throughput with its spread, e.g. "812 [790, 830] env steps/s"."""
    low, high = (format_rate(x) for x in result.spread(THROUGHPUT))
    return f"{format_rate(result.median(THROUGHPUT))} [{low}, {high}] env steps/s"


def busiest_role(result: TrialResult) -> tuple[str, float]:
    """The role with the largest busy fraction, and that fraction in [0, 1]."""
    busy = {role: result.median(f"utilisation/{role}/busy_fraction") for role in ROLES}
    known = {role: x for role, x in busy.items() if math.isfinite(x)} or {ROLES[0]: math.nan}
    best = max(known, key=lambda role: known[role])
    return best, known[best]


def waits(result: TrialResult, role: str) -> dict[str, float]:
    """Reason -> fraction of time in [0, 1] that a role waits for it, largest first."""
    start, end = f"utilisation/{role}/waiting_on/", "_fraction"
    names = {name for repeat in result.repeats for name in repeat if name.startswith(start)}
    found = {x.removeprefix(start).removesuffix(end): result.median(x) for x in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def limit_text(result: TrialResult) -> str:
    """What limits a trial: its busiest role, and whom the others wait for."""
    role, busy = busiest_role(result)
    if not math.isfinite(busy):
        return "nothing is known of what its roles did"
    shared = [
        other
        for other in ROLES
        if other != role
        and set(parse_layout(result.layout).roles[other].devices)
        & set(parse_layout(result.layout).roles[role].devices)
    ]
    text = f"{role} limits it, {busy:.0%} busy"
    if shared:
        text += f" on devices that it shares with {' and '.join(shared)}"
    for other in ROLES:
        reasons = [(x, share) for x, share in waits(result, other).items() if share >= 0.005][:1]
        text += "".join(f"; {other} waits {share:.0%} for {x}" for x, share in reasons)
    return text


def conclusions(results: Sequence[TrialResult]) -> list[str]:
    """Sentences: who wins, by how much over the next, and what limits it; per number of devices
    where there are several, then over all."""
    lines = []
    counts = sorted({x.num_devices for x in results})
    for count in counts if len(counts) > 1 else ():
        lines += _winner_lines(
            rank([x for x in results if x.num_devices == count]), f"Of {count} devices, "
        )
    lines += _winner_lines(rank(results), "Of all trials, ")
    failed = [x for x in results if x.failed is not None]
    lines += [f"{x.title} failed: {x.failed}." for x in failed]
    return lines


def _winner_lines(ranked: Sequence[TrialResult], start: str) -> list[str]:
    if not ranked:
        return [f"{start}none gave numbers."]
    best = ranked[0]
    lines = [f"{start}{best.title} is fastest: {speed_text(best)}."]
    if len(ranked) > 1:
        lines.append(_margin(best, ranked))
    return [*lines, f"{best.title}: {limit_text(best)}."]


def _margin(best: TrialResult, ranked: Sequence[TrialResult]) -> str:
    """How far the next one is behind, or which ones cannot be told from the best."""
    behind = next((x for x in ranked[1:] if is_faster(best, x)), None)
    tied = list(ranked[1 : ranked.index(behind)] if behind else ranked[1:])
    text = ""
    if tied:
        repeats = min(len(x.repeats) for x in (best, *tied))
        why = f"{repeats} of the {ENOUGH_REPEATS} repeats that telling takes"
        why = why if repeats < ENOUGH_REPEATS else "their repeats overlap"
        names = " and ".join(x.title for x in tied) if len(tied) < 4 else f"{len(tied)} others"
        text = f"It is not distinguishable from {names} ({why})"
    if behind is None:
        return f"{text}."
    ratio = best.median(THROUGHPUT) / behind.median(THROUGHPUT) - 1
    slowest = best.spread(THROUGHPUT)[0] / behind.spread(THROUGHPUT)[1] - 1
    fact = f"{ratio:.0%} faster than {behind.title}, {slowest:.0%} in the closest pair of runs"
    return f"{text}; it is {fact}." if tied else f"It is {fact}."
