"""The language and vision half of a pi model from PaliGemma's own weights.

PaliGemma (arXiv:2407.07726) is published as an `.npz` of big_vision
(https://github.com/google-research/big_vision): keys `params/img/...` and `params/llm/...`
with the names and layouts of openpi's tree, which has them below `PaliGemma/`.
"""

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxvla.config import UsageError
from jaxvla.models.layers import nest
from jaxvla.models.openpi_tree import (
    OPTIONAL,
    flat_target,
    flatten,
    kept,
    place,
    require_match,
    shapes_of,
)
from jaxvla.types import Params

EXPERT = r"^(?!PaliGemma/)|^PaliGemma/llm/.*_1/"
"""Paths of what PaliGemma has not: the action expert, projections and heads."""
INITIAL = f"{EXPERT}|{OPTIONAL}"
"""What `make_target` draws for `load_paligemma`."""


def load_paligemma(path: pathlib.Path, target: Params) -> Params:
    """Reads vision encoder and language model; all else keeps its initial value.

    One leaf at a time is on the host.

    Args:
      path: the `.npz`, float32, float16 or bfloat16 (which numpy reads as 2-byte void).
      target: see `openpi_tree`; made with `initial=INITIAL`. The shapes must be
        PaliGemma's, in particular `vocab_size` 257,152 and 224 px images for `pt_224`.

    Returns:
      Parameters with the target's shardings and dtypes.

    Raises:
      UsageError: the file is none of PaliGemma's, or does not fit the target.
    """
    flat, source = flat_target(target), f"{path}"
    # A pickled entry is an error of np.load, never code that runs.
    with _open(path) as file:
        names = _require_match(path, file.files, flat)
        result = {
            own: place(_as_number(file[names[own]]), leaf)
            if own in names
            else kept(source, own, leaf)
            for own, leaf in flat.items()
        }
    return nest(result)


def check_paligemma(path: pathlib.Path, shapes: Params) -> None:
    """Compares names and shapes with a model's; reads no array.

    Args:
      path: as for `load_paligemma`.
      shapes: a tree of anything that has a shape.

    Raises:
      UsageError: as `load_paligemma`.
    """
    with _open(path) as file:
        _require_match(path, file.files, flatten(shapes))


def _require_match(
    path: pathlib.Path, stored: Sequence[str], flat: dict[str, Any]
) -> dict[str, str]:
    """Own path -> stored name."""
    names = {_tree_path(name): name for name in stored}
    with zipfile.ZipFile(path) as archive:
        found = {own: _shape(archive, name) for own, name in names.items()}
    require_match(str(path), found, shapes_of(flat), optional=INITIAL)
    return names


def _open(path: pathlib.Path) -> Any:
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no readable .npz: {error}. Fix: PaliGemma's .npz") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UsageError(f"{path} is a single array. Fix: PaliGemma's .npz")
    return file


def _tree_path(name: str) -> str:
    """`params/img/...` -> `PaliGemma/img/...`; other names stay and will be unexpected."""
    return f"PaliGemma/{name.removeprefix('params/')}" if name.startswith("params/") else name


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Read off the header: the differences are known before any array is read."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        return read[version[0]](member)[0]


def _as_number(array: np.ndarray) -> np.ndarray:
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array
