"""What is checked once before training: a sample's log-prob does not depend on who computes it."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxvla import rng, sharding
from jaxvla.runtime.build import Parts
from jaxvla.serving.sampling import row_keys
from jaxvla.types import Observation, Params


class PolicyMismatchError(RuntimeError):
    """Sampled and evaluated log-probs differ: every importance ratio would be wrong."""


class LogProbCheck:
    """Samples on the serving mesh, evaluates the samples on the learning mesh, compares."""

    def __init__(self, parts: Parts, *, role: str = "learning"):
        """Args:
        parts: with compiled samplers.
        role: on whose mesh samples are evaluated. That of learning, unless some of its devices
          are another process's.
        """
        self._parts = parts
        self._is_apart = role != "serving"
        policy = parts.blueprint.policy

        def log_prob(params: Params, observation: Observation, trace: Any) -> jax.Array:
            return policy.evaluate(params, policy.encode(params, observation), trace)[0]

        self._log_prob = jax.jit(log_prob)
        self._num_rows = parts.sampler.buckets[0]
        self._rows = sharding.fitting_sharding(parts.meshes[role], self._num_rows)

    @functools.cached_property
    def _observation(self) -> Observation:
        """Noise for images and states, the first instruction for all."""
        random = np.random.default_rng(0)
        blueprint = self._parts.blueprint
        struct = blueprint.observation_struct(self._num_rows)
        tokens, mask = blueprint.table.tokens[0], blueprint.table.mask[0]
        return dataclasses.replace(
            struct,
            images=random.integers(0, 256, struct.images.shape, np.uint8),
            image_mask=np.ones(struct.image_mask.shape, bool),
            state=random.uniform(-1.0, 1.0, struct.state.shape).astype(np.float32),
            tokens=np.broadcast_to(tokens, struct.tokens.shape),
            token_mask=np.broadcast_to(mask, struct.token_mask.shape),
        )

    def run(self, params: Params) -> float:
        """The greatest difference, nats.

        Args:
          params: on the learning mesh; or anywhere, when it is the serving mesh that evaluates.

        Raises:
          PolicyMismatchError: it is above the policy's `log_prob_tolerance`.
        """
        sampler = self._parts.sampler
        serving = jax.device_put(params, sampler.params_shardings)
        keys = row_keys(rng.stream(self._parts.root, "self_check"), self._num_rows)
        sample, _ = sampler.run("explore", serving, [self._observation], keys)
        inputs: Any = jax.device_put((self._observation, sample.trace), self._rows)
        own = params if self._is_apart else serving
        evaluated = np.asarray(self._log_prob(own, *inputs))
        difference = float(np.abs(evaluated - sample.log_prob).max())
        allowed = self._parts.blueprint.policy.log_prob_tolerance
        if not difference <= allowed:
            raise PolicyMismatchError(
                f"sampled and evaluated log-probs of the same weights differ by {difference:.3g}, "
                f"allowed {allowed:g}"
            )
        return difference
