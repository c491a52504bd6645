"""Controller: wires the programs of a training run, and sees it through.

    restore or start anew -> warm start -> evaluate -> programs run -> evaluate -> summary

consumes    a blueprint, an empty or used work directory
produces    checkpoints, metrics.jsonl, summary.json, trace.json, report.html, videos, the screen
waits for   the learner's last update, a failure, or a signal
unblocked by  the programs
"""

import dataclasses
import functools
import logging
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxvla import rng
from jaxvla.algorithms.base import Metrics
from jaxvla.checkpoint import Restored, SaveError
from jaxvla.config import to_dict
from jaxvla.data.demonstrations import alternate, concatenate, num_samples, shuffled_batches
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.learning.learner import Learner, NonFiniteError, Progress
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.warm_start import fit
from jaxvla.runtime.alarms import Alarms
from jaxvla.runtime.build import Blueprint, Parts, Training
from jaxvla.runtime.crew import Crew, LocalCrew
from jaxvla.runtime.gang import Alone, Gang
from jaxvla.runtime.groups import Groups
from jaxvla.runtime.local import LocalRuntime, ProgramFailedError
from jaxvla.runtime.memory_use import peak_memory
from jaxvla.runtime.self_check import LogProbCheck, PolicyMismatchError
from jaxvla.runtime.telemetry import Telemetry
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.telemetry.metrics import Total
from jaxvla.telemetry.profiler import ProfileWindow
from jaxvla.telemetry.progress import RunScreen, RunSummary
from jaxvla.telemetry.report import try_to_write_report
from jaxvla.telemetry.writers import RunInfo
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.schedule import FREE, Schedule
from jaxvla.transport.staleness import StalenessViolation, credit_rule
from jaxvla.types import Params, SupervisedBatch

_LOG = logging.getLogger(__name__)

EXIT_FINISHED, EXIT_FAILED, EXIT_STOPPED, EXIT_UNSAFE = 0, 1, 3, 4


class StoppedError(Exception):
    """A signal asked to stop before training had begun."""


class Controller:
    """One training run in one process."""

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        workdir: pathlib.Path,
        screen: RunScreen,
        stop_requested: threading.Event,
        command: str,
        schedule: Schedule = FREE,
        make_crew: Callable[[Parts, Groups, Telemetry, Schedule], Crew] = LocalCrew,
        gang: Gang | None = None,
    ):
        """Args:
        blueprint: what to run.
        workdir: where to write; a checkpoint in it is continued.
        screen: where to show.
        stop_requested: set by signals.
        command: the command line; it also continues the run.
        schedule: to record or replay a run, which must be a new one.
        make_crew: the simulators and policy servers of the run.
        gang: the processes of the learner, which this one leads; None: it is the only one.
        """
        self.config = blueprint.config
        self._parts = Parts(blueprint)
        self._workdir = workdir
        self._screen = screen
        self._stop_requested = stop_requested
        self._command = command
        self._schedule = schedule
        self._gang = gang or Alone()
        self._telemetry = Telemetry(
            workdir=workdir, screen=screen, is_tracing=self.config.telemetry.trace
        )
        self._profile = ProfileWindow(self.config.telemetry, workdir)
        self._checkpointer = blueprint.checkpointer(workdir)
        self._groups = Groups(
            self._parts, log_dir=workdir / "logs", recorder=self._telemetry.recorder
        )
        self._failed_saves = 0
        """In a row."""
        self._compile_s = math.nan
        self._before: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None
        self._training = self._parts.training(self.config.optimizer)
        self._rule = credit_rule(self.config)
        lease_s = float("inf") if schedule.is_replay else self.config.simulation.lease_s
        self._queue = InProcessQueue(self._rule, lease_s=lease_s, schedule=schedule)
        self._crew = make_crew(self._parts, self._groups, self._telemetry, schedule)
        self._store = self._crew.make_store(self._queue.advance)
        self._evaluator = Evaluator(
            config=self.config.evaluation,
            sampler=self._parts.sampler,
            make_groups=self._groups.evaluation,
            should_stop=stop_requested.is_set,
        )

    def run(self) -> int:
        """Runs to the end; returns the exit code of the contract."""
        restored = self._checkpointer.restore(self._checkpoint_target)
        for step, why in self._checkpointer.passed_over.items():
            self._screen.message(f"error: checkpoint {step} is damaged and was passed over: {why}")
        run = RunInfo(
            workdir=self._workdir,
            name=self.config.name,
            config=to_dict(self.config),
            resume_update=restored.step if restored else None,
        )
        with self._telemetry.open(run, self.config.telemetry.writers):
            try:
                return self._run(restored)
            finally:
                self._crew.close()
                self._telemetry.write_trace()
                self._checkpointer.close()
                try_to_write_report(self._workdir)

    def _run(self, restored: Restored | None) -> int:
        """The run itself; its books are closed whatever happens."""
        outcome, detail, code = "finished", "", EXIT_FINISHED
        learner = None
        try:
            self._compile(is_fresh=restored is None)
            self._gang.line_up()
            learner = self._learner(*self._resume(restored) if restored else self._begin())
            check = LogProbCheck(self._parts, role=self._gang.checked_role)
            difference = check.run(self._gang.to_place(learner.state.params))
            self._screen.message(f"sampled and evaluated log-probs agree to {difference:.1e}")
            if not self._train(learner):
                learner = None  # still at work: its state is nobody else's
            elif not self._stop_requested.is_set():
                self._after = self._evaluate(learner, is_final=True)
            if self._stop_requested.is_set():
                outcome, code = "stopped", EXIT_STOPPED
        except StoppedError:
            outcome, code = "stopped", EXIT_STOPPED
        except PolicyMismatchError as error:
            outcome, detail, code = "unsafe", str(error), EXIT_UNSAFE
            self._screen.message(f"error: {detail}")
        except ProgramFailedError as error:
            outcome, detail, code = _failure(error)
            if isinstance(error.__cause__, NonFiniteError):
                # A skipped step changes no parameter: what was saved meanwhile is good, too.
                detail += f". The last good checkpoint is update {max(self._checkpointer.steps())}"
            if code == EXIT_FAILED:
                self._gang.give_up(error)
            self._screen.message(f"error: {detail}")
        except Exception as error:  # not a program's: the caller's to show
            self._gang.give_up(error)
            self._close_books("failed", f"{type(error).__name__}: {error}")
            raise
        if learner is not None and code in (EXIT_FINISHED, EXIT_STOPPED):
            try:
                self._save(learner)
            except SaveError as error:  # nobody would try again
                self._gang.give_up(error)
                outcome, detail, code = "failed", str(error), EXIT_FAILED
                self._screen.message(f"error: {detail}")
        if not self._close_books(outcome, detail) and code == EXIT_FINISHED:
            code = EXIT_FAILED
        return code

    # ---------------------------------------------------------------- before training

    def _compile(self, *, is_fresh: bool) -> None:
        """Compiles inference, stepping and training ahead of time, side by side."""
        blueprint = self._parts.blueprint
        shapes = blueprint.params_struct(), blueprint.observation_struct(1)
        jobs: list[Callable[[], None]] = []
        if self._groups.is_device_env:
            jobs += [stepper.compile for stepper in self._groups.steppers]
            if self.config.warm_start.num_steps and is_fresh:
                jobs += [demonstrator.compile for demonstrator in self._groups.demonstrators]
                jobs.append(self._compile_warm_start)
        for sampler in dict.fromkeys(self._parts.samplers):
            jobs.append(functools.partial(sampler.compile, *shapes))
        jobs.append(functools.partial(self._training.compile, self._parts))
        start_s = time.monotonic()
        with self._screen.phase("compile"), ThreadPoolExecutor(max_workers=len(jobs)) as pool:
            for job in [pool.submit(job) for job in jobs]:
                job.result()
        self._compile_s = time.monotonic() - start_s

    def _compile_warm_start(self) -> None:
        """Both stages of the warm start: scenes have no actions."""
        config, training = self.config.warm_start, self._supervised_training
        batch = self._groups.demonstrators[0].batch_struct(config.batch_size)
        batches = [batch]
        if config.num_grounding_steps:
            batches.append(dataclasses.replace(batch, actions=None))
        key = jax.eval_shape(lambda: self._parts.root)
        for struct in batches:
            training.functions.compile_supervised(training.target(), struct, key)

    def _resume(self, restored: Restored) -> tuple[TrainState, Progress, dict[str, GroupSnapshot]]:
        """State, counters and env groups of a checkpoint."""
        record = restored.record
        self._telemetry.restore(record["telemetry"])
        self._queue.load_state_dict(record["queue"], version=restored.step)
        self._before = record["evaluation_before"]
        self._screen.message(f"continuing {self._workdir} after update {restored.step}")
        if self._before is not None:
            self._screen.evaluated(self._before, update=0)
        progress = Progress(
            version=restored.step,
            skipped_in_a_row=record["skipped_in_a_row"],
            groups={
                name: {"next_segment": segment, "end_state": restored.arrays["groups"][name]}
                for name, segment in record["segments"].items()
            },
        )
        return restored.arrays["state"], progress, _snapshots(restored)

    def _checkpoint_target(self, record: dict[str, Any]) -> Any:
        """Structure, shapes, dtypes and placement that a checkpoint must have."""
        groups = self._groups.targets(record["segments"])
        return {"state": self._training.target(), "groups": groups}

    def _begin(self) -> tuple[TrainState, Progress, dict[str, GroupSnapshot]]:
        """State, counters and env groups of a new run: fresh parameters and the warm start."""
        params = self._parts.fresh_params(self._training)
        if self.config.warm_start.num_steps:
            params = self._warm_start(params)
        return self._training.init(params), Progress(), {}

    def _warm_start(self, params: Params) -> Params:
        """Grounding on random scenes, then imitation of scripted demonstrations."""
        config, root = self.config.warm_start, self._parts.root
        demonstrators, size = self._groups.demonstrators, config.batch_size
        if config.num_grounding_steps:
            steps = config.num_grounding_steps
            scenes = alternate(
                [x.scenes(batch_size=size, num_batches=steps, key=root) for x in demonstrators],
                steps,
            )
            params = self._fit(f"grounding ({steps} steps of {size} scenes)", params, scenes)
        with self._screen.phase(f"demonstrations ({config.num_episodes} scripted episodes)"):
            samples = self._demonstrations(config.num_episodes)
        steps, seed = config.num_steps, self.config.seed
        batches = shuffled_batches(samples, batch_size=size, num_batches=steps, seed=seed)
        title = f"imitation ({steps} steps of {size}, {num_samples(samples)} samples)"
        return self._fit(title, params, batches)

    def _demonstrations(self, num_episodes: int) -> SupervisedBatch:
        """Of every scene alike."""
        demonstrators, parts = self._groups.demonstrators, []
        for demonstrator in demonstrators:
            share = -(-num_episodes // len(demonstrators))
            samples = demonstrator.collect(share, self._parts.root, self._stop_requested.is_set)
            if samples is None:
                raise StoppedError
            parts.append(samples)
        return concatenate(parts)

    @functools.cached_property
    def _supervised_training(self) -> Training:
        return self._parts.training(self.config.warm_start.optimizer)

    def _fit(self, title: str, params: Params, batches: Iterable[SupervisedBatch]) -> Params:
        """One stage of the warm start, with a fresh optimizer; `params` are donated."""
        training = self._supervised_training

        def report(step: int, metrics: Metrics) -> None:
            self._screen.message(f"  step {step}: {_losses_first(metrics)}")

        with self._screen.phase(title):
            trained = fit(
                training.functions,
                training.init(params),
                batches,
                key=rng.stream(self._parts.root, "warm_start"),
                should_stop=self._stop_requested.is_set,
                report=report,
            )
        if trained is None:
            raise StoppedError
        state, metrics = trained
        self._screen.message(f"  {_losses_first(metrics)}")
        return state.params

    # ------------------------------------------------------------------- the programs

    def _learner(
        self, state: TrainState, progress: Progress, snapshots: dict[str, GroupSnapshot]
    ) -> Learner:
        self._snapshots = snapshots
        planned = self.config.learning.num_updates
        num_updates = self._schedule.num_updates(planned)
        if num_updates < planned:
            self._screen.message(f"the schedule ends after update {num_updates} of {planned}")
        functions = self._training.functions
        learner = Learner(
            functions=functions,
            state=state,
            progress=progress,
            queue=self._gang.source(self._queue, functions.placement),
            store=self._store,
            key=rng.stream(self._parts.root, "learning"),
            learning=dataclasses.replace(self.config.learning, num_updates=num_updates),
            schedule=self.config.schedule,
            algorithm=self.config.algorithm,
            recorder=self._telemetry.recorder,
            meter=self._telemetry.meters["learning"],
            on_update=self._on_update,
        )
        self._gang.lead(learner)
        return learner

    def _train(self, learner: Learner) -> bool:
        """Evaluates the starting point, then runs the programs until the learner ends; False when
        it did not do so within the grace of a stop."""
        self._crew.attach(self._queue)
        learner.publish_current()
        if learner.progress.version == 0 and self._before is None:
            self._before = self._evaluate(learner, is_final=False)
            if self._stop_requested.is_set():
                raise StoppedError
            self._try_to_save(learner)
        if learner.progress.version >= self.config.learning.num_updates:
            return True
        programs = (*self._crew.programs(self._snapshots), learner)
        self._telemetry.begin_training()
        self._profile.reached(learner.progress.version)
        alarms = Alarms(
            self.config,
            queue=self._queue,
            store=self._store,
            recorder=self._telemetry.recorder,
            screen=self._screen,
        )
        grace_s = self.config.runtime.grace_s / 2  # the rest is for the checkpoint
        try:
            with alarms.watching():
                has_ended = LocalRuntime(self._stop_requested).run(
                    programs, self._telemetry.meters, learner, grace_s
                )
        finally:
            self._profile.close()
            self._queue.close("shutdown")
            self._store.close()
            for program in programs:
                program.close()
        if not has_ended:
            self._screen.message(
                f"an update takes longer than {grace_s:g} s to stop: its work is lost, the last "
                f"checkpoint counts; to wait longer, --config.runtime.grace_s={4 * grace_s:g}"
            )
        return has_ended

    def _on_update(self, learner: Learner) -> None:
        """After every update, in the learner's thread: record, evaluation, checkpoint."""
        version, config = learner.progress.version, self.config
        meter = self._telemetry.meters["learning"]
        evaluation: dict[str, Any] = {}
        interval = config.evaluation.interval
        if interval and version % interval == 0 and version < config.learning.num_updates:
            with meter.waiting("evaluation"):
                evaluation = self._evaluate(learner, is_final=False) or {}
        self._telemetry.record_update(
            version=version,
            staleness=learner.staleness,
            bound=self._rule.bound,
            queue=self._queue,
            store=self._store,
            num_env_steps=learner.num_env_steps,
            evaluation=evaluation,
        )
        learner.staleness, learner.num_env_steps = [], 0
        for name, count in self._telemetry.recorder.totals().items():
            if name.startswith("faults/simulator_restarts/") and count:
                self._schedule.restarted(f"{count:g} env processes ({name})")
        if version % config.checkpoint.interval == 0:
            with meter.waiting("checkpoint"):
                self._try_to_save(learner)
        self._profile.reached(version)

    def _evaluate(self, learner: Learner, *, is_final: bool) -> dict[str, Any] | None:
        """The deterministic policy on the fixed episodes; videos of the final one.

        None when there are no episodes to run, or when a stop was asked for meanwhile.
        """
        if not self.config.evaluation.num_episodes:
            return None
        own = self._gang.to_place(learner.state.params)
        params = jax.device_put(own, self._parts.sampler.params_shardings)
        version = learner.progress.version
        with self._screen.phase(f"evaluate update {version}"):
            videos = self._workdir / "videos" if is_final else None
            result = self._evaluator.evaluate(params, videos)
        if result is None:
            return None
        record = result.record()
        self._screen.evaluated(record, update=version)
        return record

    # -------------------------------------------------------------------- after training

    def _try_to_save(self, learner: Learner) -> None:
        """Writes a checkpoint, or goes on without, for a few times: a full disk may be cleared.

        Raises:
          SaveError: it failed `checkpoint.max_failed_saves` times in a row.
        """
        try:
            self._save(learner)
        except SaveError as error:
            self._failed_saves += 1
            self._telemetry.recorder.add("faults/failed_saves", 1, Total)
            allowed = self.config.checkpoint.max_failed_saves
            # Other processes of the learner cannot be told that a save has failed.
            if self._failed_saves >= allowed or not self._gang.is_one:
                raise
            self._screen.message(f"error: {error} ({self._failed_saves} of {allowed} in a row)")
        else:
            self._failed_saves = 0

    def _save(self, learner: Learner) -> None:
        """Writes a checkpoint of the present version; raises SaveError."""
        progress = learner.progress
        self._gang.save(progress.version)
        arrays = {
            "state": learner.state,
            "groups": {name: where["end_state"] for name, where in progress.groups.items()},
        }
        self._checkpointer.save(
            progress.version,
            arrays,
            {
                "skipped_in_a_row": progress.skipped_in_a_row,
                "segments": {n: where["next_segment"] for n, where in progress.groups.items()},
                "queue": self._queue.state_dict(),
                "telemetry": self._telemetry.state(),
                "evaluation_before": self._before,
            },
        )

    def _close_books(self, outcome: str, detail: str) -> bool:
        """The last lines on the screen, and summary.json; False if that could not be written."""
        ledger = self._queue.ledger()
        summary = RunSummary(
            before=self._before,
            after=self._after,
            env_steps_per_s=self._telemetry.env_steps_per_s(),
            activities=self._telemetry.activities(),
            max_staleness=self._telemetry.max_staleness,
            staleness_bound=self._rule.bound,
            workdir=self._workdir,
            next_command=self._command + (" --job=evaluate" if outcome == "finished" else ""),
        )
        is_written = True
        try:
            self._telemetry.write_summary(
                outcome=outcome,
                summary=summary,
                ledger=ledger,
                detail=detail,
                costs={"compile_s": self._compile_s, **peak_memory()},
            )
        except OSError as error:
            is_written = False
            self._screen.message(f"error: summary.json could not be written: {error}")
        self._screen.final_summary(summary)
        return is_written


def _losses_first(metrics: Mapping[str, Any]) -> str:
    """One line. JAX sorts the names of what a jitted function returns."""
    names = sorted(metrics, key=lambda name: (not name.startswith("loss/"), name))
    return ", ".join(f"{name} {float(metrics[name]):.3f}" for name in names)


def _failure(error: ProgramFailedError) -> tuple[str, str, int]:
    """(outcome, detail, exit code) of a failed program."""
    unsafe = isinstance(error.__cause__, (NonFiniteError, StalenessViolation))
    outcome, code = ("unsafe", EXIT_UNSAFE) if unsafe else ("failed", EXIT_FAILED)
    return outcome, str(error), code


def _snapshots(restored: Restored) -> dict[str, GroupSnapshot]:
    """Where each env group continues."""
    return {
        name: GroupSnapshot(next_segment=segment, end_state=restored.arrays["groups"][name])
        for name, segment in restored.record["segments"].items()
    }
