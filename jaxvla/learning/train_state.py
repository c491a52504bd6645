"""What an optimizer step changes."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxvla import sharding
from jaxvla.types import Params


@flax.struct.dataclass(kw_only=True)
class TrainState:
    """Parameters and optimizer state, on the learning mesh."""

    params: Params
    opt_state: Any
    num_steps: jax.Array
    """int32 [], optimizer steps that were applied."""
    num_skipped: jax.Array
    """int32 [], optimizer steps that were skipped because the gradient was not finite."""
    ema: Params | None = None
    """float32, moving average of `params` over the steps; None where none is kept."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh optimizer around given parameters. The two counters may not share a buffer."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        num_steps=jnp.zeros((), jnp.int32),
        num_skipped=jnp.zeros((), jnp.int32),
    )


def state_shardings(state: TrainState, rules: sharding.LogicalRules, mesh: Mesh) -> TrainState:
    """Placement of a train state; the optimizer's moments lie like their parameters."""
    return sharding.params_shardings(state, rules, mesh, "learning")


def apply_gradients(
    state: TrainState,
    grads: Params,
    grad_norm: jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    weight: jax.Array | float = 1.0,
) -> TrainState:
    """One optimizer step, or none when the gradient is not finite or of no sample.

    A step that is not taken leaves parameters and optimizer state bitwise as they were: momentum
    and weight decay would move them without a gradient. Only one that is not finite counts as
    skipped.

    Args:
      state: before the step.
      grads: of its parameters.
      grad_norm: float32 [], of the trainable ones.
      optimizer: as for `init_state`.
      weight: float32 [], total of the samples that the gradient is of.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    stepped = dataclasses.replace(
        state, params=params, opt_state=opt_state, num_steps=state.num_steps + 1
    )
    is_finite = jnp.isfinite(grad_norm)
    is_taken = is_finite & (jnp.asarray(weight) > 0.0)
    kept = dataclasses.replace(state, num_skipped=state.num_skipped + ~is_finite)
    return jax.tree.map(lambda new, old: jnp.where(is_taken, new, old), stepped, kept)
