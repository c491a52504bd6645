"""What the fields and arrays of a frame must be. Whoever receives one says what it expects.

Pytrees cross as lists of their leaves in tree order; both sides know the structure, shapes and
dtypes beforehand, and check them: the sender, so that the error comes where the cause is, and the
receiver, as it trusts nobody.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxvla.sharding import path_name
from jaxvla.transport.frames import FrameError

MAX_COUNT = 2**53
"""Largest number that a counter may have."""

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
"""Of clients, owners and the like."""

_MAX_SHOWN = 80
"""Characters of a wrong value that an error shows."""


def read_int(fields: Mapping[str, Any], name: str, *, least: int = 0, most: int = MAX_COUNT) -> int:
    """An integer field.

    Raises:
      FrameError: it is missing, no integer or not in [least, most].
    """
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise FrameError(f"{name} = {shown(value)}, must be an integer in [{least}, {most}]")
    return value


def read_seconds(fields: Mapping[str, Any], name: str) -> float | None:
    """A time in seconds, at least 0 and finite; None where the field is None.

    Raises:
      FrameError: it is missing or something else.
    """
    value = fields.get(name, "")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise FrameError(f"{name} = {shown(value)}, must be seconds from 0 up, or None")
    return float(value)


def read_bool(fields: Mapping[str, Any], name: str) -> bool:
    """A truth value.

    Raises:
      FrameError: it is missing or something else.
    """
    value = fields.get(name)
    if type(value) is not bool:
        raise FrameError(f"{name} = {shown(value)}, must be true or false")
    return value


def read_text(fields: Mapping[str, Any], name: str, pattern: re.Pattern[str] | None = None) -> str:
    """A text field, all of which matches `pattern`.

    Raises:
      FrameError: it is missing, no text or does not match.
    """
    value = fields.get(name)
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        like = f" like {pattern.pattern}" if pattern else ""
        raise FrameError(f"{name} = {shown(value)}, must be text{like}")
    return value


def read_fields(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that holds fields.

    Raises:
      FrameError: it is missing or something else.
    """
    value = fields.get(name)
    if not isinstance(value, dict):
        raise FrameError(f"{name} = {shown(value)}, must be a dict")
    return value


def check_array(array: np.ndarray, name: str, dtype: Any, shape: tuple[int | None, ...]) -> None:
    """Checks an array against a dtype and a shape, in which None stands for any size.

    Raises:
      FrameError: it differs.
    """
    fits = len(array.shape) == len(shape) and all(
        want is None or size == want for size, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        sizes = ",".join("*" if size is None else str(size) for size in shape)
        is_there = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
        raise FrameError(f"{name} is {is_there}, must be {np.dtype(dtype).name}[{sizes}]")


class TreeSchema:
    """A pytree of arrays on its way: structure, dtypes and shapes."""

    def __init__(self, name: str, struct: Any, *, is_batch: bool = False):
        """Args:
        name: of the tree, in errors.
        struct: pytree of arrays or shape structs.
        is_batch: the first axis of every leaf is free, and has the same size in all of them.
        """
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(struct)
        self._leaves: list[tuple[str, np.dtype, tuple[int | None, ...]]] = [
            (
                f"{name}/{path_name(path)}" if path else name,
                np.dtype(leaf.dtype),
                (None, *leaf.shape[1:]) if is_batch else tuple(leaf.shape),
            )
            for path, leaf in leaves
        ]
        self._is_batch = is_batch
        self._name = name

    def __len__(self) -> int:
        """Leaves."""
        return len(self._leaves)

    def flatten(self, tree: Any) -> list[np.ndarray]:
        """Host arrays of a tree's leaves.

        Raises:
          FrameError: another structure, dtype or shape.
        """
        treedef = jax.tree.structure(tree)
        if treedef != self._treedef:
            raise FrameError(f"{self._name} has the structure {treedef}, must be {self._treedef}")
        arrays = [np.asarray(leaf) for leaf in jax.device_get(jax.tree.leaves(tree))]
        self._check(arrays)
        return arrays

    def unflatten(self, arrays: Sequence[np.ndarray]) -> Any:
        """The tree whose leaves are `arrays`.

        Raises:
          FrameError: another number of leaves, or a leaf of another dtype or shape.
        """
        if len(arrays) != len(self):
            raise FrameError(f"{self._name} has {len(arrays)} leaves, must have {len(self)}")
        self._check(arrays)
        return jax.tree.unflatten(self._treedef, arrays)

    def _check(self, arrays: Sequence[np.ndarray]) -> None:
        for array, leaf in zip(arrays, self._leaves, strict=True):
            check_array(array, *leaf)
        sizes = {len(array) for array in arrays} if self._is_batch else set()
        if len(sizes) > 1:
            raise FrameError(f"{self._name} has leaves of {sorted(sizes)} rows")


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
