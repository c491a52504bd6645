"""A network that is cut, and clients that ask for far more than there is."""

import time
from typing import Any

import numpy as np
import pytest
from fault_rows import FaultRow
from local_connections import CONFIG, TIMEOUT_S, in_thread
from serving.closed_loop import VirtualClock
from transport.loopback import Proxy
from transport.remote_pair import NumberCodec, greet, serving

from jaxvla.serving.batcher import Batcher, Busy
from jaxvla.transport.channel import ChannelConfig, connect
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.remote_queue import RemoteQueue
from jaxvla.transport.staleness import CreditRule

QUICK = ChannelConfig(token=CONFIG.token, ping_s=0.25, silence_s=2.0)


def join(address: tuple[str, int]) -> tuple[RemoteQueue, dict[str, Any]]:
    """A simulator's queue, and what it was welcomed with."""
    connection = connect(address, QUICK, name="sim", timeout_s=TIMEOUT_S)
    greet(connection, ["a", "b"])
    newest = connection.receive().fields["newest"]
    remote = RemoteQueue(connection, NumberCodec())
    in_thread(remote.run)
    return remote, newest


def put(queue: RemoteQueue, ticket: Any, value: int) -> bool:
    return queue.put(
        ticket, value, policy_version_min=0, policy_version_max=0, nbytes=8, info={"at": value}
    )


@pytest.mark.fault(31)
def test_a_partition_loses_what_was_in_flight_and_nothing_twice(fault_row: FaultRow) -> None:
    """Bytes are held back both ways, and no socket is closed: only silence tells."""
    queue = InProcessQueue(CreditRule(trajectories_per_update=2, max_staleness=1))
    with serving(queue, config=QUICK) as there:
        with Proxy(there.dial.address) as proxy:
            remote, _ = join(proxy.address)
            first, second = remote.admit("a"), remote.admit("b")
            assert put(remote, first, 1)
            proxy.cut()
            cut_s = time.monotonic()
            late = in_thread(lambda: put(remote, second, 2))  # it sends, and gets no answer
            assert late.result(TIMEOUT_S) is False
            # The learner's side has its own silence, and gives the tickets up.
            with queue._changed:
                assert queue._changed.wait_for(lambda: queue._book.ledger().dropped == 1, TIMEOUT_S)
            noticed_s = time.monotonic() - cut_s
        again, newest = join(there.dial.address)
        assert newest == {"a": {"at": 1}}
        ticket = again.admit("b")
        assert ticket is not None and ticket.id == 2
        assert put(again, ticket, 3)
        items = queue.take(2, 0, timeout_s=TIMEOUT_S)
        assert items is not None and [item.payload for item in items] == [1, 3]
        again.close()
    ledger = queue.ledger()
    assert ledger.dropped_by_reason == {"simulator_lost": 1} and ledger.is_balanced
    fault_row(survived=True, lost=1, recovery_s=noticed_s, bound_kept=True)


@pytest.mark.fault(26)
def test_a_flood_is_turned_away_and_those_let_in_are_served_soon(fault_row: FaultRow) -> None:
    """80 clients ask again and again where 8 rows may wait, 4 of which make a batch."""
    clock, service_s, capacity, size = VirtualClock(), 0.05, 8, 4
    batcher = Batcher(
        trigger_rows=size, max_wait_s=0.02, max_rows=size, capacity_rows=capacity, clock=clock
    )
    clients = [f"client_{i}" for i in range(10 * capacity)]
    for name in clients:
        batcher.register(name)
    waiting: dict[str, object] = {}
    latency_s: list[float] = []
    num_busy = 0
    for _ in range(500):
        for name in clients:
            if name in waiting:
                continue
            try:
                waiting[name] = batcher.submit(rows=1, client=name, kind="x", payload=None)
            except Busy:
                num_busy += 1
            assert batcher.waiting_rows <= capacity
        batch = batcher.next_batch(0.0)
        assert batch is not None and batch.rows == size
        clock.now_s += service_s
        for request in batch.requests:
            request.future.set_result(None)
            del waiting[request.client]
            latency_s.append(clock.now_s - request.submitted_s)
    assert num_busy > 30_000 and len(latency_s) == 500 * size
    # A request waits for the batches before it, of which there are at most two.
    worst_s = (capacity / size + 1) * service_s
    p99 = float(np.percentile(latency_s, 99))
    assert p99 <= worst_s + 1e-9
    assert batcher.take_turned_away() == (num_busy, 0)
    fault_row(survived=True, note=f"{num_busy} busy")
