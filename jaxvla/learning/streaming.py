"""The gradient of one update, made while its trajectories arrive one by one."""

import jax

from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.returns import Moments
from jaxvla.learning.gradients import GradientSum, SplitSum
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.types import Params, TrainingBatch, Trajectory


class GradientStream:
    """Backward passes are made at once wherever nothing of the others is needed.

    Without standardised advantages that is everywhere. With them, `SplitSum`s are made at once of
    all trajectories but two kinds, which are kept until the statistics of the whole batch are
    known and then cost one backward pass, not three:
      - the last one of the update: they are known when it arrives;
      - one with a sample outside the clip range: which side of the clip applies depends on the
        sign of its standardised advantage. These are the deferred ones.
    What is done depends on the trajectories alone, not on when they arrive, so that a recorded
    order of trajectories repeats an update to the bit.
    """

    def __init__(
        self,
        functions: TrainFunctions,
        *,
        params: Params,
        version: jax.Array,
        num_trajectories: int,
    ):
        """Args:
        functions: jitted train functions.
        params: weights that the update starts from.
        version: int32 [], of those weights.
        num_trajectories: of the update.
        """
        self._functions = functions
        self._params = params
        self._version = version
        self._num_trajectories = num_trajectories
        self._num_added = 0
        self._num_deferred = 0
        self._moments: Moments | None = None
        self._split: SplitSum | None = None
        self._total: GradientSum | None = None
        self._kept: list[TrainingBatch] = []

    def add(self, trajectory: Trajectory) -> None:
        """Takes the next trajectory [T, E, ...], on the learning mesh."""
        functions = self._functions
        batch, moments = functions.targets(self._params, trajectory, self._version)
        self._num_added += 1
        if moments is None:
            self._accumulate(batch)
            return
        known = self._moments
        self._moments = moments if known is None else functions.merge(known, moments)
        if self._num_added == self._num_trajectories:
            self._kept.append(batch)
            return
        part = functions.split_gradient(self._params, batch, moments)
        if float(part.fixed.metrics["clip_fraction"]) > 0.0:
            self._kept.append(batch)
            self._num_deferred += 1
        else:
            self._split = part if self._split is None else functions.join(self._split, part)

    def finish(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean over all samples, as if they had come in one batch.

        Args:
          state: train state with the parameters of the stream; donated.

        Returns:
          The state, and the metrics of the whole batch. "deferred_fraction" is the share of
          trajectories that had to be deferred, where advantages are standardised.
        """
        if self._split is not None:
            self._total = self._functions.settle(self._split, self._moments)
        for batch in self._kept:
            self._accumulate(batch)
        state, metrics = self._functions.apply(state, self._total)
        if self._moments is not None:
            metrics["deferred_fraction"] = self._num_deferred / self._num_trajectories
        return state, metrics

    def _accumulate(self, batch: TrainingBatch) -> None:
        part = self._functions.gradient(self._params, batch, self._moments)
        if self._total is not None:
            part = self._functions.accumulate(self._total, part)
        self._total = part
