"""A simulator between fakes, to be run in a test."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scripted_group import GOES_ON, ScriptedGroup, number_of, sample_of, value_of

from jaxvla.runtime.program import ProgramThreads
from jaxvla.serving.client import Answer
from jaxvla.simulation.simulator import Simulator
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import Tracer
from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.staleness import CreditRule
from jaxvla.types import Observation

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""
T, E = 3, 2
CALM = np.full((T, E), GOES_ON)
"""Script in which no episode ends."""
Log = list[tuple[Any, ...]]


class FakeQueue:
    """Gives out `num_tickets` tickets, then is closed. Keeps what is put."""

    def __init__(self, num_tickets: int, log: Log | None = None, *, is_late: bool = False):
        self.items: list[QueueItem] = []
        self.failed: list[tuple[int, str]] = []
        self._num_tickets = num_tickets
        self._log = [] if log is None else log
        self._is_late = is_late
        self._lock = threading.Lock()
        self._next = 0

    def admit(self, owner: str) -> Ticket | None:
        with self._lock:
            if self._next == self._num_tickets:
                return None
            self._next += 1
            self._log.append(("admit", owner))
            return Ticket(id=self._next - 1, admission_version=0, owner=owner)

    def put(self, ticket: Ticket, payload: Any, **about: Any) -> bool:
        with self._lock:
            self._log.append(("put", ticket.owner))
            self.items.append(QueueItem(ticket=ticket, payload=payload, **about))
            return not self._is_late

    def fail(self, ticket: Ticket, reason: str) -> bool:
        self.failed.append((ticket.id, reason))
        return True


class TicketsForEach(FakeQueue):
    """As many tickets for every owner."""

    def __init__(self, count: int):
        super().__init__(1000)
        self._left: dict[str, int] = {}
        self._count = count

    def admit(self, owner: str) -> Ticket | None:
        self._left[owner] = self._left.get(owner, self._count) - 1
        return super().admit(owner) if self._left[owner] >= 0 else None


def answer(kind: str, observation: Observation, version: int) -> Answer:
    """What a policy server says."""
    number = number_of(observation)
    result = sample_of(number) if kind == "explore" else value_of(number)
    return Answer(result=result, policy_version=version)


class FakeClient:
    """Answers at once, as version 0 or with the number of the query as the version."""

    def __init__(self, name: str, log: Log | None = None, *, has_updates: bool = False):
        self.name = name
        self._has_updates = has_updates
        self.log = [] if log is None else log
        self.queries: list[tuple[str, np.ndarray, np.ndarray]] = []
        """(kind, numbers, keys) of every query."""
        self.is_joined = False

    def join(self) -> None:
        assert not self.is_joined
        self.is_joined = True
        self.log.append(("join", self.name))

    def leave(self) -> None:
        assert self.is_joined
        self.is_joined = False
        self.log.append(("leave", self.name))

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        assert self.is_joined
        self.log.append((kind, self.name))
        future: Future[Answer] = Future()
        version = len(self.queries) if self._has_updates else 0
        self.queries.append((kind, number_of(observation), keys))
        self.respond(future, answer(kind, observation, version))
        return future

    def respond(self, future: Future, answer: Answer) -> None:
        future.set_result(answer)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A simulator with what it was made of."""

    simulator: Simulator
    clients: list[FakeClient]
    recorder: MetricRecorder
    meter: ActivityMeter

    def run(self) -> None:
        """Runs its threads one after the other in this one, until the queue has no ticket."""
        for name, function in self.simulator.threads().items():
            with self.meter.thread(name):
                function()

    def start(self, on_end: Callable[[Any], None] = lambda _: None) -> ProgramThreads:
        """Runs its threads as a runtime does."""
        threads = ProgramThreads(self.simulator, self.meter, on_end)
        threads.start()
        return threads


def make(
    groups: Sequence[ScriptedGroup],
    queue: Any,
    *,
    clients: Sequence[Any] | None = None,
    overlap: bool = True,
    seed: int = 0,
    group_size: int = 0,
) -> Made:
    recorder = MetricRecorder()
    meter = ActivityMeter("simulation", tracer=Tracer())
    made: list[Any] = list(clients or [FakeClient(group.name, group.log) for group in groups])
    simulator = Simulator(
        groups=list(groups),
        clients=made,
        queue=queue,
        key=jax.random.key(seed),
        segment_length=T,
        overlap_rollout=overlap,
        recorder=recorder,
        meter=meter,
        group_size=group_size,
    )
    return Made(simulator=simulator, clients=made, recorder=recorder, meter=meter)


def real_queue(per_update: int = 1, **options: Any) -> InProcessQueue:
    rule = CreditRule(trajectories_per_update=per_update, max_staleness=0)
    return InProcessQueue(rule, **options)
