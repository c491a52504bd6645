"""Runs side by side.

    python -m jaxvla.compare RUN RUN [RUN ...] [--out=compare.html]

RUN is a work directory. Prints a table of what came out and of the settings that differ, and
writes a page with the runs' curves over each other. Speeds are medians over the updates after the
first fifth; "x1.20" is the ratio to the first run.

Exit codes: 0 compared, 2 a directory holds no metrics to compare, or the page cannot be written.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxvla.config import UsageError
from jaxvla.telemetry import html, run_charts
from jaxvla.telemetry.activity import Activity
from jaxvla.telemetry.html import Section
from jaxvla.telemetry.progress import format_duration, format_rate
from jaxvla.telemetry.report import outcome_text, staleness_text, success_text
from jaxvla.telemetry.run_files import (
    RunFiles,
    finite,
    number,
    read_run,
    steady_median,
    values_of,
)
from jaxvla.telemetry.writers import replacing

EXIT_COMPARED, EXIT_USAGE = 0, 2

Table = list[list[str]]
"""Rows of a name, then a cell for every run."""

_MAX_CELL = 44
"""Columns of a cell on the screen."""


def main(argv: Sequence[str]) -> int:
    """Compares; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxvla.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("compare.html"))
    options = parser.parse_args(argv[1:])
    try:
        runs = read_runs(options.runs)
        text, page = compare(runs)
        try:
            with replacing(options.out) as file:
                file.write(page)
        except OSError as error:
            raise UsageError(f"--out={options.out}: {error}. Fix: --out=FILE.html") from error
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    sys.stdout.write(f"{text}\ncurves in {options.out}\n")
    return EXIT_COMPARED


def read_runs(workdirs: Sequence[pathlib.Path]) -> dict[str, RunFiles]:
    """Shortest distinct name -> run.

    Raises:
      UsageError: fewer than two directories, one given twice, or one without metrics.
    """
    if len(workdirs) < 2:
        raise UsageError("one run is given, want two or more. Fix: name another work directory")
    found: dict[pathlib.Path, RunFiles] = {}
    for workdir in workdirs:
        whole = workdir.expanduser().absolute()
        if whole in found:
            raise UsageError(f"{workdir} is given twice. Fix: name another work directory")
        try:
            found[whole] = read_run(whole)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not found[whole].records:
            raise UsageError(
                f"{workdir / 'metrics.jsonl'} holds no record. Fix: wait for the first update"
            )
    return dict(zip(_names(list(found)), found.values(), strict=True))


def compare(runs: Mapping[str, RunFiles]) -> tuple[str, str]:
    """The table for the screen and the page, the same for the same runs.

    Args:
      runs: name -> run.
    """
    results, settings = result_table(runs), config_differences(runs)
    settings_title = "settings that differ" if settings else "no settings differ"
    lines = [
        *_aligned([["", *runs], *results]),
        "",
        settings_title,
        *_aligned([[f"  {name}", *cells] for name, *cells in settings]),
    ]
    header = ["", *runs]
    blocks = [html.table(header, results)]
    blocks.append(html.note("Brackets are Wilson 95 % intervals; ratios are to the first run."))
    tables = [html.table(header, settings)] if settings else [html.paragraph("None.")]
    success = [run_charts.success_overlay(runs, by_time=by_time) for by_time in (False, True)]
    if not any(finite(run.records, "train/success_rate") for run in runs.values()):
        success = []
    groups = {
        "Learning": [*success, *run_charts.overlays(runs, _learning(runs))],
        "Speed": run_charts.overlays(runs, run_charts.SPEED),
        "Who waits for whom": [run_charts.utilisation_chart(_stages(runs), "Busy and waiting")],
        "Queue and staleness": run_charts.overlays(runs, run_charts.QUEUE),
        "Serving and weights": run_charts.overlays(runs, run_charts.SERVING),
    }
    sections = [
        Section(title="", blocks=blocks),
        Section(title="Settings that differ", blocks=tables),
        *(
            Section(title=title, blocks=[html.chart_grid(charts)])
            for title, charts in groups.items()
            if charts
        ),
    ]
    return "\n".join(lines), html.page(" vs ".join(runs), sections)


def result_table(runs: Mapping[str, RunFiles]) -> Table:
    """What came out of each run; rows that no run has a value for are left out."""
    every = list(runs.values())
    rows = [
        ["outcome", *map(outcome_text, every)],
        ["updates", *(str(run.update) for run in every)],
        ["wall time", *(format_duration(_wall_s(run)) for run in every)],
        ["success before", *(success_text(run.evaluated("before")) for run in every)],
        ["success after", *(success_text(run.evaluated("after")) for run in every)],
        _success_in_training(every),
        _ratios("env steps/s", every, "rate/env_steps_per_s"),
        _ratios("samples/s", every, "rate/samples_per_s"),
        _ratios("updates/s", every, "rate/updates_per_s"),
    ]
    roles = dict.fromkeys(role for run in every for role in run.activities())
    rows += [
        [role, *(_activity_text(run.activities().get(role)) for run in every)] for role in roles
    ]
    rows += [
        ["staleness", *map(staleness_text, every)],
        ["staleness, mean", *_cells(every, _mean_staleness, lambda value: f"{value:.2f}")],
    ]
    for text, percent in (("query latency p50", "p50"), ("query latency p99", "p99")):
        rows.append(_medians(text, every, f"serving/latency_ms/{percent}", "{:.1f} ms"))
    return [row for row in rows if set(row[1:]) - {"-", "not evaluated"}]


def config_differences(runs: Mapping[str, RunFiles]) -> Table:
    """Settings, versions and devices in which the runs differ; "-" where a run has none."""
    flat = [dict(_flat(run.provenance)) for run in runs.values()]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = [[name, *(values.get(name, "-") for values in flat)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """("section.field", text) of nested dicts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) or '""'


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Last parts of the paths, as few as tell them apart."""
    for count in range(1, max(len(path.parts) for path in workdirs) + 1):
        names = ["/".join(path.parts[-count:]) for path in workdirs]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"{workdirs} are not distinct")


def _learning(runs: Mapping[str, RunFiles]) -> list[run_charts.Curve]:
    """Losses of any run, then what else tells of learning."""
    every = [record for run in runs.values() for record in run.records]
    return [run_charts.loss_curve(every), *run_charts.LEARNING]


def _stages(runs: Mapping[str, RunFiles]) -> dict[str, Activity]:
    """ "role, run" -> activity; a role's bars stand together."""
    found = {name: run.activities() for name, run in runs.items()}
    roles = dict.fromkeys(role for activities in found.values() for role in activities)
    return {
        f"{role}, {name}": activities[role]
        for role in roles
        for name, activities in found.items()
        if role in activities
    }


def _wall_s(run: RunFiles) -> float:
    stated = number(run.summary.get("time_s"))
    return stated if math.isfinite(stated) else float(run.records[-1].get("time_s", math.nan))


def _mean_staleness(run: RunFiles) -> float:
    """Over consumed trajectories, of which every update has the same number."""
    values = [x for x in values_of(run.records, "queue/staleness/mean") if math.isfinite(x)]
    return sum(values) / len(values) if values else math.nan


def _success_in_training(every: Sequence[RunFiles]) -> list[str]:
    return _medians("success in training", every, "train/success_rate", "{:.2f}")


def _medians(text: str, every: Sequence[RunFiles], metric: str, spec: str) -> list[str]:
    return [text, *_cells(every, lambda run: steady_median(run.records, metric), spec.format)]


def _ratios(text: str, every: Sequence[RunFiles], metric: str) -> list[str]:
    """Steady medians, and what they are of the first run's."""
    values = [steady_median(run.records, metric) for run in every]
    cells = [format_rate(value) for value in values]
    for index, value in enumerate(values[1:], start=1):
        ratio = value / values[0] if values[0] else math.nan
        cells[index] += f" x{ratio:.2f}" if math.isfinite(ratio) else ""
    return [text, *cells]


def _cells(
    every: Sequence[RunFiles], value: Callable[[RunFiles], float], show: Callable[[float], str]
) -> list[str]:
    values = map(value, every)
    return [show(x) if math.isfinite(x) else "-" for x in values]


def _activity_text(activity: Activity | None) -> str:
    """E.g. "65% busy, waits inference 34%"."""
    if activity is None:
        return "-"
    waits = [f", waits {reason} {100 * x:.0f}%" for reason, x in activity.waiting_fractions.items()]
    return f"{100 * activity.busy_fraction:.0f}% busy{waits[0] if waits else ''}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns; long cells lose their end."""
    short = [
        [row[0], *(x if len(x) <= _MAX_CELL else f"{x[: _MAX_CELL - 3]}..." for x in row[1:])]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*short, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in short
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
