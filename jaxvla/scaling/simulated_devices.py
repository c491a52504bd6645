"""What the stages of a simulated run work on: devices of their own, or shared processor cores."""

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import simpy

Wait = Generator[simpy.Event, Any, Any]
"""What a simpy process yields."""


class ExclusiveDevice:
    """Does one piece of work at a time, first come first served, as a device's stream does."""

    def __init__(self, env: simpy.Environment):
        self._env = env
        self.resource = simpy.Resource(env, capacity=1)
        self.busy_s = 0.0
        """Work done or begun."""
        self._since_s = math.nan

    def begin(self) -> None:
        """Notes that a piece starts."""
        self._since_s = self._env.now

    def end(self) -> None:
        """Notes that it has ended."""
        self.busy_s += self._env.now - self._since_s
        self._since_s = math.nan

    def busy_so_far_s(self) -> float:
        """Seconds of work up to now."""
        running_s = 0.0 if math.isnan(self._since_s) else self._env.now - self._since_s
        return self.busy_s + running_s


class SharedCores:
    """Processor cores among which the running stages are shared out.

    A stage that keeps d cores busy while it runs alone asks for d. While the stages that run ask
    for more than there are, each proceeds by the same factor more slowly: as the kernel gives
    every thread the same share, who has more threads gets more. That is processor sharing
    (https://en.wikipedia.org/wiki/Processor_sharing) with demands.
    """

    def __init__(self, env: simpy.Environment, num_cores: float):
        """Args: simpy's environment, and cores, above 0."""
        if not num_cores > 0:
            raise ValueError(f"num_cores = {num_cores}, must be positive")
        self._env = env
        self._num_cores = num_cores
        self._jobs: dict[simpy.Event, list[float]] = {}
        """Event at the end -> [seconds of work that are left, cores asked for]."""
        self._since_s = 0.0
        self._rate = 1.0
        """Seconds of work that every job does per second."""
        self._epoch = 0
        """Number of changes so far: timers set before the last one no longer count."""
        self.core_s = 0.0
        """Core seconds used up to the last change."""

    def run(self, work_s: float, demand: float) -> simpy.Event:
        """Starts a job.

        Args:
          work_s: seconds that it would take alone, above 0.
          demand: cores that it keeps busy, above 0; one that asks for more than there are gets
            all of them and takes no longer for that: its time was measured so.
        """
        done = self._env.event()
        self._settle()
        self._jobs[done] = [work_s, min(demand, self._num_cores)]
        self._reschedule()
        return done

    def busy_so_far_s(self) -> float:
        """Seconds up to now in which all cores would have been busy."""
        self._settle()
        return self.core_s / self._num_cores

    def _settle(self) -> None:
        """Does the work of the time since the last change."""
        passed_s = self._env.now - self._since_s
        self._since_s = self._env.now
        for job in self._jobs.values():
            job[0] -= passed_s * self._rate
            self.core_s += passed_s * self._rate * job[1]

    def _reschedule(self) -> None:
        """Sets the timer of the next job that ends."""
        self._epoch += 1
        if not self._jobs:
            return
        asked = sum(demand for _, demand in self._jobs.values())
        self._rate = min(1.0, self._num_cores / asked)
        shortest_s = min(left_s for left_s, _ in self._jobs.values()) / self._rate
        epoch = self._epoch
        timer = self._env.timeout(max(shortest_s, _tick_s(self._env.now)))
        timer.callbacks.append(lambda _: self._end(epoch))

    def _end(self, epoch: int) -> None:
        """Ends the jobs that are through."""
        if epoch != self._epoch:
            return
        self._settle()
        least_s = _tick_s(self._env.now)
        ended = [done for done, (left_s, _) in self._jobs.items() if left_s <= least_s]
        for done in ended:
            del self._jobs[done]
        self._reschedule()
        for done in ended:
            done.succeed()


class Devices:
    """All devices of a simulated run, by name."""

    def __init__(self, env: simpy.Environment, names: Sequence[str], cores: Mapping[str, float]):
        """Args:
        env: simpy's environment.
        names: of all devices.
        cores: name -> processor cores, of those that are machines without other devices. Stages
          share these; every other device is exclusive.
        """
        self._env = env
        self._exclusive = {x: ExclusiveDevice(env) for x in names if x not in cores}
        self._shared = {x: SharedCores(env, cores[x]) for x in names if x in cores}

    def run(self, names: Sequence[str], work_s: float, demand: float, ledger: Any) -> Wait:
        """Does work on all the named devices at once; ends when the last has done its part.

        Args:
          names: the devices. Exclusive ones are taken all together, in the order of the calls.
          work_s: seconds that it takes when nothing else runs.
          demand: cores that it keeps busy, on devices that are shared.
          ledger: of the thread; waiting for exclusive devices is booked as "devices".
        """
        if work_s <= 0.0:
            return
        exclusive = [self._exclusive[name] for name in names if name in self._exclusive]
        shared = [self._shared[name] for name in names if name in self._shared]
        requests = [device.resource.request() for device in exclusive]
        if any(not request.triggered for request in requests):
            with ledger.inside("waiting", "devices"):
                yield self._env.all_of(requests)
        for device in exclusive:
            device.begin()
        ends = [machine.run(work_s, demand) for machine in shared]
        if exclusive:
            ends.append(self._env.timeout(work_s))
        yield self._env.all_of(ends)
        for device, request in zip(exclusive, requests, strict=True):
            device.end()
            device.resource.release(request)

    def host(self, names: Sequence[str], work_s: float) -> Wait:
        """One thread's work beside the devices: it loads shared cores, and no exclusive device."""
        if work_s <= 0.0:
            return
        shared = next((self._shared[name] for name in names if name in self._shared), None)
        yield self._env.timeout(work_s) if shared is None else shared.run(work_s, 1.0)

    def busy_s(self) -> dict[str, float]:
        """Name -> seconds of work up to now."""
        return {x: device.busy_so_far_s() for x, device in (self._exclusive | self._shared).items()}


def _tick_s(now_s: float) -> float:
    """A time step that the clock can still make at `now_s`, far below any stage's length."""
    return max(1e-12, 4.0 * math.ulp(now_s))
