"""Metrics, activity and spans of programs in other processes, on their way to the learner's.

    program -> ForwardingRecorder, ActivityMeter, Tracer -> TelemetryForwarder
                  ...  ship(fields, arrays), such as a frame of a connection  ...
    TelemetrySink -> the learner's MetricRecorder, ActivityMeters, Tracer

Values cross raw where a record needs each of them, and added up where it does not. What is dropped
because nobody fetches it, or because it makes no sense, is counted under `faults/`.
"""

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvla.telemetry.activity import Activity, ActivityMeter
from jaxvla.telemetry.clocks import RemoteClock
from jaxvla.telemetry.metrics import (
    REDUCTIONS,
    Last,
    Max,
    Min,
    Rate,
    Recorder,
    Reduction,
    Sum,
    Total,
    check_name,
    flat,
)
from jaxvla.telemetry.tracing import Drained, Span, Tracer

_LOG = logging.getLogger(__name__)

Fields = dict[str, Any]
"""Plain values: None, bool, int, float, str, and lists and dicts of them."""
Ship = Callable[[Fields, list[np.ndarray]], None]
"""Sends a parcel. Raises RuntimeError, such as a `ConnectionLostError`, when nobody is there, and
ValueError, such as a `FrameError`, when this parcel cannot be sent."""

DROPPED, MALFORMED = "faults/telemetry_dropped", "faults/telemetry_malformed"

FORWARDED = ("faults", "rate", "serving")
"""First segments of the names that other processes may add to; the rest is the learner's own."""

_MOST_NAMES = 512
"""Metrics in a parcel, and different ones ever."""
_MOST_WORDS = 64
"""Things that a role is busy with or waits for."""
_MOST_SPANS = 5000
"""In a parcel."""
_MOST_TRACKS = 64
"""Of one peer."""
_MOST_SPAN_BYTES = 16 * 2**20
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")
"""What a thread is busy with or waits for; it becomes part of a metric's name."""

_WRONG = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What reading a malformed parcel raises."""

_COLLAPSE: Mapping[type[Reduction], Callable[[np.ndarray], Any]] = {
    Sum: np.sum,
    Total: np.sum,
    Rate: np.sum,
    Max: np.max,
    Min: np.min,
    Last: lambda values: values[-1],
}
"""Reductions for which one number stands for many."""


@dataclass(kw_only=True)
class _Held:
    """Values of one metric."""

    reduction: type[Reduction]
    values: list[np.ndarray] = field(default_factory=list)


class ForwardingRecorder(Recorder):
    """Holds values until a forwarder takes them. Every method may be called by any thread."""

    def __init__(self, *, max_values: int = 65_536):
        """Args:
        max_values: of means and distributions, that are held at most; more are dropped.
        """
        self._max_values = max_values
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        """Of every name ever added."""
        self._fresh: set[str] = set()
        """Names added to since the last `take`."""
        self._num_values = 0
        self._num_dropped = 0

    def add(self, name: str, value: Any, reduction: type[Reduction]) -> None:
        """See `MetricRecorder.add`."""
        values = flat(value)
        with self._lock:
            held = self._held.get(name)
            if held is None:
                held = self._held[check_name(name)] = _Held(reduction=reduction)
            if held.reduction is not reduction:
                raise ValueError(
                    f"metric {name!r} is a {held.reduction.__name__}, not a {reduction.__name__}"
                )
            self._fresh.add(name)
            if not values.size:
                return
            collapse = _COLLAPSE.get(reduction)
            if collapse is not None:
                held.values = [np.atleast_1d(collapse(np.concatenate([*held.values, values])))]
                return
            room = max(self._max_values - self._num_values, 0)
            self._num_dropped += max(values.size - room, 0)
            self._num_values += min(values.size, room)
            if room:
                held.values.append(values[:room])

    def drop(self, count: int) -> None:
        """Counts values that were lost later."""
        with self._lock:
            self._num_dropped += count

    def take(self) -> list[tuple[str, type[Reduction], np.ndarray]]:
        """Name, reduction and values int64 or float64 [n] of what was added since the last call.

        How many values were dropped is one of them.
        """
        with self._lock:
            if self._num_dropped:
                dropped = _Held(reduction=Total, values=[np.asarray([self._num_dropped])])
                self._held[DROPPED] = dropped
                self._fresh.add(DROPPED)
            taken = [
                (name, self._held[name].reduction, _joined(self._held[name].values))
                for name in sorted(self._fresh)
            ]
            for name in self._fresh:
                self._held[name].values = []
            self._fresh.clear()
            self._num_values = self._num_dropped = 0
        return taken


class TelemetryForwarder:
    """Ships what a process's programs report, every `interval_s` and on `flush`."""

    def __init__(
        self,
        ship: Ship,
        *,
        recorder: ForwardingRecorder,
        meters: Mapping[str, ActivityMeter],
        tracer: Tracer,
        clock: RemoteClock | None = None,
        interval_s: float = 0.5,
    ):
        """Args:
        ship: sends a parcel.
        recorder: of all programs of the process.
        meters: by role; nobody else may take their snapshots.
        tracer: of all programs.
        clock: of the learner's tracer, asked before each parcel; spans wait for its first
          answer. None: it is the same as that of `tracer`.
        interval_s: between two parcels.
        """
        self._ship = ship
        self._recorder = recorder
        self._meters = meters
        self._tracer = tracer
        self._clock = clock
        self._interval_s = interval_s
        self._flushing = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Ships from now on. Once."""
        self._thread.start()

    def close(self) -> None:
        """Ships what is left and ends."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    def flush(self) -> bool:
        """Ships everything up to now. False when nobody is there: it is lost then, and counted."""
        with self._flushing:
            metrics = self._recorder.take()
            activities = {role: x.snapshot().window for role, x in self._meters.items()}
            left = sum(values.size for _, _, values in metrics)
            try:
                for start in range(0, max(len(metrics), 1), _MOST_NAMES):
                    part = metrics[start : start + _MOST_NAMES]
                    self._ship(*_metrics_parcel(part, activities))
                    left -= sum(values.size for _, _, values in part)
                    activities = {}
                self._flush_spans()
            except (RuntimeError, ValueError) as error:
                _LOG.warning("telemetry was lost: %s", error)
                self._recorder.drop(left)
                return not isinstance(error, RuntimeError)
        return True

    def _flush_spans(self) -> None:
        if self._clock is not None:
            self._clock.ask()
        offset_s = self._clock.offset_s if self._clock is not None else 0.0
        if offset_s is None:
            return
        for part in _split(self._tracer.drain()):
            self._ship(*_spans_parcel(part, offset_s))

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            if not self.flush():
                return


class TelemetrySink:
    """Adds what forwarders ship to the learner's telemetry. Thread-safe.

    Anything malformed is left out, counted and logged; it never raises.
    """

    def __init__(self, *, recorder: Recorder, meters: Mapping[str, ActivityMeter], tracer: Tracer):
        """Args:
        recorder: of the records.
        meters: by role.
        tracer: of the trace file.
        """
        self._recorder = recorder
        self._meters = meters
        self._tracer = tracer
        self._lock = threading.Lock()
        self._tracks: dict[str, set[tuple[str, str]]] = {}
        """Peer -> its tracks."""
        self._names: set[str] = set()
        """Of metrics that were ever shipped."""
        self._num_malformed = 0
        recorder.add(MALFORMED, 0, Total)

    def receive(self, peer: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Takes a parcel of a peer."""
        for part in (self._take_metrics, self._take_activities, self._take_spans):
            try:
                part(peer, fields, arrays)
            except _WRONG as error:
                self._refuse(peer, error)

    def _refuse(self, peer: str, error: Exception) -> None:
        self._recorder.add(MALFORMED, 1, Total)
        with self._lock:
            self._num_malformed += 1
            count = self._num_malformed
        if count & (count - 1) == 0:  # ever more rarely: nobody must fill the log
            _LOG.warning("%d malformed reports, the last of %s: %s", count, peer, error)

    def _take_metrics(
        self, peer: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> None:
        metrics = fields.get("metrics", [])
        if len(metrics) > min(len(arrays), _MOST_NAMES):
            raise ValueError(f"{len(metrics)} metrics in {len(arrays)} arrays")
        for (name, reduction), values in zip(metrics, arrays, strict=False):
            try:
                self._take_metric(name, reduction, values)
            except (ValueError, TypeError) as error:
                self._refuse(peer, error)

    def _take_metric(self, name: Any, reduction: Any, values: np.ndarray) -> None:
        kind = REDUCTIONS.get(reduction)
        if kind is None:
            raise ValueError(f"reduction {reduction!r:.80}, must be one of {sorted(REDUCTIONS)}")
        if check_name(name).partition("/")[0] not in FORWARDED:
            raise ValueError(f"metric {name!r:.80} is the learner's own")
        if values.dtype not in (np.int64, np.float64) or values.ndim != 1:
            raise ValueError(f"metric {name!r:.80} has values {values.dtype}{list(values.shape)}")
        with self._lock:
            if name not in self._names and len(self._names) >= _MOST_NAMES:
                raise ValueError(f"metric {name!r:.80} is one of more than {_MOST_NAMES}")
            self._names.add(name)
        self._recorder.add(name, values, kind)

    def _take_activities(self, peer: str, fields: Mapping[str, Any], _: Any) -> None:
        for role, parts in fields.get("activities", {}).items():
            if role not in self._meters:
                raise ValueError(f"role {role!r:.80}, must be one of {sorted(self._meters)}")
            busy_s, waiting_s = _seconds(parts["busy_s"]), _seconds(parts["waiting_s"])
            self._meters[role].absorb(Activity(busy_s=busy_s, waiting_s=waiting_s))

    def _take_spans(
        self, peer: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> None:
        if not fields.get("has_spans", False):
            return
        text = arrays[-1] if arrays else np.zeros(0, np.uint8)
        if text.dtype != np.uint8 or text.ndim != 1 or text.size > _MOST_SPAN_BYTES:
            raise ValueError(f"spans are {text.dtype}{list(text.shape)}")
        for program, thread, num_lost, spans in json.loads(text.tobytes()):
            label = f"{_short(program)} {peer}"
            with self._lock:
                tracks = self._tracks.setdefault(peer, set())
                if (label, thread) not in tracks and len(tracks) >= _MOST_TRACKS:
                    raise ValueError(f"more than {_MOST_TRACKS} threads")
                tracks.add((label, _short(thread)))
            checked = [_checked_span(span) for span in spans]
            lost = max(int(num_lost), 0)
            self._tracer.absorb(Drained(program=label, thread=thread, spans=checked, num_lost=lost))


def _metrics_parcel(
    metrics: Sequence[tuple[str, type[Reduction], np.ndarray]], activities: Mapping[str, Activity]
) -> tuple[Fields, list[np.ndarray]]:
    fields: Fields = {
        "metrics": [[name, reduction.__name__] for name, reduction, _ in metrics],
        "activities": {
            role: {"busy_s": dict(activity.busy_s), "waiting_s": dict(activity.waiting_s)}
            for role, activity in activities.items()
        },
    }
    return fields, [values for _, _, values in metrics]


def _spans_parcel(tracks: Sequence[Drained], offset_s: float) -> tuple[Fields, list[np.ndarray]]:
    content = [
        [
            track.program,
            track.thread,
            track.num_lost,
            [[name, start + offset_s, end + offset_s, args] for name, start, end, args in x],
        ]
        for track in tracks
        for x in (track.spans,)
    ]
    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    return {"has_spans": True}, [text]


def _split(tracks: Sequence[Drained]) -> list[list[Drained]]:
    """Parcels of `_MOST_SPANS` spans of one track at most; small tracks go together."""
    parcels: list[list[Drained]] = []
    size = 0
    for track in tracks:
        for start in range(0, max(len(track.spans), 1), _MOST_SPANS):
            part = Drained(
                program=track.program,
                thread=track.thread,
                spans=track.spans[start : start + _MOST_SPANS],
                num_lost=0 if start else track.num_lost,
            )
            if not parcels or size + len(part.spans) > _MOST_SPANS:
                parcels.append([])
                size = 0
            parcels[-1].append(part)
            size += len(part.spans)
    return parcels


def _joined(values: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [n] if all parts are, else float64 [n]."""
    return np.concatenate(values) if values else np.zeros(0, np.int64)


def _seconds(parts: Any) -> dict[str, float]:
    """Seconds by word. Raises ValueError."""
    if len(parts) > _MOST_WORDS:
        raise ValueError(f"{len(parts)} words, more than {_MOST_WORDS}")
    for word, seconds in parts.items():
        if not _WORD.fullmatch(word):
            raise ValueError(f"{word!r:.80} is no word like {_WORD.pattern}")
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"{word}: {seconds!r:.80} is no time in seconds")
    return {word: float(seconds) for word, seconds in parts.items()}


def _checked_span(span: Any) -> Span:
    name, start_s, end_s, args = span
    if not (-math.inf < start_s <= end_s < math.inf):
        raise ValueError(f"a span from {start_s!r:.80} to {end_s!r:.80}")
    if not isinstance(args, dict) or any(isinstance(x, dict | list) for x in args.values()):
        raise ValueError(f"arguments {args!r:.80} of a span")
    return _short(name), float(start_s), float(end_s), args


def _short(name: Any) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= 128:
        raise ValueError(f"{name!r:.80} is no name")
    return name
