"""Weights over real connections: the same bits, whole or not at all; nobody waits."""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_frozen_weights as frozen
import test_in_process_weights as in_process
from fault_rows import FaultRow
from local_connections import TIMEOUT_S, in_thread
from weight_pair import FarStore, FarSubscription, WeightHost, struct_of

from jaxvla.transport import weight_transfers
from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.frames import Frame
from jaxvla.transport.remote_weights import RemoteWeightStore, fetch_to_host
from jaxvla.transport.weight_receiver import RemoteSubscription

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

# ------------------------------------------------- what holds in process holds here as well

_SOURCES = [
    ((in_process.ALL, 0), (in_process.ALL, 0)),
    ((in_process.SPLIT, 0, 1), (in_process.ALL, 0, 1)),
    ((in_process.SPLIT, 0, 1), (in_process.SPLIT, 2, 3)),
]
_SHARED: list[tuple[Any, tuple[Any, ...]]] = [
    *((in_process.test_published_weights_survive_donation_of_the_learners, x) for x in _SOURCES),
    (in_process.test_late_subscriber_gets_the_latest_version_although_the_learner_moved_on, ()),
    (in_process.test_only_the_newest_version_is_delivered_and_only_once, ()),
    (
        in_process.test_tree_unlike_the_first_is_refused_and_the_old_version_stays,
        ({"encoder": {"weight": jnp.zeros((4, 8))}}, "'encoder/kernel': missing"),
    ),
    (
        in_process.test_tree_unlike_the_first_is_refused_and_the_old_version_stays,
        ({"encoder": {"kernel": jnp.zeros((4, 9))}}, r"'encoder/kernel': float32\[4,9\]"),
    ),
    (in_process.test_versions_must_rise, (4,)),
    (in_process.test_acknowledged_version_is_that_of_the_slowest_live_server, ()),
    (in_process.test_acknowledgement_of_what_was_never_pulled_is_refused, ()),
    (in_process.test_newcomer_holds_the_acknowledged_version_until_it_serves, ()),
    (in_process.test_acknowledged_version_stays_when_the_last_server_leaves, ()),
    (in_process.test_swapped_in_version_gives_credit, ()),
    (in_process.test_wait_for_is_woken_by_publish_and_by_close, ("publish",)),
    (in_process.test_wait_for_is_woken_by_publish_and_by_close, ("close",)),
]
_NEAR: list[tuple[Any, tuple[Any, ...]]] = [
    (in_process.test_live_names_are_unique_and_free_again_after_close, ()),
    (in_process.test_publish_tells_the_servers_after_the_version_is_there, ()),
]
_FROZEN: list[tuple[Any, tuple[Any, ...]]] = [
    (frozen.test_both_kinds_of_leaves_survive_donation, ((frozen.ALL, 0), (frozen.ALL, 0))),
    (frozen.test_frozen_leaves_are_copied_once_per_server, ()),
    (frozen.test_a_late_server_gets_a_complete_tree_although_the_learner_moved_on, ()),
    (frozen.test_a_server_that_leaves_takes_nothing_along, ()),
    (frozen.test_both_kinds_of_leaves_are_checked, ("encoder",)),
]


def _ids(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.fixture
def far_stores() -> Iterator[Callable[..., FarStore]]:
    made: list[FarStore] = []

    def make(params: Any, **options: Any) -> FarStore:
        made.append(FarStore(struct_of(params), **options))
        return made[-1]

    yield make
    for store in made:
        store.host.close()


@pytest.mark.parametrize(("test", "arguments"), _SHARED, ids=_ids)
def test_like_the_store_in_process(
    monkeypatch: Any, far_stores: Any, test: Any, arguments: tuple[Any, ...]
) -> None:
    params = in_process.make_params(0)
    monkeypatch.setattr(in_process, "make_store", lambda **x: far_stores(params, **x))
    test(*arguments)


@pytest.mark.parametrize(("test", "arguments"), _FROZEN, ids=_ids)
def test_frozen_leaves_like_in_process(
    monkeypatch: Any, far_stores: Any, test: Any, arguments: tuple[Any, ...]
) -> None:
    params = frozen.make_params(0)
    options = {"trainable": frozen.TRAINABLE}
    monkeypatch.setattr(frozen, "make_store", lambda: far_stores(params, **options))
    test(*arguments)


@pytest.mark.parametrize(("test", "arguments"), [*_SHARED, *_NEAR], ids=_ids)
def test_a_server_of_the_learners_process_may_subscribe_too(
    monkeypatch: Any, test: Any, arguments: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(in_process, "make_store", RemoteWeightStore)
    test(*arguments)


# ------------------------------------------------------------------------------------- bits


def odd_params(seed: int) -> dict[str, Any]:
    """Leaves of every kind, with NaNs, infinities and subnormal numbers."""
    random = np.random.default_rng(seed)
    octets = random.integers(0, 256, 4 * 1000, np.uint8)
    return {
        "float": jnp.asarray(octets.view(np.float32).reshape(50, 20)),
        "half": jnp.asarray(octets[:600].view(ml_dtypes.bfloat16).reshape(3, 100)),
        "count": jnp.asarray(seed, jnp.int32),
        "mask": jnp.asarray(octets[:7] > 99),
        "nothing": jnp.zeros((0, 4)),
        "deep": {"a": jnp.asarray(octets[:33])},
    }


@pytest.mark.parametrize("part_bytes", [2**24, 1024])
def test_every_bit_arrives(monkeypatch: Any, far_stores: Any, part_bytes: int) -> None:
    monkeypatch.setattr(weight_transfers, "PART_BYTES", part_bytes)
    store = far_stores(odd_params(0))
    subscription = store.subscribe("server", ONE)
    for version in range(2):
        params = odd_params(version)
        store.publish(version, params)
        number, got = subscription.poll()
        assert number == version
        assert jax.tree.structure(got) == jax.tree.structure(params)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_hosts_copy_is_no_view() -> None:
    leaves = jax.tree.leaves(in_process.make_params(1))
    for leaf, copy in zip(leaves, fetch_to_host(leaves), strict=True):
        assert copy.ctypes.data != leaf.unsafe_buffer_pointer()
        assert copy.flags.c_contiguous and copy.tobytes() == np.asarray(leaf).tobytes()


def test_arrays_that_span_hosts_are_fetched_by_whoever_knows_how() -> None:
    asked: list[int] = []

    def fetch(leaves: Any) -> Any:
        asked.append(len(leaves))
        return fetch_to_host(leaves)

    store = RemoteWeightStore(trainable=frozen.TRAINABLE, fetch=fetch)
    for version in range(2):
        store.publish(version, frozen.make_params(version))
    assert asked == [2, 1]


# -------------------------------------------------------------------- faults on the way


class Wire:
    """The learner's end of a connection, with something done to what is sent."""

    def __init__(self, connection: Connection, change: Callable[[Frame], Frame]):
        self._connection = connection
        self._change = change
        self.parts: list[tuple[int, str]] = []

    def send(self, frame: Frame) -> None:
        if frame.kind == "weights_part":
            self.parts.append((frame.fields["version"], frame.fields["leaf"]))
        self._connection.send(self._change(frame))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class Damage:
    """Flips a bit of a leaf in the first so many transfers."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, frame: Frame) -> Frame:
        if self.count and frame.kind == "weights_part" and frame.arrays[0].size:
            self.count -= 1
            part = frame.arrays[0].copy()
            part[0] ^= 1
            return Frame(kind=frame.kind, fields=frame.fields, arrays=[part])
        return frame


def subscribe(host: WeightHost, name: str, params: Any, **options: Any) -> FarSubscription:
    return FarSubscription(host, name, ONE, struct=struct_of(params), **options)


@pytest.mark.fault(23)
def test_a_damaged_transfer_is_not_staged_and_sent_again() -> None:
    store = RemoteWeightStore()
    host = WeightHost(store, lambda connection: Wire(connection, Damage(1)))
    subscription = subscribe(host, "server", in_process.make_params(0))
    store.publish(3, in_process.make_params(3))
    subscription.settle(3)
    version, params = subscription.poll()
    assert (version, in_process.versions_in(params)) == (3, {3.0})
    assert store.faults() == {"digest": 1}
    host.close()


def test_a_server_that_finds_damage_twice_is_given_up() -> None:
    store = RemoteWeightStore()
    host = WeightHost(store, lambda connection: Wire(connection, Damage(2)))
    subscription = subscribe(host, "server", {"w": jnp.ones(3)})
    store.publish(0, {"w": jnp.ones(3)})
    subscription.receiving.result(TIMEOUT_S)
    assert subscription.poll() is None
    assert store.faults()["digest"] == 2
    host.wrap = lambda connection: connection
    again = subscribe(host, "server", {"w": jnp.ones(3)})
    again.settle(0)
    assert again.poll()[0] == 0
    host.close()


def test_a_wrong_digest_of_the_whole_is_damage_too(monkeypatch: Any) -> None:
    real, calls = weight_transfers.transfer_digest, []

    def wrong_at_first(version: int, digests: Any) -> str:
        calls.append(version)
        return real(version + (len(calls) == 1), digests)

    monkeypatch.setattr(weight_transfers, "transfer_digest", wrong_at_first)
    store = RemoteWeightStore()
    host = WeightHost(store)
    subscription = subscribe(host, "server", {"w": jnp.ones(3)})
    store.publish(0, {"w": jnp.ones(3)})
    subscription.settle(0)
    assert store.faults() == {"digest": 1} and len(calls) == 2
    host.close()


class Die:
    """Cuts the connection at the n-th part."""

    def __init__(self, connection: Connection, at: int):
        self._connection = connection
        self._left = at

    def __call__(self, frame: Frame) -> Frame:
        if frame.kind == "weights_part":
            self._left -= 1
            if self._left < 0:
                self._connection.close()
        return frame


@pytest.mark.fault(23)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_server_that_dies_in_a_transfer_leaves_the_others_untouched(
    monkeypatch: Any, at: int, fault_row: FaultRow
) -> None:
    monkeypatch.setattr(weight_transfers, "PART_BYTES", 32)
    params = in_process.make_params(0)
    acknowledged: list[int] = []
    store = RemoteWeightStore(on_acknowledged=acknowledged.append)
    host = WeightHost(store)
    healthy = subscribe(host, "healthy", params)
    host.wrap = lambda connection: Wire(connection, Die(connection, at))
    dying = subscribe(host, "dying", params)
    host.wrap = lambda connection: connection
    store.publish(0, params)
    dying.receiving.result(TIMEOUT_S)
    assert dying.poll() is None
    healthy.settle(0)
    assert in_process.versions_in(healthy.poll()[1]) == {0.0}
    healthy.acknowledge(0)
    back = subscribe(host, "dying", params)
    back.settle(0)
    assert in_process.versions_in(back.poll()[1]) == {0.0}
    back.acknowledge(0)
    assert acknowledged == [0] and store.faults().get("lost", 0) >= 1
    host.close()
    fault_row(survived=True)


def test_publishing_waits_for_no_server_and_a_slow_one_gets_the_newest() -> None:
    """The first server does not read: its transfer stands still in the middle."""
    size = 40 * 2**20  # more than the system's socket buffers hold
    params = {"w": jax.device_put(np.zeros(size, np.uint8), ONE)}
    store = RemoteWeightStore()
    host = WeightHost(store)
    slow = host.dial("slow")
    quick = subscribe(host, "quick", params)
    step = jax.jit(lambda x: {"w": x["w"] + 1}, donate_argnums=0)
    for version in range(4):
        store.publish(version, params)
        quick.settle(version)
        params = step(params)
    receiver = RemoteSubscription(slow, struct_of(params), ONE)
    staged: list[int] = []
    has_newest = threading.Event()

    def note() -> None:
        version, got = receiver.poll()  # type: ignore[misc]
        staged.append(version)
        assert set(np.unique(np.asarray(got["w"]))) == {version}
        if version == 3:
            has_newest.set()

    receiver._on_publish = note
    in_thread(receiver.run)
    assert has_newest.wait(TIMEOUT_S)
    assert staged == [0, 3]  # what was on its way when it stopped reading, then the newest
    host.close()


def test_frozen_leaves_travel_once_per_server() -> None:
    params = frozen.make_params(0)
    wires: list[Wire] = []

    def wrap(connection: Connection) -> Wire:
        wires.append(Wire(connection, lambda frame: frame))
        return wires[-1]

    store = RemoteWeightStore(trainable=frozen.TRAINABLE)
    host = WeightHost(store, wrap)
    subscription = subscribe(host, "server", params, trainable=frozen.TRAINABLE)
    for version in range(3):
        store.publish(version, params)
        subscription.settle(version)
        params = frozen.train(params)
    whole = ["encoder/kernel", "head/kernel"]
    assert [x for x in wires[0].parts if x[0]] == [(1, "head/kernel"), (2, "head/kernel")]
    assert sorted(x for _, x in wires[0].parts[:2]) == whole
    frozen.assert_is_version(subscription.poll()[1], 2)
    host.close()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"a": jnp.zeros(3), "c": jnp.zeros(2)}, "leaf 'b': this server has no such leaf"),
        ({"a": jnp.zeros(4), "b": jnp.zeros(2)}, r"leaf 'a' is 'float32' \[3\], here .* \[4\]"),
        ({"a": jnp.zeros(3, jnp.int32), "b": jnp.zeros(2)}, "leaf 'a' is 'float32'"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(2)}, "leaf 'c' is missing"),
    ],
)
def test_other_weights_than_the_servers_are_refused_on_both_sides(
    caplog: Any, here: Any, message: str, fault_row: FaultRow
) -> None:
    store = RemoteWeightStore()
    host = WeightHost(store)
    subscription = subscribe(host, "server", here)
    with caplog.at_level(logging.ERROR):
        store.publish(0, {"a": jnp.zeros(3), "b": jnp.zeros(2)})
        subscription.receiving.result(TIMEOUT_S)
        with store.changed:
            assert store.changed.wait_for(lambda: not store._accounts, TIMEOUT_S)
    assert subscription.poll() is None
    told = [x.getMessage() for x in caplog.records if re.search(message, x.getMessage())]
    assert len(told) == 2, caplog.text
    host.close()
    fault_row(survived=True)


def begin(version: Any = 0, **fields: Any) -> Frame:
    return Frame(kind="weights_begin", fields={"version": version, "is_full": True, **fields})


def part(octets: int = 12, **fields: Any) -> Frame:
    about = {"version": 0, "leaf": "a", "digest": "", "dtype": "float32", "shape": [3], "offset": 0}
    return Frame(kind="weights_part", fields=about | fields, arrays=[np.zeros(octets, np.uint8)])


def end(**fields: Any) -> Frame:
    return Frame(kind="weights_end", fields={"version": 0, "digest": "", **fields})


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([part()], "version = 0 has not begun"),
        ([end()], "version = 0 has not begun"),
        ([begin(is_full=False)], "lacks the leaves that do not change"),
        ([begin(-1)], "version = -1"),
        ([begin(), begin(1)], "version = 1 begins"),
        ([begin(), part(version=1)], "version = 1 has not begun"),
        ([begin(), part(leaf="c")], "no such leaf"),
        ([begin(), part(leaf=3)], "leaf = 3"),
        ([begin(), part(shape=[4])], "here 'float32'"),
        ([begin(), part(dtype="int32")], "here 'float32'"),
        ([begin(), part(13)], "13 at 0, after 0"),
        ([begin(), part(0)], "0 at 0, after 0"),
        ([begin(), part(8), part(8, offset=8)], "8 at 8, after 8"),
        ([begin(), part(4, offset=4)], "4 at 4, after 0"),
        ([begin(), part(4), part(4)], "4 at 0, after 4"),
        ([begin(), part(), part()], "leaf 'a' comes out of turn"),
        ([begin(), part(4), part(leaf="b")], "leaf 'b' comes out of turn"),
        ([begin(), part(), end()], "leaf 'b' is missing"),
        ([Frame(kind="weights_part", fields=part().fields)], "has not begun"),
        ([begin(), Frame(kind="weights_part", fields=part().fields)], "a part of 0 arrays"),
    ],
)
def test_frames_that_make_no_transfer_are_refused(frames: list[Frame], message: str) -> None:
    learner = Script(frames)
    struct = struct_of({"a": jnp.zeros(3), "b": jnp.zeros(3)})
    subscription = RemoteSubscription(learner, struct, ONE)  # type: ignore[arg-type]
    subscription.run()
    assert learner.is_closed and subscription.poll() is None
    (refusal,) = [x for x in learner.sent if x.kind == "weights_refused"]
    assert message in refusal.fields["text"]


class Script:
    """A connection on which these frames come, and then no other."""

    peer = "learner"
    is_closed = False

    def __init__(self, frames: list[Frame]):
        self._frames = list(frames)
        self.sent: list[Frame] = []

    def receive(self) -> Frame:
        if not self._frames:
            raise ConnectionLostError("the script is over")
        return self._frames.pop(0)

    def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("weights_swapped", {"version": 1}),
        ("weights_swapped", {"version": -1}),
        ("weights_staged", {"version": 1, "is_sound": True}),
        ("weights_staged", {"version": 0, "is_sound": 1}),
        ("weights_refused", {"text": "no such leaf"}),
    ],
)
def test_a_server_that_says_what_cannot_be_is_given_up(kind: str, fields: Any) -> None:
    risen: list[int] = []
    store = RemoteWeightStore(on_acknowledged=risen.append)
    host = WeightHost(store)
    connection = host.dial("server")
    store.publish(0, {"w": jnp.ones(3)})
    connection.send(Frame(kind=kind, fields=fields))
    with pytest.raises(ConnectionLostError):
        while True:
            connection.receive()
    assert risen == [] and store.acknowledged_version is None
    host.close()


# -------------------------------------------------------------------------- who is waited for


def test_a_lost_server_is_waited_for_no_longer() -> None:
    params = in_process.make_params(0)
    risen: Any = []
    has_risen = threading.Event()
    store = RemoteWeightStore(on_acknowledged=lambda x: (risen.append(x), has_risen.set()))
    host = WeightHost(store)
    stays, dies = subscribe(host, "stays", params), subscribe(host, "dies", params)
    store.publish(0, params)
    for subscription in (stays, dies):
        subscription.settle(0)
        subscription.poll()
    stays.acknowledge(0)
    assert store.acknowledged_version is None
    dies.connection.close()
    assert has_risen.wait(TIMEOUT_S)
    assert risen == [0]
    host.close()


def test_a_server_that_comes_back_replaces_its_half_open_connection() -> None:
    params = in_process.make_params(0)
    store = RemoteWeightStore()
    host = WeightHost(store)
    old = subscribe(host, "server", params)
    new = subscribe(host, "server", params)
    old.receiving.result(TIMEOUT_S)
    store.publish(0, params)
    new.settle(0)
    new.poll()
    new.acknowledge(0)
    assert store.acknowledged_version == 0
    host.close()
