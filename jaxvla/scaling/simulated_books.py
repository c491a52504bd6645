"""Time accounts, the trajectory queue and the draws of costs of a simulated run."""

import contextlib
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import simpy

from jaxvla.scaling.measurements import StageSamples
from jaxvla.telemetry.activity import OTHER, Activity
from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.transport.staleness import CreditRule, TicketBook

State = tuple[str, str]
"""("busy", what) or ("waiting", reason), as in `telemetry.activity`."""
_BLOCK = 256
"""Draws made at a time."""


class Ledger:
    """What one thread of a simulated program does: the innermost block gets the time."""

    def __init__(self, env: simpy.Environment, seconds: dict[State, float]):
        self._env = env
        self._seconds = seconds
        self._states: list[State] = [("busy", OTHER)]
        self._since_s = env.now

    @contextlib.contextmanager
    def inside(self, kind: str, name: str) -> Iterator[None]:
        """The block is work ("busy") on something, or waits ("waiting") for a reason."""
        self.settle()
        self._states.append((kind, name))
        try:
            yield
        finally:
            self.settle()
            self._states.pop()

    def settle(self) -> None:
        """Books the time up to now."""
        state, now_s = self._states[-1], self._env.now
        self._seconds[state] = self._seconds.get(state, 0.0) + now_s - self._since_s
        self._since_s = now_s


class Books:
    """Ledgers of all threads, by role."""

    def __init__(self, env: simpy.Environment):
        self._env = env
        self._seconds: defaultdict[str, dict[State, float]] = defaultdict(dict)
        self._ledgers: list[Ledger] = []

    def open(self, role: str) -> Ledger:
        """A ledger for a new thread of a role."""
        ledger = Ledger(self._env, self._seconds[role])
        self._ledgers.append(ledger)
        return ledger

    def seconds(self) -> dict[str, dict[State, float]]:
        """Role -> time by state up to now."""
        for ledger in self._ledgers:
            ledger.settle()
        return {role: dict(seconds) for role, seconds in self._seconds.items()}


def activities(
    begin: Mapping[str, Mapping[State, float]], end: Mapping[str, Mapping[State, float]]
) -> dict[str, Activity]:
    """Role -> what its threads did between two readings of `Books.seconds`."""
    result = {}
    for role, seconds in end.items():
        spent = {state: s - begin.get(role, {}).get(state, 0.0) for state, s in seconds.items()}
        result[role] = Activity(
            busy_s={name: s for (kind, name), s in spent.items() if kind == "busy"},
            waiting_s={name: s for (kind, name), s in spent.items() if kind == "waiting"},
        )
    return result


class SimulatedQueue:
    """The ticket book of `transport.staleness` behind simpy events, as `InProcessQueue` has it
    behind a condition: tickets are given out in the order of the calls."""

    def __init__(self, env: simpy.Environment, rule: CreditRule):
        self._env = env
        self._book = TicketBook(rule, lease_s=float("inf"), max_bytes=None)
        self._line: deque[tuple[str, simpy.Event]] = deque()
        """Who waits for a ticket."""
        self._taker: tuple[int, int, simpy.Event] | None = None
        """Count and learner version of the waiting learner."""
        self._num_ready = 0

    def admit(self, owner: str) -> simpy.Event:
        """Gives a Ticket once there is credit."""
        event = self._env.event()
        self._line.append((owner, event))
        self._settle()
        return event

    def put(self, ticket: Ticket, *, payload: Any, oldest: int, newest: int) -> None:
        """Delivers a trajectory.

        Args:
          ticket: of it.
          payload: anything.
          oldest, newest: policy versions that made it.
        """
        item = QueueItem(
            ticket=ticket,
            payload=payload,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=0,
            info=None,
        )
        self._book.put(item)
        self._num_ready += 1
        self._settle()

    def take(self, count: int, version: int) -> simpy.Event:
        """Gives the next `count` items to a learner at `version`."""
        event = self._env.event()
        self._taker = count, version, event
        self._settle()
        return event

    def advance(self, version: int) -> None:
        """All policy servers have swapped in `version`."""
        self._book.advance(version)
        self._settle()

    def _settle(self) -> None:
        """Serves whoever can be served."""
        while self._line:
            ticket = self._book.admit(self._line[0][0], self._env.now)
            if ticket is None:
                break
            self._line.popleft()[1].succeed(ticket)
        if self._taker is None or self._num_ready < self._taker[0]:
            return
        count, version, event = self._taker
        items = self._book.take(count, version)
        if items is not None:
            self._num_ready -= count
            self._taker = None
            event.succeed(items)


class Draws:
    """Costs drawn from samples with replacement, a stream of its own for every thread.

    A stage without samples takes no time.
    """

    def __init__(self, samples: StageSamples, seed: int):
        """Args: what to draw from, and the seed that decides every draw."""
        self._samples = samples
        self._seed = seed
        self._streams: dict[tuple[str, int, str], Iterator[float]] = {}

    def one(self, name: str, thread: str) -> float:
        """A sample of a stage of one size, for a thread."""
        return next(self._stream(name, 0, thread, getattr(self._samples, name)))

    def of_rows(self, name: str, rows: int, thread: str) -> float:
        """A sample of a stage with so many rows.

        Raises:
          ValueError: there are none of that size.
        """
        table = getattr(self._samples, name)
        if rows not in table:
            raise ValueError(
                f"{name}: no samples of {rows} rows, only of {sorted(table)}. Fix: measure a run "
                "that has them, or fill them in with jaxvla.scaling.cost_model"
            )
        return next(self._stream(name, rows, thread, table[rows]))

    def _stream(self, name: str, rows: int, thread: str, samples: np.ndarray) -> Iterator[float]:
        key = name, rows, thread
        if key not in self._streams:
            entropy = [self._seed, zlib.crc32(name.encode()), rows, zlib.crc32(thread.encode())]
            self._streams[key] = _forever(samples, np.random.default_rng(entropy))
        return self._streams[key]


def _forever(samples: np.ndarray, random: np.random.Generator) -> Iterator[float]:
    while True:
        if not len(samples):
            yield 0.0
            continue
        yield from samples[random.integers(len(samples), size=_BLOCK)].tolist()
