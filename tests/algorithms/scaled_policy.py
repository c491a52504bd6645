"""A policy of three numbers, and samples for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.algorithms.ppo import PPO
from jaxvla.types import Observation, Params, TrainingBatch, Trajectory

T, B, N = 4, 3, 12


class ScaledPolicy:
    """Scores sample n as params * trace[n]: every input of a sample reaches the gradient."""

    def evaluate(
        self, params: Params, encoding: Observation, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = trace * encoding.state[..., 0]
        return params["log_prob"] * x, params["entropy"] * x, params["value"] * x


PARAMS = {"log_prob": jnp.float32(0.7), "entropy": jnp.float32(0.3), "value": jnp.float32(-0.4)}


def observation(*shape: int) -> Observation:
    return Observation(
        images=jnp.zeros((*shape, 1, 2, 2, 3), jnp.uint8),
        image_mask=jnp.ones((*shape, 1), bool),
        state=jnp.ones((*shape, 1)),
        tokens=jnp.zeros((*shape, 2), jnp.int32),
        token_mask=jnp.ones((*shape, 2), bool),
    )


def make_trajectory(seed: int = 0) -> Trajectory:
    """A random trajectory of version 0."""
    rng = np.random.default_rng(seed)

    def normal() -> Any:
        return rng.normal(size=(T, B)).astype(np.float32)

    terminated: Any = np.eye(T, B, dtype=bool)
    truncated: Any = np.eye(T, B, k=1, dtype=bool)
    valid: Any = np.ones((T, B), bool)
    version: Any = np.zeros((T, B), np.int32)
    return Trajectory(
        observation=observation(T, B),
        trace=normal(),
        behavior_log_prob=normal(),
        value=normal(),
        reward=normal(),
        terminated=terminated,
        truncated=truncated,
        bootstrap_value=normal(),
        valid=valid,
        policy_version=version,
    )


def make_batch(seed: int = 0, **changes: Any) -> TrainingBatch:
    """N random samples, which weights that are not stale made unless said otherwise."""
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        name: jnp.asarray(rng.normal(size=N), jnp.float32)
        for name in ("trace", "behavior_log_prob", "proximal_value", "advantage", "return_")
    }
    fields |= {"weight": jnp.ones(N), "observation": observation(N)}
    fields |= {"staleness": jnp.zeros(N, jnp.int32)} | changes
    return TrainingBatch(**({"proximal_log_prob": fields["behavior_log_prob"]} | fields))


def loss_and_grad(
    algorithm: PPO, samples: TrainingBatch, params: Params = PARAMS
) -> tuple[Any, Params]:
    """((loss, metrics), gradient), compiled."""
    return _compiled(algorithm)(params, samples)


def loss_and_grad_by_operation(
    algorithm: PPO, samples: TrainingBatch, params: Params = PARAMS
) -> tuple[Any, Params]:
    """The same without a compiler that orders sums and joins roundings as it likes."""
    return _differentiated(algorithm)(params, samples)


def _differentiated(algorithm: PPO) -> Any:
    def loss(params: Params, samples: TrainingBatch) -> tuple[jax.Array, Any]:
        return algorithm.loss(ScaledPolicy(), params, samples)

    return jax.value_and_grad(loss, has_aux=True)


@functools.cache
def _compiled(algorithm: PPO) -> Any:
    return jax.jit(_differentiated(algorithm))
