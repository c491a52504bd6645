"""What must hold after a soak, and its tables. See `soak.py`."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from run_watch import SUPERVISOR, Memory

_NUM_FILES_MORE = 4
"""Of the supervisor, for connections that just begin or end."""
WARM_SHARE = 0.3
"""Of a process's life, in which its memory may grow."""
_LONG_S = 240.0
"""Life of a process whose memory is judged."""

Record = Mapping[str, Any]


@dataclass(kw_only=True)
class Kill:
    """One process, and how the run got over it."""

    name: str
    signal: str
    at_s: float
    """Since the first update."""
    update: int
    """Newest one before."""
    next_update_s: float = math.nan
    recovered_s: float = math.nan
    updates_lost: int = 0
    tickets_lost: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that must hold in the end."""

    what: str
    holds: bool
    found: str


def record_checks(records: list[Record], summary: Record) -> list[Check]:
    """Of metrics.jsonl and summary.json."""
    updates = [record["update"] for record in records]
    open_at = [x["update"] for x in records if not _is_closed(x)]
    excess = [x["queue/staleness/max"] - x["queue/staleness/bound"] for x in records]
    staleness = [x["queue/staleness/max"] for x in records]
    losses = [v for x in records for name, v in x.items() if name.startswith("learner/loss/")]
    num_bad = sum(value is None for value in losses)  # so they are written that are not finite
    return [
        Check(
            what="every update has one record",
            holds=updates == list(range(1, len(updates) + 1)) and bool(updates),
            found=f"{len(updates)} up to {max(updates, default=0)}",
        ),
        Check(
            what="ledger closes in every record, and in the end",
            holds=not open_at and summary["ledger_closes"],
            found=f"open in {open_at[:5]}" if open_at else f"{summary['ledger_closes']}",
        ),
        Check(
            what="staleness is within the bound",
            holds=max(excess, default=1) <= 0
            and summary["max_staleness"] <= summary["staleness_bound"],
            found=f"{max(staleness, default=0)} of {summary['staleness_bound']}",
        ),
        Check(
            what="losses are finite",
            holds=bool(losses) and not num_bad,
            found=f"{num_bad} of {len(losses)} are not",
        ),
    ]


def files_check(num_files: list[int]) -> Check:
    """Of the supervisor's open files, counted whenever all processes were there."""
    first, last = (min(part, default=0) for part in (num_files[:3], num_files[-3:]))
    holds = last <= first + _NUM_FILES_MORE
    return Check(what="supervisor keeps no files open", holds=holds, found=f"{first} -> {last}")


def memory_checks(memory: list[Memory], max_growth: float) -> list[Check]:
    """Of the supervisor, and of all other processes that lived long enough to tell.

    Args:
      memory: of all processes.
      max_growth: of each, MiB a minute.
    """
    found: list[Check] = []
    for part, is_part in (
        ("supervisor", lambda name: name == SUPERVISOR),
        ("long-lived processes", lambda name: name != SUPERVISOR),
    ):
        long = [x for x in memory if is_part(x.name) and x.span_s >= _LONG_S]
        slopes = {x.name: x.slope_mib_per_min(WARM_SHARE) for x in long}
        text = ", ".join(f"{name} {slope:+.2f}" for name, slope in slopes.items())
        found.append(
            Check(
                what=f"memory of {part} grows by at most {max_growth:g} MiB/min",
                holds=all(slope <= max_growth for slope in slopes.values()),
                found=text or f"none lived for {_LONG_S:g} s",
            )
        )
    return found


def success_check(before: Record | None, after: Record) -> Check:
    """That training has not made the policy worse, as far as the episodes can tell."""
    low = before["eval/ci95_low"] if before else 0.0
    was = before["eval/success_rate"] if before else math.nan
    rate = after["eval/success_rate"]
    return Check(
        what="success is not below the interval of the one before",
        holds=rate >= low,
        found=f"{was:.2f} (from {low:.2f}) -> {rate:.2f}",
    )


def _is_closed(record: Record) -> bool:
    ended = record["queue/consumed"] + record["queue/dropped"]
    return record["queue/admitted"] == ended + record["queue/in_flight"] + record["queue/depth"]


HEADER = f"{'process':12} {'signal':8} {'at update':>9} {'next update':>12} " + (
    f"{'recovered':>10} {'updates lost':>13} {'tickets lost':>13}"
)


def row(kill: Kill) -> str:
    """One line of the table."""
    return (
        f"{kill.name:12} {kill.signal:8} {kill.update:9} {kill.next_update_s:10.1f} s "
        f"{kill.recovered_s:8.1f} s {kill.updates_lost:13} {kill.tickets_lost:13}"
    )


def summary_rows(kills: list[Kill]) -> dict[str, dict[str, float]]:
    """Kind and signal -> median and largest figures."""
    groups: dict[str, list[Kill]] = {}
    for kill in kills:
        groups.setdefault(f"{kill.name.split('_')[0]} {kill.signal}", []).append(kill)
    return {
        name: {
            "kills": len(part),
            "next_update_s": statistics.median(x.next_update_s for x in part),
            "recovered_s": statistics.median(x.recovered_s for x in part),
            "recovered_max_s": max(x.recovered_s for x in part),
            "updates_lost": statistics.median(x.updates_lost for x in part),
            "tickets_lost": statistics.median(x.tickets_lost for x in part),
        }
        for name, part in sorted(groups.items())
    }


def show(kills: list[Kill], found: list[Check]) -> None:
    """Tables of kills and checks."""
    print(
        f"\n{'medians':20} {'kills':>6} {'next update':>12} {'recovered':>10} {'longest':>10} ",
        end="",
    )
    print(f"{'updates lost':>13} {'tickets lost':>13}")
    for name, part in summary_rows(kills).items():
        print(
            f"{name:20} {part['kills']:6} {part['next_update_s']:10.1f} s "
            f"{part['recovered_s']:8.1f} s {part['recovered_max_s']:8.1f} s "
            f"{part['updates_lost']:13g} {part['tickets_lost']:13g}"
        )
    print()
    for check in found:
        print(f"{'ok' if check.holds else 'FAILED':7} {check.what}: {check.found}")
