"""Simulator: steps env groups and turns their experience into trajectories.

consumes    tickets from the trajectory queue; answers from a policy server
produces    trajectories [T, E], one per ticket: parts of a stream of episodes, or whole episodes
waits for   a ticket ("learner"), then per chunk an answer ("inference")
unblocked by  the learner's progress (credit), the policy server, close of the queue
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxvla import rng
from jaxvla.serving.batcher import BatcherClosedError
from jaxvla.serving.client import Answer, gather
from jaxvla.serving.routing import RoutedClient
from jaxvla.simulation.assembler import SegmentAssembler, SegmentInfo
from jaxvla.simulation.group import Cursor, EnvGroup
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Recorder, Total
from jaxvla.transport.base import Ticket, TrajectorySink
from jaxvla.types import Observation

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSnapshot:
    """Where a restart continues a group."""

    next_segment: int
    end_state: Any


@dataclass(kw_only=True)
class _Lane:
    """One env group with its way to the policy server."""

    group: EnvGroup
    client: RoutedClient
    key: jax.Array
    """Typed root key of the group's sampling noise."""
    segment: int = 0
    observation: Observation | None = None
    is_joined: bool = False

    def join(self) -> None:
        """From now on the server holds batches back for this lane's requests."""
        self.client.join()
        self.is_joined = True

    def leave(self) -> None:
        """It does so no longer."""
        if self.is_joined:
            self.is_joined = False
            self.client.leave()


class _StoppedError(Exception):
    """The queue or the policy server was closed: leave quietly."""


class Simulator:
    """One simulator program with several env groups.

    With `overlap_rollout` every group has a thread of its own and asks for inference when it
    is ready. Without, one thread moves all groups in lockstep: admit all, then per chunk ask
    for all, wait for all, step all. Both run the same segment code on a list of groups.
    """

    role = "simulation"

    def __init__(
        self,
        *,
        groups: list[EnvGroup],
        clients: list[RoutedClient],
        queue: TrajectorySink,
        key: jax.Array,
        segment_length: int,
        overlap_rollout: bool,
        recorder: Recorder,
        meter: ActivityMeter,
        group_size: int = 0,
        first_group: int = 0,
    ):
        """Args:
        groups: env groups, made with the same group size.
        clients: one per group.
        queue: where trajectories go.
        key: typed root key of all simulators.
        segment_length: chunk steps T per trajectory.
        overlap_rollout: see the class docstring.
        recorder: metrics.
        meter: busy / wait accounting.
        group_size: see `SimulationConfig.group_size`. If positive, a trajectory holds whole
          episodes: the groups are reset before each one, no query is made once all episodes
          have ended, no critic is asked, and between trajectories there is nothing to save.
        first_group: place of the first group among those of the run, which its sampling noise
          belongs to, whatever simulator it is in.
        """
        self._lanes = [
            _Lane(group=group, client=client, key=rng.stream(key, "sampling", index))
            for index, (group, client) in enumerate(
                zip(groups, clients, strict=True), start=first_group
            )
        ]
        self._queue = queue
        self._segment_length = segment_length
        self._overlap_rollout = overlap_rollout
        self._recorder = recorder
        self._meter = meter
        self._group_size = group_size

    def restore(self, snapshots: Mapping[str, GroupSnapshot]) -> None:
        """Continues groups from snapshots by group name; call before the threads start."""
        for lane in self._lanes:
            snapshot = snapshots.get(lane.group.name)
            if snapshot is not None:
                lane.segment = snapshot.next_segment
            if snapshot is not None and not self._group_size:
                lane.observation = lane.group.load_state(snapshot.end_state)

    def threads(self) -> dict[str, Callable[[], None]]:
        """Thread name -> function, for the runtime to start."""
        if not self._overlap_rollout:
            return {"all groups": functools.partial(self.run, self._lanes)}
        return {lane.group.name: functools.partial(self.run, [lane]) for lane in self._lanes}

    def run(self, lanes: list[_Lane]) -> None:
        """Makes trajectories until the queue closes."""
        try:
            while True:
                self._begin(lanes)
                self._segment(lanes, self._admit(lanes))
        except _StoppedError:
            return

    def stop(self, reason: str) -> None:
        """Nothing of its own to wake: threads end when queue and batcher are closed."""

    def close(self) -> None:
        """Frees the groups' processes."""
        for lane in self._lanes:
            lane.group.close()

    def _begin(self, lanes: list[_Lane]) -> None:
        """Resets the groups that have no episode to go on with. No weights are asked for that, so
        it comes before the wait for a ticket."""
        if all(lane.observation is not None for lane in lanes):
            return
        with self._meter.busy("reset"):
            for lane in lanes:
                if lane.observation is None:
                    lane.observation = lane.group.reset(Cursor(segment=lane.segment))

    def _admit(self, lanes: list[_Lane]) -> list[Ticket]:
        tickets = []
        with self._meter.waiting("learner"):
            for lane in lanes:
                ticket = self._queue.admit(lane.group.name)
                if ticket is None:
                    raise _StoppedError
                tickets.append(ticket)
        return tickets

    def _segment(self, lanes: list[_Lane], tickets: list[Ticket]) -> None:
        """One trajectory per lane. A failure gives the tickets back before it goes on."""
        for lane in lanes:
            lane.join()
        try:
            assemblers = [SegmentAssembler() for _ in lanes]
            self._collect(lanes, assemblers)
            values = self._bootstrap(lanes, assemblers)
            for lane, ticket, assembler, answers in zip(
                lanes, tickets, assemblers, values, strict=True
            ):
                self._put(lane, ticket, assembler, answers)
        except BaseException as error:
            reason = "shutdown" if isinstance(error, _StoppedError) else "simulator_failed"
            for ticket in tickets:
                self._queue.fail(ticket, reason)
            raise
        finally:
            for lane in lanes:
                lane.leave()

    def _collect(self, lanes: list[_Lane], assemblers: list[SegmentAssembler]) -> None:
        """The chunk steps of a segment. A lane whose episodes have all ended leaves: a server in
        lockstep would wait for its next request, and the others for the server."""
        for chunk in range(self._segment_length):
            if self._group_size:
                running = [i for i, x in enumerate(assemblers) if not x.all_ended]
                for index in set(range(len(lanes))).difference(running):
                    lanes[index].leave()
                lanes, assemblers = [lanes[i] for i in running], [assemblers[i] for i in running]
            if not lanes:
                return
            self._chunk(lanes, assemblers, chunk)

    def _chunk(self, lanes: list[_Lane], assemblers: list[SegmentAssembler], chunk: int) -> None:
        """One chunk step of every lane: ask for all, wait for all, step all."""
        asks = []
        for lane in lanes:
            keys = _explore_keys(lane.key, lane.segment, chunk, lane.group.num_envs)
            asks.append((lane, "explore", lane.observation, np.asarray(keys)))
        answers = self._ask(asks)
        for lane, assembler, answer in zip(lanes, assemblers, answers, strict=True):
            with self._meter.busy("simulate"):
                cursor = Cursor(segment=lane.segment, chunk=chunk)
                result = lane.group.step_chunk(answer.result.actions, cursor)
            assert lane.observation is not None, "every lane was reset before its first chunk"
            assembler.add(lane.observation, answer.result, answer.policy_version, result)
            lane.observation = result.observation

    def _bootstrap(
        self, lanes: list[_Lane], assemblers: list[SegmentAssembler]
    ) -> list[list[np.ndarray]]:
        """Values that the trajectories need beyond their own, by lane.

        Clients are closed-loop, one request at a time; the first query of every lane goes out
        together, further ones (many time limits in one segment) follow one by one. A lane that
        has all of its values leaves: a server in lockstep would wait for its next request, and
        the others for the server.
        """
        if self._group_size:
            return [[] for _ in lanes]
        queries = []
        for lane, assembler in zip(lanes, assemblers, strict=True):
            assert lane.observation is not None, "every lane has run a segment"
            queries.append(assembler.bootstrap_queries(lane.observation))
        values: list[list[np.ndarray]] = [[] for _ in lanes]
        for index in range(max(len(parts) for parts in queries)):
            asking = [i for i, parts in enumerate(queries) if index < len(parts)]
            for i in set(range(len(lanes))).difference(asking):
                lanes[i].leave()
            answers = self._ask(
                [
                    (lanes[i], "value", queries[i][index], _no_keys(queries[i][index]))
                    for i in asking
                ]
            )
            for i, answer in zip(asking, answers, strict=True):
                values[i].append(answer.result)
        return values

    def _put(
        self, lane: _Lane, ticket: Ticket, assembler: SegmentAssembler, values: list[np.ndarray]
    ) -> None:
        trajectory = assembler.finish(values, length=self._segment_length)
        counts = assembler.counts()
        oldest, newest = assembler.versions()
        lane.segment += 1
        group_size, end_state = self._group_size, {}
        if group_size:
            lane.observation = None
        else:
            end_state = lane.group.state()
        info = SegmentInfo(
            group=lane.group.name,
            next_segment=lane.segment,
            end_state=end_state,
            episodes=assembler.episodes(),
            num_env_steps=counts.env_steps,
            num_useful_env_steps=counts.useful_env_steps,
            num_queries=counts.queries,
            num_invalid=counts.invalid_samples,
            is_uniform=assembler.is_uniform(group_size) if group_size else np.zeros(0, bool),
        )
        self._recorder.add("faults/invalid_samples", counts.invalid_samples, Total)
        self._recorder.add("faults/contact_overflow", counts.contact_overflow, Total)
        self._queue.put(
            ticket,
            trajectory,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=sum(x.nbytes for x in jax.tree.leaves(trajectory)),
            info=info,
        )

    def _ask(self, queries: Sequence[tuple[_Lane, str, Any, np.ndarray]]) -> list[Answer]:
        """Answers to (lane, kind, observation, keys), one query per lane."""
        asks = [functools.partial(lane.client.submit, *query) for lane, *query in queries]
        try:
            with self._meter.waiting("inference"):
                return gather(asks)
        except (BatcherClosedError, CancelledError) as error:
            raise _StoppedError from error


@functools.partial(jax.jit, static_argnums=3)
def _explore_keys(key: jax.Array, segment: int, chunk: int, num_rows: int) -> jax.Array:
    """`serving.sampling.row_keys` of a chunk's stream. One compiled call, as this is all the
    computing between an env step and its query: op by op it takes ten times as long."""
    return jax.random.key_data(
        jax.random.split(rng.stream(key, "explore", segment, chunk), num_rows)
    )


def _no_keys(observation: Observation) -> np.ndarray:
    """The value pass draws nothing; its rows carry empty keys."""
    return np.zeros((len(observation.state), 2), np.uint32)
