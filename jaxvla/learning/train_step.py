"""The learner's jitted functions: prepare a batch, take a minibatch step, accumulate.

All inputs and outputs live on the learning mesh. Samples are split over the env axis B of
a trajectory, and minibatches are drawn along time for each env column separately: shards
never exchange samples, and the composition of a minibatch does not depend on the mesh.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxvla import sharding
from jaxvla.algorithms import returns
from jaxvla.algorithms.base import Algorithm, Metrics
from jaxvla.algorithms.losses import blank_unused
from jaxvla.algorithms.policy import Evaluation
from jaxvla.algorithms.returns import Moments
from jaxvla.learning import gradients
from jaxvla.learning.gradients import GradientSum, SplitSum
from jaxvla.learning.optimizer import freeze, trained, trained_norm, untrained_as_zeros
from jaxvla.learning.supervised import mean_loss
from jaxvla.learning.train_state import TrainState, apply_gradients
from jaxvla.models.base import Policy
from jaxvla.types import Params, SupervisedBatch, TrainingBatch, Trajectory


class TrainFunctions:
    """Compiled functions of one policy, algorithm, optimizer and mesh."""

    def __init__(
        self,
        *,
        policy: Policy,
        algorithm: Algorithm,
        optimizer: optax.GradientTransformation,
        trainable: str,
        mesh: Mesh,
        shardings: TrainState,
        num_minibatches: int,
        num_microbatches: int = 1,
        encode_once: bool,
    ):
        """Args:
        policy, algorithm, optimizer: what is trained, for what, and how.
        trainable: `OptimizerConfig.trainable`; no gradient is computed for the other leaves.
        mesh: learning mesh.
        shardings: placement of the train state.
        num_minibatches: optimizer steps per epoch.
        num_microbatches: parts of a minibatch whose gradients are made one after the other.
        encode_once: `prepare` encodes the observations, not every step anew.
        """
        self._policy = policy
        self._algorithm = algorithm
        self._optimizer = optimizer
        self._trainable = trainable
        self._num_minibatches = num_minibatches
        self._num_microbatches = num_microbatches
        self._encode_once = encode_once
        self._mesh = mesh
        self.columns = sharding.batch_sharding(mesh, axis=1)
        """Placement of [T, B] trajectories."""
        self.rows = sharding.batch_sharding(mesh)
        whole: Any = sharding.replicated(mesh)
        self.prepare = jax.jit(self._prepare, out_shardings=self.columns)
        self.draw = jax.jit(self._draw, static_argnums=1, out_shardings=self.columns)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, whole))
        self.supervised_step = jax.jit(
            self._supervised_step, donate_argnums=0, out_shardings=(shardings, whole)
        )
        sums: Any = GradientSum(
            grads=trained(shardings.params, trainable), metrics=whole, weight=whole
        )
        splits: Any = SplitSum(fixed=sums, centred=sums, unit=sums, moments=whole)
        self.targets = jax.jit(self._targets_and_moments, out_shardings=(self.columns, whole))
        self.merge = jax.jit(returns.merge)
        self.gradient = jax.jit(self._gradient, out_shardings=sums)
        self.split_gradient = jax.jit(self._split_gradient, out_shardings=splits)
        self.accumulate = jax.jit(gradients.accumulate, donate_argnums=0, out_shardings=sums)
        self.join = jax.jit(gradients.join, donate_argnums=0, out_shardings=splits)
        self.settle = jax.jit(gradients.settle, out_shardings=sums)
        # The sum is not donated: no output has room for it.
        self.apply = jax.jit(self._apply_sum, donate_argnums=0, out_shardings=(shardings, whole))

    def compile(self, state: TrainState, trajectories: Sequence[Trajectory], key: Any) -> None:
        """Compiles what an update from a whole batch calls, from shapes alone.

        Args:
          state: shapes, dtypes and shardings of the train state.
          trajectories: shapes and dtypes of the batch.
          key: shape and dtype of a typed key.
        """

        def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            placed = self.placement(x.shape[1])
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

        placed = [jax.tree.map(on_mesh, trajectory) for trajectory in trajectories]
        number = jax.ShapeDtypeStruct((), jnp.int32)
        batch = jax.tree.map(on_mesh, jax.eval_shape(self.prepare, state.params, placed, number))
        order = on_mesh(jax.eval_shape(self.draw, key, batch.weight.shape))
        self.prepare.lower(state.params, placed, number).compile()
        self.draw.lower(key, batch.weight.shape).compile()
        self.step.lower(state, batch, order, number).compile()

    def compile_supervised(self, state: TrainState, batch: SupervisedBatch, key: Any) -> None:
        """Compiles `supervised_step`, from shapes alone; see `compile`."""

        def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows)

        self.supervised_step.lower(state, jax.tree.map(on_mesh, batch), key).compile()

    def place(self, trajectory: Trajectory) -> Trajectory:
        """Moves a trajectory onto the learning mesh, unless it is there. If its envs do not divide,
        every device gets a copy, until `prepare` has joined it with others."""
        return jax.device_put(trajectory, self.placement(trajectory.reward.shape[1]))

    def placement(self, num_envs: int) -> jax.sharding.NamedSharding:
        """Where a trajectory of so many envs lies."""
        return sharding.fitting_sharding(self._mesh, num_envs, axis=1)

    def _prepare(
        self, params: Params, trajectories: Sequence[Trajectory], version: jax.Array
    ) -> TrainingBatch:
        """Joins trajectories along their env axis and computes targets, [T, P*E, ...].

        Args:
          params: weights that the update starts from.
          trajectories: [T, E, ...] each; all of the update.
          version: int32 [], of those weights.
        """
        batch = self._targets(params, trajectories, version)
        return _standardized(batch, self._moments(batch))

    def _targets_and_moments(
        self, params: Params, trajectory: Trajectory, version: jax.Array
    ) -> tuple[TrainingBatch, Moments | None]:
        """`_prepare` for one trajectory of several: its advantages are not standardised, and come
        with what is to be known of them for that, if they are to be."""
        batch = self._targets(params, [trajectory], version)
        return batch, self._moments(batch)

    def _moments(self, batch: TrainingBatch) -> Moments | None:
        if not self._algorithm.standardizes_advantages:
            return None
        return returns.moments(batch.advantage, batch.weight)

    def _targets(
        self, params: Params, trajectories: Sequence[Trajectory], version: jax.Array
    ) -> TrainingBatch:
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trajectories)
        observed = blank_unused(joined.observation, joined.valid.astype(jnp.float32))
        if self._encode_once:
            observed = jax.vmap(self._policy.encode, in_axes=(None, 0))(params, observed)
        evaluation = None
        if self._algorithm.needs_evaluation:
            evaluation = self._evaluate(params, observed, joined.trace)
        batch = self._algorithm.prepare(joined, version=version, evaluation=evaluation)
        return dataclasses.replace(batch, observation=observed)

    def _evaluate(self, params: Params, observed: Any, trace: Any) -> Evaluation:
        """Scores the samples [T, B] at the present weights, one time step after another: all at
        once would need the memory of a forward pass over the whole batch.

        Args:
          params: present weights.
          observed: [T, B, ...], observations, or their encodings with `encode_once`.
          trace: [T, B, ...], of the samples.
        """

        def at(step: tuple[Any, Any]) -> Evaluation:
            encoding, trace_t = step
            if not self._encode_once:
                encoding = self._policy.encode(params, encoding)
            log_prob, _, value = self._policy.evaluate(params, encoding, trace_t)
            return Evaluation(log_prob=log_prob, value=value)

        return jax.lax.map(at, (observed, trace))

    def _draw(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """int32 [T, B]: for every env column its own permutation of the time steps."""
        columns = jax.random.split(key, shape[1])
        return jax.vmap(lambda k: jax.random.permutation(k, shape[0]), out_axes=1)(columns)

    def _microbatch(
        self, batch: TrainingBatch, order: jax.Array, index: jax.Array
    ) -> TrainingBatch:
        """Samples [T/M/m * B, ...] of part `index` of an epoch's M minibatches of m parts each."""
        size = order.shape[0] // (self._num_minibatches * self._num_microbatches)
        times = jax.lax.dynamic_slice_in_dim(order, index * size, size)

        def take(x: jax.Array) -> jax.Array:
            picked = jnp.take_along_axis(x, times.reshape(*times.shape, *(1,) * (x.ndim - 2)), 0)
            return picked.reshape(-1, *x.shape[2:])

        return jax.tree.map(take, batch)

    def _loss(self, params: Params, batch: TrainingBatch) -> tuple[jax.Array, Metrics]:
        """Of samples [N, ...] that `_prepare` or `_targets` made."""
        params = freeze(params, self._trainable)
        if not self._encode_once:
            encoding = self._policy.encode(params, batch.observation)
            batch = dataclasses.replace(batch, observation=encoding)
        return self._algorithm.loss(self._policy, params, batch)

    def _step(
        self, state: TrainState, batch: TrainingBatch, order: jax.Array, index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on minibatch `index` of an epoch with sample order `order`."""
        if self._num_microbatches > 1:
            return self._apply_sum(state, self._accumulated(state.params, batch, order, index))
        minibatch = self._microbatch(batch, order, index)
        grads, metrics = jax.grad(self._loss, has_aux=True)(state.params, minibatch)
        state, norm = self._apply(state, grads, minibatch.weight.sum())
        return state, metrics | {"grad_norm": norm}

    def _accumulated(
        self, params: Params, batch: TrainingBatch, order: jax.Array, index: jax.Array
    ) -> GradientSum:
        """Of minibatch `index`, one part after the other."""
        count = self._num_microbatches

        def part(number: jax.Array) -> GradientSum:
            samples = self._microbatch(batch, order, index * count + number)
            return gradients.gradient(self._loss, params, samples, self._trainable)

        def add(total: GradientSum, number: jax.Array) -> tuple[GradientSum, None]:
            return gradients.accumulate(total, part(number)), None

        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, jnp.zeros((), jnp.int32))
        )
        return jax.lax.scan(add, empty, jnp.arange(count))[0]

    def _apply(
        self, state: TrainState, grads: Params, weight: jax.Array | float = 1.0
    ) -> tuple[TrainState, jax.Array]:
        norm = trained_norm(grads, self._trainable)
        return apply_gradients(state, grads, norm, self._optimizer, weight=weight), norm

    def _gradient(
        self, params: Params, batch: TrainingBatch, moments: Moments | None
    ) -> GradientSum:
        """Of one trajectory's samples [T, E, ...], for accumulation.

        Args:
          params: weights that the update starts from.
          batch: from `targets`.
          moments: of the advantages of the whole update; None where they stay as they are.
        """
        samples = _flat(_standardized(batch, moments))
        return gradients.gradient(self._loss, params, samples, self._trainable)

    def _split_gradient(self, params: Params, batch: TrainingBatch, moments: Moments) -> SplitSum:
        """The same while nothing is known but the moments of these very advantages."""
        return gradients.split_gradient(self._loss, params, _flat(batch), self._trainable, moments)

    def _apply_sum(self, state: TrainState, total: GradientSum) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean over all samples, as if they had come in one batch."""
        grads, metrics = gradients.means(total)
        grads = untrained_as_zeros(grads, state.params)
        state, norm = self._apply(state, grads, total.weight)
        return state, metrics | {"grad_norm": norm}

    def _supervised_step(
        self, state: TrainState, batch: SupervisedBatch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean loss of [B] labelled samples."""

        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, self._trainable)
            return mean_loss(self._policy.supervised_loss(params, batch, key))

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state, norm = self._apply(state, grads)
        return state, metrics | {"grad_norm": norm}


def _standardized(batch: TrainingBatch, moments: Moments | None) -> TrainingBatch:
    """Advantages made ready for the loss; None: they are."""
    if moments is None:
        return batch
    advantage = returns.standardize(batch.advantage, batch.weight, moments)
    return dataclasses.replace(batch, advantage=advantage)


def _flat(batch: TrainingBatch) -> TrainingBatch:
    """[T, B, ...] -> [T * B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
