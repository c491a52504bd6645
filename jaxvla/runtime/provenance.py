"""What a work directory says of the run that it belongs to."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from jaxvla.config import to_dict
from jaxvla.data.normalization import save_norm_stats
from jaxvla.runtime.build import Blueprint
from jaxvla.runtime.pretrained import STATS_FILE
from jaxvla.telemetry.writers import write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "numpy")


def write_config(blueprint: Blueprint, workdir: pathlib.Path) -> None:
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
            "cores": os.cpu_count(),
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
