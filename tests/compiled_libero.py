"""LIBERO tasks compiled once for all tests, and again when the code that compiles them changes."""

import fcntl
import functools
import hashlib
import pathlib
import tempfile

import pytest
from libero_marks import needs_package

from jaxvla.envs import libero_compiler
from jaxvla.envs.libero_mjx import LiberoMjxConfig
from jaxvla.runtime.compile_tasks import compile_tasks

MARKS = [
    pytest.mark.libero,
    pytest.mark.slow,  # compiling takes minutes
    pytest.mark.timeout(900),
    needs_package,
]


@functools.cache
def task_dir(suite: str, *task_ids: int) -> str:
    """Directory that holds the files of these tasks, for `LiberoMjxConfig.task_dir`."""
    directory = pathlib.Path(tempfile.gettempdir()) / f"jaxvla_tasks_{_version()}"
    config = LiberoMjxConfig(suite=suite, task_ids=task_ids, task_dir=str(directory))
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want the same files
        assert compile_tasks(config, num_workers=2) == 0
    return str(directory)


@functools.cache
def _version() -> str:
    """Hash of the modules that a task file may depend on."""
    root = pathlib.Path(libero_compiler.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(root / "rendering").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
