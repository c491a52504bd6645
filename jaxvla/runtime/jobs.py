"""The jobs of the command line, from a validated config to an exit code."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import threading
from typing import Any

import jax

from jaxvla import config as config_lib
from jaxvla.config import ConfigError, ExperimentConfig
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.controller import Controller
from jaxvla.runtime.dry_run import plan_lines
from jaxvla.runtime.evaluate import evaluate_checkpoint
from jaxvla.runtime.signals import stop_on_signals
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.writers import find_writers, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "numpy")


def run(
    *,
    job: str,
    config: ExperimentConfig,
    workdir: pathlib.Path,
    is_dry_run: bool,
    may_resume: bool,
    command: str,
) -> int:
    """Runs one job.

    Args:
      job: "train" or "evaluate".
      config: validated, not resolved.
      workdir: where to write.
      is_dry_run: print the plan only.
      may_resume: a used work directory is continued; otherwise it is refused.
      command: the command line that was given, for "next" lines.

    Returns:
      The exit code of the contract.

    Raises:
      ConfigError: the config does not fit the env, the devices or the work directory.
    """
    try:
        blueprint = draw_blueprint(config)
        find_writers(config.telemetry.writers)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            "env / model / telemetry", config.name, str(error), "see above"
        ) from error
    _configure_jax(config)
    config_lib.validate_devices(config, jax.device_count())
    if is_dry_run:
        for line in plan_lines(blueprint):
            sys.stdout.write(line + "\n")
        return 0
    _check_workdir(workdir, job, may_resume)
    stop_requested = threading.Event()
    with (
        stop_on_signals(stop_requested),
        Screen(sys.stdout, num_updates=config.learning.num_updates) as screen,
    ):
        if job == "evaluate":
            return evaluate_checkpoint(blueprint, workdir, screen, stop_requested)
        _write_config(blueprint, workdir)
        return Controller(
            blueprint,
            workdir=workdir,
            screen=screen,
            stop_requested=stop_requested,
            command=command,
        ).run()


def _configure_jax(config: ExperimentConfig) -> None:
    """Process-wide settings of JAX."""
    cache = config.runtime.compilation_cache
    if cache:
        directory = pathlib.Path(cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.runtime.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", config.runtime.matmul_precision)


def _check_workdir(workdir: pathlib.Path, job: str, may_resume: bool) -> None:
    """Refuses to overwrite a run, or to evaluate one that is not there."""
    is_used = workdir.is_dir() and any(workdir.iterdir())
    if job == "train" and is_used and not may_resume:
        raise ConfigError(
            "workdir", str(workdir), "is not empty and --noresume was given", "--workdir=NEW_DIR"
        )
    if job == "evaluate" and not (workdir / "checkpoints").is_dir():
        raise ConfigError(
            "workdir",
            str(workdir),
            "holds no checkpoints to evaluate",
            "train first, same --workdir",
        )


def _write_config(blueprint: Blueprint, workdir: pathlib.Path) -> None:
    """config.json: the resolved config and what it ran on."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(
        workdir / "config.json",
        {
            "config": config_lib.to_dict(blueprint.config),
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "devices": [str(device) for device in jax.devices()],
        },
    )


def _git_commit() -> str | None:
    """Commit of the source tree, None outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
