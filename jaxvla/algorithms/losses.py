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
) -> Float[Array, "*shape"]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347), with separate bounds as in
    DAPO (https://arxiv.org/abs/2503.14476).
    """
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def clipped_value_error(
    value: Float[Array, "*shape"],
    behavior_value: Float[Array, "*shape"],
    return_: Float[Array, "*shape"],
    *,
    clip: float,
) -> Float[Array, "*shape"]:
    """Half the larger of the squared errors of V and of V clipped to V_old +- clip.

    The critic's trust region of the PPO reference implementation (https://arxiv.org/abs/2005.12729,
    section 3): a sample stops pulling once V has moved `clip` towards its target.
    """
    near = behavior_value + jnp.clip(value - behavior_value, -clip, clip)
    errors = jnp.maximum(jnp.square(value - return_), jnp.square(near - return_))
    return 0.5 * errors


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
