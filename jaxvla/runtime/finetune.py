"""The finetune job: supervised learning from demonstrations.

    record or open the data -> statistics -> restore or start anew -> evaluate -> steps -> evaluate

consumes    a blueprint, demonstrations, an empty or used work directory
produces    checkpoints, norm_stats.json, metrics.jsonl, summary.json, report.html, videos,
            the screen
waits for   the thread that reads data, the device, or a signal
unblocked by  that thread, which ends with the steps
"""

import logging
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxvla import rng
from jaxvla.algorithms.base import Metrics
from jaxvla.checkpoint import Restored
from jaxvla.config import to_dict
from jaxvla.data.demonstrations import ShuffledOrder
from jaxvla.data.episodes import EpisodeDataset, EpisodeSamples
from jaxvla.data.normalization import save_norm_stats
from jaxvla.data.prefetch import Prefetcher
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.learning.learner import NonFiniteError
from jaxvla.learning.supervised import supervised_steps
from jaxvla.learning.train_state import TrainState
from jaxvla.runtime.build import Blueprint, Parts, draw_blueprint
from jaxvla.runtime.finetune_data import (
    StoppedError,
    has_checkpoint,
    make_samples,
    open_data,
    record_expert,
    statistics_of,
)
from jaxvla.runtime.finetune_training import (
    SupervisedTraining,
    batch_struct,
    published,
    restored,
    stored,
)
from jaxvla.runtime.groups import Groups
from jaxvla.runtime.pretrained import STATS_FILE
from jaxvla.runtime.telemetry import Telemetry
from jaxvla.telemetry.metrics import Mean, Rate, Total
from jaxvla.telemetry.progress import Screen, SupervisedSummary
from jaxvla.telemetry.report import try_to_write_report
from jaxvla.telemetry.writers import RunInfo
from jaxvla.types import SupervisedBatch

_LOG = logging.getLogger(__name__)

EXIT_FINISHED, EXIT_STOPPED, EXIT_UNSAFE = 0, 3, 4
_ROLE = "learning"


def finetune(
    blueprint: Blueprint,
    *,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
    command: str,
    write_config: Callable[[Blueprint], None],
) -> int:
    """Runs the job; returns the exit code of the contract.

    Args:
      blueprint: of the run, checked by `check_finetune`.
      workdir: where to write; a checkpoint in it is continued.
      screen: where to show.
      stop_requested: set by signals.
      command: the command line; it also continues the run.
      write_config: writes config.json and norm_stats.json.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    config = blueprint.config.finetune
    if config.dataset.kind == "expert":
        try:
            with screen.phase(f"demonstrations ({config.dataset.num_episodes} scripted episodes)"):
                record_expert(blueprint, workdir, stop_requested.is_set)
        except StoppedError:
            return EXIT_STOPPED
    dataset = open_data(blueprint, workdir)
    try:
        if config.compute_norm_stats and not has_checkpoint(blueprint, workdir):
            with screen.phase("statistics of states and actions"):
                blueprint = with_computed_statistics(blueprint, dataset, workdir)
        write_config(blueprint)
        return Finetuning(
            blueprint,
            make_samples(blueprint, dataset),
            workdir=workdir,
            screen=screen,
            stop_requested=stop_requested,
            command=command,
        ).run()
    finally:
        dataset.close()


def with_computed_statistics(
    blueprint: Blueprint, dataset: EpisodeDataset, workdir: pathlib.Path
) -> Blueprint:
    """Writes norm_stats.json, whole or not at all, and draws the blueprint that goes by it.

    What lies there without a checkpoint is replaced: a run that ended early may have left what
    stood in for the statistics.

    Raises:
      ConfigError: the data cannot be normalised so.
    """
    partial = workdir / f".{STATS_FILE}.partial"
    save_norm_stats(statistics_of(blueprint, dataset), partial)
    partial.replace(workdir / STATS_FILE)
    return draw_blueprint(blueprint.config, workdir)


def checkpoint_target(blueprint: Blueprint) -> dict[str, Any]:
    """What a checkpoint of a supervised run must hold."""
    return stored(SupervisedTraining.make(Parts(blueprint)).target())


class Finetuning:
    """One supervised run in one process."""

    def __init__(
        self,
        blueprint: Blueprint,
        samples: EpisodeSamples,
        *,
        workdir: pathlib.Path,
        screen: Screen,
        stop_requested: threading.Event,
        command: str,
    ):
        """Args:
        blueprint, workdir, screen, stop_requested, command: as for `finetune`.
        samples: what to learn.
        """
        self.config = blueprint.config
        self._config = blueprint.config.finetune
        self._samples = samples
        self._workdir = workdir
        self._screen = screen
        self._stop_requested = stop_requested
        self._command = command
        self._parts = Parts(blueprint)
        self._training = SupervisedTraining.make(self._parts)
        self._checkpointer = blueprint.checkpointer(workdir)
        self._telemetry = Telemetry(
            workdir=workdir, screen=screen, is_tracing=self.config.telemetry.trace
        )
        self._meter = self._telemetry.meters[_ROLE]
        self._groups = Groups(
            self._parts, log_dir=workdir / "logs", recorder=self._telemetry.recorder
        )
        self._evaluator = Evaluator(
            config=self.config.evaluation,
            sampler=self._parts.sampler,
            make_groups=self._groups.evaluation,
            should_stop=stop_requested.is_set,
        )
        self._before: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None
        self._skipped_in_a_row = 0
        self._num_samples, self._train_s = 0, 0.0

    def run(self) -> int:
        """Runs to the end; returns the exit code of the contract."""
        found = self._checkpointer.restore(lambda _: stored(self._training.target()))
        run = RunInfo(
            workdir=self._workdir,
            name=self.config.name,
            config=to_dict(self.config),
            resume_update=found.step if found else None,
        )
        with self._telemetry.open(run, self.config.telemetry.writers):
            try:
                return self._run(found)
            finally:
                self._telemetry.write_trace()
                self._checkpointer.close()
                try_to_write_report(self._workdir)

    def _run(self, found: Restored | None) -> int:
        """The run itself; its books are closed whatever happens."""
        outcome, detail, code = "finished", "", EXIT_FINISHED
        try:
            self._compile()
            state, step = self._resume(found) if found else self._begin()
            if step == 0 and self._before is None:
                self._before = self._evaluate(state, step, is_final=False)
            if not self._stop_requested.is_set():
                state, step = self._train(state, step)
            if not self._stop_requested.is_set():
                self._after = self._evaluate(state, step, is_final=True)
            self._save(state, step)
            if self._stop_requested.is_set():
                outcome, code = "stopped", EXIT_STOPPED
        except NonFiniteError as error:
            outcome, detail, code = "unsafe", str(error), EXIT_UNSAFE
            self._screen.message(f"error: {detail}")
        except Exception as error:  # the caller's to show
            self._close_books("failed", f"{type(error).__name__}: {error}")
            raise
        self._close_books(outcome, detail)
        return code

    # ----------------------------------------------------------------- before training

    def _compile(self) -> None:
        """Compiles the step, and what evaluation calls, side by side."""
        blueprint = self._parts.blueprint
        struct = batch_struct(
            self._samples.read(np.zeros(1, np.int64)),
            batch_size=self._config.batch_size,
            num_parts=self._config.accumulation_steps,
        )
        key = jax.eval_shape(lambda: self._parts.root)
        jobs: list[Callable[[], None]] = [
            lambda: self._training.functions.compile(self._training.target(), struct, key)
        ]
        if self.config.evaluation.num_episodes:
            shapes = blueprint.params_struct(), blueprint.observation_struct(1)
            jobs.append(lambda: self._parts.sampler.compile(*shapes))
            if self._groups.is_device_env:
                jobs += [stepper.compile for stepper in self._groups.steppers]
        with self._screen.phase("compile"), ThreadPoolExecutor(max_workers=len(jobs)) as pool:
            for job in [pool.submit(job) for job in jobs]:
                job.result()

    def _resume(self, found: Restored) -> tuple[TrainState, int]:
        """State and step of a checkpoint."""
        record = found.record
        self._telemetry.restore(record["telemetry"])
        self._before = record["evaluation_before"]
        self._skipped_in_a_row = record["skipped_in_a_row"]
        self._screen.message(f"continuing {self._workdir} after update {found.step}")
        if self._before is not None:
            self._screen.evaluated(self._before, update=0)
        return restored(found.arrays), found.step

    def _begin(self) -> tuple[TrainState, int]:
        """The state of a new run."""
        return self._training.init(self._parts.fresh_params(self._training)), 0

    # ---------------------------------------------------------------------- the steps

    def _train(self, state: TrainState, first: int) -> tuple[TrainState, int]:
        """Takes the steps that are left; returns the last state and the steps taken so far."""
        config = self._config
        order = ShuffledOrder(
            self._samples.num_samples, batch_size=config.batch_size, seed=self.config.seed
        )

        def read(step: int) -> SupervisedBatch:
            batch = self._samples.read(order.rows(step))
            parts = (config.accumulation_steps, -1)
            return jax.tree.map(lambda x: x.reshape(*parts, *x.shape[1:]), batch)

        self._telemetry.begin_training()
        step, pending, start_s = first, None, time.monotonic()
        indices = range(first, config.num_steps)
        with (
            Prefetcher(read, indices, depth=config.prefetch) as batches,
            self._meter.thread("learner"),
        ):
            steps = supervised_steps(
                self._training.functions.step,
                state,
                self._arriving(batches),
                placement=self._training.functions.columns,
                key=rng.stream(self._parts.root, "finetune"),
                first_step=first,
            )
            for number, stepped, metrics in steps:
                state, step = stepped, number + 1
                self._count(step - 1, pending)
                pending = metrics
                if self._is_due(step):
                    self._count(step, pending)
                    pending = None
                    self._on_due(state, step)
                self._train_s = time.monotonic() - start_s
            if pending is not None:  # stopped between two records
                self._count(step, pending)
                self._record(step, {})
        return state, step

    def _arriving(self, batches: Iterator[SupervisedBatch]) -> Iterator[SupervisedBatch]:
        """The batches until a stop is asked for. What the device waits for is booked."""
        while not self._stop_requested.is_set():
            with self._meter.waiting("data"):
                batch = next(batches, None)
            if batch is None or self._stop_requested.is_set():  # asked for while it waited
                return
            yield batch

    def _count(self, step: int, metrics: Metrics | None) -> None:
        """Adds a step's metrics to the window. Those of the step before the one in progress are
        there already, so that the device is not waited for.

        Raises:
          NonFiniteError: too many steps in a row had a gradient that was not finite.
        """
        if metrics is None:
            return
        recorder, size = self._telemetry.recorder, self._config.batch_size
        with self._meter.busy("train"):
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        for name, value in values.items():
            recorder.add(f"learner/{name}", value, Mean)
        recorder.add("rate/samples_per_s", size, Rate)
        recorder.add("rate/updates_per_s", 1, Rate)
        self._num_samples += size
        is_bad = not math.isfinite(values["grad_norm"])
        recorder.add("faults/skipped_optimizer_steps", int(is_bad), Total)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_bad else 0
        if is_bad:
            _LOG.warning("update %d: gradient not finite, skipped", step)
        if self._skipped_in_a_row >= self.config.learning.max_skipped_updates:
            self._record(step, {})
            raise NonFiniteError(
                f"{self._skipped_in_a_row} updates in a row had a non-finite gradient; lower "
                "finetune.optimizer.learning_rate or look at the states and actions of the data"
            )

    def _is_due(self, step: int) -> bool:
        """Whether something is to be done after a step. A record precedes every checkpoint."""
        intervals = (self._config.log_interval, self._config.checkpoint_interval)
        return (
            any(step % interval == 0 for interval in intervals)
            or step == self._config.num_steps
            or self._is_evaluated(step)
        )

    def _is_evaluated(self, step: int) -> bool:
        interval = self.config.evaluation.interval
        return bool(interval) and step % interval == 0 and step < self._config.num_steps

    def _on_due(self, state: TrainState, step: int) -> None:
        """Evaluation, record and checkpoint."""
        evaluation: dict[str, Any] = {}
        if self._is_evaluated(step):
            with self._meter.waiting("evaluation"):
                evaluation = self._evaluate(state, step, is_final=False) or {}
        self._record(step, evaluation)
        if step % self._config.checkpoint_interval == 0:
            with self._meter.waiting("checkpoint"):
                self._save(state, step)

    def _record(self, step: int, evaluation: dict[str, Any]) -> None:
        self._telemetry.record(step, evaluation, (_ROLE,))

    # --------------------------------------------------------- evaluation and the end

    def _evaluate(self, state: TrainState, step: int, *, is_final: bool) -> dict[str, Any] | None:
        """The deterministic policy on the fixed episodes; videos of the final one.

        None when there are no episodes to run, or when a stop was asked for meanwhile.
        """
        if not self.config.evaluation.num_episodes:
            return None
        params = jax.device_put(published(state), self._parts.sampler.params_shardings)
        with self._screen.phase(f"evaluate update {step}"):
            videos = self._workdir / "videos" if is_final else None
            result = self._evaluator.evaluate(params, videos)
        if result is None:
            return None
        record = result.record()
        self._screen.evaluated(record, update=step)
        return record

    def _save(self, state: TrainState, step: int) -> None:
        """Writes a checkpoint; one of this step stays as it is."""
        self._checkpointer.save(
            step,
            stored(state),
            {
                "skipped_in_a_row": self._skipped_in_a_row,
                "telemetry": self._telemetry.state(),
                "evaluation_before": self._before,
            },
        )

    def _close_books(self, outcome: str, detail: str) -> None:
        """The last lines on the screen, and summary.json."""
        summary = SupervisedSummary(
            before=self._before,
            after=self._after,
            samples_per_s=self._num_samples / self._train_s if self._train_s else float("nan"),
            activities={_ROLE: self._telemetry.activities()[_ROLE]},
            workdir=self._workdir,
            next_command=self._next_command(outcome),
        )
        self._telemetry.write_supervised_summary(outcome=outcome, summary=summary, detail=detail)
        self._screen.final_summary(summary)

    def _next_command(self, outcome: str) -> str:
        """Evaluates what is finished, continues the rest."""
        # The last flag of a kind counts, however the first one was written.
        return f"{self._command} --job=evaluate" if outcome == "finished" else self._command
