"""report.html: what a run did, on one page that opens anywhere.

Made of the files of a work directory alone, so it can be written for any run at any time: at the
end of a job, after a kill, while a run goes on.
"""

import json
import math
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvla.telemetry import get_logger, html, run_charts
from jaxvla.telemetry.html import Html, Section
from jaxvla.telemetry.progress import bottleneck, format_duration, format_rate
from jaxvla.telemetry.run_files import (
    RunFiles,
    finite,
    number,
    read_run,
    read_trace,
    steady_median,
    thread_times,
)
from jaxvla.telemetry.writers import replacing

REPORT = "report.html"

_LOG = get_logger("runtime")
"""So that warnings end in logs/runtime.log of a training run."""

_MAX_BARS = 12
"""Tasks with bars of their own; more are in the table alone."""

_WORRIES = ("serving/recompiles", "serving/refused", "serving/expired")
"""Totals that are no faults by name but should be zero."""


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html of a run; returns its path.

    Args:
      workdir: with metrics.jsonl; config.json, summary.json, eval.json, trace.json and videos/
        add to the report when they are there.

    Raises:
      ValueError: there is no metrics.jsonl, or a file is not what it should be.
      OSError: the report cannot be written.
    """
    run = read_run(workdir)
    path = workdir / REPORT
    with replacing(path) as file:
        file.write(html.page(f"{run.name}: run report", sections(run)))
    return path


def try_to_write_report(workdir: pathlib.Path) -> None:
    """`write_report` at the end of a job, which it never fails: what goes wrong is logged."""
    try:
        write_report(workdir)
    except Exception:  # a report is not worth a run
        _LOG.warning("%s was not written", workdir / REPORT, exc_info=True)


def sections(run: RunFiles) -> list[Section]:
    """The parts of the report; without data for it, a part has no blocks and is not shown."""
    success = run_charts.success_chart(run)
    losses = run_charts.curves(run.records, [run_charts.loss_curve(run.records)])
    learning = [*([success] if success else []), *losses]
    learning += run_charts.curves(run.records, run_charts.LEARNING)
    queue = run_charts.curves(run.records, run_charts.QUEUE)
    histograms = (
        run_charts.staleness_histogram(run),
        run_charts.depth_histogram(run.records),
    )
    queue += [chart for chart in histograms if chart is not None]
    return [
        Section(title="", blocks=_headline(run)),
        Section(title="Learning", blocks=_grid(learning)),
        Section(title="Success by task", blocks=_tasks(run)),
        Section(title="Speed", blocks=_grid(run_charts.curves(run.records, run_charts.SPEED))),
        Section(title="Who waits for whom", blocks=_utilisation(run)),
        Section(title="Queue and staleness", blocks=_grid(queue)),
        Section(title="Serving and weights", blocks=_serving(run)),
        Section(title="Faults", blocks=_faults(run)),
        Section(title="Videos", blocks=_videos(run)),
        Section(title="Config and versions", blocks=_provenance(run)),
    ]


def success_text(evaluated: Mapping[str, float] | None) -> str:
    """Success with its interval, e.g. "0.44 [0.38, 0.50] of 256"."""
    if evaluated is None:
        return "not evaluated"
    names = ("success_rate", "ci95_low", "ci95_high")
    rate, low, high = (evaluated.get(f"eval/{name}", math.nan) for name in names)
    return f"{rate:.2f} [{low:.2f}, {high:.2f}] of {evaluated.get('eval/episodes', 0):.0f}"


def staleness_text(run: RunFiles) -> str:
    """Largest staleness against its bound."""
    largest, bound = run.max_staleness(), run.staleness_bound()
    if not math.isfinite(bound):
        return "-"
    return f"max {largest:g}, bound {bound:g}" if math.isfinite(largest) else f"bound {bound:g}"


def outcome_text(run: RunFiles) -> str:
    """How the run ended; without a summary it was killed or goes on."""
    return run.summary.get("outcome") or "no summary yet"


def _headline(run: RunFiles) -> list[Html]:
    planned = run.config.get("learning", {}).get("num_updates")
    is_supervised = any("rate/samples_per_s" in record for record in run.records)
    if is_supervised:
        planned = run.config.get("finetune", {}).get("num_steps")
    rate = "samples_per_s" if is_supervised else "env_steps_per_s"
    steady = steady_median(run.records, f"rate/{rate}")
    seconds = [number(run.summary.get("time_s")), *finite(run.records[-1:], "time_s")]
    values = {
        "outcome": outcome_text(run),
        "updates": f"{run.update} of {planned}" if planned else str(run.update),
        "wall time": format_duration(next(filter(math.isfinite, seconds), math.nan)),
        "success before": success_text(run.evaluated("before")),
        "success after": success_text(run.evaluated("after")),
        "samples/s" if is_supervised else "env steps/s": format_rate(steady),
        "staleness": staleness_text(run),
    }
    if is_supervised:
        del values["staleness"]
    blocks = [html.facts(values)]
    if detail := run.summary.get("detail"):
        blocks.append(html.preformatted(detail))
    blocks.append(html.paragraph(f"Bottleneck: {bottleneck(run.activities())}."))
    if run.summary.get("ledger_closes") is False:
        blocks.append(html.paragraph("The counts of the queue do not add up: data was lost."))
    what = "the median over the updates after the first fifth"
    blocks.append(html.note(f"Brackets are Wilson 95 % intervals. The speed is {what}."))
    return blocks


def _tasks(run: RunFiles) -> list[Html]:
    """Success by task before, after, and of the evaluate job, the env's judge included."""
    found = {"before": run.evaluated("before"), "after": run.evaluated("after")}
    if stored := run.evaluation:
        found[f"evaluate job, update {stored.get('update')}"] = _numbers(stored)
        if judge := stored.get("judge"):
            found[f"judge {judge.get('env')}"] = _numbers(judge)
    prefix = "eval/success_rate/"
    columns = {
        when: {name.removeprefix(prefix): x for name, x in values.items() if prefix in name}
        for when, values in found.items()
        if values is not None
    }
    tasks = list(dict.fromkeys(task for rates in columns.values() for task in rates))
    if not tasks:
        return []
    rows = [
        [task, *(_rate(rates.get(task, math.nan)) for rates in columns.values())] for task in tasks
    ]
    rows.append(["all tasks", *(success_text(found[when]) for when in columns)])
    blocks = [html.table(["task", *columns], rows)]
    if len(tasks) * len(columns) <= 2 * _MAX_BARS:
        blocks.insert(0, html.chart_grid([run_charts.task_chart(columns, tasks)]))
    return blocks


def _utilisation(run: RunFiles) -> list[Html]:
    activities = run.activities()
    charts = []
    if activities:
        charts.append(run_charts.utilisation_chart(activities, "Busy and waiting"))
    events = read_trace(run.workdir)
    threads = run_charts.threads_chart(events)
    if threads is not None:
        charts.append(threads)
    blocks = _grid(charts)
    if (run.workdir / "trace.json").is_file():
        blocks.append(html.link("trace.json", "trace.json"))
        blocks.append(html.link("https://ui.perfetto.dev", "Open it here to see every span"))
        hidden = len(thread_times(events)) - run_charts.MAX_THREADS
        if not events:
            blocks.append(html.note("The trace is too large to be drawn here."))
        elif hidden > 0:
            blocks.append(html.note(f"{hidden} more threads are in the trace."))
    return blocks


def _serving(run: RunFiles) -> list[Html]:
    blocks = _grid(run_charts.curves(run.records, run_charts.SERVING))
    rows = []
    for text, prefix in (
        ("latency of a chunk query", "serving/latency_ms"),
        ("wait for its batch", "serving/queue_wait_ms"),
    ):
        values = [steady_median(run.records, f"{prefix}/{p}") for p in ("p50", "p95", "p99")]
        if any(map(math.isfinite, values)):
            rows.append([text, *(_rate(value, 1) for value in values)])
    if rows:
        caption = "Medians over the updates after the first fifth, in milliseconds"
        blocks.append(html.table(["", "p50", "p95", "p99"], rows, caption=caption))
    return blocks


def _faults(run: RunFiles) -> list[Html]:
    """Counters that should be zero and are not."""
    last: dict[str, Any] = {**(run.records[-1] if run.records else {})}
    totals = last | run.summary.get("totals", {})
    rows = [
        [name, f"{number(count):g}"]
        for name, count in sorted(totals.items())
        if count and (name.startswith(("faults/", "queue/dropped")) or name in _WORRIES)
    ]
    return [html.table(["counter", "total"], rows) if rows else html.paragraph("None.")]


def _videos(run: RunFiles) -> list[Html]:
    return [html.link(urllib.parse.quote(str(path)), str(path)) for path in run.videos]


def _provenance(run: RunFiles) -> list[Html]:
    provenance = run.provenance
    if not provenance:
        return []
    versions = {"python": provenance.get("python"), **provenance.get("versions", {})}
    rows = [[name, str(version)] for name, version in versions.items() if version]
    rows.append(["devices", ", ".join(provenance.get("devices") or [])])
    rows.append(["git commit", provenance.get("git_commit") or "unknown"])
    config = html.preformatted(json.dumps(run.config, indent=2))
    return [html.table(["", ""], rows), html.folded("the whole config", config)]


def _grid(charts: Sequence[Html]) -> list[Html]:
    return [html.chart_grid(charts)] if charts else []


def _numbers(stored: Mapping[str, Any]) -> dict[str, float]:
    """The `eval/*` values of eval.json or of its judge."""
    return {name: number(x) for name, x in stored.items() if name.startswith("eval/")}


def _rate(value: float, decimals: int = 2) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "-"
