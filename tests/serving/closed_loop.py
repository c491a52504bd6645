"""Closed-loop clients and a server in virtual time, around a real batcher or without one.

Nothing sleeps and no thread runs: a clock is set to the time of the next event. Every client
takes its think times from a list of its own, so that all settings meet the same workload.
"""

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxvla.serving.adaptive import ClosedLoop, Setting, Tuner, replay
from jaxvla.serving.batcher import Batch, Batcher


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A workload."""

    rows: tuple[int, ...]
    """Of each client's requests."""
    mean_think_s: tuple[float, ...]
    """Of each client."""
    sigma: float
    """Standard deviation of the logarithm of think times."""
    service_s: Callable[[int], float]
    """Rows in a bucket -> seconds."""
    max_batch: int = 2**31
    """Rows per batch, if less than those of all clients."""
    is_shared: bool = False
    """Clients think one after the other, on the same devices. Not for `replay`."""
    seed: int = 0

    @property
    def max_rows(self) -> int:
        """Rows per batch."""
        return min(self.max_batch, sum(self.rows))

    @property
    def buckets(self) -> tuple[int, ...]:
        """As many rows as 1, 2, ... of the smallest requests have."""
        step = min(self.rows)
        return tuple(range(step, self.max_rows + step, step))

    def think_s(self, client: int) -> Iterator[float]:
        """Endless log-normal think times with the client's mean."""
        draw = random.Random(f"{self.seed}, {client}")
        mean, sigma = self.mean_think_s[client], self.sigma
        while True:
            yield mean * math.exp(draw.gauss(-sigma * sigma / 2, sigma))

    def closed_loop(self, num_rounds: int) -> ClosedLoop:
        """The same workload for `replay`; the think times repeat after `num_rounds`."""
        streams = [self.think_s(client) for client in range(len(self.rows))]
        return ClosedLoop(
            rows=self.rows,
            think_s=tuple(tuple(next(s) for _ in range(num_rounds)) for s in streams),
            buckets=self.buckets,
            service_s=tuple(self.service_s(bucket) for bucket in self.buckets),
            max_rows=self.max_rows,
        )


@dataclass(kw_only=True)
class Run:
    """What happened in virtual time."""

    finished_s: list[float]
    """When each batch was answered."""
    batches: list[Batch]
    settings: list[Setting]
    """In force when each batch fired."""

    def rate(self, first_request: int) -> float:
        """Rows per second, not counting what was served until so many requests were done."""
        num_done = list(itertools.accumulate(len(batch.requests) for batch in self.batches))
        start = bisect.bisect_left(num_done, first_request)
        rows = sum(batch.rows for batch in self.batches[start + 1 :])
        return rows / (self.finished_s[-1] - self.finished_s[start])


class Loop:
    """Drives a batcher from event to event."""

    def __init__(self, profile: Profile, setting: Setting, *, tuner: Tuner | None = None):
        self.profile = profile
        self.clock = VirtualClock()
        self.batcher = Batcher(
            trigger_rows=setting.trigger_rows,
            max_wait_s=setting.max_wait_s,
            max_rows=profile.max_rows,
            capacity_rows=sum(profile.rows),
            tuner=tuner,
            clock=self.clock,
        )
        self._think_s = [profile.think_s(client) for client in range(len(profile.rows))]
        self._arrivals: list[tuple[float, int]] = []
        self._thought_s = 0.0
        """When all have thought, if they share what they think with."""
        for client in range(len(profile.rows)):
            self.batcher.register(str(client))
            self._think(client)
        self.run = Run(finished_s=[], batches=[], settings=[])

    def serve(self, num_requests: int) -> Run:
        """Goes on until this many requests more have been answered."""
        num_done = 0
        while num_done < num_requests:
            batch = self._next_batch()
            bucket = next(x for x in self.profile.buckets if x >= batch.rows)
            self._advance(self.clock.now_s + self.profile.service_s(bucket))
            self.run.finished_s.append(self.clock.now_s)
            for request in batch.requests:
                request.future.set_result(None)
                self._think(int(request.client))
            num_done += len(batch.requests)
        return self.run

    def _next_batch(self) -> Batch:
        """Lets clients ask until a batch fires."""
        while True:
            setting = self.batcher.setting
            batch = self.batcher.next_batch(timeout_s=0.0)
            if batch is not None:
                self.run.batches.append(batch)
                self.run.settings.append(setting)
                return batch
            next_s = self._arrivals[0][0] if self._arrivals else math.inf
            self._advance(min(next_s, self.batcher.due_s))

    def _advance(self, end_s: float) -> None:
        """Clients ask whose time has come."""
        while self._arrivals and self._arrivals[0][0] <= end_s:
            self.clock.now_s, client = heapq.heappop(self._arrivals)
            rows, kind = self.profile.rows[client], "explore"
            self.batcher.submit(rows=rows, client=str(client), kind=kind, payload=None)
        self.clock.now_s = end_s

    def _think(self, client: int) -> None:
        start_s = max(self.clock.now_s, self._thought_s if self.profile.is_shared else 0.0)
        self._thought_s = start_s + next(self._think_s[client])
        heapq.heappush(self._arrivals, (self._thought_s, client))


def adaptive_loop(profile: Profile, **options: Any) -> Loop:
    """Adaptive from the defaults of the config: the rows of one group, 20 ms."""
    start = Setting(trigger_rows=profile.rows[0], max_wait_s=0.02)
    tuner = Tuner(buckets=profile.buckets, max_rows=profile.max_rows, **options)
    return Loop(profile, start, tuner=tuner)


def fixed_grid(profile: Profile, num_requests: int) -> dict[Setting, float]:
    """Rows per second of every trigger with ten waits each, on the workload of `Loop`.

    As of `Run.rate`, a quarter of the requests is not counted.
    """
    count = len(profile.rows)
    loop = profile.closed_loop(2 * num_requests // count)
    mean_s = sum(profile.mean_think_s) / count

    def rate(setting: Setting) -> float:
        if profile.is_shared:
            return Loop(profile, setting).serve(num_requests).rate(num_requests // 4)
        return replay(loop, setting, num_requests)

    waits_s = [0.0, *(mean_s * 2.0**k for k in range(-5, 3)), math.inf]
    return {
        setting: rate(setting)
        for trigger in profile.buckets
        for wait_s in waits_s
        for setting in [Setting(trigger_rows=trigger, max_wait_s=wait_s)]
    }
