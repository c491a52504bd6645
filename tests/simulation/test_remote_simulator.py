"""A simulator whose queue and policy server are elsewhere, over connections that are cut."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from local_connections import CONFIG, TIMEOUT_S, in_thread, listening
from scripted_group import GOES_ON, TERMINATED, TRUNCATED, ScriptedGroup, observation_of
from simulator_run import FakeClient, Made, TicketsForEach, answer, make

from jaxvla.serving.batcher import Batcher
from jaxvla.serving.remote import InferenceService
from jaxvla.serving.remote_client import RemoteInferenceClient, ServerLink
from jaxvla.serving.remote_schema import InferenceSchema
from jaxvla.simulation.segment_codec import SegmentCodec
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.transport.base import QueueItem
from jaxvla.transport.channel import Connection
from jaxvla.transport.frames import Frame
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.remote_queue import QueueService, RemoteQueue
from jaxvla.transport.staleness import CreditRule

SCRIPT = np.asarray([[GOES_ON, TERMINATED], [TRUNCATED, GOES_ON], [GOES_ON, GOES_ON]] * 4)
GROUPS = ("group_0", "group_1")
NUM_UPDATES, PER_UPDATE = 5, 2
NUMBERS = np.zeros(2, np.int32)


def expected() -> dict[tuple[str, int], QueueItem]:
    """What a simulator in one process makes, by group and segment."""
    items = {}
    for name in GROUPS:
        queue = TicketsForEach(NUM_UPDATES * PER_UPDATE)
        make([ScriptedGroup(name, SCRIPT)], queue, clients=[FakeClient(name)]).run()
        items |= {(name, item.info.next_segment - 1): item for item in queue.items}
    return items


class Elsewhere:
    """A learner's queue and a policy server, each behind an address."""

    def __init__(self, trajectory: Any, *, cut_at: set[int]):
        """Args: the trajectory's struct, and the batches before which the connection is cut."""
        rule = CreditRule(
            trajectories_per_update=PER_UPDATE, max_staleness=9, num_updates=NUM_UPDATES
        )
        self.queue = InProcessQueue(rule)
        state = {"chunk": np.zeros((), np.int64)}
        self.codec = SegmentCodec(trajectory, dict.fromkeys(GROUPS, state))
        self.service = QueueService(self.queue, self.codec)
        self.batcher = Batcher(trigger_rows=1, max_wait_s=0.0, max_rows=8, capacity_rows=64)
        self.schema = InferenceSchema(
            observation_of(NUMBERS),
            {
                kind: answer(kind, observation_of(NUMBERS), 0).result
                for kind in ("explore", "value")
            },
        )
        self.inference = InferenceService(self.batcher, self.schema, session="s1")
        self.connections: list[Connection] = []
        self.cut_at = cut_at
        self.num_cuts = 0

    def serve_queue(self, connection: Connection) -> None:
        def welcome(newest: Mapping[str, Any]) -> None:
            self.newest = dict(newest)
            connection.send(Frame(kind="welcome"))

        self.service.serve(connection, GROUPS, welcome=welcome)

    def serve_inference(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.inference.serve(connection)

    def infer(self) -> None:
        """The policy server's thread. It keeps the first weights."""
        number = 0
        while not self.batcher.is_closed:
            batch = self.batcher.next_batch()
            if batch is None:
                continue
            if number in self.cut_at:
                self.num_cuts += 1
                self.connections[-1].close()
            number += 1
            for request in batch.requests:
                result = answer(batch.kind, request.payload.observation, 0)
                request.future.set_result(result)


@contextlib.contextmanager
def simulating(there: Elsewhere, dial: Any, address: Any) -> Iterator[tuple[Made, RemoteQueue]]:
    """A simulator that goes on where the last one was heard of, while the block runs."""
    connection = dial("simulator_0")
    assert connection.receive().kind == "welcome"
    remote = RemoteQueue(connection, there.codec)
    in_thread(remote.run)
    link = ServerLink(
        lambda: address,
        CONFIG,
        there.schema,
        name="simulator_0",
        session="s1",
        patience_s=TIMEOUT_S,
    )
    link.start()
    groups = [ScriptedGroup(name, SCRIPT) for name in GROUPS]
    clients = [RemoteInferenceClient(link, name) for name in GROUPS]
    made = make(groups, remote, clients=clients)
    made.simulator.restore(
        {
            # A copy, as it would come over the wire: the group counts on in what it is given.
            name: GroupSnapshot(
                next_segment=info.next_segment, end_state=jax.tree.map(np.copy, info.end_state)
            )
            for name, info in there.newest.items()
        }
    )
    threads = made.start()
    try:
        yield made, remote
    finally:
        remote.close()
        link.close("finished")
        assert threads.join(TIMEOUT_S) and threads.error is None


@pytest.mark.fault(31)
@pytest.mark.parametrize("cut_at", [set(), {0, 1, 2, 7, 12}])
def test_it_makes_the_same_trajectories_however_often_it_is_cut_off(cut_at: set[int]) -> None:
    wanted = expected()
    there = Elsewhere(wanted["group_0", 0].payload, cut_at=cut_at)
    serving = in_thread(there.infer)
    items: list[QueueItem] = []
    with contextlib.ExitStack() as stack:
        dial = stack.enter_context(listening(there.serve_queue))
        dial_server = stack.enter_context(listening(there.serve_inference))
        for update in range(NUM_UPDATES):
            # A new simulator for every update: the old one dies wherever it is.
            with simulating(there, dial, dial_server.address):
                taken = there.queue.take(PER_UPDATE, update, timeout_s=TIMEOUT_S)
                assert taken is not None
                items += taken
        there.queue.close("finished")
        there.batcher.close("finished")
        serving.result(TIMEOUT_S)
    assert len(items) == NUM_UPDATES * PER_UPDATE and there.queue.ledger().is_balanced
    for name in GROUPS:
        segments = [x.info.next_segment - 1 for x in items if x.ticket.owner == name]
        assert segments == list(range(len(segments)))
    for item in items:
        reference = wanted[item.info.group, item.info.next_segment - 1]
        for got, want in (
            (item.payload, reference.payload),
            (item.info.end_state, reference.info.end_state),
            (vars_of(item.info.episodes), vars_of(reference.info.episodes)),
        ):
            assert jax.tree.structure(got) == jax.tree.structure(want)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(one, other)
    assert there.num_cuts == len(cut_at)


def vars_of(episodes: Any) -> dict[str, Any]:
    return {name: getattr(episodes, name) for name in ("task", "success", "return_", "length")}
