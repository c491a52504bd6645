"""What the rest of the system may ask of a policy."""

from typing import Any, Protocol

import flax.struct
import jax

from jaxvla.types import Observation, Params, PolicySample, SupervisedBatch

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
"""(regular expression over '/'-joined parameter paths, logical axis per dimension)."""


@flax.struct.dataclass(kw_only=True)
class Prefix:
    """What the vision-language part computed from one observation, batched."""

    keys: jax.Array
    """[L, B, S, K, head_dim] in the compute dtype: L layers, S prefix tokens, K kv heads."""
    values: jax.Array
    """[L, B, S, K, head_dim]."""
    mask: jax.Array
    """bool [B, S], True where the token is valid."""
    features: jax.Array
    """[B, S, D], output of the last layer; arbitrary (but finite) where `mask` is False."""


class Normalizer(Protocol):
    """Env units to and from the policy's normalised space."""

    @property
    def state_dim(self) -> int:
        """Dimensions of an env state."""
        ...

    @property
    def action_dim(self) -> int:
        """Dimensions of an env action."""
        ...

    def normalize_state(self, state: jax.Array) -> jax.Array:
        """float32 [..., S], env units -> normalised."""
        ...

    def normalize_actions(self, actions: jax.Array) -> jax.Array:
        """float32 [..., A], env units -> normalised."""
        ...

    def unnormalize_actions(self, actions: jax.Array) -> jax.Array:
        """float32 [..., A], normalised -> env units."""
        ...


class Policy(Protocol):
    """Pure functions of `params`, safe under jit, grad and sharding.

    Rows are independent: row b of a result depends on row b of the inputs and on keys[b]
    only, so results do not depend on how requests were batched or padded.
    """

    @property
    def log_prob_tolerance(self) -> float:
        """Greatest difference, in nats, that rounding may make between the log-prob of a sample
        and its evaluation at the same weights."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters from a typed key of shape []."""
        ...

    def observation_spec(self, batch: int) -> Observation:
        """Shapes and dtypes (jax.ShapeDtypeStruct) of a batch, to compile against."""
        ...

    def act(
        self, params: Params, observation: Observation, keys: jax.Array, explore: bool
    ) -> PolicySample:
        """Samples one action chunk per row.

        Args:
          params: parameters.
          observation: leading axis B.
          keys: typed keys [B].
          explore: static; False gives the deterministic policy (given the keys' initial
            noise), whose `log_prob` is 0 and whose trace must not be scored.
        """
        ...

    @property
    def encoder(self) -> str:
        """Regular expression over parameter paths: `encode` reads the leaves that match."""
        ...

    def encode(self, params: Params, observation: Observation) -> Any:
        """What `evaluate` needs of the observations: a pytree of arrays [B, ...]."""
        ...

    def evaluate(
        self, params: Params, encoding: Any, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log_prob, entropy and value, each float32 [B], of explored samples.

        At the weights that made the trace, log_prob equals the sampled one to rounding.

        Args:
          params: parameters.
          encoding: of the observations, from `encode` at the same weights of the encoder.
          trace: of the samples.
        """
        ...

    def values(self, params: Params, observation: Observation) -> jax.Array:
        """Critic alone, float32 [B], without sampling an action."""
        ...

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Terms of the supervised loss by name, each float32 [B] and weighted: the loss is
        their sum. "actions" imitates `batch.actions`, "grounding" finds `batch.target_mask`;
        a term whose label is None, or that the policy has no head for, is absent.
        """
        ...

    def rules(self) -> Rules:
        """Logical axes of every parameter; each path matches exactly one entry."""
        ...
