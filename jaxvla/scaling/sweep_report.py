"""report.html of a sweep: which layout wins, by how much, and what limits it. No jax."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxvla.layout import ROLES, parse_layout
from jaxvla.scaling.sweep_results import (
    THROUGHPUT,
    TrialResult,
    conclusions,
    limit_text,
    rank,
    waits,
)
from jaxvla.telemetry.charts import bar_chart, line_chart, scatter, stacked_bars
from jaxvla.telemetry.html import (
    Html,
    Section,
    chart_grid,
    facts,
    note,
    page,
    paragraph,
    preformatted,
    table,
)
from jaxvla.telemetry.progress import format_duration, format_rate

_ANY = "best of all"


def sweep_page(
    results: Sequence[TrialResult], *, title: str, about: Mapping[str, Any], command: str
) -> str:
    """The whole page.

    Args:
      results: of all trials.
      title: of the page.
      about: pruned and impossible trials, as in sweep.json.
      command: that made the sweep.
    """
    ranked = rank(results)
    return page(
        title,
        [
            Section(title="", blocks=_head(results, ranked, command)),
            Section(title="Throughput", blocks=_throughput(ranked)),
            Section(title="Speed-up and efficiency", blocks=_scaling(ranked)),
            Section(title="What every role does", blocks=_utilisation(ranked)),
            Section(title="Staleness and latency", blocks=_staleness(ranked)),
            Section(title="All trials", blocks=[_table(ranked)] if ranked else []),
            Section(title="What was not measured", blocks=list(_unmeasured(results, about))),
        ],
    )


def _head(
    results: Sequence[TrialResult], ranked: Sequence[TrialResult], command: str
) -> list[Html]:
    runs = [run for result in results for run in result.repeats]
    best = {"Fastest": ranked[0].title} if ranked else {}
    shown = {
        **best,
        "Trials": str(len(results)),
        "Failed": str(sum(x.failed is not None for x in results)),
        "Runs": str(len(runs)),
        "Time measured": format_duration(math.fsum(run.get("measured_s", 0.0) for run in runs)),
    }
    lines = [paragraph(text) for text in conclusions(results)]
    return [facts(shown), *lines, preformatted(command)]


def _throughput(ranked: Sequence[TrialResult]) -> list[Html]:
    if not ranked:
        return []
    chart = bar_chart(
        {x.title: x.median(THROUGHPUT) for x in ranked},
        title="Throughput by layout",
        value_label="env steps per second, median of the repeats",
        intervals={x.title: x.spread(THROUGHPUT) for x in ranked},
    )
    text = (
        "Env steps are control steps that the learner has consumed. Whiskers are the slowest and "
        "the fastest repeat. Trials take turns, so what else the machine does reaches all alike."
    )
    return [chart_grid([chart]), note(text)]


def scaling_curves(ranked: Sequence[TrialResult]) -> dict[str, list[tuple[int, TrialResult]]]:
    """Placement, and all of them together -> (number of devices, fastest trial of it), for those
    that were tried with several numbers of devices.

    Args:
      ranked: the fastest first.
    """
    best: dict[str, dict[int, TrialResult]] = defaultdict(dict)
    for result in ranked:
        for name in (_ANY, parse_layout(result.layout).placement):
            best[name].setdefault(result.num_devices, result)
    return {name: sorted(x.items()) for name, x in best.items() if len(x) > 1}


def _scaling(ranked: Sequence[TrialResult]) -> list[Html]:
    """Relative to the fastest trial of the fewest devices."""
    curves = scaling_curves(ranked)
    if not curves:
        return []
    fewest, first = curves[_ANY][0]
    unit = first.median(THROUGHPUT)
    speedup = {
        name: [(float(n), x.median(THROUGHPUT) / unit) for n, x in curve]
        for name, curve in curves.items()
    }
    ideal = [(float(n), n / fewest) for n, _ in curves[_ANY]]
    spreads = [(float(n), x.spread(THROUGHPUT)) for n, x in curves[_ANY]]
    low_high = [(n, low / unit, high / unit) for n, (low, high) in spreads]
    ticks = [float(n) for n, _ in curves[_ANY]]
    common: Any = {"x_label": "devices", "x_ticks": ticks, "is_log_x": True}
    charts = [
        line_chart(
            {**speedup, "ideal": ideal},
            title="Speed-up",
            y_label=f"throughput over that of {fewest} devices",
            band={_ANY: low_high},
            **common,
        ),
        line_chart(
            {name: [(n, y * fewest / n) for n, y in points] for name, points in speedup.items()},
            title="Efficiency",
            y_label="speed-up per device",
            y_limits=(0.0, 1.0),
            is_percent=True,
            **common,
        ),
    ]
    text = (
        f"All relative to {first.title}, the fastest of {fewest} devices. The batch is the same "
        "for all, so this is strong scaling. Devices that are forced out of one machine's CPUs "
        "share its cores: their curves say what splitting costs, not what more hardware gives."
    )
    return [chart_grid(charts), note(text)]


def _utilisation(ranked: Sequence[TrialResult]) -> list[Html]:
    if not ranked:
        return []
    charts = []
    for role in ROLES:
        rows = {x.title: _shares(x, role) for x in ranked}
        charts.append(
            stacked_bars(
                rows,
                title=f"{role.capitalize()}",
                value_label="share of the time measured, medians of the repeats",
                limits=(0.0, 1.0),
                is_percent=True,
            )
        )
    text = (
        "A role is busy while its threads work or wait for their devices: on devices that roles "
        "share, that holds the time in which another role computes."
    )
    return [chart_grid(charts), note(text)]


def _shares(result: TrialResult, role: str) -> dict[str, float]:
    """What a role does -> its share of the time. Of several repeats the medians need not add up to
    1, so they are made to."""
    shares = {"busy": result.median(f"utilisation/{role}/busy_fraction")}
    shares |= {f"waits for {reason}": share for reason, share in waits(result, role).items()}
    whole = math.fsum(shares.values())
    return {name: share / whole for name, share in shares.items()} if whole else shares


def _staleness(ranked: Sequence[TrialResult]) -> list[Html]:
    if not ranked:
        return []
    latency = bar_chart(
        {x.title: x.median("chunk_latency_ms_p50") for x in ranked},
        title="Latency of a chunk query",
        value_label="ms that an env group waits, p50; the whisker ends at p99",
        intervals={
            x.title: (x.median("chunk_latency_ms_p50"), x.median("chunk_latency_ms_p99"))
            for x in ranked
        },
    )
    return [chart_grid([*_throughput_by_staleness(ranked), latency])]


def _throughput_by_staleness(ranked: Sequence[TrialResult]) -> Iterator[Html]:
    """Nothing where all trials have the same."""
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for x in ranked:
        where = x.median("staleness_mean"), x.median(THROUGHPUT)
        points[parse_layout(x.layout).placement].append((*where, x.title))
    if len({x.median("staleness_mean") for x in ranked}) > 1:
        yield scatter(
            points,
            title="Staleness against throughput",
            x_label="mean staleness of what the learner consumes, updates",
            y_label="env steps per second",
        )


def _table(ranked: Sequence[TrialResult]) -> Html:
    rows = []
    for x in ranked:
        low, high = x.spread(THROUGHPUT)
        rows.append(
            [
                x.title,
                format_rate(x.median(THROUGHPUT)),
                f"{format_rate(low)} to {format_rate(high)}",
                format_rate(x.median("useful_env_steps_per_s")),
                f"{x.median('staleness_mean'):.2f}",
                f"{x.median('staleness_max'):.0f}",
                f"{x.median('peak_rss_mib'):.0f}",
                f"{x.spread('compile_s')[1]:.1f}",
                limit_text(x),
            ]
        )
    header = ["trial", "env steps/s", "spread", "useful/s", "staleness", "max", "peak MiB"]
    caption = (
        "Medians of the repeats; peak resident memory of the process; the longest compilation, "
        "which JAX's cache makes shorter in later repeats."
    )
    return table([*header, "compile s", "limit"], rows, caption=caption)


def _unmeasured(results: Sequence[TrialResult], about: Mapping[str, Any]) -> Iterator[Html]:
    failed = [[x.title, x.failed] for x in results if x.failed is not None]
    if failed:
        yield table(["failed trial", "reason"], failed)
    pruned = [
        [f"{number}", f"{count}", reason]
        for count, reasons in about.get("pruned", {}).items()
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    if pruned:
        caption = "Layouts that were not tried, as they cannot work or are not worth it"
        yield table(["layouts", "of devices", "reason"], pruned, caption=caption)
    impossible = [[title, why] for title, why in about.get("impossible", {}).items()]
    if impossible:
        yield table(["settings that cannot work together", "why"], impossible)
