"""The optimizer: AdamW per parameter group, with frozen leaves left out entirely."""

import re
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvla.config import ConfigError, OptimizerConfig, override
from jaxvla.sharding import path_name
from jaxvla.types import Params

_VALUE_HEAD = re.compile(r"(^|/)value_head/")


def schedule(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up, then constant or cosine decay."""
    if config.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=config.warmup_steps + config.decay_steps,
            end_value=peak * config.final_fraction,
        )
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, config.warmup_steps), optax.constant_schedule(peak)],
        [config.warmup_steps],
    )


def make_optimizer(
    config: OptimizerConfig, params: Params, *, section: str = "optimizer"
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with one rate for the policy and one for the critic.

    Leaves whose path does not match `config.trainable` are frozen: no update, no weight
    decay, no moments, and no part in the gradient norm.

    Args:
      config: rates, moments, what is trainable.
      params: parameters or their shape structs.
      section: where `config` stands in the whole config, for the error message.

    Raises:
      ConfigError: no leaf is trainable.
    """
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: _label(path_name(path), config.trainable), params
    )
    if set(jax.tree.leaves(labels)) == {"frozen"}:
        raise ConfigError(
            f"{section}.trainable",
            config.trainable,
            "matches no parameter",
            override(f"{section}.trainable", ".*"),
        )

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            schedule(config, peak),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    groups: dict[Hashable, optax.GradientTransformation] = {
        "policy": adamw(config.learning_rate),
        "value": adamw(config.value_learning_rate),
        "frozen": optax.set_to_zero(),
    }
    is_trained = jax.tree.map(lambda label: label != "frozen", labels)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(config.clip_norm), is_trained),
        optax.multi_transform(groups, labels),
    )


def _label(path: str, trainable: str) -> str:
    if not re.search(trainable, path):
        return "frozen"
    return "value" if _VALUE_HEAD.search(path) else "policy"


def freeze(params: Params, trainable: str) -> Params:
    """Stops gradients at the leaves whose path does not match, so that no backward pass is
    computed through what lies before them."""

    def stop(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if re.search(trainable, path_name(path)) else jax.lax.stop_gradient(leaf)

    return jax.tree_util.tree_map_with_path(stop, params)


def trained(tree: Any, trainable: str) -> dict[str, Any]:
    """Path -> leaf of the trainable leaves of a tree of parameters, or of one like it."""
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if re.search(trainable, path_name(path))
    }


def untrained_as_zeros(leaves: dict[str, jax.Array], params: Params) -> Params:
    """The tree that `trained` took leaves from: zeros in place of the others."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(path_name(path), jnp.zeros_like(leaf)), params
    )


def trained_norm(grads: Any, trainable: str) -> jax.Array:
    """Global norm of the gradients of trainable leaves, float32 []."""
    return optax.tree.norm(list(trained(grads, trainable).values()))
