"""What a process for every program costs: threads, processes and Ray actors with one config.

    python scripts/bench_runtime.py [--config=configs/quickstart.py] [--kinds=local,processes,ray]
        [--repeats=3] [--num_updates=12] [--warmup=3] [--json=FILE] [--config.x=y ...]
    python scripts/bench_runtime.py --show=FILE       # of --json, as a table for docs/benchmarks.md

The kinds take turns, so that a machine that slows down slows all of them. Every run is a command
of its own, without warm start and evaluation. The first `--warmup` updates are not counted, nor
are the last two, when simulators may have nothing left to do. Figures are medians over the
repeats; the ratio of a kind is the median over the repeats of its throughput by that of the first
kind in the same repeat.

  env steps/s    consumed by counted updates, by the time between them
  chunk query    from asking to the answer as the simulator waits for it (spans of trace.json),
                 and as the policy server measures it (serving/latency_ms): the difference between
                 the two is what the way costs
  weights        from `publish` until the slowest server had swapped the version in
  start          from the command to the first update
  memory         proportional set sizes of all processes, the largest sum that was seen
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from run_watch import RunWatch

_ROOT = pathlib.Path(__file__).parents[1]
TARGET = 0.95
"""Throughput of Ray by that of threads which the design is to reach."""
_NUM_LAST = 2
_POLL_S = 0.25
_PSS_S = 5.0
"""Between two sums of memory: they cost a walk over all page tables."""
FIGURES = {
    "env_steps_per_s": ("env steps/s", ".1f"),
    "update_s": ("update, s", ".2f"),
    "query_p50_ms": ("chunk query p50, ms", ".1f"),
    "query_p99_ms": ("chunk query p99, ms", ".1f"),
    "served_p50_ms": ("in the server p50, ms", ".1f"),
    "served_p99_ms": ("in the server p99, ms", ".1f"),
    "weights_ms": ("weights to acknowledged, ms", ".1f"),
    "start_s": ("start to first update, s", ".1f"),
    "pss_mib": ("memory, MiB", ".0f"),
}
"""Figure -> its name in tables and its format."""

Figures = dict[str, float]


def main() -> None:
    """Measures, prints, saves; or shows what was saved."""
    options, overrides = parse(sys.argv[1:])
    if options.show:
        print(markdown(json.loads(options.show.read_text())))
        return
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "config": options.config,
        "overrides": overrides,
        "num_updates": options.num_updates,
        "warmup": options.warmup,
    }
    runs: dict[str, list[Figures]] = {kind: [] for kind in options.kinds}
    for repeat in range(options.repeats):
        # Nobody always runs behind the same one.
        turn = options.kinds[repeat % len(options.kinds) :] + options.kinds[: repeat % len(runs)]
        for kind in turn:
            runs[kind].append(measure(kind, options, overrides))
            shown = (f"{name} {value:.1f}" for name, value in runs[kind][-1].items())
            print(f"{kind:10} {', '.join(shown)}", flush=True)
    report |= {"runs": runs} | compare(runs)
    print(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and overrides of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--kinds", default="local,processes,ray")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="updates")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--show", type=pathlib.Path)
    options, overrides = parser.parse_known_args(arguments)
    wrong = [x for x in overrides if not x.startswith("--config.")]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.kinds = options.kinds.split(",")
    if options.warmup < 1 or options.num_updates < options.warmup + _NUM_LAST + 2:
        parser.error(f"--num_updates must be at least --warmup + {_NUM_LAST + 2}, --warmup 1")
    return options, overrides


def measure(kind: str, options: argparse.Namespace, overrides: Sequence[str]) -> Figures:
    """One run."""
    with (
        tempfile.TemporaryDirectory(prefix="bench_") as own,
        tempfile.TemporaryDirectory(prefix="tmp_") as temporary,
    ):
        workdir = pathlib.Path(own) / "run"
        command = [
            *(sys.executable, "-m", "jaxvla.main", f"--config={options.config}"),
            *(f"--workdir={workdir}", f"--config.runtime.kind={kind}"),
            f"--config.learning.num_updates={options.num_updates}",
            "--config.warm_start.num_steps=0",
            "--config.warm_start.num_grounding_steps=0",
            "--config.evaluation.num_episodes=0",
            f"--config.checkpoint.interval={options.num_updates}",
            *overrides,
        ]
        begin_s = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=os.environ | {"TMPDIR": temporary},
            stdout=subprocess.DEVNULL,
        )
        watch = RunWatch(process.pid, workdir, pathlib.Path(temporary))
        try:
            start_s, pss_mib = observe(process, watch, workdir / "metrics.jsonl", begin_s)
        finally:
            process.kill()
            process.wait()
            watch.close()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
        records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        trace = json.loads((workdir / "trace.json").read_text())["traceEvents"]
    counted = records[options.warmup - 1 : len(records) - _NUM_LAST]
    share = options.warmup / len(records)
    found = record_figures(counted) | query_figures(trace, share)
    return found | {"start_s": start_s, "pss_mib": pss_mib}


def observe(
    process: "subprocess.Popen[bytes]", watch: RunWatch, metrics: pathlib.Path, begin_s: float
) -> tuple[float, float]:
    """Until the run has ended: seconds to its first update, and its largest memory in MiB."""
    start_s, pss_mib, due_s = float("nan"), 0.0, begin_s
    while process.poll() is None:
        if start_s != start_s and metrics.is_file() and "\n" in metrics.read_text():
            start_s = time.monotonic() - begin_s
        if time.monotonic() >= due_s:
            pss_mib, due_s = max(pss_mib, watch.pss_mib()), time.monotonic() + _PSS_S
        time.sleep(_POLL_S)
    return start_s, pss_mib


def record_figures(records: Sequence[Mapping[str, Any]]) -> Figures:
    """Of metrics.jsonl.

    Args:
      records: of counted updates, and before them the one that the time begins with.
    """
    after = records[1:]
    spans_s = [b["time_s"] - a["time_s"] for a, b in itertools.pairwise(records)]
    # A rate is over the window of its record.
    steps = sum(x["rate/env_steps_per_s"] * s for x, s in zip(after, spans_s, strict=True))
    return {
        "env_steps_per_s": steps / sum(spans_s),
        "update_s": statistics.median(spans_s),
        "served_p50_ms": _median(after, "serving/latency_ms/p50"),
        "served_p99_ms": _median(after, "serving/latency_ms/p99"),
        "weights_ms": _median(after, "weights/publish_ms") + _median(after, "weights/pull_ms"),
    }


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over the records that know it: what is not finite is written as null."""
    known = [value for x in records if (value := x.get(name)) is not None]
    return statistics.median(known) if known else float("nan")


def query_figures(trace: Sequence[Mapping[str, Any]], skipped: float) -> Figures:
    """Of the spans in which simulators wait for an answer.

    Args:
      trace: events.
      skipped: share of them at the beginning that is not counted, in [0, 1).
    """
    waits = sorted(
        (x["ts"], x["dur"] / 1e3)
        for x in trace
        if x["name"] == "wait" and x.get("args", {}).get("on") == "inference"
    )
    times_ms = [dur for _, dur in waits[int(skipped * len(waits)) :]]
    p50, p99 = np.percentile(times_ms, (50, 99)) if times_ms else (float("nan"),) * 2
    return {"query_p50_ms": float(p50), "query_p99_ms": float(p99)}


def compare(runs: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Medians by kind, and each kind's throughput by that of the first kind."""
    kinds = list(runs)
    rates = {kind: [run["env_steps_per_s"] for run in runs[kind]] for kind in kinds}
    ratios = {
        kind: [own / first for own, first in zip(rates[kind], rates[kinds[0]], strict=True)]
        for kind in kinds
    }
    return {
        "medians": {
            kind: {name: statistics.median(run[name] for run in runs[kind]) for name in FIGURES}
            for kind in kinds
        },
        "ratios": {kind: statistics.median(ratios[kind]) for kind in kinds},
        "ratio_ranges": {kind: [min(ratios[kind]), max(ratios[kind])] for kind in kinds},
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The table, and whether the target is reached."""
    medians, ratios = report["medians"], report["ratios"]
    kinds = list(medians)
    lines = [f"| {report['config']} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, (title, form) in FIGURES.items():
        lines.append(f"| {title} | {' | '.join(format(medians[x][name], form) for x in kinds)} |")
    ranges = {x: "{:.3f} to {:.3f}".format(*report["ratio_ranges"][x]) for x in kinds}
    spread = (f"{ratios[x]:.3f} ({ranges[x]})" for x in kinds)
    lines.append(f"| throughput by that of {kinds[0]} | {' | '.join(spread)} |")
    if "ray" in kinds and kinds[0] == "local":
        verdict = "reached" if ratios["ray"] >= TARGET else "missed"
        lines += ["", f"Target, ray at {TARGET:.0%} of local: {verdict}, {ratios['ray']:.1%}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
