"""Discrete-event simulation of a run: the real rules, with stage costs drawn from samples.

Simulators, policy servers and the learner are processes of simpy (https://simpy.readthedocs.io)
and do what `simulation.simulator`, `serving.server` and `learning.learner` do. The rules are not
modelled but used: `serving.batcher.Batcher` decides what fires, `serving.routing.Router` who asks
which server, `transport.staleness.TicketBook` who gets a ticket and what the learner takes. Time
is the environment's, there are no threads, and a seed decides everything.

What the figures say is simulated; docs/scaling_model.md tells what is assumed.
"""

import bisect
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from jaxvla.scaling.measurements import StageSamples
from jaxvla.scaling.simulated_books import Books, Draws, Ledger, SimulatedQueue, activities
from jaxvla.scaling.simulated_devices import Devices
from jaxvla.scaling.system import Simulated, System
from jaxvla.serving.adaptive import Tuner
from jaxvla.serving.batcher import Batch, Batcher
from jaxvla.serving.routing import Router
from jaxvla.transport.staleness import CreditRule

Process = Generator[simpy.Event, Any, Any]
"""What simpy runs."""


def simulate(system: System, samples: StageSamples, *, seed: int = 0) -> Simulated:
    """Runs a system to its last update.

    Raises:
      ValueError: the samples lack a size of calls that the system makes, or its programs wait
        for each other.
    """
    return _Simulation(system, samples, seed).run()


@dataclass(kw_only=True)
class _Lane:
    """One env group."""

    name: str
    devices: tuple[str, ...]
    server: "_Server | None" = None
    """Of the present segment."""


@dataclass(kw_only=True)
class _Server:
    """One policy server."""

    name: str
    devices: tuple[str, ...]
    batcher: Batcher
    changed: simpy.Event
    """Happens when the batcher has something new to look at."""
    staged: int | None = None
    """Version to be swapped in."""
    version: int = -1
    batches: list[int] = field(default_factory=list)
    """Rows of each."""

    def notify(self) -> None:
        """Wakes the server."""
        if not self.changed.triggered:
            self.changed.succeed()


@dataclass(kw_only=True)
class _Log:
    """Readings at the end of every update."""

    times_s: list[float] = field(default_factory=list)
    env_steps: list[float] = field(default_factory=list)
    staleness: list[list[int]] = field(default_factory=list)
    books: list[dict[str, Any]] = field(default_factory=list)
    devices: list[dict[str, float]] = field(default_factory=list)


class _Simulation:
    """One run."""

    def __init__(self, system: System, samples: StageSamples, seed: int):
        self._system = system
        self._samples = samples
        self._env = env = simpy.Environment()
        self._draws = Draws(samples, seed)
        self._books = Books(env)
        self._devices = Devices(env, system.devices, system.cores)
        schedule = system.schedule
        self._rule = CreditRule(
            trajectories_per_update=system.trajectories_per_update,
            max_staleness=schedule.staleness_in_force,
            window=schedule.window_in_force,
            publish_interval=schedule.publish_interval,
            num_updates=None if system.is_endless else system.num_updates,
        )
        self._queue = SimulatedQueue(env, self._rule)
        self._servers = [
            _Server(
                name=f"server_{index}",
                devices=devices,
                batcher=self._batcher(),
                changed=env.event(),
            )
            for index, devices in enumerate(system.server_devices)
        ]
        self._lanes = [
            _Lane(name=f"group_{index}", devices=devices)
            for index, devices in enumerate(system.group_devices)
        ]
        fixed = None
        if system.assignment is not None:
            fixed = {lane.name: i for lane, i in zip(self._lanes, system.assignment, strict=True)}
        self._router = Router(len(self._servers), fixed)
        self._acknowledged = -1
        self._log = _Log()
        self._env_steps = float(samples.env_steps_per_query.mean())

    def run(self) -> Simulated:
        """See `simulate`."""
        env, size = self._env, self._system.lockstep_groups or len(self._lanes)
        size = 1 if self._system.schedule.overlap_rollout else size
        for server in self._servers:
            server.staged = 0
            env.process(self._serve(server))
        for first in range(0, len(self._lanes), size):
            env.process(self._simulate(self._lanes[first : first + size]))
        learner = env.process(self._learn())
        try:
            env.run(until=learner)
        except RuntimeError as error:
            if learner.triggered:
                raise
            raise ValueError(f"after {len(self._log.times_s)} updates all wait for ever") from error
        return self._result()

    def _batcher(self) -> Batcher:
        """As `runtime.crew.make_batcher` makes it."""
        system = self._system
        is_dynamic = system.schedule.overlap_rollout
        total = system.num_groups * system.envs_per_group
        return Batcher(
            trigger_rows=system.trigger_rows if is_dynamic else system.max_batch,
            max_wait_s=system.max_wait_s if is_dynamic else float("inf"),
            max_rows=system.max_batch,
            capacity_rows=max(total, system.max_batch),
            tuner=Tuner(buckets=system.buckets, max_rows=system.max_batch)
            if is_dynamic and system.is_adaptive
            else None,
            clock=lambda: self._env.now,
        )

    # -------------------------------------------------------------------------- simulator

    def _simulate(self, lanes: Sequence[_Lane]) -> Process:
        """One thread of a simulator: segments for ever."""
        ledger, thread = self._books.open("simulation"), lanes[0].name
        while True:
            for lane in lanes:
                if len(self._samples.reset_s):
                    with ledger.inside("busy", "reset"):
                        yield from self._host(lane, "reset_s")
            tickets = []
            with ledger.inside("waiting", "learner"):
                for lane in lanes:
                    ticket = yield self._queue.admit(lane.name)
                    tickets.append(ticket)
            for lane in lanes:
                self._join(lane)
            num_chunks = round(self._draws.one("num_chunks", thread))
            versions = yield from self._segment(lanes, num_chunks, ledger)
            for _ in range(round(self._draws.one("num_values", thread))):
                yield from self._ask(lanes, "value", ledger)
            for lane, ticket, made_by in zip(lanes, tickets, versions, strict=True):
                yield from self._host(lane, "finish_s")
                env_steps = num_chunks * self._system.envs_per_group * self._env_steps
                oldest, newest = min(made_by), max(made_by)
                self._queue.put(ticket, payload=env_steps, oldest=oldest, newest=newest)
            for lane in lanes:
                self._leave(lane)

    def _segment(self, lanes: Sequence[_Lane], num_chunks: int, ledger: Ledger) -> Process:
        """The chunk steps of a segment; gives the policy versions of each lane's samples."""
        versions: list[list[int]] = [[] for _ in lanes]
        for lane in lanes:
            yield from self._host(lane, "begin_s")
        for _ in range(num_chunks):
            answers = yield from self._ask(lanes, "explore", ledger)
            for lane, made_by, version in zip(lanes, versions, answers, strict=True):
                made_by.append(version)
                with ledger.inside("busy", "simulate"):
                    yield from self._work(lane.devices, "chunk_s", lane.name, ledger)
        return versions

    def _ask(self, lanes: Sequence[_Lane], kind: str, ledger: Ledger) -> Process:
        """Sends a query per lane and waits for all answers: their policy versions."""
        answers = [self._submit(lane, kind) for lane in lanes]
        with ledger.inside("waiting", "inference"):
            yield self._env.all_of(answers)
            answer_s = self._draws.one("answer_s", lanes[0].name)
            if answer_s:
                yield self._env.timeout(answer_s)
        return [answer.value for answer in answers]

    def _submit(self, lane: _Lane, kind: str) -> simpy.Event:
        server, answer = lane.server, self._env.event()
        assert server is not None, "a lane asks between join and leave"
        future: Future[int] = server.batcher.submit(
            rows=self._system.envs_per_group, client=lane.name, kind=kind, payload=None
        )
        future.add_done_callback(lambda done: answer.succeed(done.result()))
        server.notify()
        return answer

    def _join(self, lane: _Lane) -> None:
        rows = self._system.envs_per_group
        lane.server = self._servers[self._router.join(lane.name, rows)]
        lane.server.batcher.register(lane.name)

    def _leave(self, lane: _Lane) -> None:
        assert lane.server is not None, "a lane leaves after it has joined"
        lane.server.batcher.unregister(lane.name)
        lane.server.notify()
        self._router.leave(lane.name)
        lane.server = None

    # ----------------------------------------------------------------------------- server

    def _serve(self, server: _Server) -> Process:
        """The thread of a policy server."""
        ledger = self._books.open("serving")
        while True:
            self._swap(server)
            with ledger.inside("waiting", "requests"):
                batch = yield from self._next_batch(server)
            if batch is None:
                swap_s = self._draws.one("swap_s", server.name)
                yield from self._devices.host(server.devices, swap_s)
                continue
            self._swap(server)
            server.batches.append(batch.rows)
            name = "value_s" if batch.kind == "value" else "service_s"
            bucket = self._system.buckets[bisect.bisect_left(self._system.buckets, batch.rows)]
            work_s = self._draws.of_rows(name, bucket, server.name)
            with ledger.inside("busy", "infer"):
                yield from self._run(server.devices, "infer", work_s, ledger)
            for request in batch.requests:
                request.future.set_result(server.version)
            after_s = self._draws.one("after_s", server.name)
            yield from self._devices.host(server.devices, after_s)

    def _next_batch(self, server: _Server) -> Process:
        """Waits as `Batcher.next_batch` does; None when there are new weights."""
        while True:
            server.changed = self._env.event()
            batch: Batch | None = server.batcher.next_batch(timeout_s=0.0)
            if batch is not None or server.staged is not None:
                return batch
            due_s, now_s = server.batcher.due_s, self._env.now
            if due_s == float("inf"):
                yield server.changed
            else:
                # A span too short to change the time would be waited for again and again.
                span_s = max(due_s - now_s, 2.0 * np.spacing(now_s))
                yield server.changed | self._env.timeout(span_s)

    def _swap(self, server: _Server) -> None:
        """Swaps in what there is, and tells the queue once all servers have."""
        if server.staged is None:
            return
        server.version, server.staged = server.staged, None
        acknowledged = min(server.version for server in self._servers)
        if acknowledged > self._acknowledged:
            self._acknowledged = acknowledged
            self._queue.advance(acknowledged)

    # ---------------------------------------------------------------------------- learner

    def _learn(self) -> Process:
        """The learner's thread, up to the last update."""
        system, ledger = self._system, self._books.open("learning")
        interval = system.schedule.publish_interval
        for version in range(1, system.num_updates + 1):
            update = self._streamed if system.schedule.stream_microbatches else self._batched
            items = yield from update(version - 1, ledger)
            if version % interval == 0 or version == system.num_updates:
                with ledger.inside("busy", "publish"):
                    work_s = self._draws.one("publish_s", "learner")
                    yield from self._run(system.learner_devices, "publish", work_s, ledger)
                self._env.process(self._stage(version))
            self._note(items, version - 1)
            names, work_s = system.learner_devices, self._draws.one("between_s", "learner")
            yield from self._devices.host(names, work_s)

    def _batched(self, version: int, ledger: Ledger) -> Process:
        """One update from a whole batch."""
        system = self._system
        with ledger.inside("waiting", "trajectories"):
            items = yield self._queue.take(system.trajectories_per_update, version)
        work_s = self._draws.of_rows("train_s", self._queries(len(items)), "learner")
        with ledger.inside("busy", "train"):
            for _ in range(system.num_train_pieces):
                part_s = work_s / system.num_train_pieces
                yield from self._run(system.learner_devices, "train", part_s, ledger)
        return items

    def _streamed(self, version: int, ledger: Ledger) -> Process:
        """One update from trajectories as they arrive."""
        system, items = self._system, []
        for _ in range(system.trajectories_per_update):
            with ledger.inside("waiting", "trajectories"):
                items += yield self._queue.take(1, version)
            work_s = self._draws.of_rows("gradient_s", self._queries(1), "learner")
            with ledger.inside("busy", "train"):
                yield from self._run(system.learner_devices, "train", work_s, ledger)
        with ledger.inside("busy", "train"):
            work_s = self._draws.one("apply_s", "learner")
            yield from self._run(system.learner_devices, "train", work_s, ledger)
        return items

    def _queries(self, num_trajectories: int) -> int:
        """Chunk queries of so many whole trajectories."""
        system = self._system
        return num_trajectories * system.envs_per_group * system.segment_length

    def _stage(self, version: int) -> Process:
        """Brings new weights to the policy servers."""
        yield self._env.timeout(self._draws.one("pull_s", "learner"))
        for server in self._servers:
            server.staged = version
            server.notify()

    def _note(self, items: Sequence[Any], version: int) -> None:
        """Readings at the end of an update."""
        log = self._log
        log.times_s.append(self._env.now)
        log.env_steps.append(sum(item.payload for item in items))
        log.staleness.append([version - item.policy_version_min for item in items])
        if len(log.times_s) in (self._system.num_warmup, self._system.num_updates):
            log.books.append(self._books.seconds())
            log.devices.append(self._devices.busy_s())

    # ----------------------------------------------------------------------------- stages

    def _work(self, devices: Sequence[str], name: str, thread: str, ledger: Ledger) -> Process:
        """A chunk step."""
        work_s = self._draws.of_rows(name, self._system.envs_per_group, thread)
        yield from self._run(devices, "simulate", work_s, ledger)

    def _run(self, devices: Sequence[str], stage: str, work_s: float, ledger: Ledger) -> Process:
        """Work of a stage on its devices."""
        demand = self._samples.cores.get(stage, 1.0)
        yield from self._devices.run(devices, work_s, demand, ledger)

    def _host(self, lane: _Lane, name: str) -> Process:
        """What a simulator's thread does beside its devices."""
        yield from self._devices.host(lane.devices, self._draws.one(name, lane.name))

    def _result(self) -> Simulated:
        system, log = self._system, self._log
        first = system.num_warmup
        spans_s = np.diff(log.times_s[first - 1 :])
        window_s = float(spans_s.sum())
        staleness = [x for update in log.staleness[first:] for x in update]
        begin, end = log.devices
        batches = [rows for server in self._servers for rows in server.batches]
        return Simulated(
            env_steps_per_s=sum(log.env_steps[first:]) / window_s,
            update_s=float(spans_s.mean()),
            update_std_s=float(spans_s.std()),
            staleness_mean=float(np.mean(staleness)),
            staleness_max=max(x for update in log.staleness for x in update),
            staleness_bound=self._rule.bound,
            activities=activities(*log.books),
            device_busy={name: (end[name] - begin[name]) / window_s for name in end},
            rows_per_batch=float(np.mean(batches)),
        )
