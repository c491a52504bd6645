"""Flow matching on action chunks: training target, denoising steps and their log-probs.

Time runs from t = 1 (noise) to t = 0 (data), as in openpi and opposite to the pi0 paper:
x_t = t n + (1 - t) a, velocity v = n - a. K denoise steps go through t_i = 1 - i/K. Every
transition here has a mean that is linear in x_t and v,

    mean = c_x x_t + c_v v,    std constant per step or learned,

because the action estimate x0 = x_t - t v and the noise estimate x1 = x_t + (1 - t) v are.
The coefficients are tables indexed by the step, computed once in float64, so that sampling
and scoring see the very same numbers. Everything at run time is float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)

PredictFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
"""(x_t float32 [B, H, A], t float32 [B]) -> velocity float32 [B, H, A], and the standard deviation
float32 [B, H, A] of the transition from there where the model has learned one, else None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transitions:
    """Coefficients of the K denoise transitions, each float32 [K]."""

    x: np.ndarray
    """c_x."""
    velocity: np.ndarray
    """c_v."""
    std: np.ndarray
    """Standard deviation; 0 where the step is deterministic."""

    @property
    def num_steps(self) -> int:
        """Denoise steps K."""
        return len(self.std)


@flax.struct.dataclass(kw_only=True)
class FlowTrace:
    """The M stochastic transitions of a sampled chunk, which follow each other. Leading axis B."""

    states: jax.Array
    """float32 [B, M + 1, H, A]: before the first transition, and after each."""
    step: jax.Array
    """int32 [B], denoise step of the first transition, in [0, K - M]."""


@flax.struct.dataclass(kw_only=True)
class Draws:
    """All randomness of one sampled chunk. Leading axis B."""

    initial: jax.Array
    """float32 [B, H, A], standard normal start of the flow."""
    exploration: jax.Array
    """float32 [B, M, H, A], standard normal noise of the M stochastic transitions."""
    step: jax.Array
    """int32 [B], denoise step of the first of them."""


def time_grid(num_steps: int) -> np.ndarray:
    """t_i = 1 - i/K for i = 0..K, float32 [K + 1]: a table, never accumulated."""
    return _grid(num_steps).astype(np.float32)


def ode_transitions(num_steps: int) -> Transitions:
    """Euler steps of dx = v dt: x_next = x_t - v/K, deterministic."""
    ones = np.ones_like(_grid(num_steps)[1:])
    return _transitions(ones, -ones / num_steps, 0.0 * ones)


def sde_transitions(num_steps: int, noise_level: float) -> Transitions:
    """Flow-SDE: noise is added and the score term keeps the marginals of the ODE.

    sigma_i = a sqrt(t_i / (1 - t_i)), where t_1 replaces t_0 = 1 in the denominator,
    mean = (1 - t') x0 + (t' - sigma^2 delta / (2 t)) x1, std = sigma sqrt(delta), with
    t' = t_{i+1} and delta = 1/K. The sampler of Flow-GRPO (arXiv:2505.05470), written with
    both estimates as in piRL (arXiv:2510.25889). With K = 1 the mean is biased.

    Args:
      num_steps: K >= 1.
      noise_level: a > 0.
    """
    grid = _grid(num_steps)
    t, t_next, delta = grid[:-1], grid[1:], 1.0 / num_steps
    sigma = noise_level * np.sqrt(t / (1.0 - np.where(t == 1.0, grid[1], t)))
    return _from_estimates(1.0 - t_next, t_next - sigma**2 * delta / (2.0 * t), sigma * delta**0.5)


def cps_transitions(num_steps: int, noise_level: float) -> Transitions:
    """Flow-CPS: the noise estimate is rotated towards fresh noise, keeping its total amount.

    mean = (1 - t') x0 + t' cos(pi a / 2) x1, std = t' sin(pi a / 2) (arXiv:2509.05952). The
    last step has t' = 0 and is deterministic.

    Args:
      num_steps: K >= 1.
      noise_level: a in [0, 1].
    """
    t_next = _grid(num_steps)[1:]
    angle = 0.5 * math.pi * noise_level
    return _from_estimates(1.0 - t_next, t_next * math.cos(angle), t_next * math.sin(angle))


def noise_head_std(output: jax.Array, low: float, high: float) -> jax.Array:
    """Flow-Noise: learned standard deviation of a transition whose mean is the ODE step.

    log std^2 is interpolated between log low^2 and log high^2 by (tanh(output) + 1) / 2
    (ReinFlow, arXiv:2505.22094; bounds as in piRL, arXiv:2510.25889).

    Args:
      output: float32, any shape, last layer of the noise head.
      low: smallest standard deviation, > 0.
      high: largest standard deviation.

    Returns:
      float32, like `output`, in [low, high].
    """
    fraction = 0.5 * (jnp.tanh(output.astype(jnp.float32)) + 1.0)
    return jnp.exp(math.log(low) + (math.log(high) - math.log(low)) * fraction)


def transition(
    table: Transitions, x_t: jax.Array, velocity: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the next state.

    Args:
      table: coefficients.
      x_t: float32 [B, H, A].
      velocity: float32 [B, H, A], at x_t and t_step.
      step: int32 [B].

    Returns:
      mean float32 [B, H, A] and std float32 [B, 1, 1].
    """
    c_x, c_v, std = (
        jnp.asarray(column)[step][:, None, None] for column in (table.x, table.velocity, table.std)
    )
    return c_x * x_t + c_v * velocity, std


def normal_log_prob(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Elementwise log-density of a normal, float32; 0 (and no gradient) where std is 0."""
    is_random = std > 0.0
    scale = jnp.where(is_random, std, 1.0)
    log_prob = -0.5 * jnp.square((x - mean) / scale) - jnp.log(scale) - _LOG_SQRT_2PI
    return jnp.where(is_random, log_prob, 0.0)


def normal_entropy(std: jax.Array) -> jax.Array:
    """Elementwise entropy of a normal, log(std sqrt(2 pi e)), float32, nats."""
    return jnp.log(std) + (0.5 + _LOG_SQRT_2PI)


def chunk_sum(x: jax.Array, *, num_steps: int, num_dims: int) -> jax.Array:
    """Sum over the part of a chunk that reaches the env, for log-probs and entropies.

    Only the first `num_steps` control steps and `num_dims` dimensions are summed. The rest is
    noised too but never executed; leaving it out of the ratio is an approximation (its
    influence on the executed part through later denoise steps is ignored) that keeps the
    variance of the ratio independent of padding.

    Args:
      x: float32 [..., H, A], of every element.
      num_steps: in [1, H].
      num_dims: in [1, A].

    Returns:
      float32 [...].
    """
    return jnp.sum(x[..., :num_steps, :num_dims], axis=(-2, -1))


def chunk_log_prob(
    x: jax.Array, mean: jax.Array, std: jax.Array, *, num_steps: int, num_dims: int
) -> jax.Array:
    """Log-prob of the part of a chunk that `chunk_sum` counts.

    Args:
      x: float32 [..., H, A], scored states.
      mean: float32 [..., H, A].
      std: float32 [..., 1, 1] or [..., H, A].
      num_steps: in [1, H].
      num_dims: in [1, A].

    Returns:
      float32 [...].
    """
    log_prob = normal_log_prob(x, mean, jnp.broadcast_to(std, x.shape))
    return chunk_sum(log_prob, num_steps=num_steps, num_dims=num_dims)


def draw(
    keys: jax.Array, shape: tuple[int, int], num_choices: int, *, num_random: int = 1
) -> Draws:
    """Draws the randomness of each row from that row's key alone.

    Args:
      keys: typed keys [B].
      shape: (H, A).
      num_choices: the first stochastic step is uniform in [0, num_choices).
      num_random: stochastic transitions M.
    """

    def draw_row(key: jax.Array) -> Draws:
        normal_key, step_key = jax.random.split(key)
        normals = jax.random.normal(normal_key, (1 + num_random, *shape))
        step = jnp.floor(jax.random.uniform(step_key) * num_choices).astype(jnp.int32)
        return Draws(initial=normals[0], exploration=normals[1:], step=step)

    return jax.vmap(draw_row)(keys)


def denoise(
    predict: PredictFn, draws: Draws, table: Transitions
) -> tuple[jax.Array, FlowTrace, tuple[jax.Array, jax.Array]]:
    """Integrates from noise to data; M transitions of every row are stochastic.

    Row b takes the transitions `draws.step[b]` to `draws.step[b] + M - 1` from `table`, with the
    learned standard deviation in the place of the table's where there is one, and every other
    transition from the ODE. With M = 1 this is piRL's hybrid sampling, with the step drawn per
    row instead of per batch. With `ode_transitions` as the table, and nothing learned, the whole
    path is the ODE.

    Args:
      predict: the model.
      draws: randomness, leading axis B.
      table: coefficients of the stochastic transitions.

    Returns:
      The chunk float32 [B, H, A] at t = 0, its trace, and mean [B, M, H, A] and std
      [B, M, 1, 1] or [B, M, H, A] of the transitions in the trace, as from `transitions_of`.
    """
    num_steps, num_random = table.num_steps, draws.exploration.shape[1]
    ode = ode_transitions(num_steps)
    batch = draws.step.shape[0]

    def advance(x: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        index, t = inputs
        step = jnp.broadcast_to(index, (batch,))
        v, learned_std = predict(x, jnp.broadcast_to(t, (batch,)))
        x_ode, _ = transition(ode, x, v, step)
        mean, std = transition(table, x, v, step)
        std = std if learned_std is None else learned_std
        place = step - draws.step
        is_random = (place >= 0) & (place < num_random)
        noise = _pick(draws.exploration, jnp.clip(place, 0, num_random - 1)[:, None])[:, 0]
        x_next = jnp.where(is_random[:, None, None], mean + std * noise, x_ode)
        return x_next, (x_next, mean, std)

    start = draws.initial.astype(jnp.float32)
    steps = (jnp.arange(num_steps), jnp.asarray(time_grid(num_steps)[:-1]))
    x, along = jax.lax.scan(advance, start, steps)
    states, mean, std = (jnp.swapaxes(seen, 0, 1) for seen in along)
    states = jnp.concatenate([start[:, None], states], axis=1)
    chosen = draws.step[:, None] + jnp.arange(num_random + 1)
    trace = FlowTrace(states=_pick(states, chosen), step=draws.step)
    return x, trace, (_pick(mean, chosen[:, :-1]), _pick(std, chosen[:, :-1]))


def transitions_of(
    predict: PredictFn, trace: FlowTrace, table: Transitions
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the transitions in a trace.

    One pass of the model per transition, one after another: no copy of what `predict` closes
    over (the keys and values of the prefix) is made per transition, as a larger batch would.

    Args:
      predict: the model.
      trace: as `denoise` made it.
      table: coefficients of the stochastic transitions.

    Returns:
      mean float32 [B, M, H, A] and std float32 [B, M, 1, 1] or [B, M, H, A].
    """
    grid = jnp.asarray(time_grid(table.num_steps))
    num_random = trace.states.shape[1] - 1

    def at(place: int | jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = trace.step + place
        v, learned_std = predict(x_t, grid[step])
        mean, std = transition(table, x_t, v, step)
        return mean, std if learned_std is None else learned_std

    if num_random == 1:
        mean, std = at(0, trace.states[:, 0])
        return mean[:, None], std[:, None]
    before = (jnp.arange(num_random), jnp.swapaxes(trace.states[:, :-1], 0, 1))
    _, along = jax.lax.scan(lambda carry, inputs: (carry, at(*inputs)), None, before)
    mean, std = (jnp.swapaxes(seen, 0, 1) for seen in along)
    return mean, std


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, N, H, A] at index [B, M] of its axis 1: [B, M, H, A]."""
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)


def draw_time(key: jax.Array, batch: int) -> jax.Array:
    """Training times t = 0.001 + 0.999 Beta(1.5, 1), float32 [B], as in openpi.

    Beta(1.5, 1) has the distribution function x^1.5, hence u^(2/3) of a uniform u.
    """
    uniform = jax.random.uniform(key, (batch,))
    return uniform ** (2.0 / 3.0) * 0.999 + 0.001


def interpolate(
    actions: jax.Array, noise: jax.Array, time: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Training input x_t = t n + (1 - t) a and target velocity n - a.

    Args:
      actions: float32 [B, H, A].
      noise: float32 [B, H, A].
      time: float32 [B].

    Returns:
      x_t and target, each float32 [B, H, A].
    """
    t = time[:, None, None]
    return t * noise + (1.0 - t) * actions, noise - actions


def _grid(num_steps: int) -> np.ndarray:
    """The time grid in float64, [K + 1]."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: a flow needs at least one denoise step")
    return 1.0 - np.arange(num_steps + 1) / num_steps


def _from_estimates(c_x0: np.ndarray, c_x1: np.ndarray, std: np.ndarray) -> Transitions:
    """Rewrites c_x0 x0 + c_x1 x1 in terms of x_t and v."""
    t = _grid(len(std))[:-1]
    return _transitions(c_x0 + c_x1, c_x1 * (1.0 - t) - c_x0 * t, std)


def _transitions(c_x: np.ndarray, c_v: np.ndarray, std: np.ndarray) -> Transitions:
    return Transitions(
        x=c_x.astype(np.float32), velocity=c_v.astype(np.float32), std=std.astype(np.float32)
    )
