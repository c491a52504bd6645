"""Training runs in seconds: every program is real, policy and env are as small as can be."""

import functools
import io
import json
import math
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving.tiny_policy import HORIZON, TinyPolicy
from simulation.counter_env import FAIL, SUCCEED, CounterEnv, CounterState

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.data.normalization import NormStats
from jaxvla.layout import parse_layout
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.runtime.build import Blueprint
from jaxvla.runtime.controller import Controller
from jaxvla.simulation.unroll import TokenTable
from jaxvla.telemetry.metrics import Record
from jaxvla.telemetry.progress import Screen
from jaxvla.transport.schedule import FREE, Schedule

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""
RUN_TIMEOUT_S = 240.0
"""For a whole run, which takes a few seconds of one core."""

COMMAND = "python -m jaxvla.main --config=tiny.py"
LOSSES = ("learner/loss/total", "learner/loss/policy", "learner/loss/value", "learner/grad_norm")

SYNCHRONOUS = {
    "schedule": c.ScheduleConfig(overlap_training=False, overlap_rollout=False),
    "simulation": c.SimulationConfig(num_groups=1, envs_per_group=4, segment_length=2),
    "serving": c.ServingConfig(trigger_size=4, max_batch=4, buckets=(4,)),
}
"""Sections of a run whose every number is a function of its seed."""
NO_EVALUATION = c.EvaluationConfig(num_episodes=0)


def quick_jit() -> Iterator[None]:
    """`jax.jit` without LLVM optimisation: compiles several times faster, computes the same."""
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick)
        yield


class EventfulEnv(CounterEnv):
    """Rounds the first action to an event, so that any policy succeeds and fails at times."""

    def step(self, state: CounterState, action: jax.Array) -> CounterState:
        event = jnp.clip(jnp.round(action[0] / SUCCEED) * SUCCEED, 0.0, FAIL)
        return super().step(state, action.at[0].set(event))


def make_blueprint(
    policy: Any = None, *, layout: str = "colocated=1", **sections: Any
) -> Blueprint:
    """Two groups of two envs, two chunks a trajectory, two trajectories an update."""
    defaults: dict[str, Any] = {
        "simulation": c.SimulationConfig(num_groups=2, envs_per_group=2, segment_length=2),
        "serving": c.ServingConfig(trigger_size=2, max_batch=4, buckets=(2, 4)),
        "learning": c.LearningConfig(num_updates=4, trajectories_per_update=2),
        "evaluation": c.EvaluationConfig(num_episodes=4, num_videos=0),
        "checkpoint": c.CheckpointConfig(interval=2, keep=2),
        "algorithm": PPOConfig(),
    }
    config = c.ExperimentConfig(
        name="tiny",
        env=c.EnvConfig(name="counter", num_executed=HORIZON),
        model=c.ModelConfig(name="tiny", action_horizon=HORIZON),
        meshes=c.MeshesConfig(layout=layout),
        **(defaults | sections),
    )
    tokens: Any = np.asarray([[3, 1], [4, 0]], np.int32)
    return Blueprint(
        config=config,
        env=EventfulEnv(),
        policy=policy or TinyPolicy(CounterEnv.spec),
        layout=parse_layout(layout),
        tokenizer=ByteTokenizer(),
        stats=NormStats.from_bounds([0.0, 0.0], [1.0, 1.0], 2),
        table=TokenTable(tokens=tokens, mask=tokens > 0),
    )


class HookedScreen(Screen):
    """Calls a function with every metric record, in the learner's thread."""

    on_update: Callable[[Record], None] = staticmethod(lambda record: None)

    def update(self, record: Record) -> None:
        super().update(record)
        self.on_update(record)


class Run:
    """One process' share of a run."""

    def __init__(self, workdir: pathlib.Path, blueprint: Blueprint, schedule: Schedule = FREE):
        self.workdir = workdir
        self.stop = threading.Event()
        self._output = io.StringIO()
        num_updates = blueprint.config.learning.num_updates
        self.screen = HookedScreen(self._output, num_updates=num_updates)
        self.controller = Controller(
            blueprint,
            workdir=workdir,
            screen=self.screen,
            stop_requested=self.stop,
            command=COMMAND,
            schedule=schedule,
        )

    def run(self) -> int:
        # A run that hangs is asked to stop, and then fails for its exit code.
        watchdog = threading.Timer(RUN_TIMEOUT_S, self.stop.set)
        watchdog.start()
        try:
            return self.controller.run()
        finally:
            watchdog.cancel()

    def expect(self, code: int) -> "Run":
        actual = self.run()
        assert actual == code, f"exit code {actual}:\n" + "\n".join(self.lines)
        return self

    def stop_after(self, update: int) -> None:
        """Asks for a stop after an update, and holds the learner until it is under way."""
        is_closed = self.queue_closed()

        def stop(record: Record) -> None:
            if record["update"] == update:
                self.stop.set()
                assert is_closed.wait(TIMEOUT_S)

        self.screen.on_update = stop

    def queue_closed(self) -> threading.Event:
        """Set once a stop is under way: the runtime looks for requests only now and then, and a
        learner that is not held until then makes further updates."""
        queue, is_closed = self.controller._queue, threading.Event()
        close = queue.close

        def closing(reason: str) -> None:
            close(reason)
            is_closed.set()

        queue.close = closing
        return is_closed

    @property
    def lines(self) -> list[str]:
        """What was shown."""
        return self._output.getvalue().splitlines()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.workdir / "summary.json").read_text())

    def steps(self) -> list[int]:
        """Complete checkpoints."""
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def digests(self, step: int) -> dict[str, str]:
        """Leaf path -> SHA-256 of the arrays of a checkpoint."""
        record = self.workdir / "checkpoints" / str(step) / "record" / "metadata"
        return json.loads(record.read_text())["digests"]


def keeps_bound(run: Run) -> bool:
    """No sample of the run was staler than the bound, and its books close."""
    summary = run.summary()
    return summary["max_staleness"] <= summary["staleness_bound"] and summary["ledger_closes"]


def require_invariants(records: list[dict[str, Any]], num_updates: int) -> None:
    """What holds in every record of any run of this size."""
    assert [record["update"] for record in records] == list(range(1, num_updates + 1))
    assert [record["queue/consumed"] for record in records] == [
        2 * record["update"] for record in records
    ]
    for record in records:
        assert 0 <= record["queue/staleness/min"] <= record["queue/staleness/max"]
        assert record["queue/staleness/max"] <= record["queue/staleness/bound"]
        ended = record["queue/consumed"] + record["queue/dropped"]
        assert record["queue/admitted"] == ended + record["queue/in_flight"] + record["queue/depth"]
        assert record["serving/recompiles"] == 0
        assert all(math.isfinite(record[name]) for name in LOSSES)
    times = [record["time_s"] for record in records]
    assert times == sorted(times)
