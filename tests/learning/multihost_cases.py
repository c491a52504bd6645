"""A learner of one or two processes, the same in both: settings, trajectories and results."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from conftest import Training, make_training
from linear_policy import ACTION_DIM, STATE_DIM, LinearPolicy, make_trajectory

from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import LearningConfig, ScheduleConfig
from jaxvla.learning.learner import Learner, Progress
from jaxvla.learning.optimizer import trained
from jaxvla.learning.train_state import TrainState, init_state
from jaxvla.sharding import placed_structs
from jaxvla.simulation.assembler import EpisodeStats, SegmentInfo
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Last, MetricRecorder
from jaxvla.telemetry.tracing import NullTracer
from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.types import Params

KEY_SEED, PER_UPDATE, NUM_UPDATES = 5, 2, 3
WIDTH = 8


class WideLinearPolicy(LinearPolicy):
    """One whose kernels divide by 8, so that an axis of 8 splits them over both processes."""

    def init(self, key: jax.Array) -> Params:
        shapes = {
            "vision": (STATE_DIM, WIDTH),
            "torso": (WIDTH, ACTION_DIM),
            "value_head": (STATE_DIM, 1),
        }
        keys = jax.random.split(key, len(shapes))
        return {
            name: {"kernel": 0.5 * jax.random.normal(k, shape)}
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        return (("^.*vision/kernel$", (None, "embed")), ("torso/kernel$", ("embed", None)))


POLICY = WideLinearPolicy()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the learner."""

    name: str
    layout: str
    encode_once: bool = False
    is_streamed: bool = False
    num_envs: int = 8

    @property
    def trainable(self) -> str:
        """The encoder is frozen where it is used once."""
        return "^(torso|value_head)/" if self.encode_once else ".*"

    def training(self) -> Training:
        """Train functions."""
        return make_training(
            POLICY,
            layout=self.layout,
            num_minibatches=1 if self.is_streamed else 2,
            standardize=True,
            trainable=self.trainable,
            # Adam divides a gradient by its size: near zero, rounding would decide the sign.
            eps=1e-2,
            encode_once=self.encode_once,
        )

    def settings(self) -> dict[str, Any]:
        """What learner and follower are both given."""
        return {
            "key": jax.random.key(KEY_SEED),
            "learning": LearningConfig(num_updates=NUM_UPDATES, trajectories_per_update=PER_UPDATE),
            "schedule": ScheduleConfig(stream_microbatches=self.is_streamed),
            "algorithm": PPOConfig(
                num_epochs=1 if self.is_streamed else 2,
                num_minibatches=1 if self.is_streamed else 2,
            ),
        }

    def trajectory(self, seed: int) -> Any:
        """[4, E, ...] on the host."""
        return make_trajectory(seed, B=self.num_envs, num_invalid=seed)


CASES = (
    Case(name="data", layout="colocated=8"),
    Case(name="data_once", layout="colocated=8", encode_once=True),
    Case(name="data_streamed", layout="colocated=8", is_streamed=True),
    Case(name="data_undivided", layout="colocated=8", num_envs=4),
    Case(name="fsdp_within", layout="colocated=8:data2,fsdp4"),
    Case(name="fsdp_across", layout="colocated=8:fsdp8"),
    Case(name="fsdp_across_once", layout="colocated=8:fsdp8", encode_once=True),
    Case(name="fsdp_across_streamed", layout="colocated=8:fsdp8", is_streamed=True),
)


class ListQueue:
    """Hands out trajectories; closed after the last one, or when told."""

    def __init__(self, case: Case, *, first: int = 0, last: int = PER_UPDATE * NUM_UPDATES):
        self._case = case
        self._next, self._last = first, last

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        if self._next + count > self._last:
            return None
        seeds = range(self._next, self._next + count)
        self._next += count
        return [self._item(seed, learner_version) for seed in seeds]

    def close(self, reason: str) -> None:
        self._last = 0

    def _item(self, seed: int, version: int) -> QueueItem:
        info = SegmentInfo(
            group=f"group_{seed % 2}",
            next_segment=seed // 2 + 1,
            end_state={"qpos": np.full((2,), float(seed))},
            episodes=EpisodeStats(
                task=np.zeros(1, np.int32),
                success=np.ones(1, bool),
                return_=np.ones(1, np.float32),
                length=np.ones(1, np.int32),
            ),
            num_env_steps=10,
            num_useful_env_steps=9,
            num_queries=8,
            num_invalid=0,
        )
        return QueueItem(
            ticket=Ticket(id=seed, admission_version=version, owner="simulator"),
            payload=self._case.trajectory(seed),
            policy_version_min=version,
            policy_version_max=version,
            nbytes=0,
            info=info,
        )


@dataclass(kw_only=True)
class Result:
    """What a run came to."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every update."""
    published: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """Version -> path -> value."""


class LastValues(MetricRecorder):
    """Keeps the metrics of the newest update apart."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, float] = {}

    def add(self, name: str, value: Any, reduction: Any) -> None:
        if reduction is Last and name.startswith("learner/"):
            self.newest[name] = float(value)
        super().add(name, value, reduction)


def run_learner(
    case: Case,
    *,
    queue: Any,
    fetch: Callable[[list[jax.Array], Params], list[np.ndarray]],
    state: TrainState | None = None,
    progress: Progress | None = None,
    on_update: Callable[[Learner], None] = lambda learner: None,
) -> tuple[Learner, Result]:
    """The learner of a run in one process, or the leader of one in several."""
    made, result, recorder = case.training(), Result(), LastValues()

    class Store:
        def publish(self, version: int, params: Params) -> None:
            # Trainable leaves only, but for the first version, as the remote store does it.
            pattern = case.trainable if result.published else ".*"
            leaves = trained(params, pattern)
            values = fetch(list(leaves.values()), params)
            result.published[version] = dict(zip(leaves, values, strict=True))

    def note(learner: Learner) -> None:
        result.losses.append(dict(recorder.newest))
        on_update(learner)

    meter = ActivityMeter("learning", tracer=NullTracer())
    learner = Learner(
        functions=made.functions,
        state=state or made.fresh_state(),
        progress=progress or Progress(),
        queue=queue,
        store=Store(),
        recorder=recorder,
        meter=meter,
        on_update=note,
        **case.settings(),
    )
    learner.publish_current()
    with meter.thread("learner"):
        learner.run()
    return learner, result


def struct_of(case: Case) -> Any:
    """Shapes and dtypes of its trajectories."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.trajectory(0))


def target_of(case: Case) -> TrainState:
    """What a checkpoint of the train state is read into."""
    made = case.training()
    params = jax.eval_shape(POLICY.init, jax.random.key(0))
    struct = jax.eval_shape(lambda p: init_state(p, made.optimizer), params)
    return placed_structs(struct, made.shardings)


def groups_of(learner: Learner) -> dict[str, Any]:
    """Where its env groups stand, as a checkpoint holds it."""
    return {name: where["end_state"] for name, where in learner.progress.groups.items()}


GROUPS_TARGET = {f"group_{index}": {"qpos": np.zeros(2)} for index in (0, 1)}


def flat(result: Result) -> dict[str, np.ndarray]:
    """A result as arrays by name, for a file."""
    arrays = {
        f"loss/{index}/{name}": np.asarray(value)
        for index, metrics in enumerate(result.losses)
        for name, value in metrics.items()
    }
    for version, leaves in result.published.items():
        arrays |= {f"params/{version}/{name}": value for name, value in leaves.items()}
    return arrays
