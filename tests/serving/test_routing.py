"""Clients of several policy servers: who gets which, and for how long."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.assignment import most_groups
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""


def test_a_fixed_map_is_kept() -> None:
    router = Router(2, {"a": 1, "b": 1, "c": 0})
    for _ in range(2):
        assert [router.join(name, rows=4) for name in "bac"] == [1, 1, 0]
        for name in "abc":
            router.leave(name)


def test_greedy_takes_the_server_with_the_fewest_rows_the_first_of_several() -> None:
    router = Router(3)
    assert [router.join(name, rows=4) for name in "abcd"] == [0, 1, 2, 0]
    router.leave("b")
    router.leave("c")
    assert [router.join(name, rows=4) for name in "be"] == [1, 2]


def test_greedy_counts_rows_not_clients() -> None:
    router = Router(2)
    assert router.join("large", rows=5) == 0
    assert [router.join(name, rows=2) for name in "abc"] == [1, 1, 1]
    assert router.join("d", rows=2) == 0  # 5 rows against 6


def test_a_slow_server_gets_fewer_clients() -> None:
    """Those of server 0 stay, those of server 1 come and go."""
    router = Router(2)
    assert [router.join(name, rows=1) for name in "abcd"] == [0, 1, 0, 1]
    for name in "bdbd":
        router.leave(name)
        assert router.join(name, rows=1) == 1


def test_clients_are_known_and_joined_once() -> None:
    router = Router(1, {"a": 0})
    with pytest.raises(ValueError, match="'b' has no server"):
        router.join("b", rows=1)
    with pytest.raises(ValueError, match="'a' is not registered"):
        router.leave("a")
    router.join("a", rows=1)
    with pytest.raises(ValueError, match="'a' is registered already"):
        router.join("a", rows=1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 7), max_size=60))
def test_greedy_never_exceeds_what_batches_are_sized_for(
    num_servers: int, moves: list[int]
) -> None:
    """Clients of one size join and leave in any order: each number toggles that client."""
    router, where = Router(num_servers), dict[int, int]()
    limit = most_groups("greedy", num_groups=8, num_servers=num_servers)
    for client in moves:
        if client in where:
            router.leave(str(client))
            del where[client]
            continue
        where[client] = router.join(str(client), rows=3)
        counts = [list(where.values()).count(server) for server in range(num_servers)]
        assert max(counts) <= limit


def make_clients(fixed: dict[str, int] | None) -> tuple[list[Batcher], dict[str, RoutedClient]]:
    batchers = [
        Batcher(trigger_rows=9, max_wait_s=float("inf"), max_rows=9, capacity_rows=9)
        for _ in range(2)
    ]
    router = Router(2, fixed)
    return batchers, {
        name: RoutedClient([InferenceClient(x, name) for x in batchers], router, rows=2)
        for name in "abc"
    }


def ask(client: RoutedClient) -> Any:
    observation: Any = None
    return client.submit("explore", observation, np.zeros((2, 2), np.uint32))


@pytest.mark.parametrize("fixed", [None, {"a": 0, "b": 1, "c": 0}])
def test_requests_go_to_the_server_that_was_joined(fixed: dict[str, int] | None) -> None:
    batchers, clients = make_clients(fixed)
    for client in clients.values():
        client.join()
    for client in clients.values():
        ask(client)
    for batcher, expected in zip(batchers, (["a", "c"], ["b"]), strict=True):
        batch = batcher.next_batch(TIMEOUT_S)  # fires early: every client of this server has asked
        assert batch is not None and [x.client for x in batch.requests] == expected


def test_who_has_left_is_waited_for_by_nobody() -> None:
    batchers, clients = make_clients({"a": 0, "b": 0, "c": 0})
    for client in clients.values():
        client.join()
    clients["b"].leave()
    for name in "ac":
        ask(clients[name])
    batch = batchers[0].next_batch(TIMEOUT_S)
    assert batch is not None and len(batch.requests) == 2


def test_a_client_may_change_servers_between_segments_only() -> None:
    batchers, clients = make_clients(None)
    clients["a"].join()  # server 0
    clients["b"].join()  # server 1, which b leaves to c
    clients["b"].leave()
    clients["c"].join()
    clients["b"].join()  # server 0: both have one, and it is the first
    for client in clients.values():
        ask(client)
    servers = {}
    for index, batcher in enumerate(batchers):
        batch = batcher.next_batch(TIMEOUT_S)
        assert batch is not None
        servers |= {request.client: index for request in batch.requests}
    assert servers == {"a": 0, "b": 0, "c": 1}


def test_only_joined_clients_may_ask_or_leave() -> None:
    _, clients = make_clients(None)
    for action in (ask, RoutedClient.leave):
        with pytest.raises(ValueError, match="'a' is not registered"):
            action(clients["a"])
    clients["a"].join()
    clients["a"].leave()
    with pytest.raises(ValueError, match="'a' is not registered"):
        ask(clients["a"])


def test_threads_may_join_and_leave_side_by_side() -> None:
    """No registration is lost: at the end nobody is left."""
    router, barrier = Router(2), threading.Barrier(4)

    def come_and_go(name: str) -> None:
        barrier.wait(TIMEOUT_S)
        for _ in range(500):
            router.join(name, rows=1)
            router.leave(name)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [router.join(name, rows=1) for name in "abcd"] == [0, 1, 0, 1]
