"""Copies of weights that share no buffer with the original, and what weights look like."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla import multihost
from jaxvla.sharding import path_name
from jaxvla.types import Params

Copier = Callable[[Params], tuple[Params, int]]
"""Returns a copy, and how many bytes were copied for it."""


def params_copier(shardings: Any, trainable: str = ".*") -> Copier:
    """Returns a function that copies parameters to `shardings` and never aliases its input.

    It copies the leaves that do not change once, for its first result, and puts the same copies
    into every later one. That they do not change is the caller's word: to look would cost as much
    as to copy.

    Args:
      shardings: one sharding, or a pytree of them that matches the parameters.
      trainable: regular expression over the paths of the leaves that change between calls.
    """

    def chosen(tree: Any) -> dict[str, Any]:
        named = named_leaves(tree).items()
        return {name: leaf for name, leaf in named if re.search(trainable, name)}

    is_one = isinstance(shardings, jax.sharding.Sharding)
    copy_all = _copy_to(shardings)
    copy_chosen = _copy_to(shardings if is_one else chosen(shardings))
    kept: dict[str, jax.Array] = {}

    def copy(params: Params) -> tuple[Params, int]:
        if kept:
            moved = copy_chosen(chosen(params))
            leaves = kept | moved
            merged = jax.tree_util.tree_map_with_path(
                lambda path, _: leaves[path_name(path)], params
            )
            return merged, _nbytes(moved)
        copied = copy_all(params)
        frozen = named_leaves(copied).keys() - chosen(copied).keys()
        if frozen:
            jax.block_until_ready(copied)  # what a failed copy left must not be kept
            kept.update({name: x for name, x in named_leaves(copied).items() if name in frozen})
        return copied, _nbytes(copied)

    return copy


def _copy_to(shardings: Any) -> Callable[[Any], Any]:
    """Returns a function that copies a tree.

    `jax.device_put` returns the same buffers where a device already holds what is asked for,
    and they die when the learner donates them. So wherever source and target share a device
    the copy goes through a jitted `jnp.copy`, whose outputs are fresh buffers.
    """
    clone = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    targets = {_device_order(x) for x in jax.tree.leaves(shardings)}
    devices = frozenset().union(*targets)

    def copy(tree: Any) -> Any:
        sources = {_device_order(leaf.sharding) for leaf in jax.tree.leaves(tree)}
        if sources == targets:
            return clone(tree)
        moved = jax.device_put(tree, shardings)
        return moved if devices.isdisjoint(*sources) else clone(moved)

    return copy


def gather_leaves(leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    """Collective (`jaxvla.multihost`): copies of arrays on the leader's host, made one by one.

    Args:
      leaves: of the present parameters, on the learning mesh of one process or of several.

    Returns:
      Their values, which share no memory with them; nothing in the other processes.
    """
    found = [multihost.gather(leaf) for leaf in leaves]
    return [value for value in found if value is not None]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf path such as "decoder/kernel" -> leaf, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _device_order(sharding: jax.sharding.Sharding) -> tuple[Any, ...]:
    """Devices in mesh order: one jitted call takes arrays of a single order only."""
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    if isinstance(mesh, jax.sharding.Mesh):
        return tuple(np.ravel(mesh.devices))
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def spec_of(params: Params) -> dict[str, str]:
    """Leaf path such as "decoder/kernel" -> dtype and shape such as "float32[4,8]".

    Raises:
      ValueError: a leaf is no jax.Array.
    """
    spec = {}
    for name, leaf in named_leaves(params).items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"leaf {name!r} is a {type(leaf).__name__}, not a jax.Array")
        spec[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return spec
