"""Synchronous against asynchronous training on this machine, and what its stages allow.

    python scripts/bench_real.py [--config=quickstart] [--repeats=3] [--num_updates=8]

`--config` names a file of configs/. Both modes run in turn, every run in a process of its own,
without warm start and evaluation; the first two updates of a run are not counted. Figures are
medians over the updates of a run, and then over the repeats.

The bound. In a synchronous run one stage runs at a time and has the machine to itself, so the
seconds that it is busy per update are what it needs. All stages share the processor cores here,
whatever their threads do. So an update takes at least
    max(longest stage, processor seconds of an update / cores),
where the processor seconds are those of all threads and child processes in the synchronous
runs. The first holds because a stage does not overlap with itself, the second because a core
does one thing at a time; with two cores it is the second that counts. Where stages have devices
of their own only the first remains. What the second leaves to be won is the time in which a
synchronous run has cores idle: (processor seconds / cores) / update.
"""

import argparse
import importlib.metadata
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
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
MODES = {
    "synchronous": ("overlap_training=False", "overlap_rollout=False"),
    "asynchronous": ("overlap_training=True", "overlap_rollout=True"),
}
STAGES = {"simulation": "simulation", "serving": "inference", "learning": "training"}
"""Role -> the stage that it runs."""
_NUM_SKIPPED = 2
"""Updates at the start of a run."""
_POLL_S = 0.05
Figures = dict[str, float]
"""Name with unit -> value."""


def main() -> None:
    """Compares, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = {"machine": machine(), "config": options.config, "num_updates": options.num_updates}
    report |= compare(options.config, options.repeats, options.num_updates)
    show(report)
    out = options.out or _ROOT / f"bench_real_{options.config}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("jax", "mujoco", "mujoco-mjx")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in packages}


def compare(config: str, repeats: int, num_updates: int) -> dict[str, Any]:
    """Both modes in turn: mode -> figures, their ratio, and the bound."""
    if num_updates < _NUM_SKIPPED + 2:
        raise ValueError(f"num_updates = {num_updates}, must be at least {_NUM_SKIPPED + 2}")
    runs: dict[str, list[Figures]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode, switches in MODES.items():
            runs[mode].append(train(config, switches, num_updates))
    modes = {
        mode: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for mode, results in runs.items()
    }
    before, after = modes["synchronous"], modes["asynchronous"]
    longest_s = max(before[f"{stage}_s"] for stage in STAGES.values())
    cores_s = before["cpu_s"] / (os.cpu_count() or 1)
    bound_s = max(longest_s, cores_s)
    return modes | {
        "runs": runs,
        "ratio": after["env_steps_per_s"] / before["env_steps_per_s"],
        "longest_stage_s": longest_s,
        "all_cores_busy_s": cores_s,
        "bound_s": bound_s,
        "synchronous_to_bound": bound_s / before["update_s"],
        "asynchronous_to_bound": bound_s / after["update_s"],
    }


def show(report: dict[str, Any]) -> None:
    """The report for the screen."""
    names = ("env_steps_per_s", "update_s", *(f"{x}_s" for x in STAGES.values()), "cpu_s")
    print(f"{report['config']}\n{'':14}" + "".join(f"{name:>17}" for name in names))
    for mode in MODES:
        print(f"{mode:14}" + "".join(f"{report[mode][name]:17.2f}" for name in names))
    print(
        f"asynchronous / synchronous {report['ratio']:.3f}; bound {report['bound_s']:.2f} s = "
        f"max(longest stage {report['longest_stage_s']:.2f} s, all cores busy "
        f"{report['all_cores_busy_s']:.2f} s); share of the bound: synchronous "
        f"{report['synchronous_to_bound']:.1%}, asynchronous {report['asynchronous_to_bound']:.1%}"
    )


def train(config: str, switches: tuple[str, ...], num_updates: int) -> Figures:
    """One run; medians over its updates."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, "-m", "jaxvla.main", f"--config=configs/{config}.py"),
            *(f"--workdir={workdir}", f"--config.learning.num_updates={num_updates}"),
            "--config.warm_start.num_steps=0",
            "--config.warm_start.num_grounding_steps=0",
            "--config.evaluation.num_episodes=0",
            f"--config.checkpoint.interval={num_updates}",
            *(f"--config.schedule.{switch}" for switch in switches),
        ]
        path = pathlib.Path(workdir) / "metrics.jsonl"
        with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL) as process:
            cpu_s = cpu_at_records(process, path)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
        records = [json.loads(line) for line in path.read_text().splitlines()]
    return figures(records[_NUM_SKIPPED - 1 :], cpu_s[_NUM_SKIPPED - 1 :])


def figures(records: list[dict[str, float]], cpu_s: list[float]) -> Figures:
    """Medians over all updates but the first one, whose end is where they begin.

    Args:
      records: of metrics.jsonl.
      cpu_s: processor seconds of the run so far, at each of them that was seen in time.
    """
    spans_s = [b["time_s"] - a["time_s"] for a, b in itertools.pairwise(records)]
    after = records[1:]
    result = {
        "env_steps_per_s": statistics.median(x["rate/env_steps_per_s"] for x in after),
        "update_s": statistics.median(spans_s),
        "cpu_s": (cpu_s[-1] - cpu_s[0]) / (len(cpu_s) - 1),
    }
    for role, stage in STAGES.items():
        busy = [x[f"utilisation/{role}/busy_fraction"] for x in after]
        result[f"{role}_busy_fraction"] = statistics.median(busy)
        times_s = [share * span_s for share, span_s in zip(busy, spans_s, strict=True)]
        result[f"{stage}_s"] = statistics.median(times_s)
    return result


def cpu_at_records(process: subprocess.Popen[bytes], path: pathlib.Path) -> list[float]:
    """Processor seconds of a run, and of its children, whenever it writes a record.

    Returns when the run has ended; a record that is written just before may be missing.
    """
    seen: list[float] = []
    while process.poll() is None:
        num_records = path.read_text().count("\n") if path.exists() else 0
        if num_records > len(seen):
            seen += [cpu_of(process.pid)] * (num_records - len(seen))
        time.sleep(_POLL_S)
    return seen


def cpu_of(pid: int) -> float:
    """Processor seconds of a live process and its live descendants. Linux only."""
    process = pathlib.Path(f"/proc/{pid}")
    try:
        # utime and stime in ticks: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        children = [x.read_text().split() for x in process.glob("task/*/children")]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    own_s = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(cpu_of(int(child)) for several in children for child in several)


if __name__ == "__main__":
    main()
