"""The files of a work directory, read back for reports and comparisons. No jax.

Only metrics.jsonl must be there: a run that was killed, or that goes on, has no summary yet.
"""

import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxvla.telemetry.activity import Activity
from jaxvla.telemetry.metrics import Record

WARM_UP = 0.2
"""Share of a run's records, at least one of several, that steady rates leave out: caches fill, the
first batches wait for the first trajectories."""

_MAX_TRACE_BYTES = 64 * 2**20
"""Larger traces are not read: as Python objects they take some 15 times their size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What a work directory says of its run. Missing files are empty."""

    workdir: pathlib.Path
    records: list[Record]
    """Of metrics.jsonl, in order; null is NaN."""
    summary: dict[str, Any]
    """summary.json."""
    provenance: dict[str, Any]
    """config.json: config, git_commit, python, versions, devices."""
    evaluation: dict[str, Any]
    """eval.json of the evaluate job."""
    videos: list[pathlib.PurePosixPath]
    """mp4 files below videos/, relative to the work directory, sorted."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config; empty when it is not known."""
        return self.provenance.get("config") or {}

    @property
    def name(self) -> str:
        """The config's name, else the directory's."""
        return self.config.get("name") or self.workdir.absolute().name

    @property
    def update(self) -> int:
        """Learner updates done."""
        last = int(self.records[-1]["update"]) if self.records else 0
        return self.summary.get("update") or last

    def evaluated(self, when: str) -> dict[str, float] | None:
        """`eval/*` values "before" or "after" training; None: not evaluated."""
        found = self.summary.get(f"evaluation_{when}")
        return None if found is None else {name: number(x) for name, x in found.items()}

    def activities(self) -> dict[str, Activity]:
        """Role -> activity as fractions of the training time, by the summary, else by the means
        of the records."""
        if stated := self.summary.get("utilisation"):
            return {
                role: Activity(
                    busy_s={"work": number(x["busy_fraction"])},
                    waiting_s={name: number(s) for name, s in x["waiting_on"].items()},
                )
                for role, x in stated.items()
                if math.isfinite(number(x["busy_fraction"]))
            }
        return _mean_activities(self.records)

    def staleness_counts(self) -> dict[int, int]:
        """Staleness -> consumed trajectories; empty when the run has not counted them."""
        counts = self.summary.get("staleness_counts") or {}
        return {int(staleness): int(count) for staleness, count in sorted(counts.items())}

    def max_staleness(self) -> float:
        """Largest staleness consumed; NaN when nothing was."""
        if "max_staleness" in self.summary:
            return number(self.summary["max_staleness"])
        return max(finite(self.records, "queue/staleness/max"), default=math.nan)

    def staleness_bound(self) -> float:
        """Bound in force; NaN when there is none."""
        if "staleness_bound" in self.summary:
            return number(self.summary["staleness_bound"])
        return max(finite(self.records, "queue/staleness/bound"), default=math.nan)


def read_run(workdir: pathlib.Path) -> RunFiles:
    """Reads a work directory.

    Raises:
      ValueError: it has no metrics.jsonl, or a file in it is not what it should be.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not a directory. Fix: name the --workdir of a run")
    metrics = workdir / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{workdir} has no metrics.jsonl. Fix: name the --workdir of a run")
    videos = sorted(path.relative_to(workdir) for path in workdir.glob("videos/**/*.mp4"))
    return RunFiles(
        workdir=workdir,
        records=read_records(metrics),
        summary=_read_object(workdir / "summary.json"),
        provenance=_read_object(workdir / "config.json"),
        evaluation=_read_object(workdir / "eval.json"),
        videos=[
            pathlib.PurePosixPath(path.as_posix())
            for path in videos
            if not path.name.startswith(".")  # being written
        ],
    )


def read_records(path: pathlib.Path) -> list[Record]:
    """Records of a metrics.jsonl. A torn last line, of a run that was killed, is left out.

    Raises:
      ValueError: another line is not a record.
    """
    lines = path.read_bytes().split(b"\n")
    records: list[Record] = []
    for index, line in enumerate(lines):
        if not line:
            continue
        try:
            values = json.loads(line)
            int(values["update"])
        except (ValueError, KeyError, TypeError) as error:
            if index == len(lines) - 1:
                break
            raise ValueError(f"{path}:{index + 1}: not a metrics record: {error}") from error
        records.append({name: _number_or_nan(value) for name, value in values.items()})
    return records


def read_trace(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Events of trace.json; none when there is no trace or it is larger than 64 MiB.

    Raises:
      ValueError: the file is not a trace.
    """
    path = workdir / "trace.json"
    if not path.is_file() or path.stat().st_size > _MAX_TRACE_BYTES:
        return []
    events = _read_object(path).get("traceEvents")
    if not isinstance(events, list):
        raise ValueError(f"{path}: has no traceEvents. Fix: move it away")
    return events


def thread_times(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of each thread by what it did, each moment given to the innermost span.

    Args:
      events: of a trace.

    Returns:
      "program / thread" -> span name, or "wait for REASON", or "other" between spans -> seconds.
    """
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event["ph"] == "M"
    }
    tracks: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    found = {}
    for (pid, tid), spans in tracks.items():
        process = names.get(("process_name", pid, None), str(pid))
        thread = names.get(("thread_name", pid, tid), str(tid))
        found[f"{process} / {thread}"] = _self_times(spans)
    return found


def _self_times(spans: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by name of the spans of one thread, which nest."""
    times: dict[str, float] = {}
    open_spans: list[tuple[str, float]] = []
    ordered = sorted(spans, key=lambda span: (span["ts"], -span["dur"]))
    covered_us = 0.0
    for span in ordered:
        start, dur, reason = span["ts"], span["dur"], span.get("args", {}).get("on")
        name = f"wait for {reason}" if span["name"] == "wait" and reason else span["name"]
        while open_spans and open_spans[-1][1] <= start:
            open_spans.pop()
        times[name] = times.get(name, 0.0) + dur / 1e6
        if open_spans:
            times[open_spans[-1][0]] -= dur / 1e6
        else:
            covered_us += dur
        open_spans.append((name, start + dur))
    first, last = ordered[0]["ts"], max(span["ts"] + span["dur"] for span in ordered)
    times["other"] = max((last - first - covered_us) / 1e6, 0.0)
    return {name: max(seconds, 0.0) for name, seconds in times.items()}


def number(value: Any) -> float:
    """A JSON number; NaN for null, which is how non-finite numbers are written."""
    return math.nan if value is None else float(value)


def values_of(records: Sequence[Record], name: str) -> list[float]:
    """Values of a metric, NaN where a record lacks it."""
    return [float(record.get(name, math.nan)) for record in records]


def finite(records: Sequence[Record], name: str) -> list[float]:
    """Values of a metric that are numbers."""
    return [value for value in values_of(records, name) if math.isfinite(value)]


def steady_median(records: Sequence[Record], name: str) -> float:
    """Median of a metric over the records after warm-up; NaN without any."""
    num_left_out = max(1, round(WARM_UP * len(records))) if len(records) > 1 else 0
    found = finite(records[num_left_out:], name)
    return statistics.median(found) if found else math.nan


def _mean_activities(records: Sequence[Record]) -> dict[str, Activity]:
    """Role -> mean fractions over the records, weighted by their durations."""
    ends = values_of(records, "time_s")
    weights = [b - a for a, b in itertools.pairwise(ends)]
    later = records[1:] if len(records) > 1 else records
    found: dict[str, Activity] = {}
    names = {name.split("/")[1] for record in records for name in record if _is_busy(name)}
    for role in sorted(names):
        waits = sorted({n for record in records for n in record if _is_wait(n, role)})
        busy = _mean(values_of(later, f"utilisation/{role}/busy_fraction"), weights)
        found[role] = Activity(
            busy_s={"work": busy},
            waiting_s={
                name.rsplit("/", 1)[1].removesuffix("_fraction"): _mean(
                    [float(record.get(name, 0.0)) for record in later], weights
                )
                for name in waits
            },
        )
    return {role: activity for role, activity in found.items() if math.isfinite(activity.thread_s)}


def _is_busy(name: str) -> bool:
    return name.startswith("utilisation/") and name.endswith("/busy_fraction")


def _is_wait(name: str, role: str) -> bool:
    return name.startswith(f"utilisation/{role}/waiting_on/")


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean of the finite values; NaN without any."""
    weights = weights if len(weights) == len(values) else [1.0] * len(values)
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v) and w > 0]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else math.nan


def _number_or_nan(value: Any) -> Any:
    return math.nan if value is None else value


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}. Fix: move it away") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__}, want an object. Fix: move it away")
    return value
