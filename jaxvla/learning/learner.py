"""Learner: turns trajectories into better weights.

consumes    trajectories from the queue, in admission order, P per update
produces    published weights (version v + 1), one metric record per update, checkpoints
waits for   P trajectories
unblocked by  simulators' puts, close of the queue
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla import rng
from jaxvla.config import AlgorithmConfig, LearningConfig, ScheduleConfig
from jaxvla.learning.streaming import GradientStream
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Last, Mean, MetricRecorder, Rate
from jaxvla.transport.base import QueueItem, TrajectorySource, WeightSink

_LOG = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Nothing could be learned from update after update: the run must stop with exit code 4."""


@dataclass(kw_only=True)
class Progress:
    """Counters and positions that a checkpoint holds beside the train state."""

    version: int = 0
    """Completed updates."""
    skipped_in_a_row: int = 0
    """Latest updates that had to skip an optimizer step, or had no valid sample."""
    groups: dict[str, Any] = field(default_factory=dict)
    """Env group -> where it stood after its last trajectory that went into `version`."""


class Learner:
    """The learner program. `run` is its only thread."""

    role = "learning"

    def __init__(
        self,
        *,
        functions: TrainFunctions,
        state: TrainState,
        progress: Progress,
        queue: TrajectorySource,
        store: WeightSink,
        key: jax.Array,
        learning: LearningConfig,
        schedule: ScheduleConfig,
        algorithm: AlgorithmConfig,
        recorder: MetricRecorder,
        meter: ActivityMeter,
        on_update: Callable[["Learner"], None],
    ):
        """Args:
        functions: jitted train functions.
        state: train state on the learning mesh; donated by every step.
        progress: where the run stands.
        queue, store: ways to the simulators and to the policy servers.
        key: typed root key of the learner.
        learning, schedule, algorithm: their sections of the config.
        recorder: metrics.
        meter: busy / wait accounting.
        on_update: called after every update, in the learner's thread, for records and
          checkpoints.
        """
        self.state = state
        self.progress = progress
        self.staleness: list[int] = []
        """Of the trajectories consumed since the caller last cleared it."""
        self.num_env_steps = 0
        """Control steps in those trajectories."""
        self._functions = functions
        self._queue = queue
        self._store = store
        self._key = key
        self._learning = learning
        self._schedule = schedule
        self._algorithm = algorithm
        self._recorder = recorder
        self._meter = meter
        self._on_update = on_update
        self._has_valid = False
        """A sample of the update in progress is valid, or its process does not know."""
        self._reached: dict[str, Any] = {}
        """Where env groups stand once the update in progress is complete. Not `progress` before
        that: an update that streams in and is interrupted is made again by a resumed run."""

    def threads(self) -> dict[str, Callable[[], None]]:
        """Thread name -> function, for the runtime to start."""
        return {"learner": self.run}

    def run(self) -> None:
        """Updates until the budget is spent or the queue closes."""
        while self.progress.version < self._learning.num_updates:
            update = self._streamed if self._schedule.stream_microbatches else self._batched
            # For `telemetry.profile_updates`; costs nothing when nobody watches.
            with jax.profiler.StepTraceAnnotation("update", step_num=self.progress.version):
                metrics = update()
            if metrics is None:
                return
            self.progress.version += 1
            self.progress.groups |= self._reached
            self._publish()
            self._note(metrics)
            self._on_update(self)

    def stop(self, reason: str) -> None:
        """Ends `run` after the update in progress."""
        self._queue.close(reason)

    def close(self) -> None:
        """Nothing to free."""

    def publish_current(self) -> None:
        """Publishes the present weights, so that the policy servers can begin."""
        self._store.publish(self.progress.version, self.state.params)

    def _batched(self) -> dict[str, Any] | None:
        """One update from a whole batch: epochs of minibatch steps. None when closed."""
        items = self._take(self._learning.trajectories_per_update)
        if items is None:
            return None
        with self._meter.busy("train"):
            batch = self._functions.prepare(
                self.state.params,
                [self._functions.place(x.payload) for x in items],
                jnp.int32(self.progress.version),
            )
            steps = []
            for epoch in range(self._algorithm.num_epochs):
                key = rng.stream(self._key, "order", self.progress.version, epoch)
                order = self._functions.draw(key, batch.weight.shape)
                for index in range(self._algorithm.num_minibatches):
                    self.state, metrics = self._functions.step(
                        self.state, batch, order, jnp.int32(index)
                    )
                    steps.append(metrics)
            return _average(jax.device_get(steps))

    def _streamed(self) -> dict[str, Any] | None:
        """One optimizer step from gradients made as trajectories arrive. None when closed."""
        count = self._learning.trajectories_per_update
        stream = GradientStream(
            self._functions,
            params=self.state.params,
            version=jnp.int32(self.progress.version),
            num_trajectories=count,
        )
        for _ in range(count):
            items = self._take(1)
            if items is None:
                return None
            with self._meter.busy("train"):
                stream.add(self._functions.place(items[0].payload))
        with self._meter.busy("train"):
            self.state, metrics = stream.finish(self.state)
            return {name: float(x) for name, x in jax.device_get(metrics).items()}

    def _take(self, count: int) -> list[QueueItem] | None:
        with self._meter.waiting("trajectories"):
            items = self._queue.take(count, self.progress.version)
        for item in items or ():
            self.staleness.append(self.progress.version - item.policy_version_min)
            if item.info is None:  # in a process that follows another, which keeps the books
                self._has_valid = True
                continue
            self._has_valid |= item.info.num_useful_env_steps > 0
            self._reached[item.info.group] = {
                "next_segment": item.info.next_segment,
                "end_state": item.info.end_state,
            }
            self._note_experience(item.info)
        return items

    def _publish(self) -> None:
        """Publishes every k-th version; the last one always."""
        version = self.progress.version
        is_due = version % self._schedule.publish_interval == 0
        if is_due or version == self._learning.num_updates:
            with self._meter.busy("publish"):
                self._store.publish(version, self.state.params)

    def _note_experience(self, info: Any) -> None:
        """Metrics of a consumed trajectory."""
        self.num_env_steps += info.num_env_steps
        add, episodes = self._recorder.add, info.episodes
        add("rate/env_steps_per_s", info.num_env_steps, Rate)
        add("rate/useful_env_steps_per_s", info.num_useful_env_steps, Rate)
        add("rate/episodes_per_s", len(episodes.success), Rate)
        add("train/success_rate", episodes.success.astype(np.float64), Mean)
        add("train/return_mean", episodes.return_, Mean)
        add("train/episode_length_mean", episodes.length.astype(np.float64), Mean)
        if info.is_uniform.size:
            add("train/uniform_group_fraction", info.is_uniform.astype(np.float64), Mean)

    def _note(self, metrics: Mapping[str, float]) -> None:
        """Metrics of an update; stops the run when nothing can be learned from several in a row."""
        for name, value in metrics.items():
            self._recorder.add(f"learner/{name}", value, Last)
        self._recorder.add("rate/updates_per_s", 1, Rate)
        skipped = int(self.state.num_skipped)
        self._recorder.add("faults/skipped_optimizer_steps", skipped, Last)
        why = ""
        if not np.isfinite(metrics["grad_norm"]):
            why = (
                "had a non-finite gradient; lower optimizer.learning_rate or look at "
                "learner/loss/* in metrics.jsonl"
            )
        elif not self._has_valid:
            why = (
                "had no valid sample: every world has left the finite numbers or every env has "
                "failed, all the time; look at logs/simulation.log"
            )
        self._has_valid = False
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if why else 0
        if why:
            _LOG.warning("update %d %s", self.progress.version, why)
        if self.progress.skipped_in_a_row >= self._learning.max_skipped_updates:
            raise NonFiniteError(f"{self.progress.skipped_in_a_row} updates in a row {why}")


def _average(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of metrics over the optimizer steps of an update; "/max" ones keep their largest value.

    A non-finite gradient norm of any step stays visible.
    """
    result = {}
    for name in steps[0]:
        values = np.asarray([step[name] for step in steps], np.float64)
        result[name] = float(values.max() if name.endswith("/max") else values.mean())
    return result
