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
    observation's value, so it is read from `bootstrap_value`. At a terminated step, which no
    observation of the episode follows, the result means nothing and is not to be used.
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
    valid: Bool[Array, "T B"],
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

    A step that is not valid gets advantage 0 and ends the trace as well: the step before it
    bootstraps from the value that the critic gave before things went wrong. Nothing else of
    an invalid step is read, so it may hold NaN.

    Args:
      reward: chunk rewards.
      value: critic at acting time.
      bootstrap_value: see `next_values`.
      terminated: the episode ended inside the chunk.
      truncated: the episode was cut by its time limit inside the chunk.
      valid: the outcome of the chunk is known.
      discount: gamma per chunk, in [0, 1].
      trace_decay: lambda, in [0, 1].
    """
    following = next_values(value, bootstrap_value, truncated)
    target = reward + discount * jnp.where(terminated, 0.0, following)
    delta = jnp.where(valid, target - value, 0.0)
    decay = discount * trace_decay * (valid & ~terminated & ~truncated)

    def backward(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, decay_t = step
        advantage = delta_t + decay_t * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantages


def standardize(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """(x - mean) / sqrt(variance + epsilon) over the entries of weight 1; the others become 0.

    A batch whose entries are all equal carries no preference and becomes 0. Entries of weight 0
    are not read and may be NaN.
    """
    x = jnp.where(weight > 0.0, x, 0.0)
    count = jnp.maximum(weight.sum(), 1.0)

    def centred(y: Array) -> Array:
        return (y - (y * weight).sum() / count) * weight

    # Twice: the mean of large equal entries is off by rounding, and 1 / sqrt(epsilon) would
    # blow what is left of them up to the size of a real advantage.
    x = centred(centred(x))
    variance = jnp.square(x).sum() / count
    return x * jax.lax.rsqrt(variance + epsilon)
