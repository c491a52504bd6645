"""The screen: what a person sees of a run.

On a terminal one live panel at the bottom and messages above it; elsewhere plain lines
without control characters, one for each update. Everything shown is read from the metric
records (see `metrics`), so the screen knows no program.
"""

import contextlib
import math
import os
import pathlib
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxvla.telemetry.activity import Activity
from jaxvla.telemetry.metrics import Number, Record

MAX_COLUMNS = 120
"""Longest line of an update without a terminal."""

_SHORT = {"simulation": "sim", "serving": "serve", "learning": "learn"}
"""Roles in the line of an update."""

_SUPERVISED = "rate/samples_per_s"
"""In the records of supervised runs, which play no episodes."""

_ETA_WINDOW = 20
"""Updates over which the remaining time is extrapolated: compilation falls out of it."""


def format_duration(seconds: float) -> str:
    """Two leading units, e.g. "4.5s", "45s", "3m10s", "1h02m"; "-" when not finite."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def format_rate(value: float) -> str:
    """Three significant digits and a thousands suffix, e.g. "0.52", "81.2", "812", "12.3k"."""
    if not math.isfinite(value):
        return "-"
    exponent = 0
    while abs(value) >= 999.5 and exponent < 3:  # 999.5 would round to 1000
        value, exponent = value / 1000, exponent + 1
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{decimals}f}{('', 'k', 'M', 'G')[exponent]}"


def _format(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def _value(record: Mapping[str, Number], name: str, spec: str) -> str:
    return _format(record.get(name, math.nan), spec)


def _rate(record: Mapping[str, Number], name: str) -> str:
    return format_rate(record.get(f"rate/{name}_per_s", math.nan))


def _success(record: Mapping[str, Number]) -> str:
    """Text of an evaluation's `eval/*` values."""
    rate, low, high = (
        _format(record[f"eval/{name}"], ".2f") for name in ("success_rate", "ci95_low", "ci95_high")
    )
    return f"{rate} [{low}, {high}] of {record['eval/episodes']} episodes"


def _percent(fraction: float) -> str:
    return f"{_format(fraction * 100, '.0f')}%"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What the last lines state."""

    before: Mapping[str, Number] | None
    """`eval/*` values of the policy that the run began with; None: it was not evaluated."""
    after: Mapping[str, Number] | None
    """The same for the newest policy."""
    env_steps_per_s: float
    """Control steps per second over the training time."""
    activities: Mapping[str, Activity]
    """Role -> activity over the training time."""
    max_staleness: int
    """Largest staleness consumed, in updates."""
    staleness_bound: int
    """Bound in force."""
    workdir: pathlib.Path
    next_command: str
    """Command that continues the run or evaluates its result."""

    def lines(self) -> list[str]:
        """Plain text, one fact a line."""
        return [
            f"success     before {_evaluated(self.before)}, after {_evaluated(self.after)}",
            f"speed       {format_rate(self.env_steps_per_s)} env steps/s",
            f"bottleneck  {bottleneck(self.activities)}",
            f"staleness   max {self.max_staleness}, bound {self.staleness_bound}",
            f"workdir     {self.workdir}",
            f"next        {self.next_command}",
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedSummary:
    """What the last lines of a supervised run state."""

    before: Mapping[str, Number] | None
    """See `RunSummary`."""
    after: Mapping[str, Number] | None
    """See `RunSummary`."""
    samples_per_s: float
    """Labelled samples trained on per second over the training time."""
    activities: Mapping[str, Activity]
    """Role -> activity over the training time."""
    workdir: pathlib.Path
    next_command: str
    """Command that continues the run or evaluates its result."""

    def lines(self) -> list[str]:
        """Plain text, one fact a line."""
        return [
            f"success     before {_evaluated(self.before)}, after {_evaluated(self.after)}",
            f"speed       {format_rate(self.samples_per_s)} samples/s",
            f"bottleneck  {bottleneck(self.activities)}",
            f"workdir     {self.workdir}",
            f"next        {self.next_command}",
        ]


def _evaluated(record: Mapping[str, Number] | None) -> str:
    return "not evaluated" if record is None else _success(record)


def bottleneck(activities: Mapping[str, Activity]) -> str:
    """Names the busiest role and what each other one waits for most, as text."""
    known = {role: a for role, a in activities.items() if math.isfinite(a.busy_fraction)}
    if not known:
        return "unknown: no program ran"
    busiest = max(known, key=lambda role: known[role].busy_fraction)
    parts = [f"{busiest} {_percent(known[busiest].busy_fraction)} busy"]
    for role, activity in known.items():
        reasons = list(activity.waiting_fractions.items())[:1] if role != busiest else []
        parts += [f"{role} waits for {reason} {_percent(s)}" for reason, s in reasons if s > 0]
    return "; ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Utilisation:
    """What a record says of one role."""

    role: str
    busy: float
    """Fraction of the window in [0, 1]."""
    waiting: list[tuple[str, float]]
    """Reasons with their fractions, largest first."""


def _utilisations(record: Record) -> list[_Utilisation]:
    """Roles of the record's `utilisation/*` values, busiest first."""
    found = []
    for name, busy in record.items():
        match = re.fullmatch(r"utilisation/(\w+)/busy_fraction", name)
        if match is None or not math.isfinite(busy):
            continue
        start = f"utilisation/{match[1]}/waiting_on/"
        waiting = [
            (key.removeprefix(start).removesuffix("_fraction"), share)
            for key, share in record.items()
            if key.startswith(start) and share > 0
        ]
        waiting.sort(key=lambda item: -item[1])
        found.append(_Utilisation(role=match[1], busy=busy, waiting=waiting))
    return sorted(found, key=lambda utilisation: -utilisation.busy)


def update_line(record: Record, *, num_updates: int, eta_s: float) -> str:
    """One update as a plain line of at most `MAX_COLUMNS` columns.

    A value that the record lacks shows as "-". When the line grows too long, it loses first
    what the busiest program waits for, then the parts before the remaining time.
    """
    update = int(record["update"])
    width = len(str(num_updates))
    parts = [f"update {update:{width}d}/{num_updates}"]
    if _SUPERVISED in record:
        parts.append(f"{_rate(record, 'samples')} samples/s")
    else:
        parts += [
            f"success {_value(record, 'train/success_rate', '.2f')}",
            f"{_rate(record, 'env_steps')} env steps/s",
            f"staleness {_value(record, 'queue/staleness/max', '.0f')}"
            f"/{_value(record, 'queue/staleness/bound', '.0f')}",
        ]
    loss = f"loss {_value(record, 'learner/loss/total', '.3g')}"
    eta = f"eta {format_duration(eta_s)}"
    for busiest in _utilisations(record)[:1]:
        busy = f"{_SHORT.get(busiest.role, busiest.role)} {_percent(busiest.busy)} busy"
        waits = "".join(f", waits {reason} {_percent(s)}" for reason, s in busiest.waiting[:1])
        is_long = len(" | ".join([*parts, busy + waits, loss, eta])) > MAX_COLUMNS
        parts.append(busy if is_long else busy + waits)
    parts.append(loss)
    while len(" | ".join([*parts, eta])) > MAX_COLUMNS:
        parts.pop()
    return " | ".join([*parts, eta])


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What the panel shows. Immutable: the thread that draws the panel reads it without a lock."""

    num_updates: int
    phase: str | None = None
    """Name of the phase in progress."""
    phase_start_s: float = 0.0
    record: Record = field(default_factory=dict)
    """Newest record; empty before the first update."""
    before: Mapping[str, Number] | None = None
    now: Mapping[str, Number] | None = None
    """First and newest evaluation."""
    history: tuple[tuple[int, float], ...] = ()
    """(update, time_s) of the newest records."""

    @property
    def eta_s(self) -> float:
        """Remaining seconds of training; NaN before the second record."""
        if len(self.history) < 2:
            return math.nan
        (first, start_s), (last, end_s) = self.history[0], self.history[-1]
        return (self.num_updates - last) * (end_s - start_s) / (last - first)


def _panel(view: _View, now_s: float) -> RenderableType:
    """The live panel."""
    record = view.record
    update = int(record.get("update", 0))
    rows: list[RenderableType] = []
    if view.phase is not None:
        rows.append(Text(f"{view.phase} ... {format_duration(now_s - view.phase_start_s)}"))
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        "update",
        ProgressBar(total=max(view.num_updates, 1), completed=update, width=40),
        f"{update}/{view.num_updates}",
        f"eta {format_duration(view.eta_s)}",
    )
    rows += [progress, *(Text(line) for line in _facts(view))]
    utilisation = Table.grid(padding=(0, 1))
    for role in sorted(_utilisations(record), key=lambda u: u.role):
        waits = ", ".join(f"waits {reason} {_percent(s)}" for reason, s in role.waiting[:2])
        bar = ProgressBar(total=1.0, completed=role.busy, width=20)
        utilisation.add_row(role.role, bar, f"{_percent(role.busy)} busy", waits)
    return Panel(Group(*rows, utilisation), title="jaxvla")


def _facts(view: _View) -> list[str]:
    """Lines of the panel between progress and utilisation."""
    record = view.record
    if _SUPERVISED in record:
        return [
            f"success    before {_evaluated(view.before)}",
            f"           now {_evaluated(view.now)}",
            f"per second {_rate(record, 'samples')} samples, {_rate(record, 'updates')} updates",
        ]
    rates = ("env_steps", "chunk_queries", "episodes", "updates")
    staleness = ", ".join(
        f"{name} {_value(record, f'queue/staleness/{name}', '.3g')}"
        for name in ("mean", "max", "bound")
    )
    faults = [
        f"{name.removeprefix('faults/')} {count}"
        for name, count in record.items()
        if name.startswith("faults/") and count
    ]
    return [
        f"success    before {_evaluated(view.before)}",
        f"           now {_evaluated(view.now)}, "
        f"in training {_value(record, 'train/success_rate', '.2f')}",
        "per second " + ", ".join(f"{_rate(record, n)} {n.replace('_', ' ')}" for n in rates),
        f"staleness  {staleness}",
        *([f"faults     {', '.join(faults)}"] if faults else []),
    ]


class RunScreen(Protocol):
    """What a run shows things on: a `Screen`, or the way to the process that has it."""

    def message(self, text: str) -> None:
        """See `Screen.message`."""
        ...

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See `Screen.phase`."""
        ...

    def evaluated(self, record: Mapping[str, Number], *, update: int) -> None:
        """See `Screen.evaluated`."""
        ...

    def update(self, record: Record) -> None:
        """See `Screen.update`."""
        ...

    def final_summary(self, summary: RunSummary | SupervisedSummary) -> None:
        """See `Screen.final_summary`."""
        ...


class Screen:
    """Owns the stream that a run talks to. Every method may be called by any thread.

    To be used as a context manager: the panel lives inside the block.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        num_updates: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet.

        Args:
          stream: usually sys.stdout; a panel is shown when it is a terminal that can move
            its cursor.
          num_updates: learner updates of the whole run.
          clock: seconds, for the durations of phases.
        """
        self._stream = stream
        self._clock = clock
        # Never taken by the panel's drawing thread, which holds a lock of its own that
        # printing needs: taking both in either order would deadlock.
        self._lock = threading.Lock()
        self._view = _View(num_updates=num_updates)
        self._live: Live | None = None
        self._console: Console | None = None
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._console = Console(file=stream)

    def __enter__(self) -> "Screen":
        if self._console is not None:
            self._live = Live(console=self._console, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """Shows text, above the panel if there is one."""
        with self._lock:
            for line in text.splitlines() or [""]:
                self._line(line)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows that the block, e.g. "compile" or "warm start", is in progress, then its time."""
        start_s = self._clock()
        with self._lock:
            self._view = replace(self._view, phase=name, phase_start_s=start_s)
            if self._live is None:
                self._line(f"{name} ...")
        outcome = "failed after"
        try:
            yield
            outcome = "took"
        finally:
            with self._lock:
                self._view = replace(self._view, phase=None)
                self._line(f"{name} {outcome} {format_duration(self._clock() - start_s)}")

    def evaluated(self, record: Mapping[str, Number], *, update: int) -> None:
        """Shows `eval/*` values; the first ones in the run count as success before."""
        with self._lock:
            self._view = replace(self._view, before=self._view.before or record, now=record)
            self._line(f"evaluation at update {update}: success {_success(record)}")

    def update(self, record: Record) -> None:
        """Shows a metric record: the panel's new content, or a line."""
        with self._lock:
            history = (
                *self._view.history[-_ETA_WINDOW:],
                (int(record["update"]), record["time_s"]),
            )
            self._view = view = replace(self._view, record=record, history=history)
            if self._live is None:
                self._line(update_line(record, num_updates=view.num_updates, eta_s=view.eta_s))

    def final_summary(self, summary: RunSummary | SupervisedSummary) -> None:
        """Shows the last lines of a run."""
        self.message("\n".join(summary.lines()))

    def _render(self) -> RenderableType:
        return _panel(self._view, self._clock())

    def _line(self, text: str) -> None:
        """Writes one line. The lock is held."""
        clean = "".join(c if unicodedata.category(c) != "Cc" else " " for c in text)
        if self._console is None:
            self._stream.write(clean + "\n")
            self._stream.flush()
        else:
            # Paths and commands are to be copied: no wrapping, no colouring, no markup.
            self._console.print(Text(clean), soft_wrap=True, highlight=False)
