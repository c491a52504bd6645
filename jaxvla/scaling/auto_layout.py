"""meshes.layout = auto: short trials of the layouts worth trying, and the fastest is taken. No jax.

Two sweeps in one directory: every layout once, then the fastest `FINALISTS` until each has
`REPEATS` repeats. Each is the job "sweep" in a process of its own, so this one starts no backend
before the devices are free again.
"""

import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence

from jaxvla.config import UsageError
from jaxvla.scaling.sweep_files import SWEEP_JSON, read_results
from jaxvla.scaling.sweep_results import conclusions, rank
from jaxvla.scaling.trial_run import run_process

AUTO = "auto"
FINALISTS, REPEATS = 3, 3
_DAY_S = 86400.0
"""Its trials have limits of their own."""
_SETTINGS = {
    "runtime.kind": "local",
    "sweep.axes": "()",
    "sweep.warmup_updates": "1",
    "sweep.measured_updates": "4",
}


def known_layout(workdir: pathlib.Path) -> str | None:
    """The layout of the run that a work directory has; None: there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())["config"]["meshes"]["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--workdir={workdir}: {path} is no config of a run: {error!r}. Fix: --workdir=NEW_DIR"
        ) from error


def trials_directory(workdir: pathlib.Path) -> pathlib.Path:
    """Of the sweep that chooses, beside the work directory of the run, which is to be empty when
    the run begins."""
    return workdir.parent / f"{workdir.name}_layouts"


def choose_layout(
    arguments: Sequence[str],
    *,
    workdir: pathlib.Path,
    say: Callable[[str], None],
    stop_requested: threading.Event,
    program: Sequence[str] = (sys.executable, "-m", "jaxvla.main"),
) -> str:
    """Tries layouts and returns the fastest.

    Args:
      arguments: --config and the settings of the run.
      workdir: of the run.
      say: shows a line.
      stop_requested: set by signals.
      program: what runs a sweep.

    Raises:
      UsageError: no layout gave numbers.
      SweepStoppedError: a stop was asked for; the same command goes on with the trials.
    """
    directory = trials_directory(workdir)

    def sweep(**settings: str) -> None:
        every = _SETTINGS | {f"sweep.{name}": value for name, value in settings.items()}
        code = run_process(
            [
                *program,
                *arguments,
                *(f"--config.{name}={value}" for name, value in every.items()),
                "--job=sweep",
                f"--workdir={directory}",
            ],
            environment=os.environ,
            output=None,
            timeout_s=_DAY_S,
            stop_requested=stop_requested,
        )
        if code:
            raise UsageError(
                f"config.meshes.layout = {AUTO!r}: the trials in {directory} ended with exit code "
                f"{code}. Fix: --config.meshes.layout=colocated=1"
            )

    say("meshes.layout = auto: trying the layouts worth trying")
    sweep(repeats="1")
    best = rank(read_results(directory / SWEEP_JSON))[:FINALISTS]
    say(f"meshes.layout = auto: the fastest {len(best)} again")
    sweep(repeats=str(REPEATS), layouts=str(tuple(x.layout for x in best)))
    finalists = [
        x
        for x in rank(read_results(directory / SWEEP_JSON))
        if x.layout in {y.layout for y in best}
    ]
    for line in conclusions(finalists):
        say(f"meshes.layout = auto: {line}")
    return finalists[0].layout
