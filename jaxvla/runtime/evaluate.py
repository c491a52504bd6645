"""The evaluate job: the newest checkpoint of a work directory on fixed episodes."""

import pathlib
import threading
from typing import Any

import jax

from jaxvla.checkpoint import Checkpointer
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.groups import Groups
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.writers import write_json

EXIT_FINISHED, EXIT_STOPPED = 0, 3


def evaluate_checkpoint(
    blueprint: Blueprint,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
) -> int:
    """Writes eval.json and videos; returns the exit code of the contract."""
    parts = Parts(blueprint)
    groups = Groups(parts, log_dir=workdir / "logs", recorder=MetricRecorder())
    training = parts.training(blueprint.config.optimizer)

    def target(record: dict[str, Any]) -> Any:
        return {"state": training.target(), "groups": groups.targets(record["segments"])}

    checkpointer = Checkpointer(workdir / "checkpoints", keep=blueprint.config.checkpoint.keep)
    restored = checkpointer.restore(target)
    checkpointer.close()
    if restored is None:
        screen.message(f"{workdir} holds no complete checkpoint")
        return 1
    with screen.phase("compile"):
        parts.sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
    params = jax.device_put(restored.arrays["state"].params, parts.sampler.params_shardings)
    evaluator = Evaluator(
        config=blueprint.config.evaluation,
        sampler=parts.sampler,
        make_group=groups.evaluation,
        should_stop=stop_requested.is_set,
    )
    with screen.phase(f"evaluate update {restored.step}"):
        result = evaluator.evaluate(params, workdir / "videos")
    if result is None:
        return EXIT_STOPPED
    write_json(workdir / "eval.json", {"update": restored.step, **result.record()})
    screen.message("\n".join(result.table()))
    screen.message(f"videos in {workdir / 'videos'}")
    return EXIT_FINISHED
