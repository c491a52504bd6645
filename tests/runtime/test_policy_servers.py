"""Several policy servers: what each has of its own, and what they have in common."""

import math
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.config import ServingConfig, SimulationConfig
from jaxvla.runtime.groups import group_name
from jaxvla.runtime.policy_servers import PolicyServers
from jaxvla.runtime.program import ProgramState, ProgramThreads
from jaxvla.serving.batcher import Batch, Batcher
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import Tracer
from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore
from jaxvla.transport.schedule import ServerSchedule
from jaxvla.transport.staleness import CreditRule
from jaxvla.types import Observation

TIMEOUT_S = 30.0
"""For waits that end at once unless the code is broken."""
BUCKET = 4


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeSampler:
    """Answers with the first weight. Stops inside batches while `gate` is shut."""

    def __init__(self) -> None:
        self.params_shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.clients: list[list[float]] = []
        """Who asked, by batch."""
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def run(
        self, kind: str, params: Any, observations: Sequence[Observation], keys: np.ndarray
    ) -> tuple[np.ndarray, int]:
        self.clients.append([float(x.state[0, 0]) for x in observations])
        weights = np.full(len(keys), np.asarray(params["kernel"])[0])
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return weights, BUCKET

    def hold(self) -> None:
        self.entered.clear()
        self.gate.clear()


class ListeningBatcher(Batcher):
    """Tells when the server has come to wait for a batch."""

    def __init__(self, **limits: Any):
        super().__init__(**limits)
        self.is_awaited = threading.Event()

    def next_batch(self, timeout_s: float | None = None) -> Batch | None:
        self.is_awaited.set()
        return super().next_batch(timeout_s)


class Rig:
    """Two running servers and three env groups of two envs."""

    def __init__(self, assignment: str = "round_robin") -> None:
        self.clock = Clock()
        rule = CreditRule(trajectories_per_update=2, max_staleness=0)
        self.queue = InProcessQueue(rule)
        self.store = InProcessWeightStore(on_acknowledged=self.queue.advance)
        self.samplers = (FakeSampler(), FakeSampler())
        self.batchers: list[ListeningBatcher] = []
        self.tracer = Tracer(clock=self.clock)
        self.meter = ActivityMeter("serving", tracer=self.tracer)
        self.recorder = MetricRecorder(clock=self.clock)
        serving = ServingConfig(num_servers=2, assignment=assignment)
        parts: Any = SimpleNamespace(
            samplers=self.samplers,
            config=SimpleNamespace(serving=serving, simulation=SimulationConfig(num_groups=3)),
        )
        self.servers = PolicyServers(
            parts,
            make_batcher=self._make_batcher,
            store=self.store,
            recorder=self.recorder,
            meter=self.meter,
        )
        groups: list[Any] = [SimpleNamespace(name=group_name(i), num_envs=2) for i in range(3)]
        self.clients = dict(zip("abc", self.servers.clients(groups), strict=True))
        self.threads = [
            ProgramThreads(x, self.meter, lambda _: None) for x in self.servers.programs
        ]

    def _make_batcher(self, schedule: ServerSchedule) -> Batcher:
        limits: dict[str, Any] = {"trigger_rows": 1, "max_wait_s": math.inf}
        limits |= {"max_rows": BUCKET, "capacity_rows": BUCKET, "schedule": schedule}
        self.batchers.append(ListeningBatcher(**limits))
        return self.batchers[-1]

    def start(self) -> None:
        self.publish(0)
        for threads in self.threads:
            threads.start()
        for client in self.clients.values():
            client.join()

    def close(self) -> None:
        for sampler in self.samplers:
            sampler.gate.set()
        for threads in self.threads:
            threads.program.stop("finished")
            assert threads.join(TIMEOUT_S) and threads.state is ProgramState.STOPPED
            threads.program.close()

    def publish(self, version: int) -> None:
        self.store.publish(version, {"kernel": jnp.full(1, float(version))})

    def ask(self, name: str) -> Any:
        mark = np.full((2, 1), float("abc".index(name)), np.float32)
        observation: Any = Observation(
            images=mark, image_mask=mark, state=mark, tokens=mark, token_mask=mark
        )
        return self.clients[name].submit("explore", observation, np.zeros((2, 2), np.uint32))

    def version(self, name: str) -> int:
        """Of the weights that answer a request; they say so themselves, too."""
        answer = self.ask(name).result(TIMEOUT_S)
        np.testing.assert_array_equal(answer.result, answer.policy_version)
        return answer.policy_version


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(*getattr(request, "param", ()))
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("rig", "expected"),
    [
        (("round_robin",), ([[0.0], [2.0]], [[1.0]])),
        (("greedy",), ([[0.0], [2.0]], [[1.0]])),
        (("1,0,1",), ([[1.0]], [[0.0], [2.0]])),
    ],
    indirect=["rig"],
)
def test_groups_are_answered_by_the_server_they_are_assigned_to(
    rig: Rig, expected: tuple[list[list[float]], ...]
) -> None:
    for name in "abc":
        assert rig.version(name) == 0
    assert tuple(sampler.clients for sampler in rig.samplers) == expected


def test_the_slowest_server_paces_admission(rig: Rig) -> None:
    """Two tickets per version. Server 1 is in a batch while version 1 is published."""
    assert rig.version("a") == rig.version("b") == 0
    tickets = [rig.queue.admit(name, timeout_s=TIMEOUT_S) for name in "ab"]
    assert [x.admission_version for x in tickets if x] == [0, 0]
    rig.samplers[1].hold()
    slow = rig.ask("b")
    assert rig.samplers[1].entered.wait(TIMEOUT_S)
    rig.publish(1)
    # Server 0 answers with the new weights already: it waits for nobody.
    while rig.version("a") == 0:
        pass
    assert rig.store.acknowledged_version == 0
    # A sample that server 1 made now would be of version 0: nothing may be admitted for it.
    assert rig.queue.admit("c", timeout_s=0.0) is None
    rig.samplers[1].gate.set()
    assert slow.result(TIMEOUT_S).policy_version == 0
    ticket = rig.queue.admit("c", timeout_s=TIMEOUT_S)
    assert ticket is not None and ticket.admission_version == 1
    assert rig.version("b") == rig.version("a") == 1


def test_a_server_that_is_gone_is_waited_for_no_more(rig: Rig) -> None:
    assert rig.version("a") == rig.version("b") == 0
    dead = rig.threads[1]
    dead.program.stop("crashed")
    assert dead.join(TIMEOUT_S)
    rig.publish(1)
    while rig.version("a") == 0:
        pass
    assert rig.store.acknowledged_version == 0
    dead.program.close()
    assert rig.store.acknowledged_version == 1


def test_time_of_all_servers_is_added_up(rig: Rig) -> None:
    """One infers while the other waits: the role is busy for half of its time."""
    for batcher in rig.batchers:
        assert batcher.is_awaited.wait(TIMEOUT_S)
    assert rig.version("a") == 0
    rig.samplers[0].hold()
    rig.ask("a")
    assert rig.samplers[0].entered.wait(TIMEOUT_S)
    rig.meter.snapshot()
    rig.clock.now_s += 10.0
    activity = rig.meter.snapshot().window
    assert activity.thread_s == pytest.approx(20.0)
    assert activity.busy_fraction == pytest.approx(0.5)
    assert activity.waiting_fractions == {"requests": pytest.approx(0.5)}


def test_metrics_are_joined_under_the_same_names(rig: Rig) -> None:
    for name in "abcb":
        rig.version(name)
    rig.clock.now_s += 4.0
    record = rig.recorder.flush(update=1, time_s=0.0, extra={})
    assert record["rate/chunk_queries_per_s"] == pytest.approx(4 * 2 / 4.0)
    assert record["serving/batch_fill"] == pytest.approx(2 / BUCKET)
    assert record["serving/recompiles"] == 0
    names = {"rate", "serving"}
    assert {name.split("/")[0] for name in record} - {"update", "time_s"} == names
    assert not any("server_" in name for name in record)
