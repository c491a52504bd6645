"""Groups of single envs: each one's progress is its own, whatever the others do."""

import os
import pathlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest
from host_group_factory import EXECUTED, HORIZON, TIMEOUT_S, GroupFactory, Made, fake
from simulator_run import TicketsForEach

from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import Answer, InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.simulation.simulator import Simulator
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import Tracer
from jaxvla.types import PolicySample

NUM_SEGMENTS, SEGMENT_LENGTH = 3, 2
NAMES = ("slow", "left", "right")


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Iterator[GroupFactory]:
    factory = GroupFactory(tmp_path / "logs")
    yield factory
    factory.close()


class Server:
    """Answers each request by itself; the first of "slow" sends its env to the gate."""

    def __init__(self, batcher: Batcher):
        self._batcher = batcher
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._num_served = dict.fromkeys(NAMES, 0)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while (batch := self._batcher.next_batch()) is not None:
            for request in batch.requests:
                is_first = self._num_served[request.client] == 0
                self._num_served[request.client] += 1
                kind = fake.GATE if is_first and request.client == "slow" else fake.STEP
                self._answer(request.future, batch.kind, kind)

    def _answer(self, future: Future, query: str, kind: float) -> None:
        zero: Any = np.zeros(1, np.float32)
        result = zero
        if query == "explore":
            actions: Any = np.full((1, HORIZON, fake.ACTION_DIM), kind, np.float32)
            result = PolicySample(actions=actions, trace=zero, log_prob=zero, value=zero)
        future.set_result(Answer(result=result, policy_version=0))


def simulator_of(made: list[Made], batcher: Batcher, queue: Any) -> tuple[Simulator, ActivityMeter]:
    meter = ActivityMeter("simulation", tracer=Tracer())
    router = Router(1)
    groups: list[Any] = [x.group for x in made]
    simulator = Simulator(
        groups=groups,
        clients=[RoutedClient([InferenceClient(batcher, x.name)], router, rows=1) for x in groups],
        queue=queue,
        key=jax.random.key(0),
        segment_length=SEGMENT_LENGTH,
        overlap_rollout=True,
        recorder=MetricRecorder(),
        meter=meter,
    )
    return simulator, meter


def test_a_slow_env_delays_nobody(make: GroupFactory, tmp_path: pathlib.Path) -> None:
    """Two groups of one env finish all their trajectories while a third is in its first chunk."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    config = {"directory": str(tmp_path)}
    made = [make(1, first_env=i, name=name, config=config) for i, name in enumerate(NAMES)]
    assert [len(x.pool.pids) for x in made] == [1, 1, 1]  # a pool per group, of its size
    batcher = Batcher(trigger_rows=1, max_wait_s=float("inf"), max_rows=3, capacity_rows=3)
    server, queue = Server(batcher), TicketsForEach(NUM_SEGMENTS)
    simulator, meter = simulator_of(made, batcher, queue)

    def run(name: str, function: Any) -> None:
        with meter.thread(name):
            function()

    threads = {
        name: threading.Thread(target=run, args=(name, function), daemon=True)
        for name, function in simulator.threads().items()
    }
    for thread in threads.values():
        thread.start()
    for name in ("left", "right"):
        threads[name].join(TIMEOUT_S)
        assert not threads[name].is_alive(), f"{name} waits for the slow env"
    assert [x.ticket.owner for x in queue.items].count("slow") == 0 and threads["slow"].is_alive()
    assert len(queue.items) == 2 * NUM_SEGMENTS
    gate.write_text("go")  # blocks until the slow env has come to the gate
    threads["slow"].join(TIMEOUT_S)
    batcher.close("finished")
    server.join()
    assert sorted(x.ticket.owner for x in queue.items) == sorted(NUM_SEGMENTS * NAMES)
    for item in queue.items:
        assert item.info.num_env_steps <= SEGMENT_LENGTH * EXECUTED
        assert item.info.num_invalid == 0
