"""What a supervised run trains with: functions, state, and how a checkpoint holds it."""

import dataclasses
import functools
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.data.augmentation import augment
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.learning.supervised import SupervisedFunctions
from jaxvla.learning.train_state import TrainState, init_state, state_shardings
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.finetune_data import check_data
from jaxvla.runtime.pretrained import CHECKPOINTS
from jaxvla.sharding import placed_structs
from jaxvla.types import Params

SECTION = "finetune.optimizer"


def check_finetune(blueprint: Blueprint, workdir: pathlib.Path) -> None:
    """Everything that can be known before a supervised run. Writes nothing.

    Raises:
      ConfigError: the settings do not fit each other, the model, the env or the data.
    """
    config = blueprint.config
    _check_batch(blueprint)
    make_optimizer(config.finetune.optimizer, blueprint.params_struct(), section=SECTION)
    if config.finetune.compute_norm_stats:
        _check_statistics(config)
    check_data(blueprint, workdir)


def _check_batch(blueprint: Blueprint) -> None:
    config, axes = blueprint.config.finetune, blueprint.layout.roles["learning"].axes
    shards = axes["data"] * axes["fsdp"]
    least = config.accumulation_steps * shards
    if config.batch_size % least:
        raise ConfigError(
            "finetune.batch_size",
            config.batch_size,
            f"must be a multiple of {least}: finetune.accumulation_steps = "
            f"{config.accumulation_steps} times the learning mesh's data x fsdp = {shards}",
            override("finetune.batch_size", least * max(1, config.batch_size // least)),
        )


def _check_statistics(config: ExperimentConfig) -> None:
    """The weights may be used with computed statistics, else ConfigError.

    `model.norm_stats` may name others: they stand in until the data set's are computed, which
    checkpoints with statistics of several data sets, or of none, need to be opened at all.
    """
    model = config.model
    initial = pathlib.Path(model.initial_weights).expanduser()
    if model.initial_weights and (initial / CHECKPOINTS).is_dir():
        raise ConfigError(
            "finetune.compute_norm_stats",
            True,
            "the weights of a work directory mean nothing without its own statistics",
            override("finetune.compute_norm_stats", False),
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedTraining:
    """The functions of a supervised run and the state that they change."""

    functions: SupervisedFunctions
    optimizer: optax.GradientTransformation
    struct: TrainState
    """Shapes and dtypes."""
    placed: TrainState
    """Shardings."""

    @classmethod
    def make(cls, parts: Parts) -> "SupervisedTraining":
        """On the learning mesh; nothing is compiled yet."""
        blueprint, mesh = parts.blueprint, parts.meshes["learning"]
        config, params = blueprint.config.finetune, blueprint.params_struct()
        optimizer = make_optimizer(config.optimizer, params, section=SECTION)
        struct = jax.eval_shape(lambda p: init_state(p, optimizer), params)
        if config.ema_decay:
            ema = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)
            struct = dataclasses.replace(struct, ema=ema)
        placed = state_shardings(struct, blueprint.policy.rules(), mesh)
        functions = SupervisedFunctions(
            policy=blueprint.policy,
            optimizer=optimizer,
            trainable=config.optimizer.trainable,
            mesh=mesh,
            shardings=placed,
            ema_decay=config.ema_decay,
            augment=functools.partial(augment, cameras=blueprint.spec.cameras)
            if config.augment
            else None,
        )
        return cls(functions=functions, optimizer=optimizer, struct=struct, placed=placed)

    def init(self, params: Params) -> TrainState:
        """A fresh state around `params`, which must lie as `placed` says."""
        placed = dataclasses.replace(self.placed, ema=None)
        state = jax.jit(lambda p: init_state(p, self.optimizer), out_shardings=placed)(params)
        if self.struct.ema is None:
            return state
        ema = jax.tree.map(
            lambda x, s: jax.device_put(x.astype(np.float32), s, may_alias=False),
            state.params,
            self.placed.ema,
        )
        return dataclasses.replace(state, ema=ema)

    def target(self) -> TrainState:
        """Shapes, dtypes and shardings."""
        return placed_structs(self.struct, self.placed)


def published(state: TrainState) -> Params:
    """What is evaluated and handed on: the moving average where one is kept."""
    return state.params if state.ema is None else state.ema


def stored(state: TrainState) -> dict[str, Any]:
    """The arrays of a checkpoint, or their shapes.

    `state/params` is what other jobs read. Where a moving average is kept it lies there, as in
    openpi's checkpoints, and the train state beside it as `train`.
    """
    if state.ema is None:
        return {"state": state}
    return {"state": {"params": state.ema}, "train": dataclasses.replace(state, ema=None)}


def restored(arrays: dict[str, Any]) -> TrainState:
    """The inverse of `stored`."""
    if "train" not in arrays:
        return arrays["state"]
    return dataclasses.replace(arrays["train"], ema=arrays["state"]["params"])


def batch_struct(sample: Any, *, batch_size: int, num_parts: int) -> Any:
    """Shapes and dtypes of a batch [A, b, ...] from those of samples [n, ...]."""
    shape = (num_parts, batch_size // num_parts)
    assert math.prod(shape) == batch_size
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype), sample)
