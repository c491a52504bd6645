"""What the schedule is worth: real programs around emulated stages, next to the paper's tables.

    python scripts/bench_async.py [--profile=libero_pi0] [--gpus=8,16,32] [--speed=200]
    python scripts/bench_async.py --clock=idle [--profile=...]
    python scripts/bench_async.py --batching --clock=idle [--profile=...]

Queue, credit rule, batcher, policy server, simulator, learner, local runtime and weight store
are those of a training run. Env groups, policy and train functions only take time, as much as
RL-VLA3's tables say (`jaxvla.scaling.profiles`). The levels of asynchrony are switched on one
after the other. A row shows env steps/s in emulated time, the paper's figure, the ratio of the
two, the share of the bottleneck bound (the busiest device pool never idle), the largest
staleness with its bound, and how long the stages were busy.

Clocks
  fast  stages sleep `speed` times shorter than emulated; what the host does counts `speed`
        times too much. For an unloaded machine.
  idle  time passes only while no thread runs: the schedule alone, on a machine of any load.

Placement: one pool of devices for everything (colocated), or half of the GPUs for training
(disaggregated, as in the paper). LIBERO simulates on processor cores, apart from inference, in
four env groups. ManiSkill simulates on the GPUs that serve, in one vectorised batch, and a call
takes as long for half of it: splitting it, which the paper does, costs a second call per chunk
step. Here every group is a whole batch, and two of them double-buffer: one waits for its
answers while the other one steps. That wins nothing where both stages share the GPUs and loses
nothing either; the gain there is that training runs beside them. Of the two placements the one
with the smaller bound is the better, and as its bound is reached, it never falls below the
synchronous colocated row. Where a split of the GPUs other than 1:1 has a smaller bound, the
last row is everything on with the best split (`Profile.split_costs`).

Batching: everything on, under fixed triggers and waits and under the adaptive mode, which
starts from one group and 20 ms. The paper does not tell what part of a forward pass does not
depend on its rows, and that part decides how to batch: it is taken as 73 ms, as half of the
whole batch's pass, and as all of it.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxvla.config import ScheduleConfig, to_dict  # noqa: E402
from jaxvla.runtime.local import LocalRuntime  # noqa: E402
from jaxvla.scaling.emulated_run import (  # noqa: E402
    FORWARD_S,
    Batching,
    EmulatedRun,
    RunPlan,
    RunResult,
)
from jaxvla.scaling.emulated_time import FastTime, IdleTime  # noqa: E402
from jaxvla.scaling.profiles import (  # noqa: E402
    COLOCATED,
    PROFILES,
    Placement,
    Profile,
    StageCosts,
)

_ROOT = pathlib.Path(__file__).parents[1]
_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    label: str
    paper: str
    """The paper's row, a field of `PaperRows`."""
    placement: Placement
    costs: StageCosts
    schedule: ScheduleConfig
    num_groups: int = 1
    whole_batches: bool = False
    """Every group has all envs; otherwise they share them."""
    batching: Batching = field(default_factory=Batching)


def main() -> None:
    """Runs the table of one profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="libero_pi0")
    parser.add_argument("--batching", action="store_true", help="settings of the batcher instead")
    parser.add_argument("--gpus", help="as 8,16; default: all that the profile has")
    parser.add_argument("--clock", choices=("fast", "idle"), default="fast")
    parser.add_argument("--speed", type=float, default=200.0, help="emulated s per s, fast clock")
    parser.add_argument("--num_updates", type=int, default=2, help="measured, after one more")
    parser.add_argument("--max_staleness", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    profile = PROFILES[options.profile]
    gpus = map(int, options.gpus.split(",")) if options.gpus else profile.rows
    begin_s = time.monotonic()
    make = batching_table if options.batching else table
    tables = {str(num_gpus): make(profile, num_gpus, options) for num_gpus in gpus}
    report = {
        "profile": profile.name,
        "clock": options.clock,
        "speed": options.speed if options.clock == "fast" else None,
        "num_updates": options.num_updates,
        "seed": options.seed,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "wall_s": time.monotonic() - begin_s,
        "gpus": tables,
    }
    kind = "batching" if options.batching else "async"
    out = options.out or _ROOT / f"bench_{kind}_{profile.name}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['wall_s']:.0f} s; saved {out}")


def table(profile: Profile, num_gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs and prints the rows of one number of GPUs."""
    costs, env_steps = profile.disaggregated_costs(num_gpus), profile.workload.env_steps(num_gpus)
    bounds_s = {
        "disaggregated": profile.disaggregated.bound_s(costs),
        "colocated": COLOCATED.bound_s(profile.colocated_costs(num_gpus)),
    }
    better = min(bounds_s, key=bounds_s.__getitem__)
    print(
        f"\n{profile.name}, {num_gpus} GPUs, seconds of an update: simulation "
        f"{costs.simulation_s:.1f}, inference {costs.inference_s:.1f}, training "
        f"{costs.training_s:.1f}\nbottleneck bound: "
        + ", ".join(f"{k} {s:.1f} s = {env_steps / s:.1f} env steps/s" for k, s in bounds_s.items())
        + f"; better: {better}; best split {best_split(profile, num_gpus)}"
    )
    print(
        f"{'row':44} {'steps/s':>8} {'paper':>8} {'ratio':>6} {'bound':>6} {'stale':>5}   "
        "busy: simulation inference training"
    )
    results = []
    for row in rows(profile, num_gpus, options.max_staleness):
        result = run(profile, num_gpus, row, options)
        results.append(describe(profile, num_gpus, row, result))
        print(line(results[-1]), flush=True)
    return {
        "costs": dataclasses.asdict(costs),
        "bounds_s": bounds_s,
        "better_placement": better,
        "best_split": best_split(profile, num_gpus),
        "rows": results,
    }


def best_split(profile: Profile, num_gpus: int) -> str:
    """GPUs that roll out and that train, as 9:7."""
    num_rollout = profile.best_split(num_gpus)
    return f"{num_rollout}:{num_gpus - num_rollout}"


def groups_of(profile: Profile) -> dict[str, Any]:
    """Env groups of the rows where they need not wait for each other."""
    if profile.is_vectorised:
        return {"num_groups": 2, "whole_batches": True}
    return {"num_groups": 4}


def rows(profile: Profile, num_gpus: int, max_staleness: int) -> Iterator[Row]:
    """The table's lines, from all barriers to none."""
    costs = profile.disaggregated_costs(num_gpus)
    apart = partial(Row, placement=profile.disaggregated, costs=costs)
    together = partial(Row, placement=COLOCATED, costs=profile.colocated_costs(num_gpus))
    barriers = ScheduleConfig(overlap_training=False, overlap_rollout=False)
    lockstep = ScheduleConfig(max_staleness=max_staleness, overlap_rollout=False)
    overlap = ScheduleConfig(max_staleness=max_staleness)
    stream = ScheduleConfig(max_staleness=max_staleness, stream_microbatches=True)
    yield together(label="synchronous, colocated", paper="colocated", schedule=barriers)
    yield apart(label="synchronous, disaggregated", paper="disaggregated", schedule=barriers)
    yield apart(label="+ train async", paper="train_async", schedule=lockstep)
    groups = groups_of(profile)
    if profile.is_vectorised:
        label = "+ rollout async, batch split as in the paper"
        yield apart(label=label, paper="rollout_async", schedule=overlap, num_groups=2)
    yield apart(label="+ rollout async", paper="rollout_async", schedule=overlap, **groups)
    yield apart(label="+ streamer", paper="streamer", schedule=stream, **groups)
    if profile.is_vectorised:
        yield together(label="all on, colocated", paper="colocated", schedule=stream, **groups)
    printed_s = profile.rows[num_gpus].streamer.rollout_s
    if printed_s is not None and printed_s < costs.simulation_s:
        yield Row(
            label=f"+ streamer, its own simulation ({printed_s} s)",
            paper="streamer",
            placement=profile.disaggregated,
            costs=dataclasses.replace(costs, simulation_s=printed_s),
            schedule=stream,
            **groups,
        )
    split = profile.best_split(num_gpus)
    if split != num_gpus // 2:
        yield Row(
            label=f"+ streamer, split {best_split(profile, num_gpus)}",
            paper="streamer",
            placement=profile.disaggregated,
            costs=profile.split_costs(num_gpus, split),
            schedule=stream,
            **groups,
        )


def batching_table(profile: Profile, num_gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs and prints every setting of the batcher for each assumption about a forward pass."""
    costs = profile.disaggregated_costs(num_gpus)
    whole_s = costs.inference_s / profile.workload.num_passes
    print(
        f"\n{profile.name}, {num_gpus} GPUs, everything on; a forward pass of the whole batch "
        f"takes {whole_s:.2f} s\n{'fixed part':>10} {'adaptive':>9} {'best fixed':>10} "
        f"{'ratio':>6} {'worst':>6}   env steps/s; worst fixed over best fixed"
    )
    tables = {}
    for forward_s in (FORWARD_S, whole_s / 2, whole_s):
        results = {}
        for name, batching in batchings(profile, num_gpus, forward_s).items():
            row = Row(
                label=name,
                paper="streamer",
                placement=profile.disaggregated,
                costs=costs,
                schedule=ScheduleConfig(
                    max_staleness=options.max_staleness, stream_microbatches=True
                ),
                batching=batching,
                **groups_of(profile),
            )
            result = run(profile, num_gpus, row, options)
            results[name] = describe(profile, num_gpus, row, result)
        tables[f"{forward_s:.3f}"] = results
        print(batching_line(forward_s, results), flush=True)
    return tables


def batchings(profile: Profile, num_gpus: int, forward_s: float) -> dict[str, Batching]:
    """Settings by name. A trigger of one group leaves nothing to wait for."""
    costs = profile.disaggregated_costs(num_gpus)
    chunk_s = costs.simulation_s / profile.workload.num_chunk_steps
    adaptive = Batching(max_wait_s=0.02, is_adaptive=True, forward_s=forward_s)
    settings = {"adaptive": adaptive, "1 group": Batching(forward_s=forward_s)}
    for groups in range(2, groups_of(profile)["num_groups"] + 1):
        for max_wait_s in (chunk_s / 4, math.inf):
            settings[f"{groups} groups or {max_wait_s:.2f} s"] = Batching(
                trigger_groups=groups, max_wait_s=max_wait_s, forward_s=forward_s
            )
    return settings


def batching_line(forward_s: float, results: dict[str, dict[str, Any]]) -> str:
    """The settings under one assumption, for the screen."""
    rates = {name: row["env_steps_per_s"] for name, row in results.items()}
    adaptive = rates.pop("adaptive")
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    return (
        f"{forward_s:8.3f} s {adaptive:9.1f} {rates[best]:10.1f} {adaptive / rates[best]:6.3f} "
        f"{rates[worst] / rates[best]:6.3f}   best: {best}; worst: {worst}"
    )


def run(profile: Profile, num_gpus: int, row: Row, options: argparse.Namespace) -> RunResult:
    """Emulates one row."""
    num_envs = profile.workload.envs(num_gpus)
    clock = FastTime(options.speed) if options.clock == "fast" else IdleTime()
    emulated = EmulatedRun(
        RunPlan(
            workload=profile.workload,
            num_envs=num_envs,
            costs=row.costs,
            placement=row.placement,
            is_vectorised=profile.is_vectorised,
            num_groups=row.num_groups,
            envs_per_group=num_envs if row.whole_batches else num_envs // row.num_groups,
            schedule=row.schedule,
            batching=row.batching,
            num_warmup=1,
            num_updates=options.num_updates,
            seed=options.seed,
        ),
        clock,
    )
    try:
        with clock:
            LocalRuntime(threading.Event()).run(
                emulated.programs, emulated.meters, emulated.learner, _GRACE_S
            )
    finally:
        emulated.close()
    return emulated.result()


def describe(profile: Profile, num_gpus: int, row: Row, result: RunResult) -> dict[str, Any]:
    """A row for the JSON file."""
    printed = profile.rows[num_gpus]
    bound_s = row.placement.bound_s(row.costs)
    paper = getattr(printed, row.paper).env_steps_per_s
    is_corrected = row.paper == "disaggregated" and printed.is_corrected
    corrected = profile.corrected_env_steps_per_s(num_gpus) if is_corrected else None
    return {
        "label": row.label,
        "schedule": to_dict(row.schedule),
        "num_groups": row.num_groups,
        "whole_batches": row.whole_batches,
        "env_steps_per_s": result.env_steps_per_s,
        "step_s": result.step_s,
        "step_std_s": result.step_std_s,
        "paper_env_steps_per_s": paper,
        "paper_corrected_env_steps_per_s": corrected,
        "ratio_to_paper": result.env_steps_per_s / (corrected or paper),
        "bound_s": bound_s,
        "ratio_to_bound": bound_s / result.step_s,
        "staleness_max": result.staleness_max,
        "staleness_bound": result.staleness_bound,
        "stage_busy": result.stage_busy,
        "programs": {
            role: {"busy": x.busy_fraction, "waiting_on": x.waiting_fractions}
            for role, x in result.activities.items()
        },
    }


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    corrected = row["paper_corrected_env_steps_per_s"]
    text = (
        f"{row['label']:44} {row['env_steps_per_s']:8.1f} "
        f"{corrected or row['paper_env_steps_per_s']:8.1f} {row['ratio_to_paper']:6.3f} "
        f"{row['ratio_to_bound']:6.1%} {row['staleness_max']:2} / {row['staleness_bound']}   "
        + "  ".join(f"{share:6.1%}" for share in row["stage_busy"].values())
    )
    if corrected:
        text += f"\n  printed as {row['paper_env_steps_per_s']}, with twice the training time"
    return text


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the docstring's lines."""


if __name__ == "__main__":
    main()
