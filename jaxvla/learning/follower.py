"""Follower: the learner in a process that is not the leader.

consumes    what the leader took from the queue
produces    its devices' part of every update, checkpoint and publication
waits for   the leader's words
unblocked by  the leader, the end of the link
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxvla.checkpoint import Checkpointer
from jaxvla.config import AlgorithmConfig, LearningConfig, ScheduleConfig
from jaxvla.learning.learner import Learner, Progress
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.transport.base import WeightSink
from jaxvla.transport.mirror import FollowerQueue, Link
from jaxvla.transport.weight_copy import gather_leaves
from jaxvla.types import Params


class Follower:
    """The follower program. `run` is its only thread."""

    role = "learning"

    def __init__(
        self,
        *,
        functions: TrainFunctions,
        state: TrainState,
        progress: Progress,
        link: Link,
        trajectory: Any,
        checkpointer: Checkpointer,
        key: jax.Array,
        learning: LearningConfig,
        schedule: ScheduleConfig,
        algorithm: AlgorithmConfig,
        meter: ActivityMeter,
    ):
        """Args:
        functions: jitted train functions, the same as the leader's.
        state: train state on the learning mesh; donated by every step.
        progress: where the run stands.
        link: to the leader.
        trajectory: shapes and dtypes of a whole trajectory.
        checkpointer: of the directory that the leader saves in.
        key: typed root key of the learner.
        learning, schedule, algorithm: their sections of the config.
        meter: busy / wait accounting.
        """
        self._checkpointer = checkpointer
        self._queue = FollowerQueue(
            link,
            struct=trajectory,
            placement=functions.placement,
            actions={"fetch": self._fetch, "save": self._save},
        )
        self.learner = Learner(
            functions=functions,
            state=state,
            progress=progress,
            queue=self._queue,
            store=_NoStore(),
            key=key,
            learning=learning,
            schedule=schedule,
            algorithm=algorithm,
            recorder=MetricRecorder(),
            meter=meter,
            on_update=_clear,
        )

    def threads(self) -> dict[str, Callable[[], None]]:
        """Thread name -> function, for the runtime to start."""
        return {"follower": self.run}

    def run(self) -> None:
        """All updates, and what the leader does after them."""
        self.learner.run()
        self._queue.finish()

    def stop(self, reason: str) -> None:
        """Asks the leader to stop; `run` ends with it."""
        del reason
        self._queue.ask_stop()

    def close(self) -> None:
        """Leaves the learner."""
        self._queue.close("closed")

    def _fetch(self, fields: Mapping[str, Any]) -> None:
        leaves = jax.tree.leaves(self.learner.state.params)
        gather_leaves([leaves[index] for index in fields["leaves"]])

    def _save(self, fields: Mapping[str, Any]) -> None:
        version = self.learner.progress.version
        if fields["version"] != version:
            raise ValueError(f"the leader saves version {fields['version']}, this is {version}")
        self._checkpointer.save(version, {"state": self.learner.state}, {})


class _NoStore(WeightSink):
    """The leader publishes; what a follower has to do for it comes as the word "fetch"."""

    def publish(self, version: int, params: Params) -> None:
        """Does nothing."""


def _clear(learner: Learner) -> None:
    """The leader records: what is gathered for that would grow for ever here."""
    learner.staleness, learner.num_env_steps = [], 0
