"""Advantages and returns. Pure functions of one batch of trajectories, time-major [T, B]."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SAME_RETURN = 1e-6
"""Returns that differ by less, relative to the largest one of their group, are alike: the order
in which rewards are added up moves a float32 sum by that much."""


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
      value: critic, at acting time or at the start of the update.
      bootstrap_value: see `next_values`.
      terminated: the episode ended inside the chunk.
      truncated: the episode was cut by its time limit inside the chunk.
      valid: the outcome of the chunk is known.
      discount: gamma per chunk, in [0, 1].
      trace_decay: lambda, in [0, 1].
    """
    delta = _errors(reward, value, bootstrap_value, terminated, truncated, valid, discount)
    decay = discount * trace_decay * (valid & ~terminated & ~truncated)

    def backward(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, decay_t = step
        advantage = delta_t + decay_t * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantages


def vtrace(
    *,
    log_ratio: Float[Array, "T B"],
    reward: Float[Array, "T B"],
    value: Float[Array, "T B"],
    bootstrap_value: Float[Array, "T B"],
    terminated: Bool[Array, "T B"],
    truncated: Bool[Array, "T B"],
    valid: Bool[Array, "T B"],
    discount: float,
    trace_decay: float,
    rho_cap: float,
    trace_cap: float,
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """V-trace over action chunks: (advantages, value targets).

        v_s = V_s + sum_{t >= s} gamma^(t-s) (prod_{s <= i < t} c_i) rho_t delta_t
        A_s = r_s + gamma ((1 - lambda) V_{s+1} + lambda v_{s+1}) - V_s

    with rho_t = min(rho_cap, p / b), c_i = lambda min(trace_cap, p / b) and the error delta_t of
    `generalized_advantages`: Espeholt et al. 2018, eq. 1 and remark 2
    (https://arxiv.org/abs/1802.01561). A is the advantage of their section 4.2, less the rho_s of
    the sample itself, which weighs its policy loss; lambda enters it as it enters v, so that for
    p = b it is `generalized_advantages` to the bit, and v is A + V.

    Ends of episodes and invalid steps are treated as in `generalized_advantages`.

    Args:
      log_ratio: log p / b, of the policy that the targets are for to the one that acted. At
        invalid steps it is not read.
      value: the critic whose targets these are.
      rho_cap: it decides which policy v is the value of: without a cap p.
      trace_cap: it decides how far errors travel, not what v converges to.
    """
    delta = _errors(reward, value, bootstrap_value, terminated, truncated, valid, discount)
    decay = discount * trace_decay * (valid & ~terminated & ~truncated)
    ratio = jnp.where(valid, jnp.exp(log_ratio), 0.0)
    weighted = jnp.minimum(rho_cap, ratio) * delta
    trace = jnp.minimum(trace_cap, ratio) * decay

    def backward(later: Array, step: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        delta_t, decay_t, weighted_t, trace_t = step
        correction = weighted_t + trace_t * later
        return correction, (delta_t + decay_t * later, correction)

    steps = (delta, decay, weighted, trace)
    _, (advantages, to_v) = jax.lax.scan(backward, jnp.zeros_like(delta[0]), steps, reverse=True)
    return advantages, value + to_v


def _errors(
    reward: Array,
    value: Array,
    bootstrap_value: Array,
    terminated: Array,
    truncated: Array,
    valid: Array,
    discount: float,
) -> Array:
    """delta_t of the critic, [T, B]; 0 at invalid steps."""
    following = next_values(value, bootstrap_value, truncated)
    target = reward + discount * jnp.where(terminated, 0.0, following)
    return jnp.where(valid, target - value, 0.0)


def group_advantages(
    return_: Float[Array, " B"],
    has_return: Bool[Array, " B"],
    *,
    group_size: int,
    epsilon: float | None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """What sets the return of an episode apart from those of its group: (advantage, is_uniform).

        A_i = (R_i - mean R) / (std R + epsilon)

    Shao et al. 2024, section 4.1.2 (https://arxiv.org/abs/2402.03300), over episodes iG to
    iG + G - 1, with the standard deviation of those G numbers themselves (divisor G, not G - 1).

    Args:
      return_: of episodes; not read where it is not known.
      has_return: where it is known. Others count in no group and get advantage 0.
      group_size: G, divides B.
      epsilon: None leaves the denominator out.

    Returns:
      `is_uniform` says of every episode whether those of its group are all alike; their
      advantages are 0, exactly.

    Raises:
      TypeError: G does not divide B.
    """
    known = has_return.reshape(-1, group_size)
    value = return_.reshape(known.shape)
    lowest = jnp.where(known, value, jnp.inf).min(axis=1, keepdims=True)
    # From the lowest up: the mean of what lies far from 0 is off by rounding, and where all are
    # equal nothing but rounding would be divided by itself.
    gain = jnp.where(known, value - lowest, 0.0)
    largest = jnp.where(known, jnp.abs(value), 0.0).max(axis=1, keepdims=True)
    differs = gain.max(axis=1, keepdims=True) > SAME_RETURN * largest
    count = jnp.maximum(known.sum(axis=1, keepdims=True), 1)
    mean = gain.sum(axis=1, keepdims=True) / count
    advantage = jnp.where(known & differs, gain - mean, 0.0)
    if epsilon is not None:
        spread = jnp.sqrt(jnp.square(advantage).sum(axis=1, keepdims=True) / count)
        advantage /= spread + epsilon
    is_uniform = jnp.broadcast_to(~differs, known.shape)
    return advantage.reshape(return_.shape), is_uniform.reshape(return_.shape)


@flax.struct.dataclass(kw_only=True)
class Moments:
    """Of the advantages of samples whose weight is 1."""

    count: jax.Array
    """float32 []."""
    mean: jax.Array
    """float32 [], 0 of no sample."""
    squares: jax.Array
    """float32 [], sum of squared deviations from the mean."""


def moments(x: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Moments:
    """Of the entries of weight 1. Entries of weight 0 are not read and may be NaN."""
    x = jnp.where(weight > 0.0, x, 0.0)
    count = weight.sum()

    def mean_of(y: Array) -> Array:
        return (y * weight).sum() / jnp.maximum(count, 1.0)

    # Twice: the mean of large equal entries is off by rounding, and 1 / sqrt(epsilon) would
    # blow what is left of them up to the size of a real advantage.
    mean = mean_of(x)
    mean += mean_of(x - mean)
    return Moments(count=count, mean=mean, squares=(jnp.square(x - mean) * weight).sum())


def merge(a: Moments, b: Moments) -> Moments:
    """Of the samples of both: Chan, Golub, LeVeque 1983, eq. 2.1
    (https://doi.org/10.1080/00031305.1983.10483115)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    gap = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + gap * share,
        squares=a.squares + b.squares + jnp.square(gap) * a.count * share,
    )


def scale(moments: Moments, epsilon: float = 1e-8) -> Float[Array, ""]:
    """1 / sqrt(variance + epsilon)."""
    return jax.lax.rsqrt(moments.squares / jnp.maximum(moments.count, 1.0) + epsilon)


def deviations(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], moments: Moments
) -> Float[Array, "*shape"]:
    """x - mean; 0 for entries of weight 0, which are not read and may be NaN."""
    return jnp.where(weight > 0.0, x - moments.mean, 0.0)


def standardize(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], moments: Moments
) -> Float[Array, "*shape"]:
    """`deviations` times `scale`, by the moments of all samples that count together.

    Entries that are all equal carry no preference and become 0.
    """
    return deviations(x, weight, moments) * scale(moments)
