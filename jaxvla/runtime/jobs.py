"""The jobs of the command line, from a validated config to an exit code."""

import contextlib
import functools
import pathlib
import sys
import threading

import jax

from jaxvla.algorithms import ALGORITHMS
from jaxvla.checkpoint import CorruptCheckpointError, SaveError
from jaxvla.config import ConfigError, ExperimentConfig, UsageError, override
from jaxvla.envs import ENVS
from jaxvla.models import MODELS
from jaxvla.runtime import jax_settings
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.checks import READERS, check_checkpoint, check_training
from jaxvla.runtime.cluster import check_cluster, run_cluster
from jaxvla.runtime.controller import Controller
from jaxvla.runtime.dry_run import plan_lines
from jaxvla.runtime.evaluate import (
    draw_judge,
    evaluate_checkpoint,
)
from jaxvla.runtime.export import check_export, export
from jaxvla.runtime.finetune import finetune
from jaxvla.runtime.pretrained import CHECKPOINTS, check_initial_weights
from jaxvla.runtime.provenance import write_config
from jaxvla.runtime.serve import check_endpoint, serve_policy
from jaxvla.runtime.signals import stop_on_signals
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.writers import find_writers
from jaxvla.transport.schedule import Schedule
from jaxvla.transport.schedule_file import ScheduleRecorder, ScheduleReplay
from jaxvla.validation import validate_devices

EXIT_FINISHED, EXIT_FAILED, EXIT_UNSAFE = 0, 1, 4
_MAKERS = ("train", "finetune")
"""Jobs that make a policy in a work directory."""


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
    check_plugins(config)
    if job == "compile_tasks":
        return _compile_tasks(config)
    if not is_dry_run:
        check_workdir(workdir, job, may_resume, bool(config.model.initial_weights))
        if job == "serve":
            check_endpoint(config)
    check_flags(job, with_judge=with_judge, is_exporting=bool(export_dir or asset_id))
    check_schedules(
        record_schedule, replay_schedule, job=job, kind=config.runtime.kind, workdir=workdir
    )
    replay = ScheduleReplay(replay_schedule) if replay_schedule else None
    has_processes = job == "train" and config.runtime.kind != "local"
    if has_processes:
        check_cluster(config, workdir)
        jax_settings.leave_accelerators()  # they are for the programs
    num_devices = _num_devices()  # before the env is made, which may put arrays on a device
    if not is_dry_run and not has_processes:
        validate_devices(config, num_devices)
    blueprint, judge = _draw(config, workdir, with_judge)
    if replay is not None:
        replay.require(blueprint.config)
    check_training(blueprint, workdir, job)
    if is_dry_run:
        for line in plan_lines(blueprint):
            sys.stdout.write(line + "\n")
        return EXIT_FINISHED
    if has_processes:
        return _run_processes(blueprint, config, workdir, command)
    check_checkpoint(blueprint, workdir, job)
    export_dir = (export_dir or workdir / "openpi").expanduser()
    asset_id = asset_id or "physical-intelligence/libero"
    if job == "export":
        check_export(blueprint, export_dir, asset_id)
    if not (workdir / CHECKPOINTS).is_dir():
        check_initial_weights(blueprint.policy, blueprint.config.model, blueprint.identity)
    jax_settings.configure(config)
    schedule = replay or _recorder(record_schedule, blueprint)
    try:
        if job == "export":
            with Screen(sys.stdout, num_updates=0) as screen:
                return export(blueprint, workdir, export_dir, asset_id, screen)
        with contextlib.closing(schedule):
            return _run(blueprint, job, workdir, command, schedule, judge)
    except (CorruptCheckpointError, SaveError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_UNSAFE if isinstance(error, CorruptCheckpointError) else EXIT_FAILED


def check_flags(job: str, *, with_judge: bool, is_exporting: bool) -> None:
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
                write_config=functools.partial(write_config, workdir=workdir),
            )
        write_config(blueprint, workdir)
        return Controller(
            blueprint,
            workdir=workdir,
            screen=screen,
            stop_requested=stop_requested,
            command=command,
            schedule=schedule,
        ).run()


def _run_processes(
    blueprint: Blueprint, config: ExperimentConfig, workdir: pathlib.Path, command: str
) -> int:
    """Runs training in a process for every program, which resolve the config themselves."""
    stop_requested = threading.Event()
    with (
        stop_on_signals(stop_requested),
        Screen(sys.stdout, num_updates=blueprint.config.learning.num_updates) as screen,
    ):
        return run_cluster(
            config, workdir=workdir, screen=screen, stop_requested=stop_requested, command=command
        )


def _compile_tasks(config: ExperimentConfig) -> int:
    # Not at the top: no other job needs all that reads LIBERO.
    from jaxvla.runtime.compile_tasks import compile_tasks

    try:
        return compile_tasks(config.env)
    except ConfigError:
        raise
    except ValueError as error:  # LIBERO, or a file of it, is missing
        raise UsageError(f"config.env.name = {config.env.name!r}: {error}") from error


def check_plugins(config: ExperimentConfig) -> None:
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


def check_workdir(
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
    if job in READERS and not (workdir / CHECKPOINTS).is_dir() and not has_initial_weights:
        raise UsageError(
            f"--workdir={workdir}: holds no checkpoints to {job}. Fix: run --job=train with it, or "
            "--config.model.initial_weights=CHECKPOINT"
        )


def check_schedules(
    record: pathlib.Path | None,
    replay: pathlib.Path | None,
    *,
    job: str,
    kind: str,
    workdir: pathlib.Path,
) -> None:
    """Refuses schedules where there is none, and runs that do not begin at their beginning."""
    if record is None and replay is None:
        return
    flag = f"--record_schedule={record}" if record else f"--replay_schedule={replay}"
    if record and replay:
        raise UsageError(f"{flag} with --replay_schedule={replay}. Fix: give one of them")
    if job != "train":
        raise UsageError(f"{flag}: job {job!r} has no schedule. Fix: --job=train")
    if kind != "local":
        fix = override("runtime.kind", "local")
        raise UsageError(f"{flag}: only threads of one process have a schedule. Fix: {fix}")
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
