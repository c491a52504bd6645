"""The prediction against RL-VLA3's tables: calibrated on its 8-GPU rows, 16 and 32 predicted.

The unit of the cost model is 8 GPUs here, with the stage costs that `scaling.profiles` derives
from the 8-GPU rows alone. Rows of ManiSkill have no 8-GPU parts and are left out.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxvla.config import ScheduleConfig
from jaxvla.scaling.cost_model import BANDS, Base, Deployment, deploy
from jaxvla.scaling.emulated_run import RunPlan
from jaxvla.scaling.emulated_system import samples_of_plan, system_of_plan
from jaxvla.scaling.profiles import COLOCATED, LIBERO_OFT, LIBERO_PI0, Profile
from jaxvla.scaling.simulate import simulate

PROFILES = (LIBERO_PI0, LIBERO_OFT)
UNIT = 8
"""GPUs of a unit."""
WEIGHT_BYTES: Mapping[str, float] = {"libero_pi0": 6.6e9, "libero_oft": 15.1e9}
"""Of the gradients that are reduced: 3.3e9 (arXiv:2410.24164) and 7.5e9 (arXiv:2502.19645)
parameters of two bytes. An assumption; the tables do not tell how gradients travel."""
_ASSUMPTIONS = dataclasses.replace(BANDS["mid"], fixed_fraction=0.0)
"""There every rank streams trajectories of its own, so gradients of k units go k times as fast."""
ROWS: Mapping[str, tuple[bool, ScheduleConfig, int]] = {
    "colocated": (True, ScheduleConfig(overlap_training=False, overlap_rollout=False), 1),
    "disaggregated": (False, ScheduleConfig(overlap_training=False, overlap_rollout=False), 1),
    "train_async": (False, ScheduleConfig(overlap_rollout=False), 1),
    "rollout_async": (False, ScheduleConfig(), 4),
    "streamer": (False, ScheduleConfig(stream_microbatches=True), 4),
}
"""Row -> whether all stages share the GPUs, the schedule, and the env groups of a unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperError:
    """One row."""

    profile: str
    row: str
    num_gpus: int
    simulated: float
    """Env steps/s, from the costs of the 8-GPU rows."""
    anchored: float
    """The same times printed / simulated at 8 GPUs: what the row itself is off by is taken out."""
    printed: float
    """In the paper, freed of its anomaly where there is one."""

    @property
    def error(self) -> float:
        """Of `simulated`, as a fraction."""
        return self.simulated / self.printed - 1.0

    @property
    def anchored_error(self) -> float:
        """Of `anchored`, as a fraction."""
        return self.anchored / self.printed - 1.0


def paper_errors(profile: Profile, *, num_updates: int = 3, seed: int = 0) -> Iterator[PaperError]:
    """All rows of a profile on 8 (the calibration), 16 and 32 GPUs."""
    for row in ROWS:
        base = _base(profile, row, num_updates)
        anchor = 1.0
        for num_gpus in profile.rows:
            deployment = Deployment(num_units=num_gpus // UNIT)
            result = simulate(*deploy(base, deployment, _ASSUMPTIONS), seed=seed)
            printed = _printed(profile, row, num_gpus)
            anchor = printed / result.env_steps_per_s if num_gpus == UNIT else anchor
            yield PaperError(
                profile=profile.name,
                row=row,
                num_gpus=num_gpus,
                simulated=result.env_steps_per_s,
                anchored=anchor * result.env_steps_per_s,
                printed=printed,
            )


def _base(profile: Profile, row: str, num_updates: int) -> Base:
    """Eight GPUs, as the row runs them."""
    is_colocated, schedule, num_groups = ROWS[row]
    workload = profile.workload
    plan = RunPlan(
        workload=workload,
        num_envs=workload.envs(UNIT),
        costs=profile.colocated_costs(UNIT) if is_colocated else profile.disaggregated_costs(UNIT),
        placement=COLOCATED if is_colocated else profile.disaggregated,
        is_vectorised=profile.is_vectorised,
        num_groups=num_groups,
        envs_per_group=workload.envs(UNIT) // num_groups,
        schedule=schedule,
        num_warmup=2,
        num_updates=num_updates,
    )
    samples = samples_of_plan(plan)
    return Base(
        system=system_of_plan(plan),
        samples=dataclasses.replace(samples, weight_bytes=int(WEIGHT_BYTES[profile.name])),
        steps_per_update=1
        if schedule.stream_microbatches
        else workload.num_update_epochs * workload.num_minibatches,
        trajectory_bytes=0.0,
        devices_per_unit=UNIT,
    )


def _printed(profile: Profile, row: str, num_gpus: int) -> float:
    rows = profile.rows[num_gpus]
    if row == "disaggregated" and rows.is_corrected:
        return profile.corrected_env_steps_per_s(num_gpus)
    return getattr(rows, row).env_steps_per_s


def lines(errors: Iterator[PaperError]) -> Iterator[str]:
    """A table as text, row by row as they come."""
    yield (
        f"{'profile':12}{'row':15}{'GPUs':>5}{'printed':>9}{'simulated':>11}{'error':>8}"
        f"{'anchored':>10}{'error':>8}"
    )
    for x in errors:
        yield (
            f"{x.profile:12}{x.row:15}{x.num_gpus:>5}{x.printed:>9.1f}{x.simulated:>11.1f}"
            f"{x.error:>+8.1%}{x.anchored:>10.1f}{x.anchored_error:>+8.1%}"
        )
