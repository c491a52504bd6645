"""The spans of a finished run, read back from its trace.json, by thread."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A block of one thread; see `ActivityMeter`. Times are on the clock of the trace."""

    name: str
    start_s: float
    end_s: float
    args: Mapping[str, Any]

    @property
    def length_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s

    def waits_for(self, reason: str) -> bool:
        """Whether the thread waited for `reason`."""
        return self.name == "wait" and self.args.get("on") == reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One thread of one program."""

    program: str
    thread: str
    spans: tuple[Span, ...]
    """In order of time; none lies inside another."""


def read_tracks(path: pathlib.Path) -> list[Track]:
    """Threads of a trace, in the order of the file.

    Raises:
      ValueError: there is no such file, or it is no trace that `Tracer.write` has written.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Fix: run with --config.telemetry.trace=True")
    try:
        events = json.loads(path.read_text())["traceEvents"]
        return _tracks(events)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a trace of a run ({error!r})") from error


def overlapping_fraction(tracks: Iterable[Track], start_s: float) -> float:
    """Share of the time in which any thread was busy in which more than one was.

    Args:
      tracks: threads of a run.
      start_s: what lies before does not count.
    """
    edges = []
    for track in tracks:
        for span in track.spans:
            if span.name != "wait" and span.end_s > start_s:
                edges += [(max(span.start_s, start_s), 1), (span.end_s, -1)]
    busy_s, together_s, num_busy, last_s = 0.0, 0.0, 0, start_s
    for time_s, change in sorted(edges):
        busy_s += (time_s - last_s) * (num_busy > 0)
        together_s += (time_s - last_s) * (num_busy > 1)
        num_busy, last_s = num_busy + change, time_s
    return together_s / busy_s if busy_s else 0.0


def _tracks(events: list[dict[str, Any]]) -> list[Track]:
    programs: dict[int, str] = {}
    threads: dict[tuple[int, int], str] = {}
    spans: dict[tuple[int, int], list[Span]] = {}
    for event in events:
        if event["ph"] == "M" and event["name"] == "process_name":
            programs[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            start_s = event["ts"] / 1e6
            span = Span(
                name=event["name"],
                start_s=start_s,
                end_s=start_s + event["dur"] / 1e6,
                args=event.get("args", {}),
            )
            spans.setdefault((event["pid"], event["tid"]), []).append(span)
    return [
        Track(program=programs[pid], thread=thread, spans=_outermost(spans.get((pid, tid), [])))
        for (pid, tid), thread in threads.items()
    ]


def _outermost(spans: list[Span]) -> tuple[Span, ...]:
    """In order of time, without those that lie inside another."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda x: (x.start_s, -x.end_s)):
        if not kept or span.start_s >= kept[-1].end_s - 1e-9:
            kept.append(span)
    return tuple(kept)
