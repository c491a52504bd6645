"""SigLIP vision transformer without pooling: an image becomes a row of VLM tokens.

Architecture of SigLIP (arXiv:2303.15343) as used in PaliGemma (arXiv:2407.07726):
patch embedding, learned positions, pre-norm encoder, final norm, one dense head to the
width of the language model. Parameter names and layouts are those of openpi's
`PaliGemma/img` tree, layers stacked on axis 0. Sizes are read off the parameters.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxvla.models.layers import (
    DEFAULT_LOOP,
    LayerLoop,
    Leaf,
    attention,
    dense,
    dense_leaves,
    fan_in,
    layer_norm,
    lead,
    matmul,
    run_layers,
)
from jaxvla.types import Params


@dataclass(frozen=True, kw_only=True, slots=True)
class SiglipSize:
    """Sizes of the encoder."""

    image_size: int
    """Pixels of the square image, a multiple of `patch_size`."""
    patch_size: int
    width: int
    depth: int
    mlp_width: int
    num_heads: int
    """Divides `width`."""
    out_width: int
    """Width of the tokens handed to the language model."""

    @property
    def num_patches(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


def leaves(size: SiglipSize) -> dict[str, Leaf]:
    """Parameters of the encoder, paths relative to `PaliGemma/img`.

    Init: normal with fan-in scaling, branch outputs scaled by 1/sqrt(2 depth) so that the
    residual stream keeps unit scale. The head is not zero (as it is in openpi, which always
    starts from pretrained weights): a zero head gives zero image tokens, whose keys and
    values are zero too, and a policy that sees nothing until the head has grown.
    """
    width, patch = size.width, size.patch_size
    table = {
        "embedding/kernel": Leaf(
            shape=(patch, patch, 3, width),
            axes=(None, None, None, "embed"),
            std=fan_in(patch * patch * 3),
        ),
        "embedding/bias": Leaf(shape=(width,), axes=(None,)),
        "pos_embedding": Leaf(
            shape=(1, size.num_patches, width), axes=(None, "patch", "embed"), std=fan_in(width)
        ),
    }
    table |= dense_leaves("head", width, size.out_width)
    table |= _norm_leaves("Transformer/encoder_norm", width)
    for path, leaf in _block_leaves(size).items():
        table[f"Transformer/encoderblock/{path}"] = leaf.stacked(size.depth)
    return table


def _norm_leaves(path: str, width: int) -> dict[str, Leaf]:
    """LayerNorm: scale one, bias zero."""
    return {
        f"{path}/scale": Leaf(shape=(width,), axes=(None,), mean=1.0),
        f"{path}/bias": Leaf(shape=(width,), axes=(None,)),
    }


def _block_leaves(size: SiglipSize) -> dict[str, Leaf]:
    """One encoder block."""
    width, mlp, heads = size.width, size.mlp_width, size.num_heads
    head_dim, gain = width // heads, 1.0 / math.sqrt(2 * size.depth)
    attn = "MultiHeadDotProductAttention_0"
    first, second = "MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1"
    table = {
        f"{attn}/out/kernel": Leaf(
            shape=(heads, head_dim, width),
            axes=("heads", "head_dim", "embed"),
            std=fan_in(width, gain),
        ),
        f"{attn}/out/bias": Leaf(shape=(width,), axes=(None,)),
        f"{first}/kernel": Leaf(shape=(width, mlp), axes=("embed", "mlp"), std=fan_in(width)),
        f"{first}/bias": Leaf(shape=(mlp,), axes=("mlp",)),
        f"{second}/kernel": Leaf(shape=(mlp, width), axes=("mlp", "embed"), std=fan_in(mlp, gain)),
        f"{second}/bias": Leaf(shape=(width,), axes=(None,)),
    }
    for name in ("query", "key", "value"):
        table[f"{attn}/{name}/kernel"] = Leaf(
            shape=(width, heads, head_dim),
            axes=("embed", "heads", "head_dim"),
            std=fan_in(width),
        )
        table[f"{attn}/{name}/bias"] = Leaf(shape=(heads, head_dim), axes=("heads", "head_dim"))
    return table | _norm_leaves("LayerNorm_0", width) | _norm_leaves("LayerNorm_1", width)


def encode_images(
    params: Params, images: jax.Array, *, dtype: jnp.dtype, loop: LayerLoop = DEFAULT_LOOP
) -> jax.Array:
    """Encodes images.

    Args:
      params: the `PaliGemma/img` tree.
      images: float32 [B, h, w, 3] in [-1, 1].
      dtype: dtype of the encoder's activations.
      loop: how the blocks are run.

    Returns:
      [B, patches, out_width] in `dtype`, patches in row-major order.

    Raises:
      ValueError: the images have not the number of patches the position table was made for.
    """
    x = _embed_patches(params, images.astype(jnp.float32)).astype(dtype)
    blocks = params["Transformer"]["encoderblock"]
    x, _ = run_layers(lambda x, layer: (_block(layer, x), None), x, blocks, loop)
    return dense(params["head"], layer_norm(params["Transformer"]["encoder_norm"], x))


def _embed_patches(params: Params, images: jax.Array) -> jax.Array:
    """Patches times kernel plus positions, [B, patches, width] float32.

    A stride-patch convolution is a matmul over flattened patches, which XLA:CPU runs
    faster than the convolution.
    """
    batch, height, width, _ = images.shape
    kernel = params["embedding"]["kernel"].astype(jnp.float32)
    patch = kernel.shape[0]
    rows, columns = height // patch, width // patch
    table = params["pos_embedding"].astype(jnp.float32)
    if rows * columns != table.shape[1] or height % patch or width % patch:
        raise ValueError(
            f"{height} x {width} px images in {patch} px patches do not give the "
            f"{table.shape[1]} patches of the position table"
        )
    patches = images.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, rows * columns, -1)
    x = matmul(patches, kernel.reshape(-1, kernel.shape[-1]))
    return x + lead(params["embedding"]["bias"].astype(jnp.float32), 3) + table


def _block(layer: Params, x: jax.Array) -> jax.Array:
    """One pre-norm encoder block, x [B, N, D]."""
    x = x + _self_attention(
        layer["MultiHeadDotProductAttention_0"], layer_norm(layer["LayerNorm_0"], x)
    )
    hidden = dense(layer["MlpBlock_0"]["Dense_0"], layer_norm(layer["LayerNorm_1"], x))
    return x + dense(layer["MlpBlock_0"]["Dense_1"], jax.nn.gelu(hidden, approximate=True))


def _self_attention(params: Params, x: jax.Array) -> jax.Array:
    """Full multi-head self-attention with biases, x [B, N, D]."""
    project = functools.partial(_project_heads, x=x)
    q, k, v = project(params["query"]), project(params["key"]), project(params["value"])
    attended = attention(q * (q.shape[-1] ** -0.5), k, v, None)
    kernel = params["out"]["kernel"]
    y = matmul(attended.reshape(x.shape), kernel.reshape(-1, kernel.shape[-1]))
    return y + lead(params["out"]["bias"].astype(x.dtype), 3)


def _project_heads(params: Params, x: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, N, heads, head_dim]."""
    kernel = params["kernel"]
    y = matmul(x, kernel.reshape(kernel.shape[0], -1)).reshape(*x.shape[:-1], *kernel.shape[1:])
    return y + lead(params["bias"].astype(x.dtype), 4)
