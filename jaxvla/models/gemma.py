"""Gemma transformer with two experts: the language model, and the action expert beside it.

Both experts have the same depth and attention heads and may differ in width. Prefix
tokens (language model) never look at suffix tokens (action expert), so the joint
attention of pi0 (arXiv:2410.24164) splits into two passes without any
difference in the result: the prefix alone, which leaves its keys and values, then the
suffix on top of them. One code path therefore serves training and sampling.

Parameter names and layouts are those of openpi's `PaliGemma/llm` tree, layers stacked on
axis 0, the action expert's names ending in `_1`. Sizes are read off the parameters.

Low-rank adapters (LoRA, arXiv:2106.09685: y = x W + s x A B) are leaves beside the weights. As in
openpi, s scales those of attention only, and the output projection sums the heads in both
factors: its change is (sum over heads of x A) (sum over heads of B).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.models.layers import (
    DEFAULT_LOOP,
    LayerLoop,
    Leaf,
    adaptive_rms_norm,
    attention,
    fan_in,
    matmul,
    rms_norm,
    rotary,
    run_layers,
)
from jaxvla.types import Params

LANGUAGE = ""
"""Name suffix of the language model's parameters."""
ACTION = "_1"
"""Name suffix of the action expert's parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSize:
    """Sizes of one expert."""

    width: int
    depth: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    """Divides `num_heads`."""
    head_dim: int
    """Even."""
    lora_rank: int = 0
    """Rank of the adapters of all weights; 0: there are none."""


def leaves(size: ExpertSize, expert: str, *, adaptive: bool) -> dict[str, Leaf]:
    """Parameters of one expert, paths relative to `PaliGemma/llm`.

    Init: normal with fan-in scaling, branch outputs scaled by 1/sqrt(2 depth), RMS offsets
    zero (the identity).

    Args:
      size: sizes of the expert.
      expert: LANGUAGE or ACTION.
      adaptive: norms are conditioned (adaRMS) and have no scale of their own.
    """
    norm = _norm_leaves(size.width, adaptive=adaptive)
    block = _block_leaves(size, expert)
    if size.lora_rank:
        block |= _adapter_leaves(block, size.lora_rank)
    for place in ("pre_attention_norm", "pre_ffw_norm"):
        block |= {f"{place}{expert}/{name}": leaf for name, leaf in norm.items()}
    table = {f"layers/{path}": leaf.stacked(size.depth) for path, leaf in block.items()}
    return table | {f"final_norm{expert}/{name}": leaf for name, leaf in norm.items()}


def embedder_leaf(vocab_size: int, width: int) -> Leaf:
    """The token table `embedder/input_embedding`.

    Lookups are multiplied by sqrt(width), so a standard deviation of 1/sqrt(width) gives
    token vectors of unit scale, like the image tokens beside them.
    """
    return Leaf(shape=(vocab_size, width), axes=("vocab", "embed"), std=fan_in(width))


def _block_leaves(size: ExpertSize, expert: str) -> dict[str, Leaf]:
    """Attention and MLP of one layer; q and kv are fused if each query head has a kv head."""
    width, mlp, heads, head_dim = size.width, size.mlp_width, size.num_heads, size.head_dim
    gain, std = 1.0 / math.sqrt(2 * size.depth), fan_in(size.width)
    table = {
        f"attn/attn_vec_einsum{expert}/w": Leaf(
            shape=(heads, head_dim, width),
            axes=("heads", "head_dim", "embed"),
            std=fan_in(heads * head_dim, gain),
        ),
        f"mlp{expert}/gating_einsum": Leaf(
            shape=(2, width, mlp), axes=(None, "embed", "mlp"), std=std
        ),
        f"mlp{expert}/linear": Leaf(
            shape=(mlp, width), axes=("mlp", "embed"), std=fan_in(mlp, gain)
        ),
    }
    axes = ("embed", "head_dim")
    if size.num_kv_heads == heads:
        shape = (3, heads, width, head_dim)
        table[f"attn/qkv_einsum{expert}/w"] = Leaf(
            shape=shape, axes=(None, "heads", *axes), std=std
        )
        return table
    table[f"attn/q_einsum{expert}/w"] = Leaf(
        shape=(heads, width, head_dim), axes=("heads", *axes), std=std
    )
    table[f"attn/kv_einsum{expert}/w"] = Leaf(
        shape=(2, size.num_kv_heads, width, head_dim), axes=(None, "kv", *axes), std=std
    )
    return table


def _adapter_leaves(weights: dict[str, Leaf], rank: int) -> dict[str, Leaf]:
    """A and B for every weight; B starts at zero, and with it the change."""
    table = {}
    for path, leaf in weights.items():
        stem = path.removesuffix("w") if path.endswith("/w") else f"{path}_"
        *stack, size_in, size_out = leaf.shape
        *stack_axes, axis_in, axis_out = leaf.axes
        table[f"{stem}lora_a"] = Leaf(
            shape=(*stack, size_in, rank), axes=(*stack_axes, axis_in, None), std=fan_in(size_in)
        )
        table[f"{stem}lora_b"] = Leaf(
            shape=(*stack, rank, size_out), axes=(*stack_axes, None, axis_out)
        )
    return table


def _norm_leaves(width: int, *, adaptive: bool) -> dict[str, Leaf]:
    """One norm. An adaptive one starts near a plain norm with an open gate.

    openpi starts every adaRMS layer at zero: gates are 0, so each block of the expert is the
    identity, which leaves pretrained neighbours undisturbed. From scratch that wastes the
    first updates, because the weights inside a block get no gradient until its gate has
    opened. Here the gate's bias is 1, and small kernels let the time reach every block.
    """
    if not adaptive:
        return {"scale": Leaf(shape=(width,), axes=(None,))}
    open_gate = np.repeat([0.0, 0.0, 1.0], width)  # scale, shift, gate
    return {
        "Dense_0/kernel": Leaf(
            shape=(width, 3 * width), axes=("embed", None), std=fan_in(width, 0.1)
        ),
        "Dense_0/bias": Leaf(shape=(3 * width,), axes=(None,), mean=open_gate),
    }


def embed_tokens(params: Params, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Token vectors times sqrt(width): int32 [B, N] -> [B, N, width] in `dtype`."""
    table = params["embedder"]["input_embedding"]
    return (table[tokens] * math.sqrt(table.shape[-1])).astype(dtype)


def forward(
    params: Params,
    expert: str,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    cache: tuple[jax.Array, jax.Array] | None = None,
    condition: jax.Array | None = None,
    lora_scale: float = 1.0,
    loop: LayerLoop = DEFAULT_LOOP,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Runs one expert over its tokens, with a cache on top of the other expert's.

    Args:
      params: the `PaliGemma/llm` tree.
      expert: LANGUAGE or ACTION.
      x: [B, T, D] token vectors; their dtype is the compute dtype.
      positions: int32 [B, T].
      mask: bool [B, T, S + T], S cached keys (0 without a cache), then the T own keys.
      cache: keys after rotation and values, each [L, B, S, K, head_dim].
      condition: [B, D_c] for adaptive norms; None for plain ones.
      lora_scale: s, alpha / rank, see the module; without adapters it has no effect.
      loop: how the layers are run.

    Returns:
      Output after the final norm [B, T, D], and without a cache the keys and values
      [L, B, T, K, head_dim] of these tokens (None when a cache was given).
    """
    block = functools.partial(
        _block, positions=positions, mask=mask, condition=condition, lora_scale=lora_scale
    )
    layers = _layers_of(params, expert)
    x, new_cache = run_layers(block, x, (layers, cache), loop)
    out, _ = _norm(params[f"final_norm{expert}"], x, condition)
    return out, new_cache


def _layers_of(params: Params, expert: str) -> Params:
    """One expert's stacked leaves under names without the suffix."""
    layers = params["layers"]
    projections = {
        name: layers["attn"][f"{name}{expert}"]
        for name in ("q_einsum", "kv_einsum", "qkv_einsum", "attn_vec_einsum")
        if f"{name}{expert}" in layers["attn"]
    }
    norms = ("pre_attention_norm", "pre_ffw_norm")
    return projections | {name: layers[f"{name}{expert}"] for name in (*norms, "mlp")}


def _block(
    x: jax.Array,
    per_layer: tuple[Params, tuple[jax.Array, jax.Array] | None],
    *,
    positions: jax.Array,
    mask: jax.Array,
    condition: jax.Array | None,
    lora_scale: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """One layer: attention branch, then GeGLU branch."""
    layer, cached = per_layer
    y, gate = _norm(layer["pre_attention_norm"], x, condition)
    q, k, v = _project(layer, y, lora_scale)
    q, k = rotary(q, positions) * (q.shape[-1] ** -0.5), rotary(k, positions)
    own = (k, v)
    if cached is not None:
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cached, own, strict=True))
    attended = attention(q, k, v, mask)
    out = _join_heads(layer["attn_vec_einsum"], attended, lora_scale)
    x = _add(x, out, gate)
    y, gate = _norm(layer["pre_ffw_norm"], x, condition)
    x = _add(x, _geglu(layer["mlp"], y), gate)
    return x, own if cached is None else None


def _norm(
    params: Params, x: jax.Array, condition: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Plain or adaptive RMSNorm; the gate is None for the plain one."""
    if condition is None:
        return rms_norm(params, x), None
    return adaptive_rms_norm(params, x, condition)


def _add(x: jax.Array, branch: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Residual sum, gated where the norm was adaptive."""
    return x + branch if gate is None else x + gate * branch


def _project(
    layer: Params, x: jax.Array, lora_scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, heads, head_dim], keys and values [B, T, K, head_dim], before rotation."""

    def heads(name: str, *index: int) -> jax.Array:
        return _split_heads({key: leaf[index] for key, leaf in layer[name].items()}, x, lora_scale)

    if "qkv_einsum" in layer:
        return heads("qkv_einsum", 0), heads("qkv_einsum", 1), heads("qkv_einsum", 2)
    return heads("q_einsum"), heads("kv_einsum", 0), heads("kv_einsum", 1)


def _split_heads(params: Params, x: jax.Array, lora_scale: float) -> jax.Array:
    """x [B, T, D] through weight [N, D, h]: [B, T, N, h]."""
    y = _per_head(params["w"], x)
    if "lora_a" not in params:
        return y
    low = _per_head(params["lora_a"], x)
    return y + lora_scale * jnp.einsum("btnr,nrh->btnh", low, params["lora_b"].astype(x.dtype))


def _per_head(weight: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, D] through weight [N, D, h]: [B, T, N, h]."""
    heads, width, head_dim = weight.shape
    y = matmul(x, weight.transpose(1, 0, 2).reshape(width, heads * head_dim))
    return y.reshape(*x.shape[:-1], heads, head_dim)


def _join_heads(params: Params, x: jax.Array, lora_scale: float) -> jax.Array:
    """x [B, T, N, h] through weight [N, h, D]: [B, T, D]."""
    x = x.reshape(*x.shape[:2], -1)
    y = matmul(x, params["w"].reshape(-1, params["w"].shape[-1]))
    if "lora_a" not in params:
        return y
    low = matmul(x, params["lora_a"].reshape(-1, params["lora_a"].shape[-1]))
    return y + lora_scale * matmul(low, params["lora_b"].sum(axis=0))


def _geglu(params: Params, x: jax.Array) -> jax.Array:
    """GeGLU (arXiv:2002.05202, eq. 6) with the tanh approximation of gelu."""
    gate = jax.nn.gelu(_adapted(params, "gating_einsum", x, 0), approximate=True)
    return _adapted(params, "linear", gate * _adapted(params, "gating_einsum", x, 1))


def _adapted(params: Params, name: str, x: jax.Array, *index: int) -> jax.Array:
    """x through a weight of the MLP and its adapter, if it has one; never scaled, as in openpi."""
    y = matmul(x, params[name][index])
    if f"{name}_lora_a" not in params:
        return y
    low = matmul(x, params[f"{name}_lora_a"][index])
    return y + matmul(low, params[f"{name}_lora_b"][index])
