"""What a job refuses before anything is compiled or written, because its parts do not fit."""

import pathlib
from typing import Any

import jax
import numpy as np

from jaxvla.config import ConfigError, UsageError, override
from jaxvla.envs.base import GroundedEnv, device_scenes
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.evaluate import evaluated_target
from jaxvla.runtime.finetune import checkpoint_target
from jaxvla.runtime.finetune_data import must_record
from jaxvla.runtime.finetune_training import check_finetune
from jaxvla.runtime.groups import Groups
from jaxvla.runtime.pretrained import PARAMS
from jaxvla.telemetry.metrics import MetricRecorder

READERS = ("evaluate", "serve", "export")
"""Jobs that only read the policy of a work directory."""


def check_training(blueprint: Blueprint, workdir: pathlib.Path, job: str) -> None:
    """Refuses settings that a job which trains cannot work with."""
    if job == "train":
        _check_groups(blueprint)
        _check_learning(blueprint)
    if job == "finetune":
        check_finetune(blueprint, workdir)
        if must_record(blueprint, workdir):
            kind = blueprint.config.finetune.dataset.kind
            _check_experts(blueprint, "finetune.dataset.kind", kind, "recorded")


def _check_groups(blueprint: Blueprint) -> None:
    """Refuses a run in which some scenes would never be played."""
    num_groups, num_scenes = (
        blueprint.config.simulation.num_groups,
        len(device_scenes(blueprint.env)),
    )
    if num_groups < num_scenes:
        raise ConfigError(
            "simulation.num_groups",
            num_groups,
            f"the tasks need {num_scenes} scenes, and every env group plays one",
            override("simulation.num_groups", num_scenes),
        )


def _check_learning(blueprint: Blueprint) -> None:
    """Refuses what only the parameters' names and the kind of env show."""
    config = blueprint.config
    make_optimizer(config.optimizer, blueprint.params_struct())
    if not config.warm_start.num_steps:
        return
    section = "warm_start.optimizer"
    make_optimizer(config.warm_start.optimizer, blueprint.params_struct(), section=section)
    if not device_scenes(blueprint.env):
        raise ConfigError(
            "warm_start.num_steps",
            config.warm_start.num_steps,
            f"env {config.env.name!r} has no scripted expert to imitate",
            override("warm_start.num_steps", 0),
        )
    num_steps = config.warm_start.num_steps
    _check_experts(blueprint, "warm_start.num_steps", num_steps, 0)
    if config.warm_start.num_grounding_steps:
        _check_grounding(blueprint)


def _check_experts(blueprint: Blueprint, name: str, value: Any, instead: Any) -> None:
    """Refuses demonstrations of tasks that the env's expert cannot do.

    Args:
      blueprint: of the run.
      name: of the setting that asks for demonstrations.
      value: of that setting.
      instead: a value that asks for none.
    """
    for scene in device_scenes(blueprint.env):
        key, task = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), np.int32)
        try:
            jax.eval_shape(lambda k, t, s=scene: s.expert_action(s.reset(k, t)), key, task)
        except ValueError as error:
            raise ConfigError(name, value, str(error), override(name, instead)) from error


def _check_grounding(blueprint: Blueprint) -> None:
    """Refuses grounding steps that nothing could be learned from."""
    has_masks = all(isinstance(scene, GroundedEnv) for scene in device_scenes(blueprint.env))
    if not has_masks or "grounding_head" not in blueprint.params_struct():
        lacking = "the model has no grounding head" if has_masks else "the env gives no masks"
        raise ConfigError(
            "warm_start.num_grounding_steps",
            blueprint.config.warm_start.num_grounding_steps,
            lacking,
            override("warm_start.num_grounding_steps", 0),
        )


def check_checkpoint(blueprint: Blueprint, workdir: pathlib.Path, job: str) -> None:
    """Refuses settings that do not fit the checkpoint to use, before anything compiles."""
    parts = Parts(blueprint)

    def target(record: dict[str, Any]) -> Any:
        if "segments" not in record:
            raise _of_another_job(workdir, "finetune")
        groups = Groups(parts, log_dir=workdir / "logs", recorder=MetricRecorder())
        training = parts.training(blueprint.config.optimizer)
        return {"state": training.target(), "groups": groups.targets(record["segments"])}

    def supervised_target(record: dict[str, Any]) -> Any:
        if "segments" in record:
            raise _of_another_job(workdir, "train")
        return checkpoint_target(blueprint)

    checkpointer = blueprint.checkpointer(workdir)
    try:
        if job in READERS:
            checkpointer.check(lambda _: evaluated_target(parts), within=PARAMS)
        elif job == "finetune":
            checkpointer.check(supervised_target)
        else:
            checkpointer.check(target)
    finally:
        checkpointer.close()


def _of_another_job(workdir: pathlib.Path, job: str) -> UsageError:
    return UsageError(
        f"--workdir={workdir}: is one of --job={job}. Fix: --workdir=NEW_DIR "
        f"{override('model.initial_weights', workdir)}"
    )
