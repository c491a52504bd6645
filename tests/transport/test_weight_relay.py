"""Weights by a tree of servers: what crosses each edge, and what holds when an edge breaks."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_frozen_weights as frozen
import test_in_process_weights as in_process
from local_connections import CONFIG, TIMEOUT_S
from test_remote_weights import Damage, Die, odd_params
from weight_pair import WeightHost
from weight_tree import Edge, TreeServer

from jaxvla.cluster import weights_parent
from jaxvla.transport import weight_transfers
from jaxvla.transport.channel import Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.remote_weights import RemoteWeightStore
from jaxvla.transport.weight_relay import child_hello


class Tree:
    """A learner's store with servers, closed in the end."""

    def __init__(self, params: Any, **options: Any):
        self.risen: list[int] = []
        """What `acknowledged_version` rose to."""
        self.store = RemoteWeightStore(on_acknowledged=self.risen.append, **options)
        self.edges: dict[str, Edge] = {}
        """From the learner."""
        self.host = WeightHost(self.store, self._wrap)
        self.servers: list[TreeServer] = []
        self._params = params
        self._options = options

    def join(self, name: str, parent: TreeServer | None = None) -> TreeServer:
        server = TreeServer(self.host, name, self._params, parent=parent, **self._options)
        self.servers.append(server)
        return server

    def chain(self, names: str) -> list[TreeServer]:
        """The first one's parent is the learner, that of every other one the one before it."""
        made: list[TreeServer] = []
        for name in names:
            made.append(self.join(name, made[-1] if made else None))
        return made

    def close(self) -> None:
        for server in reversed(self.servers):
            server.close()
        self.host.close()

    def _wrap(self, connection: Connection) -> Edge:
        edge = self.edges[connection.peer] = Edge(connection)
        return edge


@pytest.fixture
def plant() -> Iterator[Callable[..., Tree]]:
    planted: list[Tree] = []

    def make(params: Any, **options: Any) -> Tree:
        planted.append(Tree(params, **options))
        return planted[-1]

    yield make
    for tree in planted:
        tree.close()


def test_every_bit_arrives_at_the_end_of_a_chain(monkeypatch: Any, plant: Any) -> None:
    monkeypatch.setattr(weight_transfers, "PART_BYTES", 1024)
    tree = plant(odd_params(0))
    servers = tree.chain("abc")
    for version in range(3):
        params = odd_params(version)
        tree.store.publish(version, params)
        for server in servers:
            got = server.settle(version)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert [server.versions for server in servers] == [[0, 1, 2]] * 3
    assert tree.edges["b"].parts == tree.edges["c"].parts == []
    assert tree.store.faults() == {}


def test_frozen_leaves_cross_every_edge_once(plant: Any) -> None:
    params = frozen.make_params(0)
    tree = plant(params, trainable=frozen.TRAINABLE)
    a, b, c = tree.chain("abc")
    for version in range(3):
        tree.store.publish(version, params)
        for server in (a, b, c):
            frozen.assert_is_version(server.settle(version), version)
        params = frozen.train(params)
    for edge in (tree.edges["a"], a.edges["b"], b.edges["c"]):
        assert sorted(edge.parts[:2]) == [(0, "encoder/kernel"), (0, "head/kernel")]
        assert edge.parts[2:] == [(1, "head/kernel"), (2, "head/kernel")]
        assert edge.nbytes == frozen.ENCODER_BYTES + 3 * frozen.HEAD_BYTES


@pytest.mark.parametrize("fanout", [1, 2, 3])
def test_the_learners_link_carries_as_many_copies_as_it_has_children(
    plant: Any, fanout: int
) -> None:
    params = {"w": jnp.arange(100.0)}
    tree = plant(params)
    for index in range(6):
        parent = weights_parent(index, fanout)
        tree.join(f"server_{index}", None if parent is None else tree.servers[parent])
    tree.store.publish(0, params)
    for server in tree.servers:
        np.testing.assert_array_equal(server.settle(0)["w"], params["w"])
    assert sum(edge.nbytes for edge in tree.edges.values()) == fanout * 400
    assert tree.store.metrics().nbytes == fanout * 400
    inner = [edge.nbytes for server in tree.servers for edge in server.edges.values()]
    assert inner == [400] * (6 - fanout)


def test_the_account_of_every_server_is_the_learners(plant: Any) -> None:
    params = in_process.make_params(0)
    tree = plant(params)
    servers = tree.chain("abc")
    for version in range(2):
        tree.store.publish(version, params)
        for server in reversed(servers):
            assert tree.risen == list(range(version))
            server.settle(version)
            server.acknowledge(version)
    assert tree.risen == [0, 1] and tree.store.acknowledged_version == 1
    assert tree.store.lagging() == []


def test_a_late_child_gets_the_newest_version_in_full(plant: Any) -> None:
    params = frozen.make_params(0)
    tree = plant(params, trainable=frozen.TRAINABLE)
    (parent,) = tree.chain("a")
    for version in range(3):
        tree.store.publish(version, params)
        parent.settle(version)
        params = frozen.train(params)
    child = tree.join("b", parent)
    grandchild = tree.join("c", child)
    for server in (child, grandchild):
        frozen.assert_is_version(server.settle(2), 2)
        assert server.versions == [2]
    assert len(parent.edges["b"].parts) == 2


def test_a_slow_child_holds_up_nobody_and_then_gets_the_newest(plant: Any) -> None:
    may_go, has_begun = threading.Event(), threading.Event()

    def wait(frame: Frame) -> Frame:
        if frame.kind == "weights_part":
            has_begun.set()
            assert may_go.wait(TIMEOUT_S)
        return frame

    params = in_process.make_params(0)
    tree = plant(params)
    (parent,) = tree.chain("a")
    parent.wrap = lambda connection: Edge(connection, wait)
    slow = tree.join("slow", parent)
    tree.store.publish(0, params)
    assert has_begun.wait(TIMEOUT_S)
    parent.wrap = Edge
    quick = tree.join("quick", parent)
    for version in range(1, 4):
        quick.settle(version - 1)
        tree.store.publish(version, in_process.make_params(version))
    for server in (parent, quick):
        assert in_process.versions_in(server.settle(3)) == {3.0}
    assert slow.versions == []
    may_go.set()
    slow.settle(3)
    assert slow.versions == [0, 3]


# ------------------------------------------------------------------------ when an edge breaks


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("last_whole", [-1, 1])
def test_who_loses_its_parent_in_a_transfer_gets_the_newest_from_the_learner(
    monkeypatch: Any, plant: Any, at: int, last_whole: int
) -> None:
    """`at`: parts that come of the transfer; `last_whole`: version before."""
    monkeypatch.setattr(weight_transfers, "PART_BYTES", 32)
    params = frozen.make_params(0)
    tree = plant(params, trainable=frozen.TRAINABLE)
    (parent,) = tree.chain("a")
    num_before = 4 + 3 * (last_whole + 1) if last_whole >= 0 else 0  # parts of whole transfers
    if last_whole >= 0:
        at = min(at, 2)  # a version after the first has three parts

    def cut(connection: Connection) -> Edge:
        return Edge(connection, Die(connection, num_before + at))

    parent.wrap = cut
    child = tree.join("b", parent)
    grandchild = tree.join("c", child)
    servers = (parent, child, grandchild)
    for version in range(4):
        tree.store.publish(version, params)
        for server in servers:
            frozen.assert_is_version(server.settle(version), version)
            server.acknowledge(version)
        params = frozen.train(params)
    for server in servers:
        assert server.versions == [0, 1, 2, 3]
        for version, got in server.staged:
            frozen.assert_is_version(got, version)
    assert tree.risen == [0, 1, 2, 3]
    assert tree.store.faults() == {"parent": 1}  # the grandchild still has its own
    leaves = {name for _, name in tree.edges["b"].parts}
    assert leaves == {"head/kernel"} | ({"encoder/kernel"} if last_whole < 0 else set())
    assert tree.edges["b"].parts[0][0] == last_whole + 1
    assert tree.edges["c"].parts == []


@pytest.mark.parametrize(("num_damaged", "num_failures"), [(1, 1), (1000, 2)])
def test_what_a_parent_damages_is_not_staged(
    plant: Any, num_damaged: int, num_failures: int
) -> None:
    params = {"w": jnp.ones(3)}
    tree = plant(params)
    (parent,) = tree.chain("a")
    parent.wrap = lambda connection: Edge(connection, Damage(num_damaged))
    child = tree.join("b", parent)
    tree.store.publish(0, params)
    np.testing.assert_array_equal(child.settle(0)["w"], np.ones(3))
    assert child.versions == [0]
    assert parent.relay.faults()["digest"] == num_failures
    is_orphan = num_failures == 2
    assert tree.store.faults() == ({"parent": 1} if is_orphan else {})
    assert len(tree.edges["b"].parts) == is_orphan


def test_who_cannot_reach_its_parent_has_the_learner(plant: Any) -> None:
    params = {"w": jnp.ones(3)}
    tree = plant(params)
    (parent,) = tree.chain("a")
    parent.listener.close()
    child = tree.join("b", parent)
    for version in range(2):
        tree.store.publish(version, params)
        child.settle(version)
    assert child.versions == [0, 1] and tree.store.faults() == {"parent": 1}


def test_a_parent_that_stayed_behind_gives_a_newcomer_nothing(plant: Any) -> None:
    """It has lost the learner: the others went on without it, and the bound with them."""
    params = in_process.make_params(0)
    tree = plant(params)
    parent, other = tree.join("a"), tree.join("other")
    tree.store.publish(0, params)
    parent.settle(0)
    parent.connection.close()
    parent.receiving.result(TIMEOUT_S)
    with tree.store.changed:
        assert tree.store.changed.wait_for(lambda: len(tree.store._accounts) == 1, TIMEOUT_S)
    tree.store.publish(1, in_process.make_params(1))
    other.settle(1)
    other.acknowledge(1)
    assert tree.risen == [1]
    child = tree.join("b", parent)
    assert in_process.versions_in(child.settle(1)) == {1.0}
    assert child.versions == [1]
    assert parent.edges["b"].kinds[0] == "weights_begin"  # it was offered, and refused
    child.acknowledge(1)


# ------------------------------------------------------------------------------ what is refused


def is_ended(connection: Connection) -> bool:
    try:
        while True:
            connection.receive()
    except ConnectionLostError:
        return True


@pytest.mark.parametrize(
    "said",
    [
        [("weights_swapped", {"version": 3})],
        [("weights_swapped", {"version": 1})],  # never published
        [("weights_swapped", {"version": 0})],  # older than what all others use
        [("weights_swapped", {"version": 2}), ("weights_swapped", {"version": 2})],
        [("weights_swapped", {"version": 2}), ("weights_orphaned", {"version": -1})],
        [("weights_staged", {"version": 2, "is_sound": True})],
        [("weights_orphaned", {"version": 1})],
        [("weights_orphaned", {"version": 0})],
        [("weights_orphaned", {"version": 3})],
        [("weights_orphaned", {"version": -2})],
        [("weights_orphaned", {"version": 2}), ("weights_orphaned", {"version": 2})],
    ],
)
def test_a_relayed_server_that_says_what_cannot_be_is_given_up(plant: Any, said: Any) -> None:
    params = {"w": jnp.ones(3)}
    tree = plant(params)
    (server,) = tree.chain("a")
    for version in (0, 2):
        tree.store.publish(version, params)
        server.settle(version)
        server.acknowledge(version)
    tree.host.relayed.add("b")
    connection = tree.host.dial("b")
    frame = connection.receive()
    assert (frame.kind, frame.fields) == ("weights_relayed", {"least": 2})
    for kind, fields in said:
        connection.send(Frame(kind=kind, fields=fields))
    assert is_ended(connection)
    assert tree.risen == [0, 2]


def test_who_gets_weights_from_the_learner_has_no_parent_to_lose(plant: Any) -> None:
    tree = plant({"w": jnp.ones(3)})
    connection = tree.host.dial("a")
    connection.send(Frame(kind="weights_orphaned", fields={"version": -1}))
    assert is_ended(connection)


@pytest.mark.parametrize("hello", [child_hello("s2"), Frame(kind="weights_child")])
def test_children_of_other_sessions_are_refused(plant: Any, hello: Frame) -> None:
    params = {"w": jnp.ones(3)}
    tree = plant(params)
    (server,) = tree.chain("a")
    tree.store.publish(0, params)
    server.settle(0)
    with connect(server.listener.address, CONFIG, name="b", timeout_s=TIMEOUT_S) as connection:
        connection.send(hello)
        assert is_ended(connection)
    assert server.edges["b"].parts == []
