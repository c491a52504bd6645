"""Loss terms per sample. Reductions and weights are the caller's."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = TypeVar("Tree")
"""A pytree of arrays."""


def clipped_surrogate(
    ratio: Float[Array, "*shape"],
    advantage: Float[Array, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Float[Array, "*shape"]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and with a dual clip c > 0 where A < 0
    no more than -c A.

    Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347), with separate bounds as in
    DAPO (https://arxiv.org/abs/2503.14476). The dual clip (Ye et al. 2020, eq. 8,
    https://arxiv.org/abs/1912.09729) bounds the loss, and ends the pull, of a bad action that has
    become c times as likely: without it such a sample outweighs all others.
    """
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    if not dual_clip:
        return loss
    return jnp.where(advantage < 0.0, jnp.minimum(loss, -dual_clip * advantage), loss)


def clipped_value_error(
    value: Float[Array, "*shape"],
    behavior_value: Float[Array, "*shape"],
    return_: Float[Array, "*shape"],
    *,
    clip: float,
    huber: float = 0.0,
) -> Float[Array, "*shape"]:
    """Half the larger of the squared errors of V and of V clipped to V_old +- clip.

    The critic's trust region of the PPO reference implementation (https://arxiv.org/abs/2005.12729,
    section 3): a sample stops pulling once V has moved `clip` towards its target. With `huber` > 0
    errors beyond it count linearly: huber (|error| - huber / 2) (Huber 1964,
    https://doi.org/10.1214/aoms/1177703732), so that no sample pulls with more than `huber`.
    """
    near = behavior_value + jnp.clip(value - behavior_value, -clip, clip)
    squared = jnp.maximum(jnp.square(value - return_), jnp.square(near - return_))
    if not huber:
        return 0.5 * squared
    is_far = squared > huber**2
    size = jnp.sqrt(jnp.where(is_far, squared, 1.0))  # the slope of sqrt at 0 is infinite
    return jnp.where(is_far, huber * (size - 0.5 * huber), 0.5 * squared)


def weighted_mean(x: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    """sum(x w) / sum(w), 0 when every weight is 0. Entries of weight 0 are not read."""
    total = weight.sum()
    weighted = jnp.where(weight > 0.0, x, 0.0) * weight
    return weighted.sum() / jnp.where(total > 0.0, total, 1.0)


def blank_unused(tree: Tree, weight: Float[Array, "*shape"]) -> Tree:
    """Zeros in place of the numbers of samples of weight 0, for use before a gradient.

    Ignoring them in the loss is not enough: the gradient multiplies the zero that comes back
    by whatever the forward pass met, and 0 * NaN = NaN.

    Args:
      tree: pytree of arrays [*shape, ...]. Leaves that are not floating-point stay as they are.
      weight: of the samples.
    """

    def blank(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        is_used = (weight > 0.0).reshape(*weight.shape, *(1,) * (x.ndim - weight.ndim))
        return jnp.where(is_used, x, jnp.zeros((), x.dtype))

    return jax.tree.map(blank, tree)
