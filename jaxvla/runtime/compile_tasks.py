"""The compile_tasks job: task files of `libero_mjx` from the installed LIBERO package."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from jaxvla.config import ConfigError, EnvConfig, override
from jaxvla.envs.libero_compiler import compile_task
from jaxvla.envs.libero_host import LiberoHost, LiberoHostConfig
from jaxvla.envs.libero_mjx import LiberoMjxConfig
from jaxvla.envs.libero_task import LiberoTask, cache_dir, task_path

EXIT_FINISHED, EXIT_FAILED = 0, 1

_COLUMNS = "{:<16}{:>3}  {:>6}  {:>11}  {:>13}  {:>9}  {:>8}  {}"
_HEADER = ("suite", "id", "geoms", "pairs", "contacts", "triangles", "seconds", "task")


def compile_tasks(config: EnvConfig, num_workers: int | None = None) -> int:
    """Compiles the configured tasks that have no sound file yet, side by side.

    Prints a line per task: geoms that collide; pairs of geoms and contacts, measured and allowed
    for; triangles that cameras see; seconds.

    Args:
      config: of the env; empty `task_ids` stand for the whole suite.
      num_workers: processes, of about 1 GB each; None: one per processor.

    Returns:
      The exit code of the contract.

    Raises:
      ConfigError: the env is not libero_mjx, or the suite or a task does not exist.
      ValueError: LIBERO is not installed.
    """
    if not isinstance(config, LiberoMjxConfig):
        raise ConfigError(
            "env.name", config.name, "has no tasks to compile", override("env.name", "libero_mjx")
        )
    ids = _task_ids(config)
    missing = [i for i in ids if not _is_sound(config, i)]
    directory = config.task_dir or cache_dir()
    _say(f"{len(ids) - len(missing)} of {len(ids)} tasks of {config.suite} are in {directory}")
    if not missing:
        return EXIT_FINISHED
    _say(_COLUMNS.format(*_HEADER))
    failed = 0
    for task_id, outcome in _run(config, missing, num_workers):
        if isinstance(outcome, ValueError):
            failed += 1
            _say(f"{config.suite} {task_id}: FAILED: {outcome}")
        else:
            _say(outcome)
    _say(f"{len(missing) - failed} compiled, {failed} failed")
    return EXIT_FAILED if failed else EXIT_FINISHED


def _task_ids(config: LiberoMjxConfig) -> tuple[int, ...]:
    """Positions of the configured tasks, which the LIBERO package must have."""
    host = LiberoHost(LiberoHostConfig(suite=config.suite, task_ids=config.task_ids))
    return config.task_ids or tuple(range(len(host.spec.tasks)))


def _is_sound(config: LiberoMjxConfig, task_id: int) -> bool:
    try:
        LiberoTask.load(task_path(config.suite, task_id, config.task_dir or None))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _run(
    config: LiberoMjxConfig, ids: list[int], num_workers: int | None
) -> Iterator[tuple[int, str | ValueError]]:
    """(task, its line or what was wrong), as tasks are finished."""
    # Read when MuJoCo is imported: spares the workers the GL libraries, which they do not use.
    os.environ["MUJOCO_GL"] = "disable"
    os.environ.pop("PYOPENGL_PLATFORM", None)  # set by MuJoCo for the backend it had
    count = min(len(ids), num_workers or os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        pending = {pool.submit(_compile, config.suite, i, config.task_dir): i for i in ids}
        for done in as_completed(pending):
            error = done.exception()
            if error is not None and not isinstance(error, ValueError):
                raise error
            yield pending[done], error or done.result()


def _compile(suite: str, task_id: int, directory: str) -> str:
    """Compiles one task in a worker process; returns its line of the table."""
    start = time.perf_counter()
    task = compile_task(suite, task_id)
    task.save(task_path(suite, task_id, directory or None))
    budget = task.contact_budget
    return _COLUMNS.format(
        suite,
        task_id,
        task.physics_xml.count("<geom "),
        f"{budget.measured_pairs}/{budget.max_geom_pairs}",
        f"{budget.measured_contacts}/{budget.max_contact_points}",
        len(task.surfaces["triangles"]),
        f"{time.perf_counter() - start:.0f}",
        task.name,
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
