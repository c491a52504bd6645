"""Spans of all programs on one monotonic clock, written as a Perfetto / Chrome trace.

Each program is a process of the trace and each of its threads a track of spans that
nest: open trace.json in https://ui.perfetto.dev to see who waits for whom.
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
(complete events "X", times in microseconds; metadata events "M").
"""

import collections
import contextlib
import itertools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxvla.telemetry.writers import replacing

Span = tuple[str, float, float, dict[str, Any]]
"""Name, start and end in seconds of the tracer's clock, arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drained:
    """Spans of one track on their way to another tracer."""

    program: str
    thread: str
    spans: list[Span]
    num_lost: int
    """Older ones that were let go."""


class _Track:
    """The newest spans of one thread."""

    def __init__(self, max_spans: int, owner: threading.Thread | None):
        self.owner = owner
        """None: a thread of another process."""
        self._spans: collections.deque[Span] = collections.deque(maxlen=max_spans)
        self._num_added = 0
        # Uncontended except while the trace is written.
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)
            self._num_added += 1

    def extend(self, spans: Sequence[Span], num_lost: int) -> None:
        """Adds spans, of which some more are missing."""
        with self._lock:
            self._spans.extend(spans)
            self._num_added += len(spans) + num_lost

    def copy(self) -> tuple[list[Span], int]:
        """Spans held, and how many older ones were let go."""
        with self._lock:
            return list(self._spans), self._num_added - len(self._spans)

    def take(self) -> tuple[list[Span], int]:
        """The same, and forgets them."""
        with self._lock:
            spans, num_lost = list(self._spans), self._num_added - len(self._spans)
            self._spans.clear()
            self._num_added = 0
        return spans, num_lost


class Tracer:
    """Collects spans from any thread. Memory is bounded per track: the oldest spans go first."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, max_spans_per_track: int = 100_000
    ):
        self.clock = clock
        """Seconds; whoever adds spans measures with it."""
        self._origin_s = clock()
        self._max_spans = max_spans_per_track
        self._tracks: dict[tuple[str, str], _Track] = {}
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._local = threading.local()

    def name_thread(self, program: str, thread: str) -> None:
        """Puts the calling thread's spans from now on into the track `thread` of `program`.

        A restarted thread goes on in the track of the dead one. A name that another live
        thread holds gets a number, since the spans of two threads would not nest.
        """
        me = threading.current_thread()
        with self._lock:
            for number in itertools.count(1):
                key = (program, thread if number == 1 else f"{thread} ({number})")
                track = self._tracks.setdefault(key, _Track(self._max_spans, me))
                owner = track.owner
                if owner is me or (owner is not None and not owner.is_alive()):
                    track.owner = me
                    self._local.track = track
                    return

    @contextlib.contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Records the block as a span, also when it raises.

        Args:
          name: what the thread does: simulate, render, wait, infer, train, publish, pull, ...
          **args: shown with the span; values that JSON can hold.
        """
        start_s = self.clock()
        try:
            yield
        finally:
            self.add(name, start_s, self.clock(), **args)

    def add(self, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Records a span of the calling thread that was measured with `clock`."""
        if not hasattr(self._local, "track"):
            self.name_thread("process", threading.current_thread().name)
        self._local.track.add((name, start_s, end_s, args))

    def drain(self) -> list[Drained]:
        """Takes all finished spans out, to be absorbed elsewhere."""
        with self._lock:
            tracks = list(self._tracks.items())
        taken = [(*key, *track.take()) for key, track in tracks]
        return [
            Drained(program=program, thread=thread, spans=spans, num_lost=num_lost)
            for program, thread, spans, num_lost in taken
            if spans or num_lost
        ]

    def absorb(self, drained: Drained) -> None:
        """Adds spans of a thread of another process, with times of this tracer's clock."""
        key = drained.program, drained.thread
        with self._lock:
            track = self._tracks.setdefault(key, _Track(self._max_spans, None))
        track.extend(drained.spans, drained.num_lost)

    def write(self, path: pathlib.Path) -> None:
        """Replaces `path` by the trace so far, atomically. Spans still open are not in it."""
        with self._lock:
            tracks = list(self._tracks.items())
        with self._write_lock, replacing(path) as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for index, event in enumerate(self._events(tracks)):
                file.write(",\n" if index else "")
                file.write(json.dumps(event))
            file.write("\n]}\n")

    def _events(self, tracks: list[tuple[tuple[str, str], _Track]]) -> Iterator[dict[str, Any]]:
        """Trace events in the order of the tracks."""
        programs = list(dict.fromkeys(program for (program, _), _ in tracks))
        for pid, program in enumerate(programs, start=1):
            yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": program}}
        for tid, ((program, thread), track) in enumerate(tracks, start=1):
            where = {"pid": programs.index(program) + 1, "tid": tid}
            spans, num_lost = track.copy()
            label = {"name": thread, "num_older_spans_lost": num_lost}
            yield {"ph": "M", **where, "name": "thread_name", "args": label}
            for span in spans:
                yield {"ph": "X", **where, **self._times(span)}

    def _times(self, span: Span) -> dict[str, Any]:
        """Fields of a complete event. Rounding both ends to whole ns keeps spans nested."""
        name, start_s, end_s, args = span
        start_ns = round((start_s - self._origin_s) * 1e9)
        end_ns = round((end_s - self._origin_s) * 1e9)
        times = {"name": name, "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
        return times | ({"args": args} if args else {})


class NullTracer(Tracer):
    """Keeps the clock, records nothing and writes nothing: `telemetry.trace` is off."""

    _NOTHING = contextlib.nullcontext()

    def name_thread(self, program: str, thread: str) -> None:
        del program, thread

    def span(self, name: str, **args: Any) -> contextlib.AbstractContextManager[None]:
        del name, args
        return self._NOTHING

    def add(self, name: str, start_s: float, end_s: float, **args: Any) -> None:
        del name, start_s, end_s, args

    def absorb(self, drained: Drained) -> None:
        del drained

    def write(self, path: pathlib.Path) -> None:
        del path
