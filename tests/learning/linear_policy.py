"""A policy that compiles in no time, and trajectories for it.

mean = state @ vision @ torso, log pi(x) = -|x - mean|^2 / 2, V = state @ value_head.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.types import Observation, Params, SupervisedBatch, Trajectory

STATE_DIM, WIDTH, ACTION_DIM = 4, 6, 2


class LinearPolicy:
    """What the learner uses of `jaxvla.models.base.Policy`."""

    def init(self, key: jax.Array) -> Params:
        shapes = {
            "vision": (STATE_DIM, WIDTH),
            "torso": (WIDTH, ACTION_DIM),
            "value_head": (STATE_DIM, 1),
        }
        keys = jax.random.split(key, len(shapes))
        return {
            name: {"kernel": 0.5 * jax.random.normal(k, shape)}
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    encoder = "^vision/"

    def encode(self, params: Params, observation: Observation) -> dict[str, jax.Array]:
        hidden = observation.state @ params["vision"]["kernel"]
        return {"hidden": hidden, "state": observation.state}

    def evaluate(
        self, params: Params, encoding: dict[str, jax.Array], trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean = encoding["hidden"] @ params["torso"]["kernel"]
        log_prob = -0.5 * jnp.square(trace - mean).sum(-1)
        value = (encoding["state"] @ params["value_head"]["kernel"])[:, 0]
        return log_prob, jnp.zeros_like(value), value

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        del key
        assert batch.actions is not None
        error = batch.actions - self._mean(params, batch.observation)[:, None]
        return {"actions": jnp.square(error).mean((1, 2))}

    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        return (("kernel$", ("embed", None)),)

    def _mean(self, params: Params, observation: Observation) -> jax.Array:
        return observation.state @ params["vision"]["kernel"] @ params["torso"]["kernel"]


def make_trajectory(seed: int, *, T: int = 4, B: int = 4, num_invalid: int = 0) -> Trajectory:
    """A random trajectory on the host. The invalid samples are NaN wherever they may be."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * rng.normal(size=(T, B, *shape)).astype(np.float32)

    def ones(*shape: int, dtype: type = bool) -> Any:
        return np.ones((T, B, *shape), dtype)

    images: Any = rng.integers(0, 256, (T, B, 1, 2, 2, 3), dtype=np.uint8)
    valid: Any = rng.permutation(T * B).reshape(T, B) >= num_invalid
    log_prob: Any = np.where(valid, normal(scale=0.1) - 1.0, np.nan)
    reward: Any = np.where(valid, normal(), np.nan)
    terminated: Any = rng.uniform(size=(T, B)) < 0.1
    return Trajectory(
        observation=Observation(
            images=images,
            image_mask=ones(1),
            state=normal(STATE_DIM),
            tokens=ones(3, dtype=np.int32),
            token_mask=ones(3),
        ),
        trace=np.where(valid[..., None], normal(ACTION_DIM), np.nan),
        behavior_log_prob=log_prob,
        value=normal(scale=0.1),
        reward=reward,
        terminated=terminated,
        truncated=~terminated & (rng.uniform(size=(T, B)) < 0.1),
        bootstrap_value=normal(scale=0.1),
        valid=valid,
        policy_version=0 * ones(dtype=np.int32),
    )
