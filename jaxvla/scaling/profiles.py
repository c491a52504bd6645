"""Measured times of RL-VLA3 (arXiv:2602.05765v1) and the stage costs that follow from them.

Tables 3 and 4 of the paper give, for a global step (one update here), the time of the whole
step, of its rollout and of its training. Table 2 gives the sizes. Rows are called after the
paper's baselines: colocated and disaggregated synchronous, + train async, + rollout async,
+ streamer; disaggregated ones use half of the GPUs for training (1:1).

Throughput in env steps/s counts every env for the whole time limit (Eq. 2):
    rollout epochs * envs * time limit / step time.

What the stages cost, in seconds of one update (`disaggregated_costs`):
  training    the synchronous row's training time.
  simulation  the rollout of the "+ rollout async" row, where inference hides behind
              simulation: 586.2 s = 192 chunk steps * 3.05 s for pi0 on 8 GPUs. On 16 and 32
              GPUs the paper leaves the rollout blank. There it is the step time less the part
              of the training that no rollout covers, the same fraction of the training time as
              on 8 GPUs (pi0: (696.6 - 586.2) / 446 = 0.248, its last rollout epoch of four).
  inference   the rest of the synchronous row's lockstep rollout: 1050 - 586.2 = 463.8 s =
              192 * 2.42 s. It includes the bootstrap query after every rollout epoch.

Other splits of the GPUs (`split_costs`): a pool's work takes inversely as long as it has GPUs,
simulation included, as LIBERO renders on the GPUs that roll out. The paper's 3:1 rows bear it
out: with 1.5 times the envs on 6 + 2 of 8 GPUs, pi0 has 562 s of rollout and 1302 s of training,
where this gives 586.2 s and 1332 s. The others that are printed agree to 7 % as well, but for
OpenVLA-OFT's training on 16 GPUs: 1838 s, where this gives 2423 s, as its 1:1 row (807.8 s) is
out of line with those of 8 and 32 GPUs (589.8 s, 707.33 s).

Anomalies of the tables:
  * pi0, disaggregated, 8 GPUs: 861 s of training, while 16 and 32 GPUs take 442.8 and 441.6 s
    with as much work per GPU, and two update epochs instead of four take 222 s on 8 GPUs. So
    444 s is taken, and the row's own throughput, 128.54, is not comparable.
  * pi0, + streamer, 8 GPUs: its rollout, 536.8 s, is shorter than the simulation above.
  * ManiSkill: only 16 GPUs have parts. They are printed in D-VLA (arXiv:2605.13276v1, Table 1)
    under the name pi0.5, with the throughputs that the paper's Table 1 prints under pi0. On 8
    and 32 GPUs the rows contradict each other: synchronous steps less training leave a rollout
    longer than the whole step of "+ train async".
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

STAGES = ("simulation", "inference", "training")


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """A printed row; None where it is blank."""

    env_steps_per_s: float
    step_s: float
    """Of one global step."""
    rollout_s: float | None = None
    training_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRows:
    """The five rows of a table for one number of GPUs."""

    colocated: PaperRow
    disaggregated: PaperRow
    train_async: PaperRow
    rollout_async: PaperRow
    """Train and rollout async."""
    streamer: PaperRow
    """All three."""
    training_s: float
    """Of the disaggregated rows, freed of anomalies."""

    @property
    def is_corrected(self) -> bool:
        """The synchronous disaggregated row was printed with another training time."""
        return self.training_s != self.disaggregated.training_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What one update consists of. Counts of envs are those of 8 GPUs and grow with them."""

    num_envs: int
    episode_steps: int
    """Time limit in env steps."""
    num_executed: int
    """Env steps per chunk step."""
    num_rollout_epochs: int
    """Times that every env runs for `episode_steps` steps."""
    num_update_epochs: int
    num_minibatches: int
    """Optimizer steps per update epoch."""

    @property
    def segment_length(self) -> int:
        """Chunk steps per rollout epoch, and per trajectory."""
        return self.episode_steps // self.num_executed

    @property
    def num_chunk_steps(self) -> int:
        """Of every env in an update."""
        return self.num_rollout_epochs * self.segment_length

    @property
    def num_passes(self) -> int:
        """Forward passes over all envs: one per chunk step, one per epoch for bootstrapping."""
        return self.num_chunk_steps + self.num_rollout_epochs

    def env_steps(self, num_gpus: int) -> int:
        """Env steps of an update as the paper counts them."""
        return self.num_rollout_epochs * self.envs(num_gpus) * self.episode_steps

    def envs(self, num_gpus: int) -> int:
        """Envs on a number of GPUs, a multiple of 8."""
        return self.num_envs * num_gpus // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCosts:
    """Seconds that each stage needs for one update when its batches are whole."""

    simulation_s: float
    inference_s: float
    training_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The device pool of each stage, by name. Stages of one pool exclude each other."""

    simulation: str
    inference: str
    training: str

    def bound_s(self, costs: StageCosts) -> float:
        """Seconds that an update takes at least: those of the pool with the most work."""
        work_s: defaultdict[str, float] = defaultdict(float)
        work_s[self.simulation] += costs.simulation_s
        work_s[self.inference] += costs.inference_s
        work_s[self.training] += costs.training_s
        return max(work_s.values())


COLOCATED = Placement(simulation="all", inference="all", training="all")
"""Every stage in turn on all devices."""
HOST_SIMULATOR = Placement(simulation="cores", inference="rollout", training="training")
"""Disaggregated, simulation on processor cores (LIBERO)."""
DEVICE_SIMULATOR = Placement(simulation="rollout", inference="rollout", training="training")
"""Disaggregated, simulation on the devices that also serve (ManiSkill)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A workload with what the paper measured on it."""

    name: str
    workload: Workload
    is_vectorised: bool
    """The simulator runs on devices as one batch: a call takes as long for half of its envs."""
    rows: Mapping[int, PaperRows]
    """By number of GPUs."""

    @property
    def disaggregated(self) -> Placement:
        """Where the stages run when training has devices of its own."""
        return DEVICE_SIMULATOR if self.is_vectorised else HOST_SIMULATOR

    def disaggregated_costs(self, num_gpus: int) -> StageCosts:
        """Derived as the module docstring says."""
        rows = self.rows[num_gpus]
        simulation_s = self._simulation_s(num_gpus)
        return StageCosts(
            simulation_s=simulation_s,
            inference_s=_known(rows.disaggregated.rollout_s) - simulation_s,
            training_s=rows.training_s,
        )

    def colocated_costs(self, num_gpus: int) -> StageCosts:
        """The row's own rollout and training. How the rollout divides makes no difference there,
        as all stages run in turn; it is divided as on separate devices."""
        row, apart = self.rows[num_gpus].colocated, self.disaggregated_costs(num_gpus)
        rollout_s = _known(row.rollout_s)
        share = apart.simulation_s / (apart.simulation_s + apart.inference_s)
        return StageCosts(
            simulation_s=share * rollout_s,
            inference_s=(1.0 - share) * rollout_s,
            training_s=_known(row.training_s),
        )

    def split_costs(self, num_gpus: int, num_rollout: int) -> StageCosts:
        """Those of a disaggregated run in which `num_rollout` of the GPUs do not train."""
        costs, half = self.disaggregated_costs(num_gpus), num_gpus / 2
        return StageCosts(
            simulation_s=costs.simulation_s * half / num_rollout,
            inference_s=costs.inference_s * half / num_rollout,
            training_s=costs.training_s * half / (num_gpus - num_rollout),
        )

    def best_split(self, num_gpus: int) -> int:
        """GPUs that do not train where the disaggregated bound is least."""
        return min(
            range(1, num_gpus),
            key=lambda n: self.disaggregated.bound_s(self.split_costs(num_gpus, n)),
        )

    def corrected_env_steps_per_s(self, num_gpus: int) -> float:
        """What the synchronous disaggregated row would have printed without its anomaly."""
        rows = self.rows[num_gpus]
        step_s = _known(rows.disaggregated.rollout_s) + rows.training_s
        return self.workload.env_steps(num_gpus) / step_s

    def _simulation_s(self, num_gpus: int) -> float:
        row = self.rows[num_gpus].rollout_async
        if self.is_vectorised:
            return self._vectorised_simulation_s(num_gpus)
        if row.rollout_s is not None:
            return row.rollout_s
        smallest = self.rows[min(self.rows)].rollout_async
        uncovered_s = smallest.step_s - _known(smallest.rollout_s)
        fraction = uncovered_s / _known(smallest.training_s)
        return row.step_s - fraction * self.rows[num_gpus].training_s

    def _vectorised_simulation_s(self, num_gpus: int) -> float:
        """From what it cost the paper to split the batch in two: a second call per chunk step.

        The rollout that the "+ rollout async" row must have had, its step time less the last
        rollout epoch's training, is then longer than the lockstep rollout by the simulation.
        """
        rows = self.rows[num_gpus]
        uncovered_s = rows.training_s / self.workload.num_rollout_epochs
        split_s = rows.rollout_async.step_s - uncovered_s
        return split_s - _known(rows.disaggregated.rollout_s)


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("the paper leaves a value blank that the derivation needs")
    return value


def _row(
    env_steps_per_s: float,
    step_s: float,
    rollout_s: float | None = None,
    training_s: float | None = None,
) -> PaperRow:
    """A row in the order of the tables' columns."""
    return PaperRow(
        env_steps_per_s=env_steps_per_s, step_s=step_s, rollout_s=rollout_s, training_s=training_s
    )


LIBERO_PI0 = Profile(
    name="libero_pi0",
    workload=Workload(
        num_envs=128,
        episode_steps=480,
        num_executed=10,
        num_rollout_epochs=4,
        num_update_epochs=4,
        num_minibatches=12,
    ),
    is_vectorised=False,
    rows={
        8: PaperRows(
            colocated=_row(304.54, 807.4, 577.4, 228.6),
            disaggregated=_row(128.54, 1911.8, 1050.0, 861.0),
            train_async=_row(200.95, 1223.0, 1088.0, 506.5),
            rollout_async=_row(352.80, 696.6, 586.2, 446.0),
            streamer=_row(397.78, 617.8, 536.8, 441.3),
            training_s=444.0,
        ),
        16: PaperRows(
            colocated=_row(591.35, 831.19, 591.0, 240.25),
            disaggregated=_row(326.8, 1504.0, 1058.0, 442.8),
            train_async=_row(431.16, 1140.0, 1030.0, 439.0),
            rollout_async=_row(687.44, 715.0),
            streamer=_row(712.35, 690.0),
            training_s=442.8,
        ),
        32: PaperRows(
            colocated=_row(1085.51, 905.6, 672.4, 227.8),
            disaggregated=_row(624.0, 1574.0, 1126.0, 441.6),
            train_async=_row(854.82, 1150.0, 1030.0, 438.0),
            rollout_async=_row(1365.33, 720.0),
            streamer=_row(1414.45, 695.0),
            training_s=441.6,
        ),
    },
)

LIBERO_OFT = Profile(
    name="libero_oft",
    workload=Workload(
        num_envs=128,
        episode_steps=512,
        num_executed=8,
        num_rollout_epochs=4,
        num_update_epochs=4,
        num_minibatches=2,
    ),
    is_vectorised=False,
    rows={
        8: PaperRows(
            colocated=_row(260.58, 1006.0, 674.6, 312.6),
            disaggregated=_row(144.35, 1816.0, 1210.0, 589.8),
            train_async=_row(189.21, 1385.5, 1225.0, 616.5),
            rollout_async=_row(308.04, 851.0, 627.8, 630.6),
            streamer=_row(307.68, 852.0, 640.0, 624.0),
            training_s=589.8,
        ),
        16: PaperRows(
            colocated=_row(466.03, 1125.0, 767.83, 352.17),
            disaggregated=_row(248.01, 2114.0, 1288.0, 807.8),
            train_async=_row(397.19, 1320.0),
            rollout_async=_row(567.41, 924.0),
            streamer=_row(579.32, 905.0),
            training_s=807.8,
        ),
        32: PaperRows(
            colocated=_row(784.86, 1336.0, 965.0, 353.6),
            disaggregated=_row(466.73, 2246.67, 1500.0, 707.33),
            train_async=_row(748.98, 1400.0),
            rollout_async=_row(953.25, 1100.0),
            streamer=_row(979.98, 1070.0),
            training_s=707.33,
        ),
    },
)

MANISKILL_PI0 = Profile(
    name="maniskill_pi0",
    workload=Workload(
        num_envs=256,
        episode_steps=80,
        num_executed=5,
        num_rollout_epochs=4,
        num_update_epochs=4,
        num_minibatches=4,
    ),
    is_vectorised=True,
    rows={
        16: PaperRows(
            colocated=_row(232.23, 705.5, 503.5, 200.5),
            disaggregated=_row(150.59, 1088.0, 672.6, 383.6),
            train_async=_row(244.61, 669.8, 525.66, 383.0),
            # Table 1 prints throughputs only; the step times follow from Eq. 2.
            rollout_async=_row(139.32, 163_840 / 139.32),
            streamer=_row(141.49, 163_840 / 141.49),
            training_s=383.6,
        ),
    },
)

PROFILES = {profile.name: profile for profile in (LIBERO_PI0, LIBERO_OFT, MANISKILL_PI0)}
