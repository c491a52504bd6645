"""The learner's jitted functions: prepare a batch, take a minibatch step, accumulate.

All inputs and outputs live on the learning mesh. Samples are split over the env axis B of
a trajectory, and minibatches are drawn along time for each env column separately: shards
never exchange samples, and the composition of a minibatch does not depend on the mesh.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxvla import sharding
from jaxvla.algorithms.base import Algorithm, Metrics
from jaxvla.learning.optimizer import freeze, trained_norm
from jaxvla.learning.train_state import TrainState, apply_gradients
from jaxvla.models.base import Policy
from jaxvla.types import Params, SupervisedBatch, TrainingBatch, Trajectory


@flax.struct.dataclass(kw_only=True)
class GradientSum:
    """Gradients of trajectories, added up over samples until the optimizer step."""

    grads: Params
    """Sum over the samples of weight * gradient."""
    weight: jax.Array
    """float32 [], sum of the samples' weights."""


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
        encode_once: bool,
    ):
        """Args:
        policy, algorithm, optimizer: what is trained, for what, and how.
        trainable: `OptimizerConfig.trainable`; no gradient is computed for the other leaves.
        mesh: learning mesh.
        shardings: placement of the train state.
        num_minibatches: optimizer steps per epoch.
        encode_once: `prepare` encodes the observations, not every step anew.
        """
        self._policy = policy
        self._algorithm = algorithm
        self._optimizer = optimizer
        self._trainable = trainable
        self._num_minibatches = num_minibatches
        self._encode_once = encode_once
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
        sums = GradientSum(grads=shardings.params, weight=whole)
        self.gradient = jax.jit(self._gradient, out_shardings=(sums, whole))
        self.accumulate = jax.jit(_accumulate, donate_argnums=0, out_shardings=sums)
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
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.columns)

        placed = [jax.tree.map(on_mesh, trajectory) for trajectory in trajectories]
        batch = jax.tree.map(on_mesh, jax.eval_shape(self.prepare, state.params, placed))
        order = on_mesh(jax.eval_shape(self.draw, key, batch.weight.shape))
        index = jax.ShapeDtypeStruct((), jnp.int32)
        self.prepare.lower(state.params, placed).compile()
        self.draw.lower(key, batch.weight.shape).compile()
        self.step.lower(state, batch, order, index).compile()

    def compile_supervised(self, state: TrainState, batch: SupervisedBatch, key: Any) -> None:
        """Compiles `supervised_step`, from shapes alone; see `compile`."""

        def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows)

        self.supervised_step.lower(state, jax.tree.map(on_mesh, batch), key).compile()

    def place(self, trajectory: Trajectory) -> Trajectory:
        """Moves a trajectory onto the learning mesh."""
        return jax.device_put(trajectory, self.columns)

    def _prepare(self, params: Params, trajectories: Sequence[Trajectory]) -> TrainingBatch:
        """Joins trajectories along their env axis and computes targets, [T, P*E, ...]."""
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trajectories)
        batch = self._algorithm.prepare(joined)
        if not self._encode_once:
            return batch
        encode = jax.vmap(self._policy.encode, in_axes=(None, 0))
        return dataclasses.replace(batch, observation=encode(params, batch.observation))

    def _draw(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """int32 [T, B]: for every env column its own permutation of the time steps."""
        columns = jax.random.split(key, shape[1])
        return jax.vmap(lambda k: jax.random.permutation(k, shape[0]), out_axes=1)(columns)

    def _minibatch(self, batch: TrainingBatch, order: jax.Array, index: jax.Array) -> TrainingBatch:
        """Samples [T/M * B, ...] of minibatch `index`."""
        size = order.shape[0] // self._num_minibatches
        times = jax.lax.dynamic_slice_in_dim(order, index * size, size)

        def take(x: jax.Array) -> jax.Array:
            picked = jnp.take_along_axis(x, times.reshape(*times.shape, *(1,) * (x.ndim - 2)), 0)
            return picked.reshape(-1, *x.shape[2:])

        return jax.tree.map(take, batch)

    def _loss_and_grad(
        self, params: Params, batch: TrainingBatch, is_encoded: bool
    ) -> tuple[Params, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, self._trainable)
            samples = batch
            if not is_encoded:
                encoding = self._policy.encode(params, batch.observation)
                samples = dataclasses.replace(batch, observation=encoding)
            return self._algorithm.loss(self._policy, params, samples)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def _step(
        self, state: TrainState, batch: TrainingBatch, order: jax.Array, index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on minibatch `index` of an epoch with sample order `order`."""
        minibatch = self._minibatch(batch, order, index)
        grads, metrics = self._loss_and_grad(state.params, minibatch, self._encode_once)
        state, norm = self._apply(state, grads)
        return state, metrics | {"grad_norm": norm}

    def _apply(self, state: TrainState, grads: Params) -> tuple[TrainState, jax.Array]:
        norm = trained_norm(grads, self._trainable)
        return apply_gradients(state, grads, norm, self._optimizer), norm

    def _gradient(self, params: Params, trajectory: Trajectory) -> tuple[GradientSum, Metrics]:
        """Gradient of one trajectory's loss, for accumulation."""
        batch = self._algorithm.prepare(trajectory)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        grads, metrics = self._loss_and_grad(params, flat, is_encoded=False)
        weight = flat.weight.sum()
        total = jax.tree.map(lambda g: weight * g, grads)
        return GradientSum(grads=total, weight=weight), metrics

    def _apply_sum(self, state: TrainState, total: GradientSum) -> tuple[TrainState, jax.Array]:
        """One optimizer step on the mean over all samples, as if they had come in one batch."""
        weight = jnp.where(total.weight > 0.0, total.weight, 1.0)
        return self._apply(state, jax.tree.map(lambda g: g / weight, total.grads))

    def _supervised_step(
        self, state: TrainState, batch: SupervisedBatch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean loss of [B] labelled samples."""

        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, self._trainable)
            terms = self._policy.supervised_loss(params, batch, key)
            means = {f"loss/{name}": term.mean() for name, term in terms.items()}
            return jnp.sum(jnp.stack(list(means.values()))), means

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state, norm = self._apply(state, grads)
        return state, metrics | {"grad_norm": norm}


def _accumulate(total: GradientSum, part: GradientSum) -> GradientSum:
    """Adds one trajectory's share."""
    return jax.tree.map(jnp.add, total, part)
