"""The pi model as a network: tokens of the prefix and the suffix, and the experts over them.

Parameters are openpi's tree; see `jaxvla.models.pi` for what a policy makes of it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.models import gemma, siglip
from jaxvla.models.base import Prefix
from jaxvla.models.layers import (
    DEFAULT_LOOP,
    LayerLoop,
    Leaf,
    attention_mask,
    dense,
    dense_leaves,
    positions_of,
    time_embedding,
)
from jaxvla.models.pi_config import PiConfig
from jaxvla.types import Params


def embed_prefix(
    params: Params,
    images: jax.Array,
    image_mask: jax.Array,
    tokens: jax.Array,
    token_mask: jax.Array,
    *,
    dtype: jnp.dtype,
    loop: LayerLoop = DEFAULT_LOOP,
) -> tuple[jax.Array, jax.Array]:
    """Token vectors of all cameras in order, then of the prompt.

    Args:
      params: the whole tree.
      images: float32 [B, C, h, w, 3] in [-1, 1].
      image_mask: bool [B, C].
      tokens: int32 [B, N].
      token_mask: bool [B, N].
      dtype: compute dtype.
      loop: how the encoder's blocks are run.

    Returns:
      [B, S, D] in `dtype` and validity bool [B, S], S = C patches + N.
    """
    batch, cameras = images.shape[:2]
    flat = images.reshape(batch * cameras, *images.shape[2:])
    encoded = siglip.encode_images(params["PaliGemma"]["img"], flat, dtype=dtype, loop=loop)
    num_patches, width = encoded.shape[1:]
    encoded = encoded.reshape(batch, cameras * num_patches, width)
    text = gemma.embed_tokens(params["PaliGemma"]["llm"], tokens, dtype)
    mask = jnp.concatenate([jnp.repeat(image_mask, num_patches, axis=1), token_mask], axis=1)
    return jnp.concatenate([encoded, text], axis=1), mask


def run_prefix(
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    lora_scale: float = 1.0,
    loop: LayerLoop = DEFAULT_LOOP,
) -> Prefix:
    """Language model over prefix tokens [B, S, D]; all valid ones see each other."""
    block = jnp.zeros(mask.shape[1], jnp.int32)
    features, cache = gemma.forward(
        params["PaliGemma"]["llm"],
        gemma.LANGUAGE,
        tokens,
        positions_of(mask),
        attention_mask(mask, block, mask, block),
        lora_scale=lora_scale,
        loop=loop,
    )
    assert cache is not None  # forward returns one whenever none was given
    return Prefix(keys=cache[0], values=cache[1], mask=mask, features=features)


@flax.struct.dataclass(kw_only=True)
class Suffix:
    """Input of the action expert."""

    tokens: jax.Array
    """[B, T, D] in the compute dtype: the state token if there is one, then H action tokens."""
    block: jax.Array
    """int32 [T], attention block of each token; the prefix is block 0."""
    condition: jax.Array | None
    """float32 [B, D], condition of adaptive norms; None for plain ones."""


def embed_suffix(
    params: Params, config: PiConfig, state: jax.Array, x_t: jax.Array, time: jax.Array
) -> Suffix:
    """Embeds state, noisy actions and flow time.

    Args:
      params: the whole tree.
      config: time_conditioning, state_input and dtype are read.
      state: float32 [B, S], normalised.
      x_t: float32 [B, H, A].
      time: float32 [B].
    """
    tokens, condition = dense(params["action_in_proj"], x_t), None
    embedded = time_embedding(time, tokens.shape[-1])
    if config.time_conditioning == "adarms":
        hidden = jax.nn.silu(dense(params["time_mlp_in"], embedded))
        condition = jax.nn.silu(dense(params["time_mlp_out"], hidden))
    else:
        repeated = jnp.broadcast_to(embedded[:, None, :], tokens.shape)
        hidden = dense(params["action_time_mlp_in"], jnp.concatenate([tokens, repeated], axis=-1))
        tokens = dense(params["action_time_mlp_out"], jax.nn.silu(hidden))
    block = jnp.ones(x_t.shape[1], jnp.int32)
    if config.state_input == "token":  # the state sees no action, every action sees the state
        state_token = dense(params["state_proj"], state)[:, None, :]
        tokens = jnp.concatenate([state_token, tokens], axis=1)
        block = jnp.concatenate([jnp.ones(1, jnp.int32), block + 1])
    return Suffix(tokens=tokens.astype(config.dtype), block=block, condition=condition)


def run_suffix(
    params: Params,
    prefix: Prefix,
    suffix: Suffix,
    *,
    lora_scale: float = 1.0,
    loop: LayerLoop = DEFAULT_LOOP,
) -> jax.Array:
    """Action expert on top of the prefix cache: features [B, T, D] in the compute dtype."""
    batch, num_tokens = suffix.tokens.shape[:2]
    valid = jnp.ones((batch, num_tokens), bool)
    positions = jnp.sum(prefix.mask, axis=1, keepdims=True) + jnp.arange(num_tokens)[None]
    key_block = jnp.concatenate([jnp.zeros(prefix.mask.shape[1], jnp.int32), suffix.block])
    key_mask = jnp.concatenate([prefix.mask, valid], axis=1)
    features, _ = gemma.forward(
        params["PaliGemma"]["llm"],
        gemma.ACTION,
        suffix.tokens,
        positions,
        attention_mask(valid, suffix.block, key_mask, key_block),
        cache=(prefix.keys, prefix.values),
        condition=suffix.condition,
        lora_scale=lora_scale,
        loop=loop,
    )
    return features


def projection_leaves(config: PiConfig) -> dict[str, Leaf]:
    """Dense layers between env dimensions, flow time and the action expert.

    The output layer starts small, so that the initial policy is close to its noise and the
    first updates need not undo a large random velocity.
    """
    width = config.expert_width
    table = dense_leaves("action_in_proj", config.action_dim, width)
    table |= dense_leaves("action_out_proj", width, config.action_dim, gain=0.1)
    if config.state_input == "token":
        table |= dense_leaves("state_proj", config.state_dim, width)
    if config.time_conditioning == "adarms":
        names, size_in = ("time_mlp_in", "time_mlp_out"), width
    else:
        names, size_in = ("action_time_mlp_in", "action_time_mlp_out"), 2 * width
    table |= dense_leaves(names[0], size_in, width)
    return table | dense_leaves(names[1], width, width)
