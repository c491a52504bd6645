"""Sums of gradients over trajectories, and what they come to as one batch.

A loss averages over samples, so sums over samples add up to the gradient of a batch however it was
divided. Standardised advantages s (A - m) are a function of the whole batch, though: the mean m and
the scale s are known when its last trajectory is. But a loss that is affine in the advantages has
a gradient that is affine in them too:

    g(s (A - m)) = g(0) + s g'(A - m) = g(0) + s (g'(A - c) + (c - m) g'(1))

with the slope g' taken at 0, per sample, and any c. So three sums over samples (`SplitSum`) hold
the gradient of a trajectory for every m and s. With c the mean of the samples summed so far, s
multiplies a sum of deviations and not a difference of large numbers; two such sums are joined as
co-moments are (Chan, Golub, LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115).

Metrics are averages like the loss and go the same way; those that are maxima do not depend on the
advantages.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.algorithms import returns
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.returns import Moments
from jaxvla.learning.optimizer import trained
from jaxvla.types import Params, TrainingBatch

Loss = Callable[[Params, TrainingBatch], tuple[jax.Array, Metrics]]
"""Mean loss over the weights of samples [N, ...], and metrics."""


@flax.struct.dataclass(kw_only=True)
class GradientSum:
    """Gradients and metrics, added up over samples until the optimizer step."""

    grads: dict[str, jax.Array]
    """Leaf path -> sum of weight * gradient, of the trainable leaves."""
    metrics: Metrics
    """Sums of weight * metric; maxima of those that end in "/max"."""
    weight: jax.Array
    """float32 [], sum of the samples' weights."""


@flax.struct.dataclass(kw_only=True)
class SplitSum:
    """`GradientSum` as a function of the mean and the scale of the advantages."""

    fixed: GradientSum
    """What it is at advantages of 0."""
    centred: GradientSum
    """Its slope towards the deviations of the advantages from `moments.mean`."""
    unit: GradientSum
    """Its slope towards advantages of 1."""
    moments: Moments
    """Of the advantages of these samples."""


def gradient(loss: Loss, params: Params, batch: TrainingBatch, trainable: str) -> GradientSum:
    """Sum over the samples [N, ...] of a batch whose advantages are as the loss reads them.

    Args:
      loss: see `Loss`.
      params: all leaves.
      batch: samples.
      trainable: `OptimizerConfig.trainable`.
    """
    grads, metrics = jax.grad(loss, has_aux=True)(params, batch)
    return _weighted(trained(grads, trainable), metrics, batch.weight.sum())


def split_gradient(
    loss: Loss, params: Params, batch: TrainingBatch, trainable: str, moments: Moments
) -> SplitSum:
    """The same for advantages that are still to be standardised; one forward pass, three backward.

    Args: as for `gradient`; the loss and its metrics are affine in the advantages of the batch.
      moments: of those advantages.
    """
    deviations = returns.deviations(batch.advantage, batch.weight, moments)
    ones = (batch.weight > 0.0).astype(jnp.float32)

    def parts(params: Params) -> tuple[list[jax.Array], list[Metrics]]:
        def at(advantage: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss(params, dataclasses.replace(batch, advantage=advantage))

        fixed, slope = jax.linearize(at, jnp.zeros_like(deviations))
        values, metrics = zip(fixed, slope(deviations), slope(ones), strict=True)
        return list(values), list(metrics)

    values, pull_back, metrics = jax.vjp(parts, params, has_aux=True)
    weight = batch.weight.sum()

    def part(index: int) -> GradientSum:
        chosen = [jnp.full_like(x, i == index) for i, x in enumerate(values)]
        (grads,) = pull_back(chosen)
        return _weighted(trained(grads, trainable), metrics[index], weight)

    none = jnp.zeros_like(weight)
    return SplitSum(
        fixed=part(0),
        centred=dataclasses.replace(part(1), weight=none),
        unit=dataclasses.replace(part(2), weight=none),
        moments=moments,
    )


def accumulate(total: GradientSum, part: GradientSum) -> GradientSum:
    """Adds one trajectory's share."""
    added = jax.tree.map(jnp.add, total, part)
    maxima = {
        name: jnp.maximum(value, part.metrics[name])
        for name, value in total.metrics.items()
        if _is_maximum(name)
    }
    return dataclasses.replace(added, metrics=added.metrics | maxima)


def join(total: SplitSum, part: SplitSum) -> SplitSum:
    """`accumulate` before mean and scale are known."""
    moments = returns.merge(total.moments, part.moments)
    return SplitSum(
        fixed=accumulate(total.fixed, part.fixed),
        centred=accumulate(_recentred(total, moments), _recentred(part, moments)),
        unit=accumulate(total.unit, part.unit),
        moments=moments,
    )


def settle(split: SplitSum, moments: Moments) -> GradientSum:
    """What the sum is once the advantages are standardised.

    Args:
      split: some trajectories of an update.
      moments: of the advantages of all of them.
    """
    return _plus(split.fixed, returns.scale(moments), _recentred(split, moments))


def means(total: GradientSum) -> tuple[dict[str, jax.Array], Metrics]:
    """(gradients, metrics) of the samples as one batch; 0 where none has weight."""
    weight = jnp.where(total.weight > 0.0, total.weight, 1.0)
    metrics = {
        name: value if _is_maximum(name) else value / weight
        for name, value in total.metrics.items()
    }
    return jax.tree.map(lambda g: g / weight, total.grads), metrics


def _weighted(grads: dict[str, Any], metrics: Metrics, weight: jax.Array) -> GradientSum:
    """Sums from means over samples of a total weight."""
    sums = {name: value if _is_maximum(name) else weight * value for name, value in metrics.items()}
    return GradientSum(grads=jax.tree.map(lambda g: weight * g, grads), metrics=sums, weight=weight)


def _recentred(split: SplitSum, moments: Moments) -> GradientSum:
    """The slope towards the deviations from another mean."""
    return _plus(split.centred, split.moments.mean - moments.mean, split.unit)


def _plus(x: GradientSum, factor: jax.Array, slope: GradientSum) -> GradientSum:
    return jax.tree.map(lambda a, b: a + factor * b, x, slope)


def _is_maximum(name: str) -> bool:
    return name.endswith("/max")
