"""What a policy brings along: its tokenizer, its statistics, and the weights it begins with.

A file that a setting names is looked for and compared with the model before anything is
compiled or written; its arrays are read when the run begins, straight into their placement.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from jaxvla.checkpoint import Checkpointer, CorruptCheckpointError, Restored
from jaxvla.config import ConfigError, ModelConfig, UsageError, override
from jaxvla.data.normalization import NormStats, load_norm_stats
from jaxvla.models import openpi_format, paligemma_npz
from jaxvla.models.openpi_tree import make_target
from jaxvla.models.pi import PiPolicy
from jaxvla.models.tokenizer import Tokenizer, make_tokenizer
from jaxvla.sharding import placed_structs
from jaxvla.types import EnvSpec, Params

STATS_FILE = "norm_stats.json"
"""In every work directory: the statistics that its policy was trained with."""
CHECKPOINTS = "checkpoints"
PARAMS = "state/params/"
"""Paths of the parameters in a checkpoint of a work directory: all that a job reads which does not
train, so that optimizer and env groups may be others."""
_BOUNDS = "bounds"


def find_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer that the config names.

    Raises:
      ConfigError: it cannot be had.
    """
    try:
        return make_tokenizer(model.tokenizer)
    except ValueError as error:
        fix = override("model.tokenizer", "PATH")
        raise ConfigError("model.tokenizer", model.tokenizer, str(error), fix) from error


def find_stats(model: ModelConfig, spec: EnvSpec, workdir: pathlib.Path | None) -> NormStats:
    """The statistics that `model.norm_stats` asks for, of the env's dimensions.

    Args:
      model: config of the model.
      spec: of the env.
      workdir: of the run, which may have statistics already.

    Raises:
      ConfigError: there are none such, or they do not fit the env.
    """
    name, kind = model.norm_stats, model.normalization
    try:
        stats = _stored_stats(model, workdir) if name != _BOUNDS else None
        if stats is None:
            low, high = np.asarray(spec.state_low), np.asarray(spec.state_high)
            return NormStats.from_bounds(low, high, spec.action_dim, kind=kind)
        return stats.cut(spec.state_dim, spec.action_dim)
    except ConfigError:
        raise
    except ValueError as error:
        fix = override("model.norm_stats", "FILE")
        raise ConfigError("model.norm_stats", name, str(error), fix) from error


def _stored_stats(model: ModelConfig, workdir: pathlib.Path | None) -> NormStats | None:
    """From a file; None where the env's bounds are to be taken."""
    name, kind = model.norm_stats, model.normalization
    if name:
        path = pathlib.Path(name).expanduser()
        if path.is_file():
            return load_norm_stats(path, kind)
        if not model.initial_weights:
            raise UsageError(f"there is no file {path}, and no model.initial_weights to look in")
        return openpi_format.load_stats(_initial_path(model), name, kind)
    if workdir is not None and (workdir / STATS_FILE).is_file():
        return load_norm_stats(workdir / STATS_FILE, kind)
    return _initial_stats(model) if model.initial_weights else None


def _initial_stats(model: ModelConfig) -> NormStats | None:
    """The only ones that come with the initial weights."""
    path, kind = _initial_path(model), model.normalization
    if _is_workdir(path):
        return load_norm_stats(path / STATS_FILE, kind)
    if path.suffix == ".npz":
        return None  # PaliGemma knows no robot
    known = openpi_format.asset_ids(path)
    if len(known) != 1:
        raise UsageError(
            f"{path} has statistics of {', '.join(known) or 'no data set'}; name one of them, the "
            f"path of a {STATS_FILE}, or {_BOUNDS!r}"
        )
    return openpi_format.load_stats(path, known[0], kind)


def check_initial_weights(policy: Any, model: ModelConfig, identity: dict[str, str]) -> None:
    """Compares what is stored with the model. Reads no weights.

    Args:
      policy: the model's.
      model: its config.
      identity: see `Checkpointer`; what a work directory must have in common with the run.

    Raises:
      ConfigError: there is nothing to begin with, or it does not fit.
    """
    if not model.initial_weights:
        return
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    try:
        path = _initial_path(model)
        if _is_workdir(path):
            _check_workdir(path, shapes, identity)
            return
        _require_pi(policy)
        if path.suffix == ".npz":
            paligemma_npz.check_paligemma(path, shapes)
        else:
            openpi_format.check_params(path, shapes)
    except ConfigError:
        raise
    except UsageError as error:
        fix = override("model.initial_weights", "PATH")
        name = model.initial_weights
        raise ConfigError("model.initial_weights", name, str(error), fix) from error


def load_initial_weights(
    policy: Any,
    model: ModelConfig,
    placed: Params,
    *,
    key: jax.Array,
    identity: dict[str, str],
    dtype: str = "float32",
) -> Params:
    """Reads the initial weights into their placement.

    Args:
      policy: the model's.
      model: its config; `initial_weights` is set.
      placed: tree of shardings.
      key: typed key, for leaves that the file lacks.
      identity: as for `check_initial_weights`.
      dtype: of the parameters, "float32" or "bfloat16".

    Raises:
      UsageError: the files changed since they were checked.
    """
    path = _initial_path(model)
    if _is_workdir(path):
        return _load_workdir(path, policy, placed, identity, dtype)
    is_paligemma = path.suffix == ".npz"
    initial = {"initial": paligemma_npz.INITIAL} if is_paligemma else {}
    target = make_target(policy.leaves(), placed, dtype=dtype, key=key, **initial)
    load = paligemma_npz.load_paligemma if is_paligemma else openpi_format.load_params
    return load(path, target)


def _initial_path(model: ModelConfig) -> pathlib.Path:
    return openpi_format.local_checkpoint(model.initial_weights)


def _is_workdir(path: pathlib.Path) -> bool:
    return (path / CHECKPOINTS).is_dir()


def _check_workdir(path: pathlib.Path, shapes: Params, identity: dict[str, str]) -> None:
    checkpointer = Checkpointer(path / CHECKPOINTS, keep=2, identity=identity)
    try:
        if not checkpointer.steps():
            raise UsageError(f"{path} holds no complete checkpoint")
        checkpointer.check(lambda _: {"state": {"params": shapes}}, within=PARAMS)
    finally:
        checkpointer.close()


def _load_workdir(
    path: pathlib.Path, policy: Any, placed: Params, identity: dict[str, str], dtype: str
) -> Params:
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    target = placed_structs(shapes, placed)
    checkpointer = Checkpointer(path / CHECKPOINTS, keep=2, identity=identity)
    try:
        restored = restore_params(checkpointer, target)
    except CorruptCheckpointError as error:
        raise UsageError(f"{error}") from error
    if restored is None:
        raise UsageError(f"{path} holds no complete checkpoint")
    return jax.tree.map(lambda x: x.astype(dtype), restored.arrays["state"]["params"])


def restore_params(checkpointer: Checkpointer, target: Params) -> Restored | None:
    """The newest sound parameters of a work directory, None when it has no checkpoint.

    Args:
      checkpointer: of the work directory; closed here.
      target: shapes, dtypes and shardings.

    Raises:
      CheckpointMismatchError, CorruptCheckpointError: see `Checkpointer.restore`.
    """
    try:
        return checkpointer.restore(lambda _: {"state": {"params": target}}, within=PARAMS)
    finally:
        checkpointer.close()


def _require_pi(policy: Any) -> None:
    if not isinstance(policy, PiPolicy):
        raise UsageError("only models of the family pi begin with openpi's or PaliGemma's weights")
