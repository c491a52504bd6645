"""The programs of a run, joined as in training, around emulated stages."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import cast

import jax
import numpy as np

from jaxvla.config import AlgorithmConfig, LearningConfig, ScheduleConfig
from jaxvla.learning.learner import Learner, Progress
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.scaling.emulated_time import EmulatedTime
from jaxvla.scaling.emulation import (
    AffineCost,
    DevicePool,
    EmulatedGroup,
    EmulatedSampler,
    EmulatedTrainFunctions,
    Stage,
    empty_train_state,
)
from jaxvla.scaling.profiles import STAGES, Placement, StageCosts, Workload
from jaxvla.serving.adaptive import Tuner
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.serving.sampling import Sampler
from jaxvla.serving.server import PolicyServer
from jaxvla.simulation.simulator import Simulator
from jaxvla.telemetry.activity import Activity, ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import NullTracer
from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore
from jaxvla.transport.staleness import CreditRule

FORWARD_S = 0.073
"""Default of `Batching.forward_s`. No row of the paper tells it; it is at most the time of a
single row, 73 ms for pi0 on one GPU (arXiv:2410.24164, appendix D)."""
VARIATION = {"simulation": 0.05, "inference": 0.02, "training": 0.02}
"""Default of `RunPlan.variation`. An assumption: the paper gives no spread, and none of its means
depends on it."""
ROLES = {"simulation": "simulation", "inference": "serving", "training": "learning"}
"""Stage -> role of the program that runs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """When batches fire where groups need not wait for each other."""

    trigger_groups: int = 1
    """Groups whose requests together start a batch."""
    max_wait_s: float = math.inf
    """Emulated; longest time that a request is held back."""
    is_adaptive: bool = False
    """The two above are where the tuner starts."""
    forward_s: float = FORWARD_S
    """Emulated seconds of a forward pass that do not depend on its rows. The whole batch takes
    as long whatever they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What to emulate."""

    workload: Workload
    num_envs: int
    """Envs of a whole batch, for which the costs hold."""
    costs: StageCosts
    placement: Placement
    is_vectorised: bool
    """A simulation call takes as long for half of the envs."""
    num_groups: int
    envs_per_group: int
    """With `num_envs` in each of two groups, whole batches are double-buffered."""
    schedule: ScheduleConfig
    batching: Batching = field(default_factory=Batching)
    num_warmup: int
    """First updates, which are not measured; at least 1."""
    num_updates: int
    """Updates that are measured."""
    variation: dict[str, float] = field(default_factory=lambda: dict(VARIATION))
    """Stage -> standard deviation of its length as a fraction of the mean."""
    seed: int = 0

    @property
    def trajectories_per_update(self) -> int:
        """A trajectory is one rollout epoch of one env group."""
        return self.workload.num_rollout_epochs * self.num_envs // self.envs_per_group

    @property
    def last_update(self) -> int:
        """Updates of the whole run."""
        return self.num_warmup + self.num_updates


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What was measured, in emulated time, over the measured updates."""

    step_s: float
    """Mean time of an update."""
    step_std_s: float
    """Standard deviation over the updates."""
    env_steps_per_s: float
    staleness_max: int
    """Of the whole run."""
    staleness_bound: int
    stage_busy: dict[str, float]
    """Share of the time in which a stage's pool worked for it."""
    activities: dict[str, Activity]
    """Role -> what its threads did."""


@dataclass(kw_only=True)
class _Log:
    """Collected by the learner's thread after every update."""

    times_s: list[float] = field(default_factory=list)
    """Emulated."""
    stage_s: list[dict[str, float]] = field(default_factory=list)
    """Work done by stage, emulated."""
    env_steps: list[int] = field(default_factory=list)
    """Consumed by each update."""
    staleness: list[int] = field(default_factory=list)
    activities: dict[str, Activity] = field(default_factory=dict)
    """Since the snapshot before."""


class EmulatedRun:
    """Programs to be run by a runtime until `learner` ends; then `result` tells what they did."""

    def __init__(self, plan: RunPlan, emulated_time: EmulatedTime):
        self.plan = plan
        self._time = emulated_time
        self._log = _Log()
        tracer = NullTracer(clock=emulated_time.now_s)
        self.meters = {role: ActivityMeter(role, tracer=tracer) for role in ROLES.values()}
        self._recorder = MetricRecorder()
        names = set(dataclasses.asdict(plan.placement).values())
        self._pools = {name: DevicePool(self._time) for name in names}
        # Without the run's last update: simulation goes on as if there were no end, or else the
        # last updates would have the devices to themselves.
        self._rule = CreditRule(
            trajectories_per_update=plan.trajectories_per_update,
            max_staleness=plan.schedule.staleness_in_force,
            window=plan.schedule.window_in_force,
            publish_interval=plan.schedule.publish_interval,
        )
        self._queue = InProcessQueue(self._rule)
        self._store = InProcessWeightStore(on_acknowledged=self._queue.advance)
        self._batcher = self._make_batcher()
        self._key = jax.random.key(plan.seed)
        self.learner = self._make_learner()
        self.programs = (self._make_server(), self._make_simulator(), self.learner)
        self.learner.publish_current()

    def close(self) -> None:
        """Wakes and frees everything. For after the run, however it ended."""
        self._queue.close("shutdown")
        self._store.close()
        for program in self.programs:
            program.close()

    def result(self) -> RunResult:
        """What the measured updates took.

        Raises:
          ValueError: the run has not made all of its updates.
        """
        plan, log, first = self.plan, self._log, self.plan.num_warmup - 1
        if len(log.times_s) != plan.last_update:
            raise ValueError(f"the run ended after {len(log.times_s)} updates")
        steps_s = np.diff(log.times_s[first:])
        window_s = float(steps_s.sum())
        begin, end = log.stage_s[first], log.stage_s[-1]
        return RunResult(
            step_s=float(steps_s.mean()),
            step_std_s=float(steps_s.std()),
            env_steps_per_s=sum(log.env_steps[plan.num_warmup :]) / window_s,
            staleness_max=max(log.staleness),
            staleness_bound=self._rule.bound,
            stage_busy={name: (end[name] - begin[name]) / window_s for name in STAGES},
            activities=log.activities,
        )

    def _on_update(self, learner: Learner) -> None:
        """Notes where the run stands, in the learner's thread."""
        log = self._log
        now_s = self._time.now_s()
        log.times_s.append(now_s)
        stage_s: dict[str, float] = {}
        for pool in self._pools.values():
            stage_s |= pool.busy_s(now_s)
        log.stage_s.append(stage_s)
        log.staleness += learner.staleness
        log.env_steps.append(learner.num_env_steps)
        learner.staleness, learner.num_env_steps = [], 0
        if len(log.times_s) in (self.plan.num_warmup, self.plan.last_update):
            log.activities = {role: m.snapshot().window for role, m in self.meters.items()}

    def _stage(self, name: str, index: int = 0) -> Stage:
        """A stage with random lengths of its own."""
        return Stage(
            name,
            self._pools[getattr(self.plan.placement, name)],
            self.meters[ROLES[name]],
            variation=self.plan.variation[name],
            random=np.random.default_rng([self.plan.seed, STAGES.index(name), index]),
        )

    def _make_batcher(self) -> Batcher:
        """As `plan.batching` says; in lockstep, the requests of all groups make a batch."""
        plan, batching, envs = self.plan, self.plan.batching, self.plan.envs_per_group
        rows, is_dynamic = plan.num_groups * envs, plan.schedule.overlap_rollout
        tuner = Tuner(buckets=range(envs, rows + 1, envs), max_rows=rows)
        return Batcher(
            trigger_rows=batching.trigger_groups * envs if is_dynamic else rows,
            max_wait_s=batching.max_wait_s if is_dynamic else math.inf,
            max_rows=rows,
            capacity_rows=rows,
            tuner=tuner if is_dynamic and batching.is_adaptive else None,
            clock=self._time.now_s,
            wait=self._time.wait,
        )

    def _make_learner(self) -> Learner:
        plan, workload = self.plan, self.plan.workload
        num_steps = workload.num_update_epochs * workload.num_minibatches
        functions = EmulatedTrainFunctions(
            self._stage("training"),
            step_s=plan.costs.training_s / num_steps,
            gradient_s=plan.costs.training_s / plan.trajectories_per_update,
        )
        return Learner(
            functions=cast(TrainFunctions, functions),
            state=empty_train_state(),
            progress=Progress(),
            queue=self._queue,
            store=self._store,
            key=self._key,
            learning=LearningConfig(
                num_updates=plan.last_update,
                trajectories_per_update=plan.trajectories_per_update,
            ),
            schedule=plan.schedule,
            algorithm=AlgorithmConfig(
                name="emulated",
                num_epochs=workload.num_update_epochs,
                num_minibatches=workload.num_minibatches,
            ),
            recorder=self._recorder,
            meter=self.meters["learning"],
            on_update=self._on_update,
        )

    def _make_server(self) -> PolicyServer:
        plan = self.plan
        whole_s = plan.costs.inference_s / plan.workload.num_passes
        sampler = EmulatedSampler(
            self._stage("inference"),
            cost=AffineCost.of(whole_s, plan.num_envs, fixed_s=plan.batching.forward_s),
            max_rows=plan.num_groups * plan.envs_per_group,
        )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return PolicyServer(
            sampler=cast(Sampler, sampler),
            batcher=self._batcher,
            subscribe=lambda wake: self._store.subscribe("server", device, wake),
            recorder=self._recorder,
            meter=self.meters["serving"],
        )

    def _make_simulator(self) -> Simulator:
        plan, workload = self.plan, self.plan.workload
        whole_s = plan.costs.simulation_s / workload.num_chunk_steps
        cost = AffineCost.of(whole_s, plan.num_envs, fixed_s=whole_s * plan.is_vectorised)
        groups = [
            EmulatedGroup(
                f"group_{index}",
                self._stage("simulation", index),
                num_envs=plan.envs_per_group,
                num_executed=workload.num_executed,
                step_s=cost.seconds(plan.envs_per_group),
            )
            for index in range(plan.num_groups)
        ]
        router = Router(1)
        clients = [
            RoutedClient([InferenceClient(self._batcher, x.name)], router, rows=x.num_envs)
            for x in groups
        ]
        return Simulator(
            groups=list(groups),
            clients=clients,
            queue=self._queue,
            key=self._key,
            segment_length=workload.segment_length,
            overlap_rollout=plan.schedule.overlap_rollout,
            recorder=self._recorder,
            meter=self.meters["simulation"],
        )
