"""Flow policy optimisation, FPO (arXiv:2507.21053): policy gradients without a likelihood.

The flow-matching loss of a chunk bounds minus its log-likelihood from above, up to a constant and
the weighting of flow times. So FPO puts the fall of that loss, at the same noises and flow times,
in the place of the log of PPO's ratio:

    log ratio = clip(L_behavior - L, -3, 3),    L = mean over N draws of the flow-matching loss

A "log-prob" here is what makes that the difference of two log-probs: -L_behavior of the weights
that acted, and -L_behavior + clip(L_behavior - L, -3, 3) of others. It is no density: sums and
exponentials of it mean nothing, and its scale is that of the loss, a mean over the executed part of
the chunk: what is padding, or never reaches the env, would dilute it. Only
differences count. Between two weights inside the clip a difference is the fall of the loss from
one to the other, so corrections for stale samples see L_behavior - L_proximal as log p / b.

The chunk is sampled by the ODE from a random start, and the start is the exploration.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.models import flow

MAX_LOG_RATIO = 3.0
"""Bound of the log-ratio to the weights that acted, as in the authors' code: exp of a large fall
of the loss would overflow. No gradient passes outside."""


@flax.struct.dataclass(kw_only=True)
class FpoTrace:
    """A chunk and the flow-matching problems it is judged by. Leading axis B."""

    chunk: jax.Array
    """float32 [B, H, A], normalised, with its padding."""
    noise: jax.Array
    """float32 [B, N, H, A], standard normal."""
    time: jax.Array
    """float32 [B, N], flow times."""
    loss: jax.Array
    """float32 [B], mean flow-matching loss at the weights that acted."""


class FpoExploration:
    """Implements `jaxvla.models.exploration.Exploration`."""

    error_scale = 0.04
    """A mean of squares of about 2, instead of a sum of squares in units of the exploration."""

    def __init__(self, *, num_steps: int, num_draws: int, loss_steps: int, loss_dims: int):
        """Args:
        num_steps: denoise steps K.
        num_draws: draws N of (noise, flow time) per chunk.
        loss_steps: control steps of a chunk that the loss is a mean over, the first ones.
        loss_dims: action dimensions that it is a mean over.
        """
        self._ode = flow.ode_transitions(num_steps)
        self._num_draws = num_draws
        self._part = loss_steps, loss_dims

    def sample(
        self,
        predict: flow.PredictFn,
        keys: jax.Array,
        shape: tuple[int, int],
        *,
        explore: bool,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, FpoTrace, jax.Array]:
        """See `Exploration.sample`. With and without exploration the path is the ODE; the
        losses are left out (0) without."""
        path_keys, loss_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        draws = flow.draw(path_keys, shape, 1)
        if noise is not None:
            draws = dataclasses.replace(draws, initial=noise)
        chunk, _, _ = flow.denoise(predict, draws, self._ode)
        problems, times = self._draw(loss_keys, shape)
        loss = jnp.zeros(keys.shape, jnp.float32)
        if explore:
            loss = mean_loss(predict, chunk, problems, times, self._part)
        return chunk, FpoTrace(chunk=chunk, noise=problems, time=times, loss=loss), -loss

    def evaluate(self, predict: flow.PredictFn, trace: FpoTrace) -> tuple[jax.Array, jax.Array]:
        """What stands for the log-prob, see the module, and 0 for the entropy: one pass of the
        model per draw."""
        fall = trace.loss - mean_loss(predict, trace.chunk, trace.noise, trace.time, self._part)
        log_prob = -trace.loss + jnp.clip(fall, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        return log_prob, jnp.zeros_like(log_prob)

    def _draw(self, keys: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Noises [B, N, H, A] and flow times [B, N], the latter by the law of supervised training:
        the losses are those that the model was trained with."""

        def draw_row(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise_key, time_key = jax.random.split(key)
            noise = jax.random.normal(noise_key, (self._num_draws, *shape))
            return noise, flow.draw_time(time_key, self._num_draws)

        return jax.vmap(draw_row)(keys)


def mean_loss(
    predict: flow.PredictFn,
    chunk: jax.Array,
    noise: jax.Array,
    time: jax.Array,
    part: tuple[int, int],
) -> jax.Array:
    """Flow-matching loss float32 [B], a mean over the N draws and part of the chunk.

    One pass of the model per draw, one after another, as in `flow.transitions_of`.

    Args:
      predict: the model.
      chunk: float32 [B, H, A].
      noise: float32 [B, N, H, A].
      time: float32 [B, N].
      part: the first steps and the first dimensions that count.
    """
    steps, dims = part

    def add(total: jax.Array, draw: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_t, target = flow.interpolate(chunk, *draw)
        velocity, _ = predict(x_t, draw[1])
        return total + jnp.square(velocity - target)[:, :steps, :dims].mean((1, 2)), None

    draws = jnp.swapaxes(noise, 0, 1), time.T
    total, _ = jax.lax.scan(add, jnp.zeros(chunk.shape[:1], jnp.float32), draws)
    return total / noise.shape[1]
