"""The jobs of the command line, from a validated config to an exit code."""

import contextlib
import functools
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import threading
from typing import Any

import jax
import numpy as np

from jaxvla.algorithms import ALGORITHMS
from jaxvla.checkpoint import CorruptCheckpointError
from jaxvla.config import ConfigError, ExperimentConfig, UsageError, override, to_dict
from jaxvla.data.normalization import save_norm_stats
from jaxvla.envs import ENVS
from jaxvla.envs.base import GroundedEnv, device_scenes
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.models import MODELS
from jaxvla.runtime.build import Blueprint, Parts, draw_blueprint
from jaxvla.runtime.controller import Controller
from jaxvla.runtime.dry_run import plan_lines
from jaxvla.runtime.evaluate import (
    draw_judge,
    evaluate_checkpoint,
    evaluated_target,
)
from jaxvla.runtime.export import check_export, export
from jaxvla.runtime.finetune import checkpoint_target, finetune
from jaxvla.runtime.finetune_data import must_record
from jaxvla.runtime.finetune_training import check_finetune
from jaxvla.runtime.groups import Groups
from jaxvla.runtime.pretrained import CHECKPOINTS, PARAMS, STATS_FILE, check_initial_weights
from jaxvla.runtime.serve import check_endpoint, serve_policy
from jaxvla.runtime.signals import stop_on_signals
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.writers import find_writers, write_json
from jaxvla.transport.schedule import Schedule
from jaxvla.transport.schedule_file import ScheduleRecorder, ScheduleReplay
from jaxvla.validation import validate_devices

EXIT_FINISHED, EXIT_UNSAFE = 0, 4
_MAKERS = ("train", "finetune")
"""Jobs that make a policy in a work directory."""
_READERS = ("evaluate", "serve", "export")
"""Jobs that only read the policy of a work directory."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "numpy")


def run(
    *,
    job: str,
    config: ExperimentConfig,
    workdir: pathlib.Path,
    is_dry_run: bool,
    may_resume: bool,
    command: str,
    with_judge: bool = False,
    export_dir: pathlib.Path | None = None,
    asset_id: str | None = None,
    record_schedule: pathlib.Path | None = None,
    replay_schedule: pathlib.Path | None = None,
) -> int:
    """Runs one job.

    Args:
      job: one of `jaxvla.main.JOBS`.
      config: validated, not resolved.
      workdir: where to write.
      is_dry_run: print the plan only.
      may_resume: a used work directory is continued; otherwise it is refused.
      command: the command line that was given, for "next" lines.
      with_judge: evaluate in the env's judge too.
      export_dir: where to export to, see `jaxvla.runtime.export`.
      asset_id: of the exported statistics; None: that of openpi's LIBERO data.
      record_schedule: new file to write the schedule of the run to.
      replay_schedule: file of the schedule to follow.

    Returns:
      The exit code of the contract.

    Raises:
      UsageError: the config does not fit the env, the devices, the work directory, the
        checkpoint in it or the schedule to replay. Nothing has been written then.
    """
    _check_plugins(config)
    if job == "compile_tasks":
        return _compile_tasks(config)
    if not is_dry_run:
        _check_workdir(workdir, job, may_resume, bool(config.model.initial_weights))
        if job == "serve":
            check_endpoint(config)
    _check_flags(job, with_judge=with_judge, is_exporting=bool(export_dir or asset_id))
    _check_schedules(record_schedule, replay_schedule, job, workdir)
    replay = ScheduleReplay(replay_schedule) if replay_schedule else None
    num_devices = _num_devices()  # before the env is made, which may put arrays on a device
    if not is_dry_run:
        validate_devices(config, num_devices)
    blueprint, judge = _draw(config, workdir, with_judge)
    if replay is not None:
        replay.require(blueprint.config)
    _check_training(blueprint, workdir, job)
    if is_dry_run:
        for line in plan_lines(blueprint):
            sys.stdout.write(line + "\n")
        return EXIT_FINISHED
    _check_checkpoint(blueprint, workdir, job)
    export_dir = (export_dir or workdir / "openpi").expanduser()
    asset_id = asset_id or "physical-intelligence/libero"
    if job == "export":
        check_export(blueprint, export_dir, asset_id)
    if not (workdir / CHECKPOINTS).is_dir():
        check_initial_weights(blueprint.policy, blueprint.config.model, blueprint.identity)
    _configure_jax(config)
    schedule = replay or _recorder(record_schedule, blueprint)
    try:
        if job == "export":
            with Screen(sys.stdout, num_updates=0) as screen:
                return export(blueprint, workdir, export_dir, asset_id, screen)
        with contextlib.closing(schedule):
            return _run(blueprint, job, workdir, command, schedule, judge)
    except CorruptCheckpointError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_UNSAFE


def _check_flags(job: str, *, with_judge: bool, is_exporting: bool) -> None:
    """Refuses flags of another job."""
    if with_judge and job != "evaluate":
        raise UsageError(f"--judge: job {job!r} has no judge. Fix: --job=evaluate")
    if is_exporting and job != "export":
        raise UsageError(f"--export_dir, --asset_id: job {job!r} has none. Fix: --job=export")


def _draw(
    config: ExperimentConfig, workdir: pathlib.Path, with_judge: bool
) -> tuple[Blueprint, Blueprint | None]:
    """The run, and its judge if there is to be one."""
    try:
        blueprint = draw_blueprint(config, workdir)
        return blueprint, draw_judge(blueprint, workdir) if with_judge else None
    except ConfigError:
        raise
    except ValueError as error:  # an optional package, or a library of it, is missing
        raise UsageError(f"config.env.name = {config.env.name!r}: {error}") from error


def _check_training(blueprint: Blueprint, workdir: pathlib.Path, job: str) -> None:
    """Refuses settings that a job which trains cannot work with."""
    if job == "train":
        _check_groups(blueprint)
        _check_learning(blueprint)
    if job == "finetune":
        check_finetune(blueprint, workdir)
        if must_record(blueprint, workdir):
            kind = blueprint.config.finetune.dataset.kind
            _check_experts(blueprint, "finetune.dataset.kind", kind, "recorded")


def _run(
    blueprint: Blueprint,
    job: str,
    workdir: pathlib.Path,
    command: str,
    schedule: Schedule,
    judge: Blueprint | None,
) -> int:
    """Runs a job that is known to fit."""
    stop_requested = threading.Event()
    config, is_supervised = blueprint.config, job == "finetune"
    num_updates = config.finetune.num_steps if is_supervised else config.learning.num_updates
    with (
        stop_on_signals(stop_requested),
        Screen(sys.stdout, num_updates=num_updates) as screen,
    ):
        if job == "evaluate":
            return evaluate_checkpoint(blueprint, workdir, screen, stop_requested, judge)
        if job == "serve":
            return serve_policy(blueprint, workdir, screen, stop_requested)
        if is_supervised:
            return finetune(
                blueprint,
                workdir=workdir,
                screen=screen,
                stop_requested=stop_requested,
                command=command,
                write_config=functools.partial(_write_config, workdir=workdir),
            )
        _write_config(blueprint, workdir)
        return Controller(
            blueprint,
            workdir=workdir,
            screen=screen,
            stop_requested=stop_requested,
            command=command,
            schedule=schedule,
        ).run()


def _compile_tasks(config: ExperimentConfig) -> int:
    # Not at the top: no other job needs all that reads LIBERO.
    from jaxvla.runtime.compile_tasks import compile_tasks

    try:
        return compile_tasks(config.env)
    except ConfigError:
        raise
    except ValueError as error:  # LIBERO, or a file of it, is missing
        raise UsageError(f"config.env.name = {config.env.name!r}: {error}") from error


def _check_plugins(config: ExperimentConfig) -> None:
    """Refuses plug-ins that cannot be imported."""
    for section, registry in (("env", ENVS), ("model", MODELS), ("algorithm", ALGORITHMS)):
        name = getattr(config, section).name
        try:
            registry.get(name)
        except ValueError as error:
            fix = f"use one of {', '.join(registry)}"
            raise ConfigError(f"{section}.name", name, str(error), fix) from error
    try:
        find_writers(config.telemetry.writers)
    except ConfigError:
        raise
    except ValueError as error:
        writers = config.telemetry.writers
        fix = override("telemetry.writers", ())
        raise ConfigError("telemetry.writers", writers, str(error), fix) from error


def _num_devices() -> int:
    """Devices present. To count them, JAX starts its backend."""
    try:
        return jax.device_count()
    except RuntimeError as error:
        raise UsageError(f"JAX has no devices: {error}. Fix: JAX_PLATFORMS=cpu") from error


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


def _check_checkpoint(blueprint: Blueprint, workdir: pathlib.Path, job: str) -> None:
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
        if job in _READERS:
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


def _configure_jax(config: ExperimentConfig) -> None:
    """Process-wide settings of JAX."""
    cache = config.runtime.compilation_cache
    if cache:
        directory = pathlib.Path(cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.runtime.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", config.runtime.matmul_precision)


def _check_workdir(
    workdir: pathlib.Path, job: str, may_resume: bool, has_initial_weights: bool
) -> None:
    """Refuses to overwrite a run, or to use one that is not there."""
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir}: is not a directory. Fix: --workdir=NEW_DIR")
    is_used = workdir.is_dir() and any(workdir.iterdir())
    if job in _MAKERS and is_used and not may_resume:
        raise UsageError(
            f"--workdir={workdir}: is not empty and --noresume was given. Fix: --workdir=NEW_DIR"
        )
    if job in _READERS and not (workdir / CHECKPOINTS).is_dir() and not has_initial_weights:
        raise UsageError(
            f"--workdir={workdir}: holds no checkpoints to {job}. Fix: run --job=train with it, or "
            "--config.model.initial_weights=CHECKPOINT"
        )


def _check_schedules(
    record: pathlib.Path | None, replay: pathlib.Path | None, job: str, workdir: pathlib.Path
) -> None:
    """Refuses schedules where there is none, and runs that do not begin at their beginning."""
    if record is None and replay is None:
        return
    flag = f"--record_schedule={record}" if record else f"--replay_schedule={replay}"
    if record and replay:
        raise UsageError(f"{flag} with --replay_schedule={replay}. Fix: give one of them")
    if job != "train":
        raise UsageError(f"{flag}: job {job!r} has no schedule. Fix: --job=train")
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UsageError(
            f"{flag}: --workdir={workdir} is not empty, and a run that goes on from a checkpoint "
            "cannot be replayed. Fix: --workdir=NEW_DIR"
        )
    if record and record.exists():
        raise UsageError(f"{flag}: is there already. Fix: --record_schedule=NEW_FILE")


def _recorder(path: pathlib.Path | None, blueprint: Blueprint) -> Schedule:
    """A schedule that is written to a file, if there is one to write."""
    if path is None:
        return Schedule()
    try:
        return ScheduleRecorder(path, blueprint.config)
    except OSError as error:
        raise UsageError(
            f"--record_schedule={path}: {error}. Fix: --record_schedule=NEW_FILE"
        ) from error


def _write_config(blueprint: Blueprint, workdir: pathlib.Path) -> None:
    """config.json: the resolved config and what it ran on. norm_stats.json: what a policy needs
    beside its weights."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(
        workdir / "config.json",
        {
            "config": to_dict(blueprint.config),
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "devices": [str(device) for device in jax.devices()],
        },
    )
    save_norm_stats(blueprint.stats, workdir / STATS_FILE)


def _git_commit() -> str | None:
    """Commit of the source tree, None outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
