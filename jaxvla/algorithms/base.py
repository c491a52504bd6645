"""What the learner asks of an algorithm: pure functions, no devices, no queues."""

from typing import Protocol

import jax

from jaxvla.algorithms.policy import Evaluation, TrainablePolicy
from jaxvla.types import Params, TrainingBatch, Trajectory

Metrics = dict[str, jax.Array]
"""Scalar float32 per name, without the "learner/" prefix: an average over the samples' weights, or
a maximum, at least 0, where the name ends in "/max". So those of parts of a batch can be joined."""


class Algorithm(Protocol):
    """Turns trajectories into targets and targets into a loss."""

    @property
    def needs_evaluation(self) -> bool:
        """Whether `prepare` reads an evaluation at the weights that the update starts from."""
        ...

    @property
    def standardizes_advantages(self) -> bool:
        """Whether the learner is to standardise the advantages over all samples of an update, after
        `prepare` and before `loss`.

        Then the loss and its metrics must be affine functions of the advantages, whatever their
        signs, wherever the metric "clip_fraction" is 0: the learner can make gradients before it
        knows the statistics.
        """
        ...

    def prepare(
        self, trajectory: Trajectory, *, version: jax.Array, evaluation: Evaluation | None
    ) -> TrainingBatch:
        """Advantages and returns of [T, B] trajectories; runs outside the gradient.

        The trajectories need not be all of an update: statistics over the whole batch are for the
        learner, see `standardizes_advantages`.

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
