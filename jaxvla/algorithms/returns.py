"""Advantages and returns. Pure functions of one batch of trajectories, time-major [T, B]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def next_values(
    value: Float[Array, "T B"],
    bootstrap_value: Float[Array, "T B"],
    truncated: Bool[Array, "T B"],
) -> Float[Array, "T B"]:
    """Value of the observation that follows each step within the same episode.

    After a truncated step and after the last one the trajectory does not hold that
    observation's value, so it is read from `bootstrap_value`. What follows a terminated step
    has no value; the caller multiplies by zero.
    """
    following = jnp.concatenate([value[1:], bootstrap_value[-1:]])
    return jnp.where(truncated, bootstrap_value, following)


def generalized_advantages(
    *,
    reward: Float[Array, "T B"],
    value: Float[Array, "T B"],
    bootstrap_value: Float[Array, "T B"],
    terminated: Bool[Array, "T B"],
    truncated: Bool[Array, "T B"],
    discount: float,
    trace_decay: float,
) -> Float[Array, "T B"]:
    """Generalised advantage estimation over action chunks.

        delta_t = r_t + gamma (1 - terminated_t) V(next_t) - V_t
        A_t     = delta_t + gamma lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    Schulman et al. 2016, eq. 16 (https://arxiv.org/abs/1506.02438), with one step per action
    chunk: gamma discounts chunks, not control steps. Time limits bootstrap (V of the final
    observation), true ends do not; neither lets the trace pass into the next episode
    (Pardo et al. 2018, https://arxiv.org/abs/1712.00378).

    Args:
      reward: chunk rewards.
      value: critic at acting time.
      bootstrap_value: see `next_values`.
      terminated: the episode ended inside the chunk.
      truncated: the episode was cut by its time limit inside the chunk.
      discount: gamma per chunk, in [0, 1].
      trace_decay: lambda, in [0, 1].
    """
    alive = 1.0 - terminated.astype(jnp.float32)
    delta = reward + discount * alive * next_values(value, bootstrap_value, truncated) - value
    decay = discount * trace_decay * alive * (1.0 - truncated.astype(jnp.float32))

    def backward(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, decay_t = step
        advantage = delta_t + decay_t * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantages


def standardize(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """(x - mean) / std over the entries of weight 1; entries of weight 0 become 0.

    A batch whose entries are all equal carries no preference and becomes 0.
    """
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (x * weight).sum() / count
    variance = (jnp.square(x - mean) * weight).sum() / count
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * weight
