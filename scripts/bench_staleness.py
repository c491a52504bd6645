"""What staleness costs in learning, and what each correction wins back, on the quickstart's env.

    python scripts/bench_staleness.py [--seeds 0 1 2] [--staleness 0 1 2 4 8] [--kinds none ...]
                                      [--num_updates 24]

For every seed one warm start is made; all runs of the seed go on from its checkpoint, so they
differ in staleness and correction alone. Staleness S is `schedule.max_staleness=S` with
`schedule.publish_interval=S + 1`: servers get every (S + 1)th version, and what is consumed is
up to S versions old. Without that interval a simulator that is slower than the learner, as here,
never gets more than one version behind. What it really was is in the table.

A run that is finished, in `--workdir` or in `--json`, is not made again: the script may be stopped,
and asked for more later, also with the published figures alone. It prints a table and writes
`--json` and `--plot` from all finished runs.
Two CPU cores need about three minutes for a run.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from jaxvla.algorithms.corrections import CORRECTIONS

_ROOT = pathlib.Path(__file__).parents[1]
_LAST = 6
"""Updates at the end whose training success is averaged."""
Cell = tuple[str, int]
"""(correction, staleness)."""
Runs = dict[tuple[str, int, int], dict[str, Any]]
"""(correction, staleness, seed) -> figures."""


def main() -> None:
    """Makes what is missing, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="*", default=list(CORRECTIONS), choices=list(CORRECTIONS))
    parser.add_argument("--num_updates", type=int, default=24)
    parser.add_argument("--workdir", type=pathlib.Path, default=_ROOT / "runs" / "staleness")
    parser.add_argument("--json", type=pathlib.Path, default=_ROOT / "bench_staleness.json")
    parser.add_argument("--plot", type=pathlib.Path, default=_ROOT / "bench_staleness.svg")
    options = parser.parse_args()
    known = published(options.json, options.num_updates)
    for seed in options.seeds:
        for staleness in options.staleness:
            for kind in options.kinds if staleness else ["none"]:  # at 0 all are plain PPO
                if (kind, staleness, seed) not in known:
                    run(options.workdir, seed, kind, staleness, options.num_updates)
    known |= finished(options.workdir, options.num_updates)
    report = {"machine": machine(), "num_updates": options.num_updates}
    report["runs"] = [known[key] for key in sorted(known)]
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    cells = by_cell(report["runs"])
    show(cells)
    plot(cells, options.plot)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("jax", "mujoco", "mujoco-mjx")
    return {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def train(workdir: pathlib.Path, seed: int, *overrides: str) -> None:
    """Runs or continues the quickstart; its log goes beside the work directory."""
    command = [
        *(sys.executable, "-m", "jaxvla.main", "--config=configs/quickstart.py"),
        *(f"--workdir={workdir}", f"--config.seed={seed}", "--config.evaluation.num_videos=0"),
        *(f"--config.{override}" for override in overrides),
    ]
    with open(f"{workdir}.log", "a") as log:
        code = subprocess.run(command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"exit code {code}, see {log.name}")


def start(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """The checkpoint from which the runs of a seed go on: after the warm start."""
    begun = workdir / f"start_seed_{seed}"
    checkpoint = begun / "checkpoints" / "0"
    if not (begun / "summary.json").exists():
        begun.mkdir(parents=True, exist_ok=True)
        train(begun, seed, "learning.num_updates=1")
    return checkpoint


def run(workdir: pathlib.Path, seed: int, kind: str, staleness: int, num_updates: int) -> None:
    """One run, unless it is there."""
    where = workdir / f"{kind}_{staleness}_seed_{seed}"
    if outcome(where, num_updates) is not None:
        return
    if not where.exists():
        checkpoint = start(workdir, seed)
        copy = where.with_suffix(".new")  # a copy that was cut short is no work directory
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy / "checkpoints" / "0")
        copy.rename(where)
    print(f"seed {seed}, staleness {staleness}, {kind} ...", flush=True)
    train(
        where,
        seed,
        f"schedule.max_staleness={staleness}",
        f"schedule.publish_interval={staleness + 1}",
        f"algorithm.correction.kind={kind}",
        f"learning.num_updates={num_updates}",
    )


def outcome(where: pathlib.Path, num_updates: int) -> dict[str, Any] | None:
    """Figures of a run that made all its updates."""
    path = where / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    if summary["outcome"] != "finished" or summary["update"] != num_updates:
        return None
    lines = (where / "metrics.jsonl").read_text().splitlines()
    records = [x for x in map(json.loads, lines) if "queue/staleness/mean" in x]
    return {
        "success": summary["evaluation_after"]["eval/success_rate"],
        "episodes": summary["evaluation_after"]["eval/episodes"],
        "training_success": statistics.mean(x["train/success_rate"] for x in records[-_LAST:]),
        "staleness_mean": statistics.mean(x["queue/staleness/mean"] for x in records),
        "staleness_max": max(x["queue/staleness/max"] for x in records),
    }


def published(path: pathlib.Path, num_updates: int) -> Runs:
    """What an earlier report has, if it is of as many updates."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if report["num_updates"] != num_updates:
        raise SystemExit(f"{path} is of {report['num_updates']} updates: name another --json")
    return {(one["kind"], one["staleness"], one["seed"]): one for one in report["runs"]}


def finished(workdir: pathlib.Path, num_updates: int) -> Runs:
    """All runs in the work directory that made all their updates."""
    runs: Runs = {}
    for where in sorted(workdir.glob("*_seed_*/")):
        kind, _, rest = where.name.partition("_")
        figures = outcome(where, num_updates) if kind in CORRECTIONS else None
        if figures is not None:
            staleness, seed = int(rest.split("_")[0]), int(rest.split("_")[2])
            key = {"kind": kind, "staleness": staleness, "seed": seed}
            runs[kind, staleness, seed] = key | figures
    return runs


def by_cell(runs: Sequence[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """Runs of all seeds together; staleness 0 counts for every correction."""
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for one in runs:
        kinds = CORRECTIONS if one["staleness"] == 0 else [one["kind"]]
        for kind in kinds:
            cells.setdefault((kind, one["staleness"]), []).append(one)
    return cells


def show(cells: dict[Cell, list[dict[str, Any]]]) -> None:
    """Mean success after RL over the seeds (lowest to highest), as a Markdown table."""
    columns = sorted({staleness for _, staleness in cells})
    print("| correction | " + " | ".join(f"S = {x}" for x in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for kind in CORRECTIONS:
        row = [_cell(cells.get((kind, x), [])) for x in columns]
        print(f"| `{kind}` | " + " | ".join(row) + " |")
    row = [
        _staleness([one for (_, s), runs in cells.items() if s == x for one in runs])
        for x in columns
    ]
    print("| staleness mean, max | " + " | ".join(row) + " |")


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return ""
    values = [one["success"] for one in runs]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _staleness(runs: Sequence[dict[str, Any]]) -> str:
    mean = statistics.mean(one["staleness_mean"] for one in runs)
    return f"{mean:.2f}, {max(one['staleness_max'] for one in runs):.0f}"


def plot(cells: dict[Cell, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Success over staleness, a line for every correction, a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for index, kind in enumerate(CORRECTIONS):
        points = sorted(
            (s, [x["success"] for x in runs]) for (k, s), runs in cells.items() if k == kind
        )
        if not points:
            continue
        offset = 0.06 * (index - len(CORRECTIONS) / 2)
        line = axes.plot(
            [s + offset for s, _ in points], [statistics.mean(y) for _, y in points], label=kind
        )
        for s, values in points:
            axes.plot([s + offset] * len(values), values, ".", color=line[0].get_color())
    axes.set(xlabel="largest staleness S", ylabel="success after RL")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
