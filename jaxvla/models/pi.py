"""The pi model family: pi0 (arXiv:2410.24164), pi0.5 (arXiv:2504.16054), and tiny relatives.

A SigLIP encoder and a Gemma language model read images and instruction (the prefix); an
action expert predicts the flow-matching velocity of an action chunk (the suffix). One
implementation serves all sizes. Parameters are a nested dict of arrays shaped and named
like openpi's; what openpi has not (`value_head`, `noise_head`, `grounding_head`) lies beside it.

dtype policy: parameters, patch embedding, action/time/state projections, flow state, value
head, log-probs and losses are float32; the transformers run in `PiConfig.dtype`.
"""

import dataclasses
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.models import flow, gemma, grounding, heads, siglip
from jaxvla.models.base import Normalizer, Prefix, Rules
from jaxvla.models.layers import (
    Leaf,
    dense,
    init_leaves,
)
from jaxvla.models.pi_config import PiConfig, require
from jaxvla.models.pi_network import (
    embed_prefix,
    embed_suffix,
    projection_leaves,
    run_prefix,
    run_suffix,
)
from jaxvla.types import Observation, Params, PolicySample, SupervisedBatch

__all__ = ["PiConfig", "PiPolicy"]


@flax.struct.dataclass(kw_only=True)
class Encoding:
    """What the action expert and the critic read of an observation; leading axis B."""

    prefix: Prefix
    """With keys and values as [B, L, S, K, head_dim]."""
    state: jax.Array
    """float32 [B, state_dim], normalised."""


class PiPolicy:
    """A pi model with its normalisation. Methods are pure functions of `params`.

    `act`, `evaluate`, `values` and `supervised_loss` speak the env's units; the methods
    below them (`prefix`, `sample`, `log_prob`, `value`, `velocity`) speak normalised ones.
    """

    def __init__(self, config: PiConfig, normalizer: Normalizer):
        """Binds a resolved config and the env's statistics.

        Raises:
          ConfigError: the config is not resolved, or does not fit the statistics.
        """
        config.validate_resolved()
        for name, size, fits in (
            ("state_dim", normalizer.state_dim, config.state_dim >= normalizer.state_dim),
            ("action_dim", normalizer.action_dim, config.action_dim >= normalizer.action_dim),
            ("log_prob_dims", normalizer.action_dim, config.log_prob_dims <= normalizer.action_dim),
        ):
            require(config, name, fits, f"the statistics have {size}", "resolve it from the env")
        self.config = config
        self._normalizer = normalizer
        self._exploration = config.make_exploration()

    @property
    def log_prob_tolerance(self) -> float:
        """See `Policy.log_prob_tolerance`. A chunk's log-prob is a sum over tens of squares in
        units of the exploration noise, which amplifies the rounding of the velocity."""
        of_transition = 1e-3 if self.config.dtype == "float32" else 0.5
        return of_transition * self._exploration.error_scale

    def leaves(self) -> dict[str, Leaf]:
        """Declaration of every parameter by '/'-joined path."""
        config = self.config
        adaptive = config.time_conditioning == "adarms"
        llm = {"embedder/input_embedding": gemma.embedder_leaf(config.vocab_size, config.vlm_width)}
        llm |= gemma.leaves(config.expert(gemma.LANGUAGE), gemma.LANGUAGE, adaptive=False)
        llm |= gemma.leaves(config.expert(gemma.ACTION), gemma.ACTION, adaptive=adaptive)
        table = {
            f"PaliGemma/img/{path}": leaf for path, leaf in siglip.leaves(config.vision).items()
        }
        table |= {f"PaliGemma/llm/{path}": leaf for path, leaf in llm.items()}
        table |= projection_leaves(config)
        table |= heads.value_leaves(config.value_input_width, config.value_widths)
        if config.has_noise_head:
            table |= heads.noise_leaves(config.expert_width, config.action_dim)
        return table | (grounding.leaves(config.vlm_width) if config.grounding_coef else {})

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; see the leaf declarations for the distributions."""
        return init_leaves(key, self.leaves())

    def rules(self) -> Rules:
        """Logical axes by path. Expressions match the whole path or its end after a '/'."""
        return tuple(
            (rf"(^|/){re.escape(path)}$", leaf.axes) for path, leaf in self.leaves().items()
        )

    def observation_spec(self, batch: int) -> Observation:
        """Shapes and dtypes of a batch of observations, for ahead-of-time compilation."""
        config, size = self.config, self.config.image_size

        def zeros() -> Observation:
            return Observation(
                images=jnp.zeros((batch, config.num_cameras, size, size, 3), jnp.uint8),
                image_mask=jnp.zeros((batch, config.num_cameras), bool),
                state=jnp.zeros((batch, self._normalizer.state_dim)),
                tokens=jnp.zeros((batch, config.max_tokens), jnp.int32),
                token_mask=jnp.zeros((batch, config.max_tokens), bool),
            )

        return jax.eval_shape(zeros)

    def act(
        self, params: Params, observation: Observation, keys: jax.Array, explore: bool
    ) -> PolicySample:
        """Samples one action chunk per row, see `Policy.act`."""
        prefix = self.prefix(params, observation)
        state = self._model_state(observation)
        actions, trace, log_prob = self.sample(params, prefix, state, keys, explore)
        return PolicySample(
            actions=self._env_actions(actions, observation),
            trace=trace,
            log_prob=log_prob,
            value=self.value(params, prefix, state),
        )

    @property
    def encoder(self) -> str:
        """See `Policy.encoder`: vision, and the language model without the action expert."""
        return r"^PaliGemma/(?!llm/.*_1/)"

    def encode(self, params: Params, observation: Observation) -> "Encoding":
        """See `Policy.encode`."""
        prefix = self.prefix(params, observation)
        return Encoding(prefix=_swap_axes(prefix), state=self._model_state(observation))

    def evaluate(
        self, params: Params, encoding: "Encoding", trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log_prob, entropy and value, each float32 [B], see `Policy.evaluate`."""
        prefix = _swap_axes(encoding.prefix)
        log_prob, entropy = self.log_prob(params, prefix, encoding.state, trace)
        return log_prob, entropy, self.value(params, prefix, encoding.state)

    def values(self, params: Params, observation: Observation) -> jax.Array:
        """Critic alone, float32 [B]."""
        prefix = self.prefix(params, observation)
        return self.value(params, prefix, self._model_state(observation))

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Terms of the supervised loss, each float32 [B], see `Policy.supervised_loss`.

        "actions" is the flow-matching loss, the mean over H, A and `loss_draws` draws of
        (noise, flow time) of (v - (n - a))^2; "grounding" is `grounding.grounding_loss`.
        """
        prefix = self.prefix(params, batch.observation)
        terms = {}
        if batch.actions is not None:
            state = self._model_state(batch.observation)
            relative = batch.actions - self._origin(batch.observation)
            actions = self._normalizer.normalize_actions(relative)
            terms["actions"] = self._imitation_loss(params, prefix, state, actions, key)
        if batch.target_mask is not None and self.config.grounding_coef:
            loss = grounding.grounding_loss(
                params["grounding_head"], prefix.features, batch.target_mask, self.config.patch_size
            )
            terms["grounding"] = self.config.grounding_coef * loss
        return terms

    def _imitation_loss(
        self, params: Params, prefix: Prefix, state: jax.Array, actions: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Flow-matching loss float32 [B] of normalised actions [B, H, A]."""
        draws = self.config.loss_draws

        def repeat(x: jax.Array, axis: int = 0) -> jax.Array:
            return jnp.repeat(x, draws, axis)

        prefix = Prefix(
            keys=repeat(prefix.keys, 1),
            values=repeat(prefix.values, 1),
            mask=repeat(prefix.mask),
            features=repeat(prefix.features),
        )
        noise_key, time_key = jax.random.split(key)
        target = repeat(_pad_last(actions, self.config.action_dim))
        noise = jax.random.normal(noise_key, target.shape)
        time = flow.draw_time(time_key, target.shape[0])
        loss = self.flow_matching_loss(params, prefix, repeat(state), target, noise, time)
        return loss.reshape(-1, draws * loss.shape[1]).mean(axis=1)

    def flow_matching_loss(
        self,
        params: Params,
        prefix: Prefix,
        state: jax.Array,
        actions: jax.Array,
        noise: jax.Array,
        time: jax.Array,
    ) -> jax.Array:
        """Loss float32 [B, H] at given noise [B, H, A] and time [B], normalised units."""
        x_t, target = flow.interpolate(actions, noise, time)
        velocity = self.velocity(params, prefix, state, x_t, time)
        return jnp.mean(jnp.square(velocity - target), axis=-1)

    def prefix(self, params: Params, observation: Observation) -> Prefix:
        """Runs vision and language model over one batch of observations."""
        images = observation.images.astype(jnp.float32) / 255.0 * 2.0 - 1.0
        tokens, mask = embed_prefix(
            params,
            images,
            observation.image_mask,
            observation.tokens,
            observation.token_mask,
            dtype=jnp.dtype(self.config.dtype),
            loop=self.config.loop,
        )
        return run_prefix(
            params, tokens, mask, lora_scale=self.config.lora_scale, loop=self.config.loop
        )

    def sample(
        self,
        params: Params,
        prefix: Prefix,
        state: jax.Array,
        keys: jax.Array,
        explore: bool,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """Denoises one chunk per row.

        With `noise` and without exploration the chunk is a function of the observation and the
        noise alone: a black box for methods that steer a frozen policy by choosing its noise, as
        DSRL does (arXiv:2506.15799).

        Args:
          params: parameters.
          prefix: from the same observations.
          state: float32 [B, state_dim], normalised.
          keys: typed keys [B].
          explore: static; sample by `PiConfig.exploration`, not by the ODE.
          noise: float32 [B, H, A], start of the flow; None: standard normal, from the keys.

        Returns:
          actions float32 [B, H, A] (normalised), trace, and log_prob float32 [B] (0 without
          exploration).
        """
        shape = (self.config.action_horizon, self.config.action_dim)
        predict = self._predict_fn(params, prefix, state)
        return self._exploration.sample(predict, keys, shape, explore=explore, noise=noise)

    def log_prob(
        self, params: Params, prefix: Prefix, state: jax.Array, trace: Any
    ) -> tuple[jax.Array, jax.Array]:
        """log_prob and entropy of explored samples, each float32 [B], see `Exploration`."""
        return self._exploration.evaluate(self._predict_fn(params, prefix, state), trace)

    def value(self, params: Params, prefix: Prefix, state: jax.Array) -> jax.Array:
        """Critic, float32 [B], by `PiConfig.value_input`.

        "prefix": an MLP on the masked mean of the prefix features, and on the normalised state
        [B, state_dim] where the prefix does not hold it. "suffix": an MLP on the mean over the
        scored control steps of the action expert's features at x_t = 0, t = 1, the mean of the
        states that every path begins with. At a state that was drawn, or averaged over the steps
        of a path, rollout and update would see different values of one observation; here the
        value depends on the observation alone, and costs one pass of the expert.
        """
        config = self.config
        if config.value_input == "suffix":
            batch = state.shape[0]
            x_t = jnp.zeros((batch, config.action_horizon, config.action_dim))
            features = self._action_features(params, prefix, state, x_t, jnp.ones(batch))
            hidden = features[:, : config.log_prob_steps].mean(axis=1)
        else:
            hidden = heads.masked_mean(prefix.features, prefix.mask)
        if config.detach_value:
            hidden = jax.lax.stop_gradient(hidden)
        if config.value_input == "prefix" and config.state_input == "token":
            hidden = jnp.concatenate([hidden, state], axis=-1)
        return heads.value(params["value_head"], hidden)

    def velocity(
        self, params: Params, prefix: Prefix, state: jax.Array, x_t: jax.Array, time: jax.Array
    ) -> jax.Array:
        """Velocity float32 [B, H, A] at x_t float32 [B, H, A] and time float32 [B]."""
        features = self._action_features(params, prefix, state, x_t, time)
        return dense(params["action_out_proj"], features)

    def _action_features(
        self, params: Params, prefix: Prefix, state: jax.Array, x_t: jax.Array, time: jax.Array
    ) -> jax.Array:
        """The action expert's output of the action tokens, float32 [B, H, D]."""
        suffix = embed_suffix(params, self.config, state, x_t, time)
        features = run_suffix(
            params, prefix, suffix, lora_scale=self.config.lora_scale, loop=self.config.loop
        )
        return features[:, -x_t.shape[1] :].astype(jnp.float32)

    def _predict_fn(self, params: Params, prefix: Prefix, state: jax.Array) -> flow.PredictFn:
        config = self.config

        def predict(x_t: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            features = self._action_features(params, prefix, state, x_t, time)
            velocity = dense(params["action_out_proj"], features)
            if not config.has_noise_head:
                return velocity, None
            head = params["noise_head"]
            return velocity, heads.noise_std(head, features, config.noise_low, config.noise_high)

        return predict

    def _model_state(self, observation: Observation) -> jax.Array:
        """Normalised state, zero-padded to the model's width."""
        state = self._normalizer.normalize_state(observation.state)
        return _pad_last(state, self.config.state_dim)

    def _env_actions(self, actions: jax.Array, observation: Observation) -> jax.Array:
        """Normalised actions [B, H, action_dim] as the env takes them."""
        known = actions[:, :, : self._normalizer.action_dim]
        return self._normalizer.unnormalize_actions(known) + self._origin(observation)

    def _origin(self, observation: Observation) -> jax.Array:
        """What actions are relative to: float32 [B, 1, A], the state in `delta_dims`, else 0."""
        origin = observation.state[:, : self.config.delta_dims]
        return _pad_last(origin, self._normalizer.action_dim)[:, None, :]


def _swap_axes(prefix: Prefix) -> Prefix:
    """Exchanges the layer and the batch axis of the cache."""
    keys, values = jnp.swapaxes(prefix.keys, 0, 1), jnp.swapaxes(prefix.values, 0, 1)
    return dataclasses.replace(prefix, keys=keys, values=values)


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    """Zero-pads the last axis to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
