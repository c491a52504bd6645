"""Building blocks shared by the vision encoder, the transformer and the heads.

Everything is a pure function of arrays. Weights are cast to the dtype of the
activations they meet; statistics, trigonometry and softmax are float32 whatever
that dtype is. Shape letters as in `jaxvla.types`, plus K kv heads, G query heads per
kv head, D width, L layers.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla import rng
from jaxvla.types import Params

_RECOMPUTED = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "layers": None}
"""Kind of `LayerLoop.remat` -> what is not recomputed, as a policy of jax.checkpoint."""
REMAT = ("auto", "none", *_RECOMPUTED)

_MASKED_LOGIT = -2.3819763e38
"""Finite, so that a row with every key masked gives a uniform softmax instead of NaN."""

_CHUNK = 4096
"""Normals per key when small leaves are drawn together."""
_LARGE = 2**20
"""Elements from which a leaf is drawn on its own, so that a sharded init stays sharded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """Declaration of one parameter: init, sharding rules and counts are read off it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis per dimension; None is never sharded."""
    std: float = 0.0
    """Standard deviation of the initial values. Stated instead of an initialiser's fan-in
    rule, because stacked layers and split heads hide the fan-in from the shape."""
    mean: float | np.ndarray = 0.0
    """Mean of the initial values; an array describes the last axis."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.axes)} axes {self.axes} for shape {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def stacked(self, depth: int) -> "Leaf":
        """The same leaf for `depth` layers, stacked on a new axis 0."""
        return dataclasses.replace(self, shape=(depth, *self.shape), axes=("layers", *self.axes))


def fan_in(size: int, gain: float = 1.0) -> float:
    """Standard deviation gain / sqrt(size) that keeps the scale of `size` summed inputs."""
    return gain / math.sqrt(size)


def dense_leaves(path: str, size_in: int, size_out: int, *, gain: float = 1.0) -> dict[str, Leaf]:
    """Kernel [in, out] and zero bias [out] of a dense layer."""
    kernel = Leaf(shape=(size_in, size_out), axes=("embed", None), std=fan_in(size_in, gain))
    return {f"{path}/kernel": kernel, f"{path}/bias": Leaf(shape=(size_out,), axes=(None,))}


def nest(flat: Mapping[str, Any]) -> Params:
    """'/'-joined path to leaf -> nested dict."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def init_leaves(key: jax.Array, leaves: dict[str, Leaf]) -> Params:
    """Draws every leaf in float32 and nests the tree by path.

    The values of a leaf depend on the key and its path alone, so adding a leaf changes no
    other. Small leaves are drawn by one batched call: a generator per leaf would make
    compilation take minutes on CPU.

    Args:
      key: typed key, shape [].
      leaves: '/'-joined path -> declaration.
    """
    random = {path: leaf for path, leaf in leaves.items() if leaf.std > 0.0}
    normals = _draw_small(key, {p: leaf for p, leaf in random.items() if leaf.size < _LARGE})
    for path, leaf in random.items():
        if leaf.size >= _LARGE:
            normals[path] = jax.random.normal(rng.stream(key, path), leaf.shape)
    values = {}
    for path, leaf in leaves.items():
        mean = jnp.broadcast_to(jnp.asarray(leaf.mean, jnp.float32), leaf.shape)
        values[path] = mean + leaf.std * normals[path] if path in normals else mean
    return nest(values)


def _draw_small(key: jax.Array, leaves: dict[str, Leaf]) -> dict[str, jax.Array]:
    """Standard normals of the shape of each leaf, in chunks keyed by path and chunk index."""
    counts = [math.ceil(leaf.size / _CHUNK) for leaf in leaves.values()]
    roles = [zlib.crc32(path.encode()) for path in leaves]
    keys = jax.vmap(lambda role, index: jax.random.fold_in(jax.random.fold_in(key, role), index))(
        np.repeat(np.asarray(roles, np.uint32), counts),
        np.concatenate([np.arange(count, dtype=np.uint32) for count in counts]),
    )
    chunks = jax.vmap(lambda chunk_key: jax.random.normal(chunk_key, (_CHUNK,)))(keys)
    parts = jnp.split(chunks, np.cumsum(counts)[:-1])
    return {
        path: part.reshape(-1)[: leaf.size].reshape(leaf.shape)
        for (path, leaf), part in zip(leaves.items(), parts, strict=True)
    }


def lead(vector: jax.Array, ndim: int) -> jax.Array:
    """Adds leading axes of size 1, so that no rank is promoted implicitly."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out], in the dtype of x.

    Leading axes are flattened: XLA:CPU runs the gradient of a rank-3 product several times
    slower than the same product at rank 2.
    """
    weight = weight.astype(x.dtype)
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], weight.shape[-1])


def dense(params: Params, x: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] + bias [out], in the dtype of x."""
    return matmul(x, params["kernel"]) + lead(params["bias"].astype(x.dtype), x.ndim)


def layer_norm(params: Params, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis with scale and bias, eps 1e-6, statistics in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    scale, bias = (lead(params[name].astype(jnp.float32), y.ndim) for name in ("scale", "bias"))
    return (y * scale + bias).astype(x.dtype)


def _rms_normalize(x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)


def rms_norm(params: Params, x: jax.Array) -> jax.Array:
    """RMSNorm over the last axis, eps 1e-6; `scale` [D] is stored as an offset from 1."""
    scale = lead(params["scale"].astype(jnp.float32), x.ndim)
    return (_rms_normalize(x) * (1.0 + scale)).astype(x.dtype)


def adaptive_rms_norm(
    params: Params, x: jax.Array, condition: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """RMSNorm whose scale, shift and residual gate come from a condition.

    Args:
      params: {"Dense_0": dense layer D_c -> 3 D}, outputs in the order scale, shift, gate.
      x: [B, N, D].
      condition: [B, D_c].

    Returns:
      The normed x [B, N, D] and the gate [B, 1, D], both in the dtype of x.
    """
    modulation = dense(params["Dense_0"], condition.astype(x.dtype))[:, None, :]
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    y = _rms_normalize(x) * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return y.astype(x.dtype), gate


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv:2104.09864), base 10000, halves not interleaved.

    Args:
      x: [B, N, heads, head_dim], head_dim even.
      positions: int32 [B, N].

    Returns:
      Like x; the rotation is computed in float32.
    """
    half = x.shape[-1] // 2
    timescale = jnp.asarray(10_000.0 ** (np.arange(half) / half), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] / lead(timescale, 4)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Grouped-query attention; the scale is already in q.

    Args:
      q: [B, T, heads, head_dim], heads a multiple of K.
      k: [B, S, K, head_dim].
      v: [B, S, K, head_dim].
      mask: bool [B, T, S], True where the query may look; None: everywhere.

    Returns:
      [B, T, heads, head_dim] in the dtype of q; logits and softmax are float32.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    groups = num_heads // num_kv_heads
    # The queries that share a kv head form one matrix with the rows (g, t). In this order the rows
    # stay where the heads are when a mesh splits these.
    rows = (batch, num_kv_heads, groups * num_queries)
    split = (batch, num_queries, num_kv_heads, groups, head_dim)
    q_rows = q.reshape(split).transpose(0, 2, 3, 1, 4).reshape(*rows, head_dim)
    k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkxh,bksh->bkxs", q_rows, k_rows, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = logits.reshape(batch, num_kv_heads, groups, num_queries, num_keys)
        logits = jnp.where(mask[:, None, None], logits, _MASKED_LOGIT)
        logits = logits.reshape(*rows, num_keys)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkxs,bksh->bkxh", weights, v_rows)
    out = out.reshape(batch, num_kv_heads, groups, num_queries, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attention_mask(
    query_mask: jax.Array, query_block: jax.Array, key_mask: jax.Array, key_block: jax.Array
) -> jax.Array:
    """Which query sees which key: both valid, and the key's block not after the query's.

    Args:
      query_mask: bool [B, T].
      query_block: int32 [T], non-decreasing block index.
      key_mask: bool [B, S].
      key_block: int32 [S].

    Returns:
      bool [B, T, S].
    """
    causal = key_block[None, :] <= query_block[:, None]
    return causal[None] & query_mask[:, :, None] & key_mask[:, None, :]


def positions_of(mask: jax.Array) -> jax.Array:
    """Position ids int32 [B, N] of valid tokens; padding consumes no position.

    A padded token repeats the last valid position (-1 before the first one).
    """
    return jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1


def time_embedding(
    time: jax.Array, width: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> jax.Array:
    """Sinusoidal features of the flow time: sines, then cosines, of geometric periods.

    Args:
      time: float32 [B] in [0, 1].
      width: even number of features.
      min_period: shortest period.
      max_period: longest period.

    Returns:
      float32 [B, width]. Angles reach 2 pi / min_period = 1571 rad, so they are computed
      elementwise in float32 and never by a reduced-precision matmul.
    """
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = min_period * (max_period / min_period) ** fraction
    angle = time.astype(jnp.float32)[:, None] * (1.0 / period * 2.0 * jnp.pi)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLoop:
    """How a stack of layers is run and differentiated. The numbers are the same, to rounding."""

    max_unrolled: int = 4
    """Stacks of at most this many layers are unrolled, which saves 20 % of a gradient's time on
    CPU; longer ones are scanned, which compiles one layer for all."""
    remat: str = "auto"
    """What the backward pass recomputes, to keep less: "layers", all but each layer's input;
    "dots", what is cheap (norms, activation functions, attention weights); "none"; "auto": "none"
    in an unrolled stack, "dots" in a scan, where stacking cheap things over the layers costs more
    memory traffic than it saves."""


DEFAULT_LOOP = LayerLoop()


def run_layers(
    block: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    per_layer: Any,
    loop: LayerLoop = DEFAULT_LOOP,
) -> tuple[jax.Array, Any]:
    """Runs `block(x, leaves of one layer) -> (x, output)` over axis 0 of `per_layer`.

    Args:
      block: one layer.
      x: [B, N, D].
      per_layer: pytree with leading axis L.
      loop: how.

    Returns:
      x after the last layer, and the outputs stacked on axis 0.
    """
    depth = jax.tree.leaves(per_layer)[0].shape[0]
    is_scanned = depth > loop.max_unrolled
    remat = ("dots" if is_scanned else "none") if loop.remat == "auto" else loop.remat
    if remat != "none":
        # A scan keeps the compiler from undoing the recomputation: no barrier needed.
        block = jax.checkpoint(block, policy=_RECOMPUTED[remat], prevent_cse=not is_scanned)
    if is_scanned:
        return jax.lax.scan(block, x, per_layer)
    outputs = []
    for index in range(depth):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], per_layer)
        x, output = block(x, layer)
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)
