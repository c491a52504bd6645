"""Weights of openpi's PyTorch port (`PI0Pytorch`), as published on the Hugging Face hub.

The file `model.safetensors` has one tensor per layer under the names of the libraries that
the port is built on: SigLIP, Gemma and PaliGemma of `transformers`. The names and the
meaning of the axes were read off openpi (src/openpi/models_pytorch/pi0_pytorch.py,
gemma_pytorch.py, examples/convert_jax_model_to_pytorch.py). A `torch.nn.Linear` computes
y = W x + b with W [out, in]; heads are folded into `out` (queries, keys, values) or `in`
(output projections), the head's index being the slower one.

Three facts of published files: the token table is shared with a language head that the
policy never uses, and `safetensors` stores a shared tensor under the first of its names in
alphabetical order, `lm_head.weight`; the action expert has an unused `lm_head.weight` too;
files saved by LeRobot prefix every name with `model.`.
"""

import logging
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxvla.config import UsageError
from jaxvla.models import gemma
from jaxvla.models.layers import nest
from jaxvla.models.openpi_tree import (
    OPTIONAL,
    Shapes,
    flat_target,
    flatten,
    kept,
    place,
    require_match,
)
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)

_BOTH = "paligemma_with_expert."
_PALIGEMMA = f"{_BOTH}paligemma.model."
_VISION = f"{_PALIGEMMA}vision_tower.vision_model."
_EXPERTS = {
    gemma.LANGUAGE: f"{_PALIGEMMA}language_model.",
    gemma.ACTION: f"{_BOTH}gemma_expert.model.",
}
_TOKEN_TABLE = f"{_PALIGEMMA}language_model.embed_tokens.weight"
_SHARED_TABLE = f"{_BOTH}paligemma.lm_head.weight"
_IGNORED = r"(^|\.)lm_head\.weight$|^(value_head|noise_head)\."
"""Names of tensors that the policy does not use: language heads, and critics and noise nets of
other trainers, whose layouts are their own."""

_VECTOR = "d -> d"
_DENSE = "i o -> o i"
_INTO_HEADS = "n d h -> (n h) d"
_OUT_OF_HEADS = "n h d -> d (n h)"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """Where the values of one leaf are."""

    names: tuple[str, ...]
    """Tensors per layer; several are stacked on an axis of their own. "*": the layer."""
    layout: str
    """Axes of the leaf (without layer and stack) -> axes of the tensor; brackets fold."""

    @property
    def is_layered(self) -> bool:
        """The leaf has a layer axis 0."""
        return "*" in self.names[0]

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what one tensor holds of a leaf."""
        return shape[self.is_layered + (len(self.names) > 1) :]

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index into a leaf of this shape, and the name of the tensor that goes there."""
        for layer in range(shape[0]) if self.is_layered else (None,):
            for part, name in enumerate(self.names):
                index = () if layer is None else (layer,)
                index += (part,) if len(self.names) > 1 else ()
                yield index, name.replace("*", str(layer))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensors:
    """An open file under PI0Pytorch's names."""

    source: str
    """For messages."""
    file: Any
    """As `safetensors.safe_open` gives it."""
    names: dict[str, str]
    """PI0Pytorch's name -> name in the file, without tensors that a policy does not use."""

    def shapes(self) -> Shapes:
        """Read off the header."""
        return {
            name: tuple(self.file.get_slice(stored).get_shape())
            for name, stored in self.names.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the file's dtype."""
        return self.file.get_tensor(self.names[name])


def load_safetensors(path: pathlib.Path, target: Params) -> Params:
    """Reads `model.safetensors` of openpi's PyTorch port. One leaf at a time is on the host.

    Args:
      path: the file; tensors float32, float16 or bfloat16, also mixed.
      target: see `openpi_tree`.

    Returns:
      Parameters with the target's shardings and dtypes.

    Raises:
      UsageError: the file is unreadable, does not fit the target, or the package
        `safetensors` is not installed.
    """
    flat, rules = flat_target(target), _rules()
    with _open(path) as file:
        names = _used_names(list(file.keys()))
        tensors = _Tensors(source=str(path), file=file, names=names)
        _require_match(tensors, flat, rules)
        result = {
            own: _read(tensors, rules[own], leaf)
            if own in rules
            else kept(tensors.source, own, leaf)
            for own, leaf in flat.items()
        }
    return nest(result)


def check_safetensors(path: pathlib.Path, shapes: Params) -> None:
    """Compares names and shapes with a model's; reads no tensor.

    Args:
      path: as for `load_safetensors`.
      shapes: a tree of anything that has a shape.

    Raises:
      UsageError: as `load_safetensors`.
    """
    with _open(path) as file:
        names = _used_names(list(file.keys()))
        tensors = _Tensors(source=str(path), file=file, names=names)
        _require_match(tensors, flatten(shapes), _rules())


def _open(path: pathlib.Path) -> Any:
    try:
        import safetensors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{path} needs the package safetensors. Fix: pip install 'jaxvla[openpi]'"
        ) from error
    try:
        # numpy knows bfloat16 by name because JAX has registered it.
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is no readable safetensors file: {error}. Fix: download it again"
        ) from error


def _used_names(stored: list[str]) -> dict[str, str]:
    """See `_Tensors.names`."""
    prefix = "model." if all(name.startswith("model.") for name in stored) else ""
    names = {name.removeprefix(prefix): name for name in stored}
    if _SHARED_TABLE in names:
        names.setdefault(_TOKEN_TABLE, names[_SHARED_TABLE])
    ignored = sorted(name for name in names if re.search(_IGNORED, name))
    if ignored:
        _LOG.info("not read: %s", ", ".join(ignored))
    return {name: file_name for name, file_name in names.items() if name not in ignored}


def _require_match(tensors: _Tensors, flat: dict[str, Any], rules: dict[str, _Rule]) -> None:
    """Compares under the file's names, which its makers know."""
    wanted: dict[str, tuple[int, ...]] = {}
    for own, leaf in flat.items():
        if own in rules:
            shape = _tensor_shape(rules[own].layout, rules[own].part_shape(leaf.shape))
            wanted |= {name: shape for _, name in rules[own].tensors(leaf.shape)}
        elif not re.search(OPTIONAL, own):
            raise UsageError(
                f"{tensors.source} cannot hold {own}, which no pi0 or pi0.5 model has. "
                "Fix: a model of the family pi"
            )
    require_match(tensors.source, tensors.shapes(), wanted)


def _read(tensors: _Tensors, rule: _Rule, leaf: Any) -> jax.Array:
    """Gathers one leaf in the target's dtype."""
    array = np.empty(leaf.shape, leaf.dtype)
    shape = rule.part_shape(leaf.shape)
    for index, name in rule.tensors(leaf.shape):
        array[index] = _from_tensor(tensors.read(name), rule.layout, shape)
    return place(array, leaf)


def _axes(layout: str) -> tuple[list[str], list[list[str]]]:
    """Axes of the leaf, and the groups of them that the tensor's axes are."""
    own, theirs = layout.split(" -> ")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", theirs)
    return own.split(), [(folded or single).split() for folded, single in groups]


def _tensor_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that holds a part of this shape."""
    own, groups = _axes(layout)
    size = dict(zip(own, shape, strict=True))
    return tuple(int(np.prod([size[axis] for axis in group])) for group in groups)


def _from_tensor(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """Unfolds and transposes a tensor into a part of this shape."""
    own, groups = _axes(layout)
    size = dict(zip(own, shape, strict=True))
    theirs = [axis for group in groups for axis in group]
    unfolded = tensor.reshape([size[axis] for axis in theirs])
    return unfolded.transpose([theirs.index(axis) for axis in own])


def _rules() -> dict[str, _Rule]:
    """All leaves that pi0 or pi0.5 may have, by path."""
    table = {
        "PaliGemma/llm/embedder/input_embedding": _Rule(names=(_TOKEN_TABLE,), layout="v d -> v d")
    }
    table |= _dense("PaliGemma/img/head", f"{_PALIGEMMA}multi_modal_projector.linear")
    for name in ("action_in_proj", "action_out_proj", "state_proj"):
        table |= _dense(name, name)
    for name in ("time_mlp_in", "time_mlp_out", "action_time_mlp_in", "action_time_mlp_out"):
        table |= _dense(name, name)
    table |= _vision_rules() | _block_rules()
    for expert, module in _EXPERTS.items():
        table |= _expert_rules(expert, module)
    return table


def _dense(path: str, module: str) -> dict[str, _Rule]:
    return {
        f"{path}/kernel": _Rule(names=(f"{module}.weight",), layout=_DENSE),
        f"{path}/bias": _Rule(names=(f"{module}.bias",), layout=_VECTOR),
    }


def _layer_norm(path: str, module: str) -> dict[str, _Rule]:
    return {
        f"{path}/scale": _Rule(names=(f"{module}.weight",), layout=_VECTOR),
        f"{path}/bias": _Rule(names=(f"{module}.bias",), layout=_VECTOR),
    }


def _vision_rules() -> dict[str, _Rule]:
    patches = f"{_VISION}embeddings.patch_embedding"
    positions = f"{_VISION}embeddings.position_embedding.weight"
    table = {
        "embedding/kernel": _Rule(names=(f"{patches}.weight",), layout="y x c d -> d c y x"),
        "embedding/bias": _Rule(names=(f"{patches}.bias",), layout=_VECTOR),
        "pos_embedding": _Rule(names=(positions,), layout="b p d -> (b p) d"),
    }
    table |= _layer_norm("Transformer/encoder_norm", f"{_VISION}post_layernorm")
    return {f"PaliGemma/img/{path}": rule for path, rule in table.items()}


def _block_rules() -> dict[str, _Rule]:
    """Encoder blocks of SigLIP."""
    layer = f"{_VISION}encoder.layers.*."
    attention, table = "MultiHeadDotProductAttention_0", {}
    for index in (0, 1):
        table |= _layer_norm(f"LayerNorm_{index}", f"{layer}layer_norm{index + 1}")
        table |= _dense(f"MlpBlock_0/Dense_{index}", f"{layer}mlp.fc{index + 1}")
    table |= _dense(f"{attention}/out", f"{layer}self_attn.out_proj")
    table[f"{attention}/out/kernel"] = _Rule(
        names=(f"{layer}self_attn.out_proj.weight",), layout=_OUT_OF_HEADS
    )
    for name in ("query", "key", "value"):
        module = f"{layer}self_attn.{name[0]}_proj"
        table[f"{attention}/{name}/kernel"] = _Rule(
            names=(f"{module}.weight",), layout="d n h -> (n h) d"
        )
        table[f"{attention}/{name}/bias"] = _Rule(names=(f"{module}.bias",), layout="n h -> (n h)")
    return {f"PaliGemma/img/Transformer/encoderblock/{path}": rule for path, rule in table.items()}


def _expert_rules(expert: str, module: str) -> dict[str, _Rule]:
    """One Gemma transformer, whose norms are plain or adaptive."""
    layer = f"{module}layers.*."
    query, key, value, out = (f"{layer}self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    table = {
        f"layers/attn/q_einsum{expert}/w": _Rule(names=(query,), layout=_INTO_HEADS),
        f"layers/attn/kv_einsum{expert}/w": _Rule(names=(key, value), layout=_INTO_HEADS),
        f"layers/attn/qkv_einsum{expert}/w": _Rule(names=(query, key, value), layout=_INTO_HEADS),
        f"layers/attn/attn_vec_einsum{expert}/w": _Rule(names=(out,), layout=_OUT_OF_HEADS),
        f"layers/mlp{expert}/gating_einsum": _Rule(names=(gate, up), layout=_DENSE),
        f"layers/mlp{expert}/linear": _Rule(names=(down,), layout=_DENSE),
    }
    norms = {
        f"layers/pre_attention_norm{expert}": f"{layer}input_layernorm",
        f"layers/pre_ffw_norm{expert}": f"{layer}post_attention_layernorm",
        f"final_norm{expert}": f"{module}norm",
    }
    for path, norm in norms.items():
        table[f"{path}/scale"] = _Rule(names=(f"{norm}.weight",), layout=_VECTOR)
        table |= _dense(f"{path}/Dense_0", f"{norm}.dense")
    return {f"PaliGemma/llm/{path}": rule for path, rule in table.items()}
