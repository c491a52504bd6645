"""From stage costs measured on one machine to systems of many such machines.

The unit that is multiplied is the measured machine with all its devices. Two deployments:

  replicated  every unit has all roles, as in the measured run; the learner is spread over all.
  separate    some units only roll out (their own simulators and policy servers), the others train.

Two questions:

  weak    each unit has the work that the measured machine had: k units have k times the env groups
          and train on k times the trajectories per update.
  strong  the work of an update stays that of the smallest number of units asked for; on k times
          as many, an env group has 1 / k of its envs.

An update trains on as many chunk queries whichever of the two deployments makes them.

What is assumed, beyond the samples (`Assumptions`, docs/scaling_model.md):
  * A call of another size than those measured costs a fixed part plus a part per row. Two measured
    sizes or more decide both; with one, the fixed part is an assumption.
  * A training step over k units takes as long as the slowest of k draws from the samples, and
    each optimizer step adds a ring all-reduce of the gradients (Patarasuk and Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002): 2 (k - 1) / k * bytes / bandwidth, and
    2 log2(k) latencies.
  * A streamed trajectory is spread over all learning units, as the learner does it: what of its
    gradient is fixed is paid once per trajectory, however many units there are.
  * Where roles are separate, a trajectory takes bytes / bandwidth to arrive, and weights travel
    down a tree, ceil(log2(k + 1)) times bytes / bandwidth.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxvla.scaling.measurements import Samples, StageSamples, Table
from jaxvla.scaling.system import System

MODES = ("weak", "strong")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What one machine cannot tell."""

    host_gb_per_s: float
    """Bandwidth from one unit to another, 1e9 bytes per second."""
    reduce_gb_per_s: float
    """The same for all-reduces between learning units."""
    latency_s: float
    """Of a message between units."""
    fixed_fraction: float
    """Part of a call's time that does not depend on its rows, where one size was measured."""


BANDS: Mapping[str, Assumptions] = {
    "low": Assumptions(
        host_gb_per_s=1.25, reduce_gb_per_s=1.25, latency_s=5e-4, fixed_fraction=0.5
    ),
    "mid": Assumptions(
        host_gb_per_s=12.5, reduce_gb_per_s=25.0, latency_s=1e-4, fixed_fraction=0.2
    ),
    "high": Assumptions(
        host_gb_per_s=50.0, reduce_gb_per_s=200.0, latency_s=2e-5, fixed_fraction=0.0
    ),
}
"""Assumptions that give low, middle and high throughput: 10, 100 and 400 Gbit/s Ethernet between
hosts; all-reduces over the first, over 200 Gbit/s and over 1.6 Tbit/s. None is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The measured machine and its run."""

    system: System
    samples: StageSamples
    steps_per_update: int
    """Optimizer steps, each with an all-reduce; 1 if streamed."""
    trajectory_bytes: float
    """Of a trajectory of `system.envs_per_group` envs."""
    devices_per_unit: int
    """Devices of the measured machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """How many units do what."""

    num_units: int
    num_learning: int = 0
    """Units that only train; 0: replicated."""
    shrink: int = 1
    """Each group has 1 / shrink of its envs: strong scaling."""

    @property
    def num_rollout(self) -> int:
        """Units with env groups."""
        return self.num_units - self.num_learning

    def __post_init__(self):
        if not 0 <= self.num_learning < self.num_units:
            raise ValueError(
                f"num_learning = {self.num_learning}, must be in [0, num_units = {self.num_units})"
            )


def deploy(
    base: Base, deployment: Deployment, assumptions: Assumptions
) -> tuple[System, StageSamples]:
    """A system of many units, and what its stages cost.

    Raises:
      ValueError: the envs of a group do not divide by `shrink`.
    """
    system = base.system
    if system.envs_per_group % deployment.shrink:
        raise ValueError(
            f"{system.envs_per_group} envs per group do not divide by {deployment.shrink}"
        )
    large = _system(base, deployment)
    return large, _samples(base, deployment, large, assumptions)


def best_num_learning(base: Base, num_units: int, assumptions: Assumptions) -> int:
    """Units that train where the slower of rollout and training is fastest, by the means of their
    costs alone; 0 where there is one unit."""
    rollout_s, train_s = _rollout_s(base, assumptions), _train_s(base, assumptions)
    return min(
        range(1, num_units),
        key=lambda n: max(rollout_s / (num_units - n), train_s / n),
        default=0,
    )


def _rollout_s(base: Base, assumptions: Assumptions) -> float:
    """Seconds per trajectory of a unit that only rolls out and is never idle."""
    system, samples, fixed = base.system, base.samples, assumptions.fixed_fraction
    rows = system.envs_per_group
    step_s = float(at_rows(samples.chunk_s, rows, fixed).mean())
    serve_s = float(at_rows(samples.service_s, rows, fixed).mean())
    if system.cores:
        num_cores = sum(system.cores.values())
        core_s = step_s * samples.cores.get("simulate", 1.0)
        core_s += serve_s * samples.cores.get("infer", 1.0)
        per_step_s = max(core_s / num_cores, (step_s + serve_s) / system.num_groups)
    elif set(system.group_devices) & set(system.server_devices):
        per_step_s = step_s + serve_s
    else:
        steppers, servers = set(system.group_devices), set(system.server_devices)
        per_step_s = max(step_s / len(steppers), serve_s / len(servers))
    return per_step_s * base.system.segment_length


def _train_s(base: Base, assumptions: Assumptions) -> float:
    """Seconds per trajectory of a unit that only trains and is never idle."""
    system, samples, fixed = base.system, base.samples, assumptions.fixed_fraction
    queries = system.envs_per_group * base.system.segment_length
    if system.schedule.stream_microbatches:
        return float(at_rows(samples.gradient_s, queries, fixed).mean())
    count = system.trajectories_per_update
    return float(at_rows(samples.train_s, queries * count, fixed).mean()) / count


def at_rows(table: Table, rows: int, fixed_fraction: float) -> Samples:
    """Samples of calls with so many rows: measured ones, or those of the nearest measured size,
    scaled to the mean that the fixed part and the part per row give.

    Args:
      table: not empty.
      rows: at least 1.
      fixed_fraction: in [0, 1], see `Assumptions`.

    Raises:
      ValueError: the table is empty.
    """
    if not table:
        raise ValueError("no samples of any size")
    if rows in table:
        return table[rows]
    nearest = min(table, key=lambda x: abs(math.log(x / rows)))
    mean_s = float(table[nearest].mean())
    fixed_s, row_s = _affine(table, fixed_fraction)
    expected_s = fixed_s + row_s * nearest
    factor = (fixed_s + row_s * rows) / expected_s if expected_s and mean_s else 1.0
    return table[nearest] * factor


def _affine(table: Table, fixed_fraction: float) -> tuple[float, float]:
    """Seconds of a call, and seconds of a row on top; neither is negative."""
    sizes = np.asarray(list(table), np.float64)
    means_s = np.asarray([samples.mean() for samples in table.values()])
    if len(sizes) == 1:
        fixed_s = fixed_fraction * means_s[0]
        return float(fixed_s), float((means_s[0] - fixed_s) / sizes[0])
    row_s, fixed_s = np.polyfit(sizes, means_s, 1)
    if fixed_s < 0.0:
        return 0.0, float(sizes @ means_s / (sizes @ sizes))
    if row_s < 0.0:
        return float(means_s.mean()), 0.0
    return float(fixed_s), float(row_s)


def _system(base: Base, deployment: Deployment) -> System:
    """The units' systems as one."""
    system, shrink = base.system, deployment.shrink
    num_servers, num_groups = len(system.server_devices), system.num_groups
    local = system.assignment or tuple(index % num_servers for index in range(num_groups))
    rollout = range(deployment.num_rollout)
    learning = range(deployment.num_rollout, deployment.num_units)
    learning = learning if deployment.num_learning else rollout

    def placed(names: tuple[str, ...], unit: int) -> tuple[str, ...]:
        return tuple(f"{name}@{unit}" for name in names)

    return dataclasses.replace(
        system,
        group_devices=tuple(placed(x, u) for u in rollout for x in system.group_devices),
        server_devices=tuple(placed(x, u) for u in rollout for x in system.server_devices),
        learner_devices=tuple(x for u in learning for x in placed(system.learner_devices, u)),
        cores={
            f"{name}@{unit}": cores
            for unit in range(deployment.num_units)
            for name, cores in system.cores.items()
        },
        envs_per_group=system.envs_per_group // shrink,
        assignment=tuple(server + u * num_servers for u in rollout for server in local),
        buckets=tuple(sorted({max(1, x // shrink) for x in system.buckets})),
        trigger_rows=max(1, system.trigger_rows // shrink),
        max_batch=max(1, system.max_batch // shrink),
        trajectories_per_update=system.trajectories_per_update * deployment.num_units,
        lockstep_groups=system.lockstep_groups or num_groups,
    )


def _samples(
    base: Base, deployment: Deployment, large: System, assumptions: Assumptions
) -> StageSamples:
    """Costs of the calls that the large system makes."""
    samples, fixed, shrink = base.samples, assumptions.fixed_fraction, deployment.shrink
    num_learning = deployment.num_learning or deployment.num_units
    queries = large.envs_per_group * base.system.segment_length
    whole = queries * large.trajectories_per_update
    reduce_s = _reduce_s(samples.weight_bytes, num_learning, assumptions)
    is_separate = bool(deployment.num_learning)
    upload_s = assumptions.latency_s + base.trajectory_bytes / shrink / (
        1e9 * assumptions.host_gb_per_s
    )
    pull_s = _broadcast_s(samples.weight_bytes, deployment.num_rollout, assumptions)
    train_s: Table = {}
    gradient_s: Table = {}
    apply_s = samples.apply_s
    if large.schedule.stream_microbatches:
        share = max(1, round(queries / num_learning))
        part_s = at_rows(samples.gradient_s, share, fixed)
        gradient_s = {queries: slowest(part_s, num_learning)}
        apply_s = slowest(apply_s, num_learning) + reduce_s
    else:
        share = max(1, round(whole / num_learning))
        part_s = at_rows(samples.train_s, share, fixed)
        train_s = {whole: slowest(part_s, num_learning) + base.steps_per_update * reduce_s}
    return dataclasses.replace(
        samples,
        chunk_s={large.envs_per_group: at_rows(samples.chunk_s, large.envs_per_group, fixed)},
        service_s={rows: at_rows(samples.service_s, rows, fixed) for rows in large.buckets},
        value_s={
            rows: at_rows(samples.value_s, rows, fixed) for rows in large.buckets if samples.value_s
        },
        train_s=train_s,
        gradient_s=gradient_s,
        apply_s=apply_s,
        finish_s=samples.finish_s + upload_s if is_separate else samples.finish_s,
        pull_s=np.asarray([pull_s]) if is_separate else samples.pull_s,
    )


def slowest(samples: Samples, count: int) -> Samples:
    """As many samples of the largest of `count` independent draws: quantiles of its distribution,
    F(x)^count, so nothing is random here."""
    if count == 1 or not len(samples):
        return samples
    size = len(samples)
    levels = ((np.arange(size) + 0.5) / size) ** (1.0 / count)
    index = np.minimum((levels * size).astype(int), size - 1)
    return np.sort(samples)[index]


def _reduce_s(nbytes: float, count: int, assumptions: Assumptions) -> float:
    """Of a ring all-reduce over `count` units."""
    if count == 1:
        return 0.0
    transfer_s = 2.0 * (count - 1) / count * nbytes / (1e9 * assumptions.reduce_gb_per_s)
    return transfer_s + 2.0 * math.log2(count) * assumptions.latency_s


def _broadcast_s(nbytes: float, count: int, assumptions: Assumptions) -> float:
    """Of weights on their way to `count` units."""
    hop_s = assumptions.latency_s + nbytes / (1e9 * assumptions.host_gb_per_s)
    return math.ceil(math.log2(count + 1)) * hop_s
