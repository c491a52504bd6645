"""Loss terms per sample. Reductions and weights are the caller's."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
    """sum(x w) / sum(w), 0 when every weight is 0."""
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)
