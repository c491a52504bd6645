"""The evaluate job: the newest checkpoint of a work directory on fixed episodes."""

import pathlib
import threading
from typing import Any

import jax

from jaxvla.checkpoint import Restored
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.groups import Groups
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.writers import write_json

EXIT_FINISHED, EXIT_STOPPED = 0, 3

EVALUATED = "state/params/"
"""Paths of what an evaluation reads of a checkpoint. It needs neither the optimizer nor the env
groups of the run, and so may have others."""


def evaluated_target(parts: Parts) -> Any:
    """What a checkpoint must hold to be evaluated: the parameters, placed as they are served."""
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        parts.blueprint.params_struct(),
        parts.sampler.params_shardings,
    )
    return {"state": {"params": params}}


def restore_evaluated(parts: Parts, workdir: pathlib.Path) -> Restored | None:
    """The newest sound parameters of a work directory, None when it has no checkpoint.

    Raises:
      CheckpointMismatchError, CorruptCheckpointError: see `Checkpointer.restore`.
    """
    checkpointer = parts.blueprint.checkpointer(workdir)
    try:
        return checkpointer.restore(lambda _: evaluated_target(parts), within=EVALUATED)
    finally:
        checkpointer.close()


def evaluate_checkpoint(
    blueprint: Blueprint,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
) -> int:
    """Writes eval.json and videos; returns the exit code of the contract."""
    parts = Parts(blueprint)
    groups = Groups(parts, log_dir=workdir / "logs", recorder=MetricRecorder())
    restored = restore_evaluated(parts, workdir)
    if restored is None:
        screen.message(f"{workdir} holds no complete checkpoint")
        return 1
    with screen.phase("compile"):
        parts.sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
    evaluator = Evaluator(
        config=blueprint.config.evaluation,
        sampler=parts.sampler,
        make_group=groups.evaluation,
        should_stop=stop_requested.is_set,
    )
    with screen.phase(f"evaluate update {restored.step}"):
        result = evaluator.evaluate(restored.arrays["state"]["params"], workdir / "videos")
    if result is None:
        return EXIT_STOPPED
    write_json(workdir / "eval.json", {"update": restored.step, **result.record()})
    screen.message("\n".join(result.table()))
    screen.message(f"videos in {workdir / 'videos'}")
    return EXIT_FINISHED
