"""The part of a policy that algorithms use."""

from typing import Any, Protocol

import jax

from jaxvla.types import Observation, Params


class TrainablePolicy(Protocol):
    """Scores samples and imitates actions; implemented by every model."""

    def evaluate(
        self, params: Params, observation: Observation, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(log_prob, entropy, value), each float32 [N]."""
        ...

    def supervised_loss(
        self, params: Params, observation: Observation, actions: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Imitation loss float32 [N] of actions float32 [N, H, A] in the env's units."""
        ...
