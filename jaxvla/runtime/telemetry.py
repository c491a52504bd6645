"""Everything a training run reports, in one place: meters, records, screen, files."""

import collections
import contextlib
import json
import pathlib
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxvla.layout import ROLES
from jaxvla.telemetry import program_log
from jaxvla.telemetry.activity import Activity, ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder, Number, Record, Total
from jaxvla.telemetry.progress import RunScreen, RunSummary, SupervisedSummary
from jaxvla.telemetry.tracing import NullTracer, Tracer
from jaxvla.telemetry.writers import MetricWriter, RunInfo, open_writers, write_json
from jaxvla.transport.base import Ledger, TrajectoryQueue, WeightStore

SUMMARY_STATES = ("finished", "stopped", "failed", "unsafe")


class Telemetry:
    """Owns the recorder, one meter per role, the tracer and the metric writers of a run."""

    def __init__(self, *, workdir: pathlib.Path, screen: RunScreen, is_tracing: bool):
        self.workdir = workdir
        self.screen = screen
        self.recorder = MetricRecorder()
        self.tracer = Tracer() if is_tracing else NullTracer()
        clock = time.process_time if is_tracing else None
        self.meters = {
            role: ActivityMeter(role, tracer=self.tracer, processor_clock=clock) for role in ROLES
        }
        self.last_record: Record = {}
        self.max_staleness = 0
        self._staleness_counts: collections.Counter[int] = collections.Counter()
        self._update = 0
        self._writers: list[MetricWriter] = []
        self._failing: set[str] = set()
        """Writers that could not write the latest record."""
        self._start_s = time.monotonic()
        self._earlier_s = 0.0
        self._env_steps = 0
        self._env_steps_s = 0.0

    @property
    def time_s(self) -> float:
        """Seconds since the run began, earlier runs of the work directory included."""
        return self._earlier_s + time.monotonic() - self._start_s

    @contextlib.contextmanager
    def open(self, run: RunInfo, extra_writers: tuple[str, ...]) -> Iterator[None]:
        """Opens logs and metric writers while the block runs."""
        self._update = run.resume_update or 0
        with contextlib.ExitStack() as stack:
            for role in (*ROLES, "runtime", "checkpoint", "evaluation"):
                stack.enter_context(program_log(self.workdir, role))
            self._writers = stack.enter_context(open_writers(run, extra_writers))
            yield

    def state(self) -> dict[str, Any]:
        """Counters for a checkpoint."""
        return {
            "totals": self.recorder.totals(),
            "time_s": self.time_s,
            "max_staleness": self.max_staleness,
            "staleness_counts": self._named_staleness_counts(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the counters of an earlier run."""
        self.recorder.restore(state["totals"])
        self._earlier_s = state["time_s"]
        self.max_staleness = state["max_staleness"]
        # Checkpoints of earlier versions have none.
        counts = state.get("staleness_counts", {})
        self._staleness_counts.update({int(s): int(count) for s, count in counts.items()})

    def begin_training(self) -> None:
        """Starts the windows of rates and activities: compilation is not part of them."""
        for meter in self.meters.values():
            meter.snapshot()
        self.recorder.flush(update=0, time_s=0.0, extra={})
        self._training_start_s = time.monotonic()

    def record_update(
        self,
        *,
        version: int,
        staleness: list[int],
        bound: int,
        queue: TrajectoryQueue,
        store: WeightStore,
        num_env_steps: int,
        evaluation: Mapping[str, Number],
    ) -> None:
        """Writes the record of one learner update and shows it."""
        self._env_steps += num_env_steps
        self._env_steps_s = time.monotonic() - self._training_start_s
        self.max_staleness = max(self.max_staleness, *staleness)
        self._staleness_counts.update(staleness)
        extra: Record = {**evaluation, **queue_record(queue.ledger())}
        extra |= _staleness_record(staleness, bound)
        weights = store.metrics()
        extra |= {
            "weights/publish_ms": weights.publish_ms,
            "weights/pull_ms": weights.pull_ms,
            "weights/bytes": weights.nbytes,
        }
        self.record(version, extra, ROLES)

    def record(self, update: int, extra: Record, roles: Iterable[str]) -> None:
        """Writes a record of the window and shows it.

        Args:
          update: learner update, or optimizer step of a supervised run.
          extra: finished values of this record.
          roles: whose activity is part of it.
        """
        activity: Record = {}
        for role in roles:
            activity |= self.meters[role].snapshot().window.record(role)
        record = self.recorder.flush(update=update, time_s=self.time_s, extra=extra | activity)
        self._write(record)
        self.last_record, self._update = record, update
        self.screen.update(record)

    def _write(self, record: Record) -> None:
        """A disk without room costs records, not the run: checkpoints decide when that ends."""
        failures: dict[str, OSError] = {}
        for writer in self._writers:
            try:
                writer.write(record)
            except OSError as error:
                failures[type(writer).__name__] = error
        for name in failures.keys() - self._failing:
            self.screen.message(f"error: {name} could not write a record: {failures[name]}")
        self._failing = set(failures)
        if failures:
            self.recorder.add("faults/failed_writes", len(failures), Total)

    def activities(self) -> dict[str, Activity]:
        """Role -> activity over the training time of this process."""
        return {role: meter.snapshot().total for role, meter in self.meters.items()}

    def env_steps_per_s(self) -> float:
        """Control steps consumed per second of training time of this process."""
        return self._env_steps / self._env_steps_s if self._env_steps_s else float("nan")

    def _named_staleness_counts(self) -> dict[str, int]:
        """Staleness -> consumed trajectories, as JSON can hold it."""
        return {str(staleness): n for staleness, n in sorted(self._staleness_counts.items())}

    def write_trace(self) -> None:
        """Writes trace.json. Nothing depends on it, so a full disk is only told."""
        try:
            self.tracer.write(self.workdir / "trace.json")
        except OSError as error:
            self.screen.message(f"error: trace.json could not be written: {error}")

    def write_summary(
        self,
        *,
        outcome: str,
        summary: RunSummary,
        ledger: Ledger,
        detail: str,
        costs: Mapping[str, float] = types.MappingProxyType({}),
    ) -> None:
        """Writes summary.json; `outcome` is one of SUMMARY_STATES, `costs` are values of the
        process such as its peak memory."""
        own = {
            "env_steps_per_s": summary.env_steps_per_s,
            "max_staleness": summary.max_staleness,
            "staleness_bound": summary.staleness_bound,
            "staleness_counts": self._named_staleness_counts(),
            "ledger_closes": ledger.is_balanced,
            **costs,
        }
        self._write_summary(outcome, detail, summary, own, queue_record(ledger))

    def write_supervised_summary(
        self, *, outcome: str, summary: SupervisedSummary, detail: str
    ) -> None:
        """Writes summary.json of a supervised run."""
        own = {"samples_per_s": summary.samples_per_s}
        self._write_summary(outcome, detail, summary, own, {})

    def _write_summary(
        self,
        outcome: str,
        detail: str,
        summary: RunSummary | SupervisedSummary,
        own: dict[str, Any],
        totals: Record,
    ) -> None:
        """What every summary has, with values of its own between."""
        activities = {
            role: {
                "busy_fraction": activity.busy_fraction,
                "waiting_on": activity.waiting_fractions,
            }
            for role, activity in summary.activities.items()
        }
        begin = {
            "outcome": outcome,
            "detail": detail,
            "update": self._update,
            "time_s": self.time_s,
        }
        end = {
            "evaluation_before": summary.before,
            "evaluation_after": summary.after,
            "utilisation": activities,
            "totals": self.recorder.totals() | totals,
            "last_record": self.last_record,
        }
        write_json(self.workdir / "summary.json", begin | own | end)


def queue_record(ledger: Ledger) -> Record:
    """The contract's counts of trajectories."""
    record: Record = {
        "queue/admitted": ledger.admitted,
        "queue/completed": ledger.completed,
        "queue/consumed": ledger.consumed,
        "queue/dropped": ledger.dropped,
        "queue/in_flight": ledger.in_flight,
        "queue/depth": ledger.depth,
    }
    dropped = ledger.dropped_by_reason.items()
    return record | {f"queue/dropped/{reason}": count for reason, count in dropped}


def _staleness_record(staleness: list[int], bound: int) -> Record:
    values = np.asarray(staleness, np.float64)
    return {
        "queue/staleness/min": int(values.min()),
        "queue/staleness/mean": float(values.mean()),
        "queue/staleness/p95": float(np.percentile(values, 95)),
        "queue/staleness/max": int(values.max()),
        "queue/staleness/bound": bound,
    }


def read_json(path: pathlib.Path) -> Any:
    """A JSON file's content, None when there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None
