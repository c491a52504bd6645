"""Writers of other programs' weight files, from their definitions, and what tests compare."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxvla.layout import parse_layout
from jaxvla.models.openpi_tree import make_target
from jaxvla.models.pi import PiPolicy
from jaxvla.models.pi_network import embed_prefix, run_prefix
from jaxvla.sharding import make_mesh, params_shardings
from jaxvla.types import Params

LAYOUT = "colocated=8:data2,fsdp2,tensor2"


def target_of(policy: PiPolicy, dtype: str = "float32", **options: Any) -> Params:
    """A target over eight devices; initial values come from key 7."""
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    mesh = make_mesh(parse_layout(LAYOUT).roles["learning"])
    shardings = params_shardings(shapes, policy.rules(), mesh, "learning")
    key = jax.random.key(7)
    return make_target(policy.leaves(), shardings, dtype=dtype, key=key, **options)


def velocity(policy: PiPolicy, params: Params, case: Any) -> jax.Array:
    """Velocity at the inputs of a reference case."""
    dtype = jnp.dtype(policy.config.dtype)
    tokens, mask = embed_prefix(params, *case.prefix_inputs(), dtype=dtype)
    prefix = run_prefix(params, tokens, mask)
    return policy.velocity(params, prefix, case["in/state"], case["in/x_t"], case["in/time"])


def write_params(path: pathlib.Path, params: Params, *, suffix: bool) -> None:
    """openpi's `params/`, with the suffix that its training gives to every leaf or without."""
    if suffix:
        params = jax.tree.map(lambda leaf: {"value": leaf}, params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": params})


def torch_tensors(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What openpi's PyTorch port calls the parameters of pi0 and pi0.5.

    Written head by head from y = W x + b: row (head n, dim h) of a query weight is the column
    h of that head's kernel, and column (n, h) of an output weight is row h of its kernel.
    """
    out: dict[str, np.ndarray] = {}

    def linear(name: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> None:
        out[f"{name}.weight"] = kernel.T
        if bias is not None:
            out[f"{name}.bias"] = bias

    for name in ("action_in_proj", "action_out_proj", "state_proj", "time_mlp_in", "time_mlp_out"):
        if f"{name}/kernel" in flat:
            linear(name, flat[f"{name}/kernel"], flat[f"{name}/bias"])
    for name in ("action_time_mlp_in", "action_time_mlp_out"):
        if f"{name}/kernel" in flat:
            linear(name, flat[f"{name}/kernel"], flat[f"{name}/bias"])
    model = "paligemma_with_expert.paligemma.model"
    _add_vision(out, linear, flat, model)
    out[f"{model}.language_model.embed_tokens.weight"] = flat[
        "PaliGemma/llm/embedder/input_embedding"
    ]
    _add_expert(out, linear, flat, (f"{model}.language_model", ""))
    _add_expert(out, linear, flat, ("paligemma_with_expert.gemma_expert.model", "_1"))
    return out


def _add_vision(out: dict, linear: Any, flat: dict[str, np.ndarray], model: str) -> None:
    tower, img = f"{model}.vision_tower.vision_model", "PaliGemma/img"
    kernel = flat[f"{img}/embedding/kernel"]  # rows, columns, colours, width
    patches = [kernel[:, :, colour, :].transpose(2, 0, 1) for colour in range(3)]
    out[f"{tower}.embeddings.patch_embedding.weight"] = np.stack(patches, axis=1)
    out[f"{tower}.embeddings.patch_embedding.bias"] = flat[f"{img}/embedding/bias"]
    out[f"{tower}.embeddings.position_embedding.weight"] = flat[f"{img}/pos_embedding"][0]
    projector = f"{model}.multi_modal_projector.linear"
    linear(projector, flat[f"{img}/head/kernel"], flat[f"{img}/head/bias"])
    norm = f"{img}/Transformer/encoder_norm"
    out[f"{tower}.post_layernorm.weight"] = flat[f"{norm}/scale"]
    out[f"{tower}.post_layernorm.bias"] = flat[f"{norm}/bias"]
    block = f"{img}/Transformer/encoderblock"
    for i in range(len(flat[f"{block}/LayerNorm_0/scale"])):
        layer = f"{tower}.encoder.layers.{i}"
        for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
            out[f"{layer}.{theirs}.weight"] = flat[f"{block}/{ours}/scale"][i]
            out[f"{layer}.{theirs}.bias"] = flat[f"{block}/{ours}/bias"][i]
        for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            kernel = flat[f"{block}/MlpBlock_0/{ours}/kernel"][i]
            linear(f"{layer}.mlp.{theirs}", kernel, flat[f"{block}/MlpBlock_0/{ours}/bias"][i])
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel = flat[f"{attention}/{ours}/kernel"][i]  # width, heads, head_dim
            heads = range(kernel.shape[1])
            name, bias = f"{layer}.self_attn.{theirs}", flat[f"{attention}/{ours}/bias"][i]
            out[f"{name}.weight"] = np.concatenate([kernel[:, n].T for n in heads])
            out[f"{name}.bias"] = np.concatenate([bias[n] for n in heads])
        kernel = flat[f"{attention}/out/kernel"][i]  # heads, head_dim, width
        name = f"{layer}.self_attn.out_proj"
        out[f"{name}.weight"] = np.concatenate([head.T for head in kernel], axis=1)
        out[f"{name}.bias"] = flat[f"{attention}/out/bias"][i]


def _add_expert(
    out: dict, linear: Any, flat: dict[str, np.ndarray], expert: tuple[str, str]
) -> None:
    (model, end), llm = expert, "PaliGemma/llm"

    def norm(name: str, path: str, layer: int | None) -> None:
        def at(leaf: str) -> np.ndarray:
            array = flat[f"{llm}/{path}{end}/{leaf}"]
            return array if layer is None else array[layer]

        if f"{llm}/{path}{end}/scale" in flat:
            out[f"{name}.weight"] = at("scale")
        else:
            linear(f"{name}.dense", at("Dense_0/kernel"), at("Dense_0/bias"))

    norm(f"{model}.norm", "final_norm", None)
    for i in range(len(flat[f"{llm}/layers/mlp{end}/linear"])):
        layer = f"{model}.layers.{i}"
        norm(f"{layer}.input_layernorm", "layers/pre_attention_norm", i)
        norm(f"{layer}.post_attention_layernorm", "layers/pre_ffw_norm", i)
        attention = f"{llm}/layers/attn"
        query = flat[f"{attention}/q_einsum{end}/w"][i]  # heads, width, head_dim
        key, value = flat[f"{attention}/kv_einsum{end}/w"][i]  # kv heads, width, head_dim
        for name, kernel in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
            out[f"{layer}.self_attn.{name}.weight"] = np.concatenate([head.T for head in kernel])
        heads = flat[f"{attention}/attn_vec_einsum{end}/w"][i]  # heads, head_dim, width
        out[f"{layer}.self_attn.o_proj.weight"] = np.concatenate([w.T for w in heads], axis=1)
        gate, up = flat[f"{llm}/layers/mlp{end}/gating_einsum"][i]
        linear(f"{layer}.mlp.gate_proj", gate)
        linear(f"{layer}.mlp.up_proj", up)
        linear(f"{layer}.mlp.down_proj", flat[f"{llm}/layers/mlp{end}/linear"][i])
