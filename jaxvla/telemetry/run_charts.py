"""Charts of runs: how their metrics develop, who waits for whom, how stale samples are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxvla.telemetry.activity import Activity
from jaxvla.telemetry.charts import Point, bar_chart, histogram, line_chart, stacked_bars
from jaxvla.telemetry.html import Html
from jaxvla.telemetry.metrics import Record
from jaxvla.telemetry.run_files import RunFiles, finite, thread_times, values_of

_LOG_FROM = 30.0
"""Largest over median value from which a positive metric is drawn logarithmically."""
MAX_THREADS = 24
"""Threads in the chart of them: of more, the first of each kind tell the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Metrics that share an axis."""

    title: str
    metrics: Mapping[str, str]
    """Text of the legend -> metric."""
    unit: str = ""
    y_limits: tuple[float, float] | None = None
    is_percent: bool = False


def _one(title: str, metric: str, unit: str = "", *, is_percent: bool = False) -> Curve:
    limits = (0.0, 1.0) if is_percent else None
    return Curve(
        title=title, metrics={title: metric}, unit=unit, y_limits=limits, is_percent=is_percent
    )


def _percentiles(title: str, prefix: str) -> Curve:
    names = {name: f"{prefix}/{name}" for name in ("p50", "p95", "p99")}
    return Curve(title=title, metrics=names, unit="ms")


LEARNING = (
    _one("Return", "train/return_mean", "mean per episode"),
    _one("Episode length", "train/episode_length_mean", "env steps"),
    _one("Approximate KL", "learner/approx_kl"),
    _one("Clip fraction", "learner/clip_fraction", is_percent=True),
    _one("Gradient norm", "learner/grad_norm"),
    _one("Largest ratio", "learner/ratio/max"),
)
SPEED = (
    Curve(
        title="Env steps",
        metrics={"all": "rate/env_steps_per_s", "useful": "rate/useful_env_steps_per_s"},
        unit="per second",
    ),
    _one("Samples", "rate/samples_per_s", "per second"),
    _one("Chunk queries", "rate/chunk_queries_per_s", "per second"),
    _one("Episodes", "rate/episodes_per_s", "per second"),
    _one("Updates", "rate/updates_per_s", "per second"),
    Curve(
        title="Busy",
        metrics={
            role: f"utilisation/{role}/busy_fraction"
            for role in ("simulation", "serving", "learning")
        },
        unit="of wall time",
        y_limits=(0.0, 1.0),
        is_percent=True,
    ),
)
QUEUE = (
    Curve(
        title="Staleness",
        metrics={name: f"queue/staleness/{name}" for name in ("mean", "max", "bound")},
        unit="updates",
    ),
    Curve(
        title="Queue",
        metrics={"ready": "queue/depth", "in flight": "queue/in_flight"},
        unit="trajectories",
    ),
)
SERVING = (
    _percentiles("Latency of a chunk query", "serving/latency_ms"),
    _percentiles("Wait of a chunk query for its batch", "serving/queue_wait_ms"),
    _one("Batch fill", "serving/batch_fill", is_percent=True),
    Curve(
        title="Weights",
        metrics={"publish": "weights/publish_ms", "pull": "weights/pull_ms"},
        unit="ms",
    ),
)


def curves(records: Sequence[Record], specs: Sequence[Curve]) -> list[Html]:
    """Charts over updates; those without data are left out."""
    found = []
    for spec in specs:
        series = {text: _points(records, metric) for text, metric in spec.metrics.items()}
        series = {text: points for text, points in series.items() if _has_data(points)}
        if series:
            found.append(_chart(spec, _merged(series)))
    return found


def overlays(runs: Mapping[str, RunFiles], specs: Sequence[Curve]) -> list[Html]:
    """A chart for every metric, with a line for every run; those without data are left out."""
    found = []
    for spec in specs:
        for text, metric in spec.metrics.items():
            series = {name: _points(run.records, metric) for name, run in runs.items()}
            title = spec.title if len(spec.metrics) == 1 else f"{spec.title}: {text}"
            if any(map(_has_data, series.values())):
                found.append(_chart(spec, series, title))
    return found


def loss_curve(records: Sequence[Record]) -> Curve:
    """All losses of a run, the total first."""
    prefix = "learner/loss/"
    names = {name.removeprefix(prefix) for r in records for name in r if name.startswith(prefix)}
    ordered = sorted(names, key=lambda name: (name != "total", name))
    return Curve(title="Loss", metrics={name: prefix + name for name in ordered})


def success_chart(run: RunFiles) -> Html | None:
    """Success in training and in evaluations, these with their 95 % intervals; None: unknown."""
    series = {"training": _points(run.records, "train/success_rate")}
    evaluated = evaluations(run)
    series["evaluation"] = [(x, y) for x, y, _, _ in evaluated]
    series = {name: points for name, points in series.items() if _has_data(points)}
    if not series:
        return None
    ends = [(x, low, high) for x, _, low, high in evaluated]
    return line_chart(
        series,
        title="Success",
        x_label="update",
        y_label="share of episodes",
        band={"evaluation": ends} if "evaluation" in series else None,
        y_limits=(0.0, 1.0),
        is_percent=True,
    )


def success_overlay(runs: Mapping[str, RunFiles], *, by_time: bool) -> Html:
    """Success in training of several runs, over updates or over time."""
    key, label = ("time_s", "seconds") if by_time else ("update", "update")
    series = {
        name: [
            (float(record[key]), float(record.get("train/success_rate", math.nan)))
            for record in run.records
        ]
        for name, run in runs.items()
    }
    return line_chart(
        series,
        title=f"Success in training by {'time' if by_time else 'update'}",
        x_label=label,
        y_label="share of episodes",
        y_limits=(0.0, 1.0),
        is_percent=True,
    )


def evaluations(run: RunFiles) -> list[tuple[float, float, float, float]]:
    """(update, success, low, high) of every evaluation that the run made, in order."""
    found = {}
    before, after = run.evaluated("before"), run.evaluated("after")
    timed = [(0, before)] if before else []
    timed += [(int(r["update"]), r) for r in run.records if "eval/success_rate" in r]
    timed += [(run.update, after)] if after else []
    for update, values in timed:
        names = ("success_rate", "ci95_low", "ci95_high")
        found[update] = tuple(float(values.get(f"eval/{name}", math.nan)) for name in names)
    return [(float(update), *found[update]) for update in sorted(found)]


def utilisation_chart(activities: Mapping[str, Activity], title: str) -> Html:
    """Who works and who waits for whom, over the whole training time."""
    rows: dict[str, dict[str, float]] = {row: {"busy": 0.0} for row in activities}
    for row, activity in activities.items():
        rows[row]["busy"] = activity.busy_fraction
        for reason, share in activity.waiting_fractions.items():
            if share >= 5e-4:
                rows[row][f"waiting for {reason}"] = share
    return stacked_bars(
        rows, title=title, value_label="of wall time", limits=(0.0, 1.0), is_percent=True
    )


def threads_chart(events: Sequence[Mapping]) -> Html | None:
    """What each thread of a trace did; None without spans."""
    rows = dict(list(thread_times(events).items())[:MAX_THREADS])
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    # Work first, then waiting: bars of threads of a kind then compare from the left.
    names.sort(key=lambda name: (name.startswith("wait"), name == "other"))
    return stacked_bars(rows, title="Time of each thread", value_label="seconds", parts=names)


def staleness_histogram(run: RunFiles) -> Html | None:
    """Of the trajectories consumed, or of the updates' means where these alone are known."""
    bound, counts = run.staleness_bound(), run.staleness_counts()
    if counts:
        values, weights = list(map(float, counts)), list(map(float, counts.values()))
        title, y_label = "Staleness of what was trained on", "trajectories"
    else:
        values, weights = finite(run.records, "queue/staleness/mean"), None
        title, y_label = "Mean staleness of the updates", "updates"
    if not values:
        return None
    marks = {f"bound {bound:g}": bound} if math.isfinite(bound) else {}
    return _integer_histogram(values, title, "staleness (updates)", y_label, weights, marks)


def depth_histogram(records: Sequence[Record]) -> Html | None:
    """Trajectories that waited for the learner when an update ended; None: unknown."""
    values = finite(records, "queue/depth")
    if not values:
        return None
    return _integer_histogram(
        values, "Queue depth at the end of updates", "trajectories ready", "updates", None, {}
    )


def task_chart(columns: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> Html:
    """Success by task.

    Args:
      columns: e.g. "before" -> task -> success.
      tasks: to be shown, in this order.
    """
    values = {
        f"{task} {when}": rates.get(task, math.nan)
        for task in tasks
        for when, rates in columns.items()
    }
    return bar_chart(
        values,
        title="Success by task",
        value_label="share of episodes",
        limits=(0.0, 1.0),
        is_percent=True,
    )


def _integer_histogram(
    values: Sequence[float],
    title: str,
    x_label: str,
    y_label: str,
    weights: Sequence[float] | None,
    marks: Mapping[str, float],
) -> Html:
    """A histogram with a bin for each integer, or for several when there are many."""
    last = math.ceil(max([*values, *marks.values()]))
    width = max(1, math.ceil((last + 1) / 40))
    edges = [i - 0.5 for i in range(0, last + width + 1, width)]
    return histogram(
        values,
        edges,
        title=title,
        x_label=x_label,
        y_label=y_label,
        weights=weights,
        marks=marks,
        x_ticks=list(range(0, last + 1, max(1, math.ceil(last / 10)))),
    )


def _points(records: Sequence[Record], metric: str) -> list[Point]:
    """(update, value) of every record."""
    updates = [float(record["update"]) for record in records]
    return list(zip(updates, values_of(records, metric), strict=True))


def _merged(series: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Series that coincide under a common name: one line would hide the other."""
    found: dict[str, list[Point]] = {}
    for text, points in series.items():
        same = next((name for name in found if repr(found[name]) == repr(points)), None)
        if same is None:
            found[text] = points
        else:
            found = {f"{name} = {text}" if name == same else name: x for name, x in found.items()}
    return found


def _has_data(points: Sequence[Point]) -> bool:
    return any(math.isfinite(y) for _, y in points)


def _chart(spec: Curve, series: Mapping[str, Sequence[Point]], title: str = "") -> Html:
    ys = sorted(y for points in series.values() for _, y in points if math.isfinite(y))
    is_log = ys[0] > 0 and ys[-1] > _LOG_FROM * ys[len(ys) // 2] and not spec.is_percent
    return line_chart(
        series,
        title=title or spec.title,
        x_label="update",
        y_label=spec.unit,
        y_limits=spec.y_limits,
        is_log_y=is_log,
        is_percent=spec.is_percent,
    )
