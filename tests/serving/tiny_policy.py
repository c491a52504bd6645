"""A policy of two matrices around the real flow: it compiles at once."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxvla.models import flow
from jaxvla.types import EnvSpec, Observation, Params, PolicySample, SupervisedBatch

HORIZON = 2
NUM_DENOISE_STEPS = 3


class TinyPolicy:
    """Implements Policy: velocity = x_t - features @ torso, V = features @ value_head."""

    log_prob_tolerance = 1e-3
    encoder = r"(?!)"  # the features are those of nature: no parameter makes them

    def __init__(
        self, spec: EnvSpec, *, noise_level: float = 0.5, evaluated_noise_level: float | None = None
    ):
        """Scores samples as made with `evaluated_noise_level`, by default the true one."""
        self._num_features = len(spec.cameras) + spec.state_dim + 1
        self._chunk = (HORIZON, spec.action_dim)
        self._ode = flow.ode_transitions(NUM_DENOISE_STEPS)
        self._noisy, self._scored = (
            flow.sde_transitions(NUM_DENOISE_STEPS, level)
            for level in (noise_level, evaluated_noise_level or noise_level)
        )

    def init(self, key: jax.Array) -> Params:
        sizes = {"torso": self._chunk[0] * self._chunk[1], "value_head": 1}
        keys = jax.random.split(key, len(sizes))
        return {
            name: {"kernel": 0.5 * jax.random.normal(k, (self._num_features, size))}
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def act(
        self, params: Params, observation: Observation, keys: jax.Array, explore: bool
    ) -> PolicySample:
        features = features_of(observation)
        chunk, trace, (mean, std) = flow.denoise(
            lambda x_t, time: (self._velocity(params, features, x_t), None),
            flow.draw(keys, self._chunk, NUM_DENOISE_STEPS),
            self._noisy if explore else self._ode,
        )
        return PolicySample(
            actions=chunk,
            trace=trace,
            log_prob=self._score(trace, mean, std),
            value=self.values(params, observation),
        )

    def encode(self, params: Params, observation: Observation) -> jax.Array:
        return features_of(observation)

    def evaluate(
        self, params: Params, encoding: jax.Array, trace: flow.FlowTrace
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, std = flow.transitions_of(
            lambda x_t, time: (self._velocity(params, encoding, x_t), None), trace, self._scored
        )
        log_prob = self._score(trace, mean, std)
        return log_prob, jnp.zeros_like(log_prob), self._value(params, encoding)

    def values(self, params: Params, observation: Observation) -> jax.Array:
        return self._value(params, features_of(observation))

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        assert batch.actions is not None
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch.actions.shape)
        time = flow.draw_time(time_key, len(batch.actions))
        x_t, target = flow.interpolate(batch.actions, noise, time)
        error = self._velocity(params, features_of(batch.observation), x_t) - target
        return {"actions": jnp.square(error).mean((1, 2))}

    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        return (("kernel$", ("embed", "mlp")),)

    def _velocity(self, params: Params, features: jax.Array, x_t: jax.Array) -> jax.Array:
        return x_t - (features @ params["torso"]["kernel"]).reshape(x_t.shape)

    def _value(self, params: Params, features: jax.Array) -> jax.Array:
        return (features @ params["value_head"]["kernel"])[:, 0]

    def _score(self, trace: flow.FlowTrace, mean: Any, std: Any) -> jax.Array:
        steps, dims = self._chunk
        states = trace.states[:, 1:]
        return flow.chunk_log_prob(states, mean, std, num_steps=steps, num_dims=dims)[:, 0]


def features_of(observation: Observation) -> jax.Array:
    """Masked mean brightness of every camera, state, masked mean of the tokens: [B, C + S + 1]."""
    brightness = observation.images.astype(jnp.float32).mean((-3, -2, -1)) / 255.0
    text = (observation.tokens * observation.token_mask).mean(-1, keepdims=True)
    seen = brightness * observation.image_mask
    return jnp.concatenate([seen, observation.state, text], -1)
