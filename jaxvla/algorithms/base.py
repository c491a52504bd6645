"""What the learner asks of an algorithm: pure functions, no devices, no queues."""

from typing import Protocol

import jax

from jaxvla.algorithms.policy import TrainablePolicy
from jaxvla.types import Params, TrainingBatch, Trajectory

Metrics = dict[str, jax.Array]
"""Scalar float32 per name, without the "learner/" prefix."""


class Algorithm(Protocol):
    """Turns trajectories into targets and targets into a loss."""

    def prepare(self, trajectory: Trajectory) -> TrainingBatch:
        """Advantages and returns of [T, B] trajectories; runs outside the gradient.

        Every number of a sample of weight 0 is finite: what is computed from it is thrown away,
        but a gradient multiplies it by zero first.
        """
        ...

    def loss(
        self, policy: TrainablePolicy, params: Params, batch: TrainingBatch
    ) -> tuple[jax.Array, Metrics]:
        """Scalar loss of encoded samples [N, ...], averaged over their weights, and metrics."""
        ...
