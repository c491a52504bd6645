"""The evaluate job: a stored policy on fixed episodes."""

import dataclasses
import pathlib
import threading
from typing import Any

from jaxvla.checkpoint import Restored
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.evaluation.statistics import EvaluationResult, table
from jaxvla.runtime.build import Blueprint, Parts, draw_blueprint
from jaxvla.runtime.groups import Groups
from jaxvla.runtime.pretrained import restore_params
from jaxvla.sharding import placed_structs
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.progress import Screen
from jaxvla.telemetry.report import try_to_write_report
from jaxvla.telemetry.writers import write_json
from jaxvla.types import Params

EXIT_FINISHED, EXIT_STOPPED = 0, 3


def evaluated_target(parts: Parts, placed: Any = None) -> Any:
    """What a checkpoint must hold to be evaluated: the parameters, placed as they are served.

    Args:
      parts: of the run.
      placed: tree of shardings; None: those of the first policy server.
    """
    params = placed_structs(
        parts.blueprint.params_struct(), placed or parts.sampler.params_shardings
    )
    return {"state": {"params": params}}


def restore_evaluated(parts: Parts, workdir: pathlib.Path, placed: Any = None) -> Restored | None:
    """The newest sound parameters of a work directory, None when it has no checkpoint.

    Raises:
      CheckpointMismatchError, CorruptCheckpointError: see `Checkpointer.restore`.
    """
    target = evaluated_target(parts, placed)["state"]["params"]
    return restore_params(parts.blueprint.checkpointer(workdir), target)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredPolicy:
    """What is evaluated, served or exported."""

    params: Params
    """Placed as they are served."""
    update: int
    """Learner updates, or steps of fine-tuning, that made them; 0: the initial weights."""


def stored_policy(parts: Parts, workdir: pathlib.Path, placed: Any = None) -> StoredPolicy | None:
    """The newest sound checkpoint of a work directory; where it has none, `model.initial_weights`;
    None without either.

    Args:
      parts: of the run.
      workdir: of the run.
      placed: tree of shardings; None: those of the first policy server.

    Raises:
      CheckpointMismatchError, CorruptCheckpointError: see `Checkpointer.restore`.
    """
    restored = restore_evaluated(parts, workdir, placed)
    if restored is not None:
        return StoredPolicy(params=restored.arrays["state"]["params"], update=restored.step)
    if not parts.config.model.initial_weights:
        return None
    return StoredPolicy(
        params=parts.initial_params(placed or parts.sampler.params_shardings), update=0
    )


def draw_judge(blueprint: Blueprint, workdir: pathlib.Path) -> Blueprint:
    """The same policy in the env that judges it.

    Args:
      blueprint: of the run.
      workdir: of the run, which has the policy's statistics.

    Raises:
      ConfigError: the env has no judge.
      ValueError: what the judge needs is not installed.
    """
    config = blueprint.config
    env = config.env.judge()
    simulation = dataclasses.replace(
        config.simulation, envs_per_group=config.evaluation.num_judge_envs
    )
    return draw_blueprint(dataclasses.replace(config, env=env, simulation=simulation), workdir)


def evaluate_checkpoint(
    blueprint: Blueprint,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
    judge: Blueprint | None = None,
) -> int:
    """Writes eval.json and videos, and the report again; returns the exit code of the contract.

    Args:
      blueprint: of the run.
      workdir: of the run.
      screen: where to show.
      stop_requested: set by signals.
      judge: from `draw_judge`, to evaluate there too.
    """
    parts = Parts(blueprint)
    stored = stored_policy(parts, workdir)
    if stored is None:
        screen.message(f"{workdir} holds no complete checkpoint")
        return 1
    with screen.phase("compile"):
        parts.sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
    results: dict[str, EvaluationResult] = {}
    for where in (blueprint, judge) if judge else (blueprint,):
        name = where.config.env.name
        videos = workdir / "videos" / ("judge" if where is judge else "")
        groups = Groups(Parts(where), log_dir=workdir / "logs", recorder=MetricRecorder())
        evaluator = Evaluator(
            config=where.config.evaluation,
            sampler=parts.sampler,
            make_groups=groups.evaluation,
            should_stop=stop_requested.is_set,
        )
        with screen.phase(f"evaluate update {stored.update} in {name}"):
            result = evaluator.evaluate(stored.params, videos)
        if result is None:
            return EXIT_STOPPED
        results[name] = result
    own, *judged = results.values()
    record: dict[str, Any] = {"update": stored.update, **own.record()}
    if judge and judged:
        record["judge"] = {"env": judge.config.env.name, **judged[0].record()}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "eval.json", record)
    if (workdir / "metrics.jsonl").is_file():  # not a policy that was brought from elsewhere
        try_to_write_report(workdir)
    screen.message("\n".join(table(results)))
    screen.message(f"videos in {workdir / 'videos'}")
    return EXIT_FINISHED
