"""The part of a policy that algorithms use."""

from typing import Any, Protocol

import jax

from jaxvla.types import Params


class TrainablePolicy(Protocol):
    """Scores samples; implemented by every model."""

    def evaluate(
        self, params: Params, encoding: Any, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(log_prob, entropy, value), each float32 [N]."""
        ...
