"""What the learner asks of an algorithm: pure functions, no devices, no queues."""

from typing import Protocol

import jax

from jaxvla.algorithms.policy import Evaluation, TrainablePolicy
from jaxvla.types import Params, TrainingBatch, Trajectory

Metrics = dict[str, jax.Array]
"""Scalar float32 per name, without the "learner/" prefix."""


class Algorithm(Protocol):
    """Turns trajectories into targets and targets into a loss."""

    @property
    def needs_evaluation(self) -> bool:
        """Whether `prepare` reads an evaluation at the weights that the update starts from."""
        ...

    def prepare(
        self, trajectory: Trajectory, *, version: jax.Array, evaluation: Evaluation | None
    ) -> TrainingBatch:
        """Advantages and returns of [T, B] trajectories; runs outside the gradient.

        Every number of a sample of weight 0 is finite: what is computed from it is thrown away,
        but a gradient multiplies it by zero first.

        Args:
          trajectory: samples of weights up to `version`.
          version: int32 [], of the weights that the update starts from.
          evaluation: of the samples at those weights, arbitrary (also NaN) where they are not
            valid; None unless `needs_evaluation`.
        """
        ...

    def loss(
        self, policy: TrainablePolicy, params: Params, batch: TrainingBatch
    ) -> tuple[jax.Array, Metrics]:
        """Scalar loss of encoded samples [N, ...], averaged over their weights, and metrics."""
        ...
