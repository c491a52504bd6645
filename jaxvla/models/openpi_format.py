"""openpi's checkpoints: found, read and written.

    <checkpoint>/params/                        orbax PyTree {"params": tree}
    <checkpoint>/assets/<asset_id>/norm_stats.json

Source: https://github.com/Physical-Intelligence/openpi, commit 15a9616. The tree is that of
`PiPolicy` without the heads that openpi has not. openpi's training appends `value` to every
leaf path, its released checkpoints do not; both are read, the latter is written. Released
checkpoints are float32; openpi casts when it loads, and so does this module.

One process only: nobody decides which of several would rename the finished directory.
"""

import math
import os
import pathlib
import shutil
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxvla.config import UsageError
from jaxvla.data.normalization import NormStats, load_norm_stats, save_norm_stats
from jaxvla.models import openpi_torch
from jaxvla.models.layers import nest
from jaxvla.models.openpi_tree import (
    HEADS,
    flat_target,
    flatten,
    kept,
    require_match,
    shapes_of,
)
from jaxvla.models.tokenizer import CACHE_DEFAULT, CACHE_VARIABLE
from jaxvla.types import Params

_STATS_FILE = "norm_stats.json"


def local_checkpoint(location: str) -> pathlib.Path:
    """Where a checkpoint lies on this machine. Nothing is downloaded.

    Args:
      location: a local path, or an address such as
        "gs://openpi-assets/checkpoints/pi05_libero", which is looked up in openpi's cache:
        `$OPENPI_DATA_HOME/<bucket>/<path>`, by default below ~/.cache/openpi.

    Raises:
      UsageError: it is not there. For an address, the message has the command that
        downloads it.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        path = pathlib.Path(location).expanduser().resolve()
        if not path.exists():
            raise UsageError(f"there is no checkpoint at {path}. Fix: the path, or a gs:// address")
        return path
    parts = pathlib.PurePosixPath(rest).parts
    if scheme != "gs" or len(parts) < 2 or ".." in parts:
        raise UsageError(f"address {location!r}: must be gs://BUCKET/PATH or a local path")
    cache = pathlib.Path(os.environ.get(CACHE_VARIABLE) or CACHE_DEFAULT).expanduser().resolve()
    path = cache.joinpath(*parts)
    if not path.exists():
        raise UsageError(
            f"{location} is not in openpi's cache ({path}). Fix: mkdir -p '{path.parent}' && "
            f"gcloud storage cp -r 'gs://{'/'.join(parts)}' '{path.parent}', "
            f"or {CACHE_VARIABLE}=DIR where it is"
        )
    return path


def load_params(checkpoint: pathlib.Path, target: Params) -> Params:
    """Reads the weights of a pi0 or pi0.5 checkpoint into a model's placement and dtype.

    Every shard goes to the devices that hold it. Reads in progress are bounded by the largest
    leaf (4.8 GB in a float32 pi0) and at most 1 GB more, so the host never holds the tree.

    Args:
      checkpoint: an openpi checkpoint, its `params/`, a directory with a
        `model.safetensors` of openpi's PyTorch port, or that file.
      target: see `openpi_tree`; made by `make_target`. Leaves that the checkpoint lacks
        (own heads, LoRA) keep their initial values.

    Returns:
      Parameters with the target's shardings and dtypes.

    Raises:
      UsageError: there are no weights, or they do not fit the target.
    """
    path, is_orbax = _weights_of(checkpoint)
    return _load_orbax(path, target) if is_orbax else openpi_torch.load_safetensors(path, target)


def check_params(checkpoint: pathlib.Path, shapes: Params) -> None:
    """Compares names and shapes with a model's; reads no weights.

    Args:
      checkpoint: as for `load_params`.
      shapes: a tree of anything that has a shape.

    Raises:
      UsageError: there are no weights, or they do not fit.
    """
    path, is_orbax = _weights_of(checkpoint)
    if not is_orbax:
        openpi_torch.check_safetensors(path, shapes)
        return
    stored = _stored_leaves(path)
    found = {own: stored[name] for own, name in _names(stored).items()}
    require_match(str(path), shapes_of(found), shapes_of(flatten(shapes)))


def _weights_of(checkpoint: pathlib.Path) -> tuple[pathlib.Path, bool]:
    """What holds a checkpoint's weights, and whether it is orbax's directory."""
    for path in (checkpoint / "params", checkpoint):
        if (path / "_METADATA").is_file():
            return path.resolve(), True
    for path in (checkpoint / "model.safetensors", checkpoint):
        if path.suffix == ".safetensors" and path.is_file():
            return path, False
    raise UsageError(
        f"{checkpoint} holds no weights of openpi: neither params/_METADATA nor "
        "model.safetensors. Fix: the directory that has one of them"
    )


def load_stats(checkpoint: pathlib.Path, asset_id: str, kind: str) -> NormStats:
    """Reads the statistics that a checkpoint was trained with.

    Args:
      checkpoint: an openpi checkpoint or its `params/`.
      asset_id: the data set's name, such as "physical-intelligence/libero".
      kind: "zscore" (pi0) or "quantile" (pi0.5); the file does not say.

    Raises:
      UsageError: the checkpoint has no such asset. The message lists those that it has.
      ValueError: see `load_norm_stats`.
    """
    assets, known = _assets(checkpoint), asset_ids(checkpoint)
    if asset_id not in known:
        raise UsageError(
            f"asset_id = {asset_id!r}: {assets} has no {_STATS_FILE} for it. "
            f"Fix: one of those that are there: {', '.join(known) or 'none'}"
        )
    return load_norm_stats(assets / asset_id / _STATS_FILE, kind)


def asset_ids(checkpoint: pathlib.Path) -> list[str]:
    """Data sets whose statistics a checkpoint has."""
    assets = _assets(checkpoint)
    return sorted(path.parent.relative_to(assets).as_posix() for path in assets.rglob(_STATS_FILE))


def _assets(checkpoint: pathlib.Path) -> pathlib.Path:
    is_params = checkpoint.name == "params" and not (checkpoint / "assets").is_dir()
    return (checkpoint.parent if is_params else checkpoint) / "assets"


def save_checkpoint(
    directory: pathlib.Path, params: Params, *, stats: NormStats, asset_id: str
) -> None:
    """Writes a checkpoint that openpi reads, in one step: it is whole or not there.

    Arrays are written as they are, so reading back gives the same bits. Own heads are left
    out. Checked: orbax 0.11.13 with jax 0.5.3, which openpi pins, reads every leaf of what
    orbax 0.12.8 writes here (zarr version 2 in one OCDBT database) with the same bits.

    Args:
      directory: made here; its parents too.
      params: parameters of a `PiPolicy`, float32 or bfloat16.
      stats: written without their kind, see `save_norm_stats`.
      asset_id: the data set's name; may have slashes.

    Raises:
      UsageError: the directory exists, the parameters are none of a pi model, or the
        asset id is no relative path.
    """
    directory = directory.expanduser().resolve()
    tree = {name: branch for name, branch in params.items() if name not in HEADS}
    require_writable(directory, tree, asset_id)
    unfinished = directory.with_name(f".{directory.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        assets = unfinished / "assets" / asset_id
        assets.mkdir(parents=True)
        save_norm_stats(stats, assets / _STATS_FILE)
        _save_orbax(unfinished / "params", tree)
        unfinished.rename(directory)  # fails where a directory with files has come up meanwhile
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def require_writable(directory: pathlib.Path, tree: Params, asset_id: str) -> None:
    """What `save_checkpoint` refuses, before any parameter is read.

    Args:
      directory, asset_id: as there.
      tree: parameters, or anything of their structure.

    Raises:
      UsageError: see `save_checkpoint`.
    """
    if directory.exists():
        raise UsageError(f"{directory} exists and is not overwritten. Fix: another directory")
    if "PaliGemma" not in tree:
        raise UsageError(
            f"the parameters have no PaliGemma, only {', '.join(tree) or 'heads'}. "
            "Fix: a model of the family pi; openpi reads no other"
        )
    parts = pathlib.PurePosixPath(asset_id).parts
    if not parts or ".." in parts or asset_id.startswith("/"):
        raise UsageError(f"asset_id = {asset_id!r}: must be a relative path such as 'org/data'")


def _save_orbax(path: pathlib.Path, tree: Params) -> None:
    limit = _limit_gb([leaf.nbytes for leaf in jax.tree.leaves(tree)])
    # Both are the defaults of orbax 0.12.8, written out because openpi's orbax needs them.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, save_device_host_concurrent_gb=limit
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave({"params": tree}))


def _load_orbax(path: pathlib.Path, target: Params) -> Params:
    stored = _stored_leaves(path)
    names = _names(stored)
    flat, source = flat_target(target), str(path)
    found = {own: stored[name] for own, name in names.items()}
    require_match(source, shapes_of(found), shapes_of(flat))
    loaded = _restore(path, {names[own]: flat[own] for own in names}, stored)
    return nest(
        {
            own: loaded[names[own]] if own in names else kept(source, own, leaf)
            for own, leaf in flat.items()
        }
    )


def _stored_leaves(path: pathlib.Path) -> dict[str, Any]:
    """orbax's metadata of every array, by path below "params"."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item = checkpointer.metadata(path).item_metadata
    tree = {} if item is None else item.tree
    if not isinstance(tree, dict) or "params" not in tree:
        raise UsageError(f"{path} is no params/ of openpi: its item has no entry 'params'")
    return flatten(tree["params"])


def _names(stored: dict[str, Any]) -> dict[str, str]:
    """Own path -> stored path."""
    has_suffix = all(name.endswith("/value") for name in stored)
    return {name.removesuffix("/value") if has_suffix else name: name for name in stored}


def _restore(
    path: pathlib.Path, wanted: dict[str, Any], stored: dict[str, Any]
) -> dict[str, jax.Array]:
    """Reads the leaves, which are all of the directory's, by stored path."""
    args = {
        name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding)
        for name, leaf in wanted.items()
    }
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
    limit = _limit_gb([_read_bytes(stored[name]) for name in wanted])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit)) as checkpointer:
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item={"params": nest(item)}, restore_args={"params": nest(args)}
            ),
        )
    return flatten(restored["params"])


def _read_bytes(stored: Any) -> int:
    """The most that reading one leaf takes: whole chunks, also where the array ends in one."""
    chunk = stored.storage.chunk_shape if stored.storage else stored.shape
    sizes = (-(-size // step) * step for size, step in zip(stored.shape, chunk, strict=True))
    return math.prod(sizes) * stored.dtype.itemsize


def _limit_gb(sizes: list[int]) -> int:
    """orbax's limit of bytes in flight, 10^9 bytes; it must exceed the largest array."""
    return max(sizes) // 10**9 + 1
