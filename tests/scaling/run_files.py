"""The files of a small run, written by the telemetry of a run on a clock that is told the time."""

import json
import pathlib
from typing import Any

from jaxvla.scaling.run_samples import RunFiles, read_run
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.tracing import Tracer


class Clock:
    """Time passes when told to; processor time twice as fast."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def cpu_s(self) -> float:
        """Processor seconds."""
        return 2.0 * self.now_s


CONFIG: dict[str, Any] = {
    "env": {"name": "tabletop", "image_size": 32},
    "model": {"num_cameras": 2},
    "algorithm": {"num_epochs": 2, "num_minibatches": 3},
    "simulation": {"num_groups": 2, "envs_per_group": 4, "segment_length": 2},
    "serving": {"trigger_size": 4, "max_wait_ms": 20.0, "max_batch": 8, "buckets": [4, 8]},
    "schedule": {
        "overlap_training": False,
        "overlap_rollout": False,
        "stream_microbatches": False,
        "max_staleness": 1,
        "window": 1,
        "publish_interval": 1,
    },
    "meshes": {"layout": "colocated=1"},
    "learning": {"trajectories_per_update": 2, "num_updates": 30},
}
"""What is read of a resolved config."""

CHUNK_S, BEFORE_S, AFTER_S = 3.0, 0.1, 0.2
"""A chunk step, and what is done before and after the chunk steps of a round."""
BEGIN_S, FINISH_S = 0.4, 0.6
TURN_S, INFER_S, VALUE_S, BOOKS_S, WAKE_S = 0.01, 0.5, 0.25, 0.03, 0.02
"""From a request to the batch, the passes, the server's books, and until an answer is seen."""
TRAIN_S, PUBLISH_S, BETWEEN_S, CHECKPOINT_S = 7.0, 0.3, 0.15, 50.0
UPDATE_S = (
    2 * BEGIN_S
    + 2 * (TURN_S + INFER_S + WAKE_S + BEFORE_S + 2 * CHUNK_S + AFTER_S)
    + (TURN_S + VALUE_S + WAKE_S)
    + 2 * FINISH_S
    + TRAIN_S
    + PUBLISH_S
)
"""Until the next trajectory is waited for, but for what lies between."""


class _Run:
    """Writes spans as the programs of a synchronous run with two groups of four envs do."""

    def __init__(self, num_updates: int, config: dict[str, Any]):
        self._clock = Clock()
        self._tracer = Tracer(clock=self._clock)
        self._config = config
        self.records: list[dict[str, float]] = []
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []
        self._marks = dict.fromkeys(("simulation", "serving", "learning"), self._clock())
        for update in range(1, num_updates + 1):
            self._update(update, is_last=update == num_updates)

    def write(self, workdir: pathlib.Path) -> None:
        """The files that `read_run` reads."""
        for role, thread in (
            ("simulation", "all groups"),
            ("serving", "server_0"),
            ("learning", "learner"),
        ):
            self._write_thread(role, thread)
        self._tracer.write(workdir / "trace.json")
        (workdir / "config.json").write_text(
            json.dumps({"config": self._config, "devices": ["TFRT_CPU_0"], "cores": 2})
        )
        lines = [json.dumps(record) for record in self.records]
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def _write_thread(self, role: str, thread: str) -> None:
        """Replays the spans of a role through a real meter."""
        clock = self._clock
        meter = ActivityMeter(role, tracer=self._tracer, processor_clock=clock.cpu_s)
        with meter.thread(thread):
            for _, name, start_s, end_s, args in [x for x in self._spans if x[0] == role]:
                clock.now_s = start_s
                reason = args.get("on")
                with meter.waiting(reason) if reason else meter.busy(name, **args):
                    clock.now_s = end_s

    def _add(self, role: str, name: str, span_s: float, **args: Any) -> None:
        start_s = self._clock.now_s
        self._clock.now_s += span_s
        self._spans.append((role, name, start_s, self._clock.now_s, args))

    def _wait(self, role: str, reason: str, start_s: float, end_s: float) -> None:
        self._spans.append((role, "wait", start_s, end_s, {"on": reason}))

    def _query(self, kind: str, pass_s: float) -> None:
        """All lanes ask, and all are answered in one batch."""
        asked_s = self._clock.now_s
        self._wait("serving", "requests", self._marks["serving"], asked_s + TURN_S / 2)
        self._clock.now_s = asked_s + TURN_S
        self._add("serving", "infer", pass_s, kind=kind, rows=8)
        self._marks["serving"] = self._clock.now_s + BOOKS_S
        self._clock.now_s += WAKE_S
        self._wait("simulation", "inference", asked_s, self._clock.now_s)

    def _update(self, update: int, *, is_last: bool) -> None:
        clock, begin_s = self._clock, self._clock.now_s
        self._wait("simulation", "learner", self._marks["simulation"], begin_s)
        clock.now_s += 2 * BEGIN_S
        for _ in range(2):
            self._query("explore", INFER_S)
            clock.now_s += BEFORE_S
            self._add("simulation", "simulate", CHUNK_S)
            self._add("simulation", "simulate", CHUNK_S)
            clock.now_s += AFTER_S
        self._query("value", VALUE_S)
        clock.now_s += 2 * FINISH_S
        self._marks["simulation"] = clock.now_s
        self._wait("learning", "trajectories", self._marks["learning"], clock.now_s)
        self._add("learning", "train", TRAIN_S)
        self._add("learning", "publish", PUBLISH_S)
        self.records.append(self._record(update))
        if update % 10 == 0:
            self._wait("learning", "checkpoint", clock.now_s, clock.now_s + CHECKPOINT_S)
            clock.now_s += CHECKPOINT_S
        clock.now_s += BETWEEN_S
        self._marks["learning"] = clock.now_s
        if is_last:
            self._wait("serving", "requests", self._marks["serving"], clock.now_s)

    def _record(self, update: int) -> dict[str, float]:
        roles = ("simulation", "serving", "learning")
        return {
            "update": update,
            "time_s": self._clock.now_s,
            "rate/env_steps_per_s": 10.0,
            "queue/staleness/mean": 0.5 * (update % 2),
            "queue/staleness/max": update % 2,
            "weights/bytes": 1000,
        } | {f"utilisation/{role}/busy_fraction": 0.25 for role in roles}


def write_run(
    workdir: pathlib.Path, *, num_updates: int = 30, config: dict[str, Any] = CONFIG
) -> RunFiles:
    """Writes a run and reads it back."""
    _Run(num_updates, config).write(workdir)
    return read_run(workdir)
