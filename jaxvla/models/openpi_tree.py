"""What a weight file of any format is read into, and how it is compared with the model.

A target is the parameter tree of a model with a placement in every leaf: a
`jax.ShapeDtypeStruct` with sharding where the file must have the leaf, a `jax.Array` with
its initial value where the file may lack it. Leaves are named by '/'-joined path.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.config import UsageError
from jaxvla.models.layers import Leaf, init_leaves, nest
from jaxvla.sharding import path_name
from jaxvla.types import Params

HEADS = ("value_head", "noise_head", "grounding_head")
"""Top-level entries that openpi has not."""
OPTIONAL = rf"^({'|'.join(HEADS)})/|(/|_)lora_[ab]$"
"""Paths of leaves that a file may lack: own heads, and adapters (LoRA, arXiv:2106.09685)."""

_MAX_LISTED = 4
"""Leaves of each kind of difference that a message names."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""


def make_target(
    leaves: Mapping[str, Leaf],
    shardings: Params,
    *,
    dtype: str,
    key: jax.Array,
    initial: str = OPTIONAL,
) -> Params:
    """The target for a model's parameters.

    Args:
      leaves: declarations, as `PiPolicy.leaves` gives them.
      shardings: tree of `jax.sharding.Sharding` of the same structure, as
        `params_shardings` gives it.
      dtype: dtype of all leaves, "float32" or "bfloat16".
      key: typed key, shape []. Initial values are those of `PiPolicy.init`.
      initial: regular expression of the paths that get an initial value; other leaves are
        not allocated.
    """
    places = flatten(shardings)
    table = {path: leaf for path, leaf in leaves.items() if re.search(initial, path)}
    target: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=places[path])
        for path, leaf in leaves.items()
    }

    def draw() -> dict[str, jax.Array]:
        values = flatten(init_leaves(key, table))
        return {path: value.astype(dtype) for path, value in values.items()}

    if table:
        target |= jax.jit(draw, out_shardings={path: places[path] for path in table})()
    return nest(target)


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dict -> path to leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flat_target(target: Params) -> dict[str, Any]:
    """The leaves of a target by path.

    Raises:
      UsageError: a leaf has no sharding.
    """
    flat = flatten(target)
    for path, leaf in flat.items():
        if getattr(leaf, "sharding", None) is None:
            raise UsageError(f"the target's leaf {path} has no sharding. Fix: use make_target")
    return flat


def shapes_of(flat: Mapping[str, Any]) -> Shapes:
    """Shape of every leaf."""
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def require_match(source: str, found: Shapes, wanted: Shapes, *, optional: str = OPTIONAL) -> None:
    """Compares the names and shapes of a file with those of a model.

    Args:
      source: what is read, for the message.
      found: what it holds.
      wanted: what the model has.
      optional: regular expression of the names that the file may lack.

    Raises:
      UsageError: they differ. It names the first leaves of each kind of difference.
    """
    missing = [name for name in wanted if name not in found and not re.search(optional, name)]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [
        f"{name} {list(found[name])} instead of {list(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    differences = [_listing(kind, names) for kind, names in kinds.items() if names]
    if differences:
        raise UsageError(
            f"{source} does not fit the model: {'; '.join(differences)}. "
            "Fix: the sizes in config.model, or a checkpoint of the same family (pi0, pi0.5)"
        )


def _listing(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"


def kept(source: str, path: str, leaf: Any) -> jax.Array:
    """The initial value of a leaf that a file lacks.

    Raises:
      UsageError: the target has none.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    raise UsageError(
        f"{source} lacks {path} and the target gives no initial value. "
        "Fix: a target from make_target, or a jax.Array in that leaf"
    )


def place(array: np.ndarray, leaf: Any) -> jax.Array:
    """An array of the host on the devices, and in the dtype, of a target's leaf.

    Returns when the copy is done, so that the caller can free the array.
    """
    array = array.astype(leaf.dtype, copy=False)
    return jax.block_until_ready(jax.device_put(array, leaf.sharding))
