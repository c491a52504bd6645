"""The job "sweep": checks everything, then runs trials in processes of their own.

This process leaves the accelerators to the trials.
"""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxvla.config import ConfigError, ExperimentConfig, UsageError, override, to_dict
from jaxvla.runtime import jax_settings
from jaxvla.runtime.build import draw_blueprint
from jaxvla.runtime.checks import check_training
from jaxvla.runtime.jobs import check_plugins
from jaxvla.runtime.memory import MemoryEstimate
from jaxvla.runtime.signals import EXIT_STOPPED, stop_on_signals
from jaxvla.scaling.layouts import Constraints
from jaxvla.scaling.sweep import Sweep
from jaxvla.scaling.sweep_files import SWEEP_CSV, SWEEP_JSON, SweepBook
from jaxvla.scaling.sweep_plan import Plan, Reconfigure, Trial, plan_sweep
from jaxvla.scaling.sweep_report import sweep_page
from jaxvla.scaling.sweep_results import TrialResult, conclusions, rank, speed_text
from jaxvla.scaling.trial_run import HOST_DEVICES_FLAG, TrialRunner, trial_environment
from jaxvla.telemetry.writers import replacing

EXIT_FINISHED, EXIT_FAILED = 0, 1
REPORT = "report.html"
_PROBE_S = 300.0
_GIB = 2**30
_UNUSED = ("sweep", "name", "meshes", "warm_start", "finetune", "evaluation", "checkpoint")
"""Sections that make no difference to a trial: they may change between parts of a sweep."""

_PROBE = """
import json, os, jax
devices = jax.devices()
limits = [(d.memory_stats() or {}).get("bytes_limit") for d in devices]
print(json.dumps({"num": len(devices), "kind": devices[0].device_kind, "limits": limits}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What trials run on."""

    num: int
    kind: str
    memory: int
    """Bytes of the smallest device; 0: it does not say."""


def run(
    config: ExperimentConfig,
    *,
    workdir: pathlib.Path,
    is_dry_run: bool,
    may_resume: bool,
    arguments: Sequence[str],
    command: str,
    reconfigure: Reconfigure,
) -> int:
    """Runs a sweep, or what is left of one.

    Args:
      config: valid.
      workdir: of the sweep.
      is_dry_run: print the trials only.
      may_resume: a used work directory is continued; otherwise it is refused.
      arguments: --config and the settings of the command line, for the trials.
      command: the whole command line, to be shown.
      reconfigure: applies settings to the config as the command line does.

    Returns:
      The exit code of the contract; 1 when no trial gave numbers.

    Raises:
      UsageError: something cannot work. Nothing has been started or written then.
    """
    check_plugins(config)
    if not is_dry_run and not may_resume and workdir.is_dir() and any(workdir.iterdir()):
        raise UsageError(
            f"--workdir={workdir}: is not empty and --noresume was given. Fix: --workdir=NEW_DIR"
        )
    sweep = config.sweep
    environment = trial_environment(sweep.host_devices, os.environ)
    devices = _find_devices(sweep.host_devices, environment)
    plan = plan_sweep(
        config,
        num_devices=devices.num,
        reconfigure=reconfigure,
        constraints=_constraints(config, devices),
    )
    _check_trials(plan.trials, reconfigure, workdir)
    if is_dry_run:
        _say(*plan_lines(plan, config, devices))
        return EXIT_FINISHED
    book = SweepBook(workdir, _conditions(config, devices), _about(plan))
    stop_requested = threading.Event()
    runner = TrialRunner(
        arguments=arguments,
        environment=environment,
        timeout_s=sweep.timeout_s,
        stop_requested=stop_requested,
    )
    todo = Sweep(
        plan.trials,
        book=book,
        workdir=workdir,
        repeats=sweep.repeats,
        retry_failed=sweep.retry_failed,
        run=runner.run,
        say=_say,
        stop_requested=stop_requested,
    )
    _say(_count_line(plan, config, devices))
    with stop_on_signals(stop_requested):
        is_finished = todo.run()
    content = sweep_page(
        todo.results, title=f"Sweep of {config.name}", about=_about(plan), command=command
    )
    with replacing(workdir / REPORT) as file:
        file.write(content)
    winner = next(iter(rank(todo.results)), None)
    if winner and is_finished:
        command = _training_command(winner, arguments, sweep.host_devices)
    elif is_finished:  # without a single figure
        command += " --config.sweep.retry_failed=True"
    _say(*_last_lines(todo.results, workdir, command))
    if not is_finished:
        return EXIT_STOPPED
    return EXIT_FINISHED if winner else EXIT_FAILED


def _find_devices(host_devices: int, environment: Mapping[str, str]) -> Devices:
    """Asks a process, which gives them back: this one must not hold any."""
    if host_devices:
        return Devices(num=host_devices, kind="cpu", memory=0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"JAX finds no devices in {_PROBE_S:g} s. Fix: JAX_PLATFORMS=cpu"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(f"JAX has no devices: {last}. Fix: JAX_PLATFORMS=cpu")
    found = json.loads(done.stdout.splitlines()[-1])
    limits = [x for x in found["limits"] if x]
    return Devices(num=found["num"], kind=found["kind"], memory=min(limits, default=0))


def _constraints(config: ExperimentConfig, devices: Devices) -> Constraints:
    """Of the layouts that "all" stands for. Memory is only estimated when there is a limit."""
    sweep = config.sweep
    limit = int(sweep.device_memory_gib * _GIB) or devices.memory
    memory = None
    if limit:
        jax_settings.leave_accelerators()
        memory = MemoryEstimate(draw_blueprint(config)).total
    return Constraints(
        config=config,
        devices_per_host=sweep.devices_per_host,
        memory=memory,
        device_memory=limit,
        keep=sweep.keep,
    )


def _check_trials(trials: Sequence[Trial], reconfigure: Reconfigure, workdir: pathlib.Path) -> None:
    """Refuses what the env, the model or the algorithm cannot do. Layouts make no difference."""
    jax_settings.leave_accelerators()
    for trial in {str(trial.overrides): trial for trial in trials}.values():
        config = reconfigure(trial.settings())
        check_plugins(config)
        try:
            blueprint = draw_blueprint(config)
        except ConfigError:
            raise
        except ValueError as error:  # an optional package, or a library of it, is missing
            raise UsageError(f"config.env.name = {config.env.name!r}: {error}") from error
        check_training(blueprint, workdir, "train")


def _conditions(config: ExperimentConfig, devices: Devices) -> dict[str, Any]:
    """What all trials of a sweep have in common."""
    settings = {name: x for name, x in to_dict(config).items() if name not in _UNUSED}
    return {
        "config": settings,
        "warmup_updates": config.sweep.warmup_updates,
        "measured_updates": config.sweep.measured_updates,
        "devices": {"num": devices.num, "kind": devices.kind},
    }


def _about(plan: Plan) -> dict[str, Any]:
    return {
        "pruned": {str(count): dict(reasons) for count, reasons in plan.pruned.items()},
        "impossible": {trial.title: str(error) for trial, error in plan.impossible},
    }


def plan_lines(plan: Plan, config: ExperimentConfig, devices: Devices) -> Iterator[str]:
    """What --dry_run prints: the trials, and what is not tried for which reason."""
    yield _count_line(plan, config, devices)
    for trial in plan.trials:
        yield f"  {trial.title}  ({trial.layout.placement}, {trial.num_updates} updates)"
    for count, reasons in plan.pruned.items():
        yield f"pruned     {reasons.total()} layouts of {count} devices"
        yield from (f"  {number:>8}  {reason}" for reason, number in reasons.most_common())
    if plan.impossible:
        yield f"impossible {len(plan.impossible)} combinations of settings"
        yield from (f"  {trial.title}: {error}" for trial, error in plan.impossible)


def _count_line(plan: Plan, config: ExperimentConfig, devices: Devices) -> str:
    sweep = config.sweep
    return (
        f"sweep      {len(plan.trials)} trials x {sweep.repeats} repeats, "
        f"{sweep.measured_updates} updates measured after {sweep.warmup_updates} or more, "
        f"on {devices.num} devices ({devices.kind})"
    )


def _last_lines(
    results: Sequence[TrialResult], workdir: pathlib.Path, command: str
) -> Iterator[str]:
    """The table, what follows from it, and what to do next."""
    for place, result in enumerate(rank(results), start=1):
        yield f"{place:>3}. {speed_text(result):<36} {result.title}"
    yield from conclusions(results)
    yield f"workdir    {workdir} ({SWEEP_JSON}, {SWEEP_CSV}, {REPORT})"
    yield f"next       {command}"


def _training_command(best: TrialResult, arguments: Sequence[str], host_devices: int) -> str:
    """The command that trains with what was best, on the devices that the trials had."""
    changes = {"meshes.layout": best.layout, **best.overrides}
    changed = {f"--config.{name}" for name in changes}
    kept = [
        shlex.quote(x)
        for x in arguments
        if x.partition("=")[0] not in changed and not x.startswith("--config.sweep.")
    ]
    flags = f"XLA_FLAGS={HOST_DEVICES_FLAG}={host_devices} " if host_devices else ""
    settings = [override(name, value) for name, value in changes.items()]
    return flags + " ".join(["python -m jaxvla.main", *kept, *settings])


def _say(*lines: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever read has gone; the files stay
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
