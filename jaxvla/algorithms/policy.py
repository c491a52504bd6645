"""The part of a policy that algorithms use."""

from typing import Any, Protocol

import flax.struct
import jax

from jaxvla.types import Params


@flax.struct.dataclass(kw_only=True)
class Evaluation:
    """Samples of a trajectory, scored at the weights that an update starts from."""

    log_prob: jax.Array
    """float32 [T, B]."""
    value: jax.Array
    """float32 [T, B]."""


class TrainablePolicy(Protocol):
    """Scores samples; implemented by every model."""

    def evaluate(
        self, params: Params, encoding: Any, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(log_prob, entropy, value), each float32 [N]."""
        ...
