"""The part of the trace event format that trace.json uses, as Perfetto reads it.

Written from the format's public description,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, and from
https://perfetto.dev/docs/faq: events of one track must nest, overlapping ones are not supported.
"""

import itertools
import json
import math
from typing import Any

_INT32 = 2**31
_METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_sort_index": ("sort_index", int),
}
"""Metadata event -> the argument that it must have."""


class TraceError(AssertionError):
    """A trace that a viewer would refuse, or not show as meant."""


def check_trace(text: str) -> list[dict[str, Any]]:
    """Checks a whole file; returns its complete events.

    Raises:
      TraceError: what is wrong, and with which event.
    """
    document = json.loads(text, parse_constant=_refuse_constant)
    _require(isinstance(document, dict), "the document is not an object")
    _require(document.get("displayTimeUnit", "ms") in ("ms", "ns"), "displayTimeUnit")
    events = document.get("traceEvents")
    _require(isinstance(events, list), "traceEvents is not a list")
    assert isinstance(events, list)
    for event in events:
        _check_event(event)
    complete = [event for event in events if event["ph"] == "X"]
    _check_names(events, complete)
    for track, spans in itertools.groupby(sorted(complete, key=_track), _track):
        _check_nesting(track, list(spans))
    return complete


def _check_event(event: Any) -> None:
    """The fields of one event."""
    _require(isinstance(event, dict), f"{event} is not an object")
    _require(event.get("ph") in ("X", "M"), f"{event}: phase")
    _require(isinstance(event.get("name"), str) and event["name"] != "", f"{event}: name")
    _require(isinstance(event.get("args", {}), dict), f"{event}: args")
    _require(isinstance(event.get("cat", ""), str), f"{event}: cat")
    _require(_is_id(event.get("pid")), f"{event}: pid")
    if event["ph"] == "M":
        _require(event["name"] in _METADATA, f"{event}: unknown metadata")
        argument, kind = _METADATA[event["name"]]
        _require(isinstance(event.get("args", {}).get(argument), kind), f"{event}: {argument}")
        _require(_is_id(event.get("tid", 0)), f"{event}: tid")
        return
    _require(_is_id(event.get("tid")), f"{event}: tid")
    for field in ("ts", "dur"):
        value = event.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(is_number and math.isfinite(value) and value >= 0, f"{event}: {field}")


def _check_names(events: list[dict[str, Any]], complete: list[dict[str, Any]]) -> None:
    """Every track with spans has one name, and so has its process."""
    for kind, key in (
        ("process_name", lambda event: event["pid"]),
        ("thread_name", lambda event: (event["pid"], event["tid"])),
    ):
        named = [key(event) for event in events if event["name"] == kind and event["ph"] == "M"]
        _require(len(named) == len(set(named)), f"two events {kind} of one track")
        strangers = {key(event) for event in complete} - set(named)
        _require(not strangers, f"no {kind} for {sorted(strangers)}")


def _check_nesting(track: tuple[int, int], spans: list[dict[str, Any]]) -> None:
    """Spans of a track are apart or one inside the other. Times are compared in nanoseconds."""
    open_ends: list[int] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        start = round(span["ts"] * 1000)
        end = start + round(span["dur"] * 1000)
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        _require(not open_ends or end <= open_ends[-1], f"{track}: {span} does not nest")
        open_ends.append(end)


def _track(event: dict[str, Any]) -> tuple[int, int]:
    return event["pid"], event["tid"]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _INT32


def _refuse_constant(name: str) -> None:
    raise TraceError(f"{name} is not JSON")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TraceError(message)
