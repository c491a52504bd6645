"""Supervised steps: the loss, a step on a batch in parts, and the loop over batches.

A batch is [A, b, ...]: A parts of b samples, whose gradients are added up before the optimizer
step. Every sample has a random stream of its own, so that the step is that of the whole batch
whatever A is, and however b is split over the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxvla import rng, sharding
from jaxvla.algorithms.base import Metrics
from jaxvla.learning.optimizer import freeze, trained, trained_norm, untrained_as_zeros
from jaxvla.learning.train_state import TrainState, apply_gradients
from jaxvla.models.base import Policy
from jaxvla.types import Params, SupervisedBatch

Augment = Callable[[SupervisedBatch, jax.Array], SupervisedBatch]
"""From samples [b, ...] and typed keys [b] to the samples to learn."""

Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]
"""From a state (donated), a placed batch and a typed key to the next state and its metrics."""


def mean_loss(terms: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    """The sum of the means of the terms, each [B], and these means as "loss/TERM"."""
    means = {f"loss/{name}": term.mean() for name, term in terms.items()}
    return jnp.sum(jnp.stack(list(means.values()))), means


def supervised_steps(
    step: Step,
    state: TrainState,
    batches: Iterable[SupervisedBatch],
    *,
    placement: Any,
    key: jax.Array,
    first_step: int = 0,
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """One optimizer step per batch.

    Args:
      step: see `Step`.
      state: a train state; donated, as is every one that is yielded.
      batches: what to learn.
      placement: sharding of a batch.
      key: typed key for noise and flow times; the stream of a step depends on its number.
      first_step: number of the first step.

    Yields:
      The number of each step that was taken, the state after it and its metrics, on the devices.
    """
    for number, batch in enumerate(batches, start=first_step):
        placed = jax.device_put(batch, placement)
        state, metrics = step(state, placed, rng.stream(key, "flow", number))
        yield number, state, metrics


class SupervisedFunctions:
    """Compiled functions of supervised fine-tuning."""

    def __init__(
        self,
        *,
        policy: Policy,
        optimizer: optax.GradientTransformation,
        trainable: str,
        mesh: Mesh,
        shardings: TrainState,
        ema_decay: float = 0.0,
        augment: Augment | None = None,
    ):
        """Args:
        policy, optimizer: what is trained, and how.
        trainable: `OptimizerConfig.trainable`.
        mesh: learning mesh.
        shardings: placement of the train state, which has `ema` if `ema_decay` is above 0.
        ema_decay: d of ema = d ema + (1 - d) params after every step that was not skipped.
        augment: applied to each part of a batch, with streams apart from those of the loss.
        """
        self._policy = policy
        self._optimizer = optimizer
        self._trainable = trainable
        self._ema_decay = ema_decay
        self._augment = augment
        self.columns = sharding.batch_sharding(mesh, axis=1)
        """Placement of a batch [A, b, ...]."""
        whole: Any = sharding.replicated(mesh)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, whole))

    def compile(self, state: TrainState, batch: SupervisedBatch, key: Any) -> None:
        """Compiles `step` from shapes alone.

        Args:
          state: shapes, dtypes and shardings of the train state.
          batch: shapes and dtypes of a batch [A, b, ...].
          key: shape and dtype of a typed key.
        """

        def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.columns)

        self.step.lower(state, jax.tree.map(on_mesh, batch), key).compile()

    def _step(
        self, state: TrainState, batch: SupervisedBatch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean loss of a batch [A, b, ...]."""
        num_parts, size = batch.observation.state.shape[:2]
        fold = functools.partial(jax.random.fold_in, key)
        keys = jax.vmap(fold)(jnp.arange(num_parts * size)).reshape(num_parts, size)
        gradient = functools.partial(self._gradient, state.params)
        if num_parts == 1:
            leaves, metrics = gradient(*jax.tree.map(lambda x: x[0], (batch, keys)))
        else:
            leaves, metrics = _mean(gradient, (batch, keys), num_parts)
        grads = untrained_as_zeros(leaves, state.params)
        norm = trained_norm(grads, self._trainable)
        stepped = apply_gradients(state, grads, norm, self._optimizer)
        if self._ema_decay:
            ema = self._averaged(state.ema, stepped.params, stepped.num_steps > state.num_steps)
            stepped = dataclasses.replace(stepped, ema=ema)
        total = jnp.sum(jnp.stack(list(metrics.values())))
        return stepped, metrics | {"loss/total": total, "grad_norm": norm}

    def _gradient(
        self, params: Params, batch: SupervisedBatch, keys: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """Gradients of the trainable leaves by path, and metrics, of samples [b, ...]."""
        if self._augment is not None:
            batch = self._augment(batch, jax.vmap(lambda k: rng.stream(k, "augment"))(keys))

        def terms(params: Params, sample: SupervisedBatch, key: jax.Array) -> dict[str, jax.Array]:
            alone: SupervisedBatch = jax.tree.map(lambda x: x[None], sample)
            found = self._policy.supervised_loss(params, alone, key)
            return {name: term[0] for name, term in found.items()}

        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, self._trainable)
            return mean_loss(jax.vmap(terms, in_axes=(None, 0, 0))(params, batch, keys))

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return trained(grads, self._trainable), metrics

    def _averaged(self, ema: Params | None, params: Params, is_applied: jax.Array) -> Params:
        """The next moving average, in float32."""

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            mean = self._ema_decay * old + (1.0 - self._ema_decay) * new.astype(jnp.float32)
            return jnp.where(is_applied, mean, old)

        return jax.tree.map(average, ema, params)


def _mean(gradient: Callable[..., Any], parts: Any, num_parts: int) -> Any:
    """The mean of a function's results over the leading axis of its arguments, one at a time."""

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(*part)), None

    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)
