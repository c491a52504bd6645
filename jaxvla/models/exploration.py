"""Kinds of exploration: what of the denoise path is random, and what its log-prob is.

| kind      | random                  | standard deviation | log-prob of a chunk             |
|-----------|-------------------------|--------------------|---------------------------------|
| sde       | one step, drawn per row | table              | of that transition              |
| cps       | one step, drawn per row | table              | of that transition              |
| sde_chain | every step              | table              | sum over the K transitions      |
| noise     | every step              | noise head         | mean over K transitions + start |
| reinflow  | every step              | noise head         | sum over the K transitions      |

The start of the path is standard normal whatever the weights are, so its log-prob cancels in every
ratio. "noise" counts it all the same, as one of K + 1 terms, as piRL does (arXiv:2510.25889):
a ratio of two such log-probs is the (K + 1)-th root of the ratio of the path's densities, so that
the clip range does not depend on K. ReinFlow (arXiv:2505.22094) takes the sum, whose ratio
is that of the densities of the whole path.

`jaxvla.models.fpo` explores without a likelihood.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxvla.models import flow


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What tells kinds of exploration of the denoise path apart."""

    transitions: Callable[[int, float], flow.Transitions]
    """Table of the stochastic transitions from (denoise steps K, noise level)."""
    is_chain: bool = True
    """Every step is stochastic, not one."""
    has_noise_head: bool = False
    """The noise head gives the standard deviations, not the table."""
    is_averaged: bool = False
    """The log-prob is a mean over the transitions and the start, not a sum over transitions."""
    max_draw: float = math.inf
    """Standard normal draws of transitions are clipped to +- this, and scored as if they were not.
    Between the borders the clipped law has the normal density. What lay outside (0.27 % with 3)
    sits on the borders, where the normal density is not that of the law, so that the ratios of
    those elements are approximate."""


def _ode(num_steps: int, noise_level: float) -> flow.Transitions:
    """Means of Flow-Noise; the noise head gives the standard deviations."""
    del noise_level
    return flow.ode_transitions(num_steps)


KINDS = {
    "sde": Kind(transitions=flow.sde_transitions, is_chain=False),
    "cps": Kind(transitions=flow.cps_transitions, is_chain=False),
    "sde_chain": Kind(transitions=flow.sde_transitions),
    "noise": Kind(transitions=_ode, has_noise_head=True, is_averaged=True),
    "reinflow": Kind(transitions=_ode, has_noise_head=True, max_draw=3.0),
}
"""By `PiConfig.exploration`."""


class Exploration(Protocol):
    """Samples chunks and scores them."""

    @property
    def error_scale(self) -> float:
        """Rounding error of a log-prob, in units of that of one transition of Flow-SDE."""
        ...

    def sample(
        self,
        predict: flow.PredictFn,
        keys: jax.Array,
        shape: tuple[int, int],
        *,
        explore: bool,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """Denoises one chunk per row.

        Args:
          predict: the model.
          keys: typed keys [B].
          shape: (H, A).
          explore: static; False: the ODE.
          noise: float32 [B, H, A], start of the path in the place of a standard normal draw.

        Returns:
          Chunk float32 [B, H, A], trace, and log_prob float32 [B], 0 without exploration.
        """
        ...

    def evaluate(self, predict: flow.PredictFn, trace: Any) -> tuple[jax.Array, jax.Array]:
        """log_prob and entropy of explored samples, each float32 [B]."""
        ...


class PathExploration:
    """Exploration of the denoise path by an entry of `KINDS`."""

    def __init__(
        self,
        kind: Kind,
        *,
        num_steps: int,
        noise_level: float,
        num_choices: int,
        log_prob_steps: int,
        log_prob_dims: int,
    ):
        """Args:
        kind: what is random.
        num_steps: denoise steps K.
        noise_level: strength of a table's noise.
        num_choices: the one stochastic step is among the first so many; not read for chains.
        log_prob_steps, log_prob_dims: part of a chunk that is scored, see `flow.chunk_sum`.
        """
        self._kind = kind
        self._ode = flow.ode_transitions(num_steps)
        self._noisy = kind.transitions(num_steps, noise_level)
        self._num_random = num_steps if kind.is_chain else 1
        self._num_choices = 1 if kind.is_chain else num_choices
        self._scored = {"num_steps": log_prob_steps, "num_dims": log_prob_dims}

    @property
    def error_scale(self) -> float:
        """See `Exploration.error_scale`: errors add up like the transitions."""
        return 1 if self._kind.is_averaged else self._num_random

    def sample(
        self,
        predict: flow.PredictFn,
        keys: jax.Array,
        shape: tuple[int, int],
        *,
        explore: bool,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, flow.FlowTrace, jax.Array]:
        """See `Exploration.sample`."""
        drawn = flow.draw(keys, shape, self._num_choices, num_random=self._num_random)
        bound = self._kind.max_draw
        draws = flow.Draws(
            initial=drawn.initial if noise is None else noise,
            exploration=jnp.clip(drawn.exploration, -bound, bound),
            step=drawn.step,
        )
        if not explore:
            chunk, trace, _ = flow.denoise(lambda x, t: (predict(x, t)[0], None), draws, self._ode)
            return chunk, trace, jnp.zeros(keys.shape, jnp.float32)
        chunk, trace, (mean, std) = flow.denoise(predict, draws, self._noisy)
        return chunk, trace, self._log_prob(trace, mean, std)

    def evaluate(
        self, predict: flow.PredictFn, trace: flow.FlowTrace
    ) -> tuple[jax.Array, jax.Array]:
        """See `Exploration.evaluate`. One pass of the model per stochastic transition.

        The entropy is put together like the log-prob. Where no parameter has a say in it,
        without a noise head, it is reported as 0.
        """
        mean, std = flow.transitions_of(predict, trace, self._noisy)
        log_prob = self._log_prob(trace, mean, std)
        if not self._kind.has_noise_head:
            return log_prob, jnp.zeros_like(log_prob)
        entropy = flow.chunk_sum(flow.normal_entropy(std), **self._scored)
        of_start = flow.chunk_sum(
            flow.normal_entropy(jnp.ones_like(trace.states[:, 0])), **self._scored
        )
        return log_prob, self._over_path(entropy, of_start)

    def _log_prob(self, trace: flow.FlowTrace, mean: jax.Array, std: jax.Array) -> jax.Array:
        log_prob = flow.chunk_log_prob(trace.states[:, 1:], mean, std, **self._scored)
        start = trace.states[:, 0]
        of_start = flow.chunk_log_prob(
            start, jnp.zeros_like(start), jnp.ones_like(start), **self._scored
        )
        return self._over_path(log_prob, of_start)

    def _over_path(self, of_transitions: jax.Array, of_start: jax.Array) -> jax.Array:
        """[B, M] of the transitions and [B] of the start -> [B]."""
        total = of_transitions.sum(axis=1)
        if not self._kind.is_averaged:
            return total
        return (total + of_start) / (1 + of_transitions.shape[1])
