"""Is what is simulated what happens? Real runs, held out from the calibration, against predictions.

    python scripts/validate_simulator.py [--config=configs/quickstart.py] [--num_updates=40]
                                         [--repeats=2] [--cores=2] [--trial] [--out=FILE]
    python scripts/validate_simulator.py --paper [--out=FILE]

One synchronous run, in which stages run one at a time, gives the samples of all stages. Every
other run differs from it in the schedule, in the staleness that it allows, in how often weights
are published, or in the number of env groups; its own measurements are never used. Each is
simulated from the samples, with its own config and number of updates, and compared: env steps/s
and mean staleness after two updates of warm-up. Every run has a process of its own, without
warm start and evaluation. A run that is there already, in `--workdir`, is not made again.

`--trial` marks figures that were made on a machine that had other work to do: they show that the
script works, and their errors say nothing.

`--paper` compares with RL-VLA3's tables instead (`jaxvla.scaling.paper`).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxvla.scaling import paper  # noqa: E402
from jaxvla.scaling.measurements import StageSamples  # noqa: E402
from jaxvla.scaling.predict import check_alone, cores_of  # noqa: E402
from jaxvla.scaling.run_samples import (  # noqa: E402
    NUM_WARMUP,
    Figures,
    RunFiles,
    figures,
    measure,
    read_run,
)
from jaxvla.scaling.simulate import simulate  # noqa: E402
from jaxvla.scaling.system import system_of  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[1]
_SYNCHRONOUS = ("schedule.overlap_training=False", "schedule.overlap_rollout=False")
CALIBRATION = ("calibration", _SYNCHRONOUS)
HELD_OUT = {
    "rollout_overlaps": ("schedule.overlap_training=False",),
    "staleness_1": ("schedule.max_staleness=1",),
    "staleness_3": ("schedule.max_staleness=3",),
    "staleness_3_interval_4": ("schedule.max_staleness=3", "schedule.publish_interval=4"),
    "groups_1": ("simulation.num_groups=1",),
    "groups_4": ("simulation.num_groups=4",),
    "groups_4_staleness_2": ("simulation.num_groups=4", "schedule.max_staleness=2"),
    "lockstep_staleness_1": ("schedule.overlap_rollout=False",),
}
"""Name -> overrides."""
SEEDS = range(5)
"""Of the simulation; figures are means over them."""


def main() -> None:
    """Runs what is missing, simulates, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=pathlib.Path, default="configs/quickstart.py")
    parser.add_argument("--num_updates", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cores", type=float, default=0.0)
    parser.add_argument("--only", nargs="*", default=list(HELD_OUT), choices=list(HELD_OUT))
    parser.add_argument("--workdir", type=pathlib.Path, default=_ROOT / "runs" / "validation")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = against_paper() if options.paper else against_runs(options)
    name = "paper" if options.paper else f"validation_{options.config.stem}"
    out = options.out or _ROOT / f"simulator_{name}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")


def against_paper() -> dict[str, Any]:
    """Compares with the paper's tables, and prints."""
    errors: list[paper.PaperError] = []

    def collected() -> Iterator[paper.PaperError]:
        for profile in paper.PROFILES:
            for found in paper.paper_errors(profile):
                errors.append(found)
                yield found

    for text in paper.lines(collected()):
        print(text, flush=True)
    rows = [
        dataclasses.asdict(x) | {"error": x.error, "anchored_error": x.anchored_error}
        for x in errors
    ]
    return {"label": "simulated", "calibrated_on_gpus": paper.UNIT, "rows": rows}


def against_runs(options: argparse.Namespace) -> dict[str, Any]:
    """Compares with real runs, and prints."""
    name, overrides = CALIBRATION
    calibration = run(options, name, 0, overrides)
    samples = measure(calibration).checked()
    num_cores = cores_of(calibration, options.cores)
    print(f"{'held out':24}{'measured':>10}{'simulated':>10}{'error':>8}   staleness")
    rows = []
    for name in options.only:
        real = [run(options, name, i, HELD_OUT[name]) for i in range(options.repeats)]
        rows.append(compare(name, real, samples, num_cores))
        print(line(rows[-1]), flush=True)
    return {
        "label": "simulated",
        "trial": options.trial,
        "config": str(options.config),
        "num_updates": options.num_updates,
        "warmup_updates": NUM_WARMUP,
        "repeats": options.repeats,
        "machine": machine(),
        "cores": num_cores,
        "samples": samples.counts(),
        "stage_cores": dict(samples.cores),
        "overlap": samples.overlap,
        "rows": rows,
    }


def compare(
    name: str, real: list[RunFiles], samples: StageSamples, num_cores: float
) -> dict[str, Any]:
    """Measured and simulated figures of one setting."""
    found = [figures(x) for x in real]
    system = system_of(
        real[0].config, platform=real[0].platform, num_cores=num_cores, num_warmup=NUM_WARMUP
    )
    check_alone(system, samples)
    simulated = [simulate(system, samples, seed=seed) for seed in SEEDS]
    measured = {
        "env_steps_per_s": statistics.mean(x.env_steps_per_s for x in found),
        "staleness_mean": statistics.mean(x.staleness_mean for x in found),
        "staleness_max": max(x.staleness_max for x in found),
        "busy": _mean_busy(found),
    }
    predicted = {
        "env_steps_per_s": statistics.mean(x.env_steps_per_s for x in simulated),
        "staleness_mean": statistics.mean(x.staleness_mean for x in simulated),
        "staleness_max": max(x.staleness_max for x in simulated),
        "busy": {r: statistics.mean(x.busy[r] for x in simulated) for r in simulated[0].busy},
    }
    return {
        "name": name,
        "overrides": list(HELD_OUT[name]),
        "measured": measured,
        "measured_runs": [x.env_steps_per_s for x in found],
        "simulated": predicted,
        "error_env_steps_per_s": error(predicted["env_steps_per_s"], measured["env_steps_per_s"]),
        "error_staleness_mean": error(predicted["staleness_mean"], measured["staleness_mean"]),
    }


def error(predicted: float, measured: float) -> float:
    """Relative; 0 where both are 0."""
    return predicted / measured - 1.0 if measured else float(predicted != measured)


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    measured, simulated = row["measured"], row["simulated"]
    return (
        f"{row['name']:24}{measured['env_steps_per_s']:>10.1f}"
        f"{simulated['env_steps_per_s']:>10.1f}{row['error_env_steps_per_s']:>+8.1%}   "
        f"{measured['staleness_mean']:.2f} measured, {simulated['staleness_mean']:.2f} simulated "
        f"({row['error_staleness_mean']:+.1%})"
    )


def run(
    options: argparse.Namespace, name: str, repeat: int, overrides: tuple[str, ...]
) -> RunFiles:
    """The files of one run, which is made if it is not there."""
    workdir = options.workdir / f"{options.config.stem}_{name}_{repeat}"
    if not (workdir / "summary.json").is_file():
        train(options, workdir, (*overrides, f"seed={repeat}"))
    return read_run(workdir)


def train(options: argparse.Namespace, workdir: pathlib.Path, overrides: tuple[str, ...]) -> None:
    """Makes a run in a process of its own."""
    command = [
        *(sys.executable, "-m", "jaxvla.main", f"--config={options.config}"),
        *(f"--workdir={workdir}", f"--config.learning.num_updates={options.num_updates}"),
        "--config.warm_start.num_steps=0",
        "--config.warm_start.num_grounding_steps=0",
        "--config.evaluation.num_episodes=0",
        f"--config.checkpoint.interval={options.num_updates}",
        *(f"--config.{override}" for override in overrides),
    ]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in ("jax", "simpy")}


def _mean_busy(found: list[Figures]) -> dict[str, float]:
    return {role: statistics.mean(x.busy[role] for x in found) for role in found[0].busy}


if __name__ == "__main__":
    main()
