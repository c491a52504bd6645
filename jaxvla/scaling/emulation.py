"""Stages that only take time: env groups, policy and train functions made of sleeps.

They stand in for the real ones in a Simulator, a PolicyServer and a Learner, so that what is
measured is the schedule: queue, credit, batching, threads and weight publication are real.

Every stage runs on a device pool. A pool runs one stage at a time, in the order in which the
stages ask, so stages that share devices exclude each other and stages on different pools
overlap.
"""

import math
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.learning.gradients import GradientSum
from jaxvla.learning.train_state import TrainState
from jaxvla.scaling.emulated_time import EmulatedTime
from jaxvla.simulation.group import Cursor
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.types import ChunkResult, EnvSpec, Observation, PolicySample


class DevicePool:
    """Devices that do one piece of work at a time, first come first served.

    A piece that was asked for while another ran starts the moment that one ends, as work
    queued on a device does, however late the host's threads wake up. Thread-safe.
    """

    def __init__(self, emulated: EmulatedTime):
        self._time = emulated
        self._lock = threading.Lock()
        self._free_s = -math.inf
        """Emulated time at which everything asked for so far is done."""
        self._pieces: deque[tuple[str, float, float]] = deque()
        """Stage, start and end of what was not finished when `busy_s` was last asked."""
        self._finished_s: dict[str, float] = {}

    def run(self, stage: str, work_s: float, meter: ActivityMeter) -> None:
        """Does `work_s` emulated seconds of work and returns when it is done.

        Args:
          stage: under which name the time is booked.
          work_s: at least 0.
          meter: the time before the start is booked there as waiting for "devices".
        """
        with self._lock:
            start_s = max(self._time.now_s(), self._free_s)
            end_s = self._free_s = start_s + work_s
            self._pieces.append((stage, start_s, end_s))
        with meter.waiting("devices"):
            self._time.sleep_until(start_s)
        self._time.sleep_until(end_s)

    def busy_s(self, now_s: float) -> dict[str, float]:
        """Emulated seconds of work by stage up to `now_s`, which never goes back."""
        with self._lock:
            while self._pieces and self._pieces[0][2] <= now_s:
                stage, start_s, end_s = self._pieces.popleft()
                self._finished_s[stage] = self._finished_s.get(stage, 0.0) + end_s - start_s
            busy_s = defaultdict(float, self._finished_s)
            for stage, start_s, _ in self._pieces:
                busy_s[stage] += max(0.0, now_s - start_s)
        return dict(busy_s)


class Stage:
    """One kind of work on a pool, of random length around a given mean."""

    def __init__(
        self,
        name: str,
        pool: DevicePool,
        meter: ActivityMeter,
        *,
        variation: float,
        random: np.random.Generator,
    ):
        """Args:
        name, pool, meter: see `DevicePool.run`.
        variation: standard deviation of the length as a fraction of its mean, at least 0.
        random: source of the lengths; a stage is used by one thread only.
        """
        self._name = name
        self._pool = pool
        self._meter = meter
        self._random = random
        # Of a log-normal: https://en.wikipedia.org/wiki/Log-normal_distribution#Arithmetic_moments
        self._sigma = math.sqrt(math.log1p(variation**2))

    def run(self, mean_s: float) -> None:
        """Takes log-normally many emulated seconds, `mean_s` on average."""
        factor = self._random.lognormal(-(self._sigma**2) / 2, self._sigma)
        self._pool.run(self._name, mean_s * factor, self._meter)


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineCost:
    """Emulated seconds of a call by its number of rows."""

    fixed_s: float
    """Of a call, whatever its size."""
    row_s: float
    """Of every row on top."""

    @classmethod
    def of(cls, whole_s: float, rows: int, *, fixed_s: float) -> "AffineCost":
        """The cost of which a call of `rows` rows takes `whole_s`."""
        return cls(fixed_s=fixed_s, row_s=(whole_s - fixed_s) / rows)

    def seconds(self, rows: int) -> float:
        """Of a call of `rows` rows."""
        return self.fixed_s + rows * self.row_s


SPEC = EnvSpec(
    cameras=("none",),
    image_size=1,
    state_dim=1,
    state_low=(0.0,),
    state_high=(1.0,),
    action_dim=1,
    action_names=("none",),
    tasks=("none",),
    instructions=("none",),
    max_episode_steps=(1,),
    control_hz=1.0,
)
"""Of an env without content."""


class EmulatedGroup:
    """An EnvGroup whose chunk steps take time and show nothing. Episodes never end."""

    spec = SPEC
    task_ids: tuple[int, ...] = (0,)
    frames_per_s = SPEC.control_hz

    def __init__(self, name: str, stage: Stage, *, num_envs: int, num_executed: int, step_s: float):
        """Args:
        name: of the group.
        stage: what a chunk step runs on.
        num_envs: envs E.
        num_executed: env steps per chunk step.
        step_s: mean emulated seconds of a chunk step of all E envs.
        """
        self.name = name
        self.num_envs = num_envs
        self._stage = stage
        self._step_s = step_s
        self._observation = _observation(num_envs)
        self._result = _chunk_result(self._observation, num_executed)

    def reset(self, cursor: Cursor) -> Observation:
        """See EnvGroup.reset. Takes no time."""
        return self._observation

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        """See EnvGroup.reset_to. Takes no time."""
        return self._observation

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        """See EnvGroup.step_chunk."""
        self._stage.run(self._step_s)
        return self._result

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        """See EnvGroup.frames."""
        return [np.zeros((1, 1, 1, 1, 3), np.uint8) for _ in rows]

    def instruction(self, row: int) -> str:
        """See EnvGroup.instruction."""
        return self.spec.instructions[0]

    def state(self) -> Any:
        """See EnvGroup.state: there is none."""
        return {}

    def load_state(self, state: Any) -> Observation:
        """See EnvGroup.load_state."""
        return self._observation

    def close(self) -> None:
        """Nothing to free."""


class EmulatedSampler:
    """Answers batches as `serving.sampling.Sampler.run` does, after the time they cost."""

    def __init__(self, stage: Stage, *, cost: AffineCost, max_rows: int):
        """Args:
        stage: what a forward pass runs on.
        cost: mean emulated seconds of a pass by its rows; a value query costs as much.
        max_rows: rows of the largest batch.
        """
        self._stage = stage
        self._cost = cost
        self._answer = _policy_sample(max_rows)

    def run(
        self, kind: str, params: Any, observations: Sequence[Observation], keys: np.ndarray
    ) -> tuple[Any, int]:
        """Zeros for every row, and the number of rows as the bucket."""
        rows = len(keys)
        self._stage.run(self._cost.seconds(rows))
        answer = jax.tree.map(lambda x: x[:rows], self._answer)
        return (answer.value if kind == "value" else answer), rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """What the learner reads of a TrainingBatch."""

    weight: np.ndarray


class EmulatedTrainFunctions:
    """Stands in for `learning.train_step.TrainFunctions`; the parameters stay as they are."""

    def __init__(self, stage: Stage, *, step_s: float, gradient_s: float):
        """Args:
        stage: what training runs on.
        step_s: mean emulated seconds of a minibatch step.
        gradient_s: mean emulated seconds of the gradient of one trajectory.
        """
        self._stage = stage
        self._step_s = step_s
        self._gradient_s = gradient_s

    def place(self, trajectory: Any) -> Any:
        """The trajectory."""
        return trajectory

    def prepare(self, params: Any, trajectories: Sequence[Any], version: Any) -> _Batch:
        """An empty batch; its cost is part of the steps'."""
        return _Batch(weight=np.ones((1, 1), np.float32))

    def draw(self, key: jax.Array, shape: tuple[int, int]) -> None:
        """No order: there are no samples."""

    def step(
        self, state: TrainState, batch: Any, order: Any, index: Any
    ) -> tuple[TrainState, dict[str, float]]:
        """A minibatch step."""
        self._stage.run(self._step_s)
        return state, {"grad_norm": 0.0}

    def targets(self, params: Any, trajectory: Any, version: Any) -> tuple[None, None]:
        """Nothing, and no statistics; their cost is part of the gradient's."""
        return None, None

    def gradient(self, params: Any, batch: Any, moments: Any) -> GradientSum:
        """The gradient of one trajectory."""
        self._stage.run(self._gradient_s)
        return GradientSum(grads={}, metrics={}, weight=jnp.ones(()))

    def accumulate(self, total: GradientSum, part: GradientSum) -> GradientSum:
        """The first sum: there is nothing to add."""
        return total

    def apply(self, state: TrainState, total: GradientSum) -> tuple[TrainState, dict[str, float]]:
        """The optimizer step; its cost is part of the gradients'."""
        return state, {"loss/total": 0.0, "grad_norm": 0.0}


def empty_train_state() -> TrainState:
    """A train state with one small parameter, for the weight store to carry."""
    return TrainState(
        params={"nothing": jnp.zeros(1)},
        opt_state=(),
        num_steps=jnp.zeros((), jnp.int32),
        num_skipped=jnp.zeros((), jnp.int32),
    )


def _observation(rows: int) -> Any:
    """Zeros of the smallest sizes."""
    return Observation(
        images=_zeros(np.uint8, rows, 1, 1, 1, 3),
        image_mask=_zeros(np.bool_, rows, 1),
        state=_zeros(np.float32, rows, 1),
        tokens=_zeros(np.int32, rows, 1),
        token_mask=_zeros(np.bool_, rows, 1),
    )


def _chunk_result(observation: Observation, num_executed: int) -> ChunkResult:
    rows = len(observation.state)
    return ChunkResult(
        observation=observation,
        final_observation=observation,
        reward=_zeros(np.float32, rows),
        terminated=_zeros(np.bool_, rows),
        truncated=_zeros(np.bool_, rows),
        success=_zeros(np.bool_, rows),
        num_steps=np.full(rows, num_executed, np.int32),
        episode_return=_zeros(np.float32, rows),
        episode_steps=_zeros(np.int32, rows),
        task=_zeros(np.int32, rows),
        invalid=_zeros(np.bool_, rows),
        contact_overflow=_zeros(np.int32, rows),
    )


def _policy_sample(rows: int) -> PolicySample:
    return PolicySample(
        actions=_zeros(np.float32, rows, 1, 1),
        trace=_zeros(np.float32, rows),
        log_prob=_zeros(np.float32, rows),
        value=_zeros(np.float32, rows),
    )


def _zeros(dtype: Any, *shape: int) -> Any:
    return np.zeros(shape, dtype)
