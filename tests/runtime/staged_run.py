"""Real programs, queue and weight store around stages that do nothing but tell the time.

Simulating, inference and training are entries of one log, and a test may hold any of them until
something else has happened: what the schedule lets overlap shows in the order of the log, and
what it does not let overlap would wait for ever.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import LearningConfig, ScheduleConfig
from jaxvla.learning.learner import Learner, Progress
from jaxvla.runtime.local import LocalRuntime
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.serving.server import PolicyServer
from jaxvla.simulation.group import Cursor
from jaxvla.simulation.simulator import Simulator
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import Tracer
from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore
from jaxvla.transport.staleness import CreditRule
from jaxvla.types import ChunkResult, Observation, PolicySample

TIMEOUT_S = 30.0
"""For waits that end at once unless the code is broken."""

Event = tuple[Any, ...]


class Stages:
    """The log. `hooks[event]` runs inside the stage that begins with that event."""

    def __init__(self) -> None:
        self.log: list[Event] = []
        self.hooks: dict[Event, Callable[[], None]] = {}
        self._changed = threading.Condition()

    def enter(self, *event: Any) -> None:
        """A stage begins."""
        self.note(*event)
        hook = self.hooks.get(event)
        if hook is not None:
            hook()

    def note(self, *event: Any) -> None:
        with self._changed:
            self.log.append(event)
            self._changed.notify_all()

    def wait_for(self, *event: Any) -> None:
        with self._changed:
            is_there = self._changed.wait_for(lambda: event in self.log, TIMEOUT_S)
        assert is_there, f"{event} has not happened: {self.log}"

    def hold(self, stage: Event, until: Event) -> None:
        """Keeps a stage from ending before an event."""
        self.hooks[stage] = lambda: self.wait_for(*until)

    def of(self, *kinds: str) -> list[Event]:
        """The part of the log that is of these kinds."""
        return [event for event in self.log if event[0] in kinds]

    def between(self, first: Event, last: Event) -> list[Event]:
        """What happened between two events."""
        return self.log[self.log.index(first) + 1 : self.log.index(last)]


def observation_of(group: int, chunks: int, num_envs: int) -> Any:
    """What group number `group` shows after `chunks` chunks."""
    return Observation(
        images=np.zeros((num_envs, 1, 1, 1, 3), np.uint8),
        image_mask=np.ones((num_envs, 1), bool),
        state=np.tile(np.float32([group, chunks]), (num_envs, 1)),
        tokens=np.zeros((num_envs, 1), np.int32),
        token_mask=np.ones((num_envs, 1), bool),
    )


class StagedGroup:
    """One env whose episodes never end. Implements what a simulator uses of EnvGroup."""

    num_envs = 1

    def __init__(self, stages: Stages, index: int):
        self.name = "ab"[index]
        self._stages, self._index, self._chunks = stages, index, 0

    def reset(self, cursor: Cursor) -> Observation:
        return observation_of(self._index, 0, 1)

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        self._stages.enter("step", self.name, self._chunks)
        self._stages.note("stepped", self.name, self._chunks)
        self._chunks += 1
        off, zero = np.zeros(1, bool), np.zeros(1, np.float32)
        count = np.ones(1, np.int32)
        return ChunkResult(
            observation=observation_of(self._index, self._chunks, 1),
            final_observation=observation_of(self._index, self._chunks, 1),
            reward=zero,
            terminated=off,
            truncated=off,
            success=off,
            num_steps=count,
            episode_return=zero,
            episode_steps=count,
            task=0 * count,
            invalid=off,
            contact_overflow=0 * count,
        )

    def state(self) -> Any:
        return self._chunks

    def close(self) -> None:
        """Holds nothing."""


class StagedSampler:
    """Inference: one "infer" entry per group and chunk."""

    def __init__(self, stages: Stages):
        self._stages = stages

    def run(
        self, kind: str, params: Any, observations: Sequence[Observation], keys: np.ndarray
    ) -> tuple[Any, int]:
        rows = np.concatenate([x.state for x in observations])
        zero: Any = np.zeros(len(rows), np.float32)
        if kind == "value":
            return zero, len(rows)
        for group, chunk in rows.astype(int).tolist():
            self._stages.enter("infer", "ab"[group], chunk)
        sample = PolicySample(actions=zero[:, None, None], trace=zero, log_prob=zero, value=zero)
        return sample, len(rows)


class StagedFunctions:
    """Training: "train" for a whole batch, or "gradient" per trajectory and then "apply"."""

    def __init__(self, stages: Stages):
        self._stages = stages
        self._num_gradients = self._num_updates = 0

    def place(self, trajectory: Any) -> Any:
        return trajectory

    def prepare(self, params: Any, trajectories: Sequence[Any], *_: Any) -> Any:
        self._stages.enter("train", self._num_updates)
        return SimpleNamespace(weight=np.ones((1, len(trajectories))))

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> None:
        """In any order."""

    def step(self, state: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        self._finish()
        return state, {"grad_norm": np.float32(1.0)}

    def targets(self, *_: Any) -> tuple[None, None]:
        return None, None

    def gradient(self, *_: Any) -> None:
        self._stages.enter("gradient", self._num_gradients)
        self._num_gradients += 1

    def accumulate(self, total: Any, part: Any) -> Any:
        return total

    def apply(self, state: Any, total: Any) -> tuple[Any, Any]:
        self._stages.enter("apply", self._num_updates)
        self._finish()
        return state, {"grad_norm": np.float32(1.0)}

    def _finish(self) -> None:
        self._stages.note("trained", self._num_updates)
        self._num_updates += 1


def run(
    stages: Stages,
    *,
    overlap_training: bool = False,
    overlap_rollout: bool = False,
    stream_microbatches: bool = False,
    num_groups: int,
    segment_length: int,
    per_update: int,
    num_updates: int,
) -> None:
    """Runs a simulator, a policy server and a learner until the learner has ended."""
    schedule = ScheduleConfig(
        overlap_training=overlap_training,
        overlap_rollout=overlap_rollout,
        stream_microbatches=stream_microbatches,
    )
    rule = CreditRule(
        trajectories_per_update=per_update,
        max_staleness=schedule.staleness_in_force,
        num_updates=num_updates,
    )
    queue = InProcessQueue(rule)
    store = InProcessWeightStore(on_acknowledged=queue.advance)
    recorder, tracer = MetricRecorder(), Tracer()
    roles = ("serving", "simulation", "learning")
    meters = {role: ActivityMeter(role, tracer=tracer) for role in roles}
    batcher = Batcher(
        trigger_rows=1 if overlap_rollout else num_groups,
        max_wait_s=math.inf,
        max_rows=num_groups,
        capacity_rows=num_groups,
    )
    groups: list[Any] = [StagedGroup(stages, index) for index in range(num_groups)]
    router = Router(1)
    sampler: Any = StagedSampler(stages)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    server = PolicyServer(
        sampler=sampler,
        batcher=batcher,
        subscribe=lambda wake: store.subscribe("server_0", device, wake),
        recorder=recorder,
        meter=meters["serving"],
    )
    simulator = Simulator(
        groups=groups,
        clients=[RoutedClient([InferenceClient(batcher, x.name)], router, rows=1) for x in groups],
        queue=queue,
        key=jax.random.key(0),
        segment_length=segment_length,
        overlap_rollout=overlap_rollout,
        recorder=recorder,
        meter=meters["simulation"],
    )
    functions: Any = StagedFunctions(stages)
    state: Any = SimpleNamespace(params={"kernel": jnp.zeros(1)}, num_skipped=0)
    learner = Learner(
        functions=functions,
        state=state,
        progress=Progress(),
        queue=queue,
        store=store,
        key=jax.random.key(1),
        learning=LearningConfig(num_updates=num_updates, trajectories_per_update=per_update),
        schedule=schedule,
        algorithm=dataclasses.replace(PPOConfig(), num_epochs=1, num_minibatches=1),
        recorder=recorder,
        meter=meters["learning"],
        on_update=lambda learner: None,
    )
    learner.publish_current()
    programs = (server, simulator, learner)
    LocalRuntime(threading.Event()).run(programs, meters, learner, grace_s=TIMEOUT_S)
    assert queue.ledger().consumed == num_updates * per_update
