"""The words between leader and follower: their order, and what happens when one is missing."""

import queue
import threading
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.transport.frames import Frame
from jaxvla.transport.mirror import (
    FollowerLostError,
    FollowerQueue,
    Leader,
    LeaderQueue,
    line_up,
)

TIMEOUT_S = 60.0
STRUCT = {"a": jax.ShapeDtypeStruct((3, 8), np.float32), "b": jax.ShapeDtypeStruct((3, 8, 2), bool)}


class MemoryLink:
    """One end of a pair of queues; None in one is the end of the link."""

    def __init__(self, sent: "queue.Queue[Frame | None]", received: "queue.Queue[Frame | None]"):
        self.sent, self.received = sent, received
        self.is_closed = False

    def send(self, frame: Frame) -> None:
        if self.is_closed:
            raise ConnectionResetError("closed")
        self.sent.put(frame)

    def receive(self) -> Frame:
        frame = self.received.get(timeout=TIMEOUT_S)
        if frame is None:
            raise ConnectionResetError("the other side is gone")
        return frame

    def close(self) -> None:
        self.is_closed = True
        self.sent.put(None)
        self.received.put(None)


def _links() -> tuple[MemoryLink, MemoryLink]:
    one: queue.Queue[Frame | None] = queue.Queue()
    other: queue.Queue[Frame | None] = queue.Queue()
    return MemoryLink(one, other), MemoryLink(other, one)


def _placement(num_envs: int) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def _follower(link: MemoryLink, **actions: Any) -> FollowerQueue:
    return FollowerQueue(link, struct=STRUCT, placement=_placement, actions=actions)


def _item(scale: float = 1.0) -> QueueItem:
    return QueueItem(
        ticket=Ticket(id=7, admission_version=2, owner="simulator"),
        payload={
            "a": scale * np.arange(24, dtype=np.float32).reshape(3, 8),
            "b": np.arange(48).reshape(3, 8, 2) % 3 == 0,
        },
        policy_version_min=2,
        policy_version_max=3,
        nbytes=144,
        info="the simulator's",
    )


def _give(leader: Leader, item: QueueItem) -> None:
    leader.give(item, lambda process: jax.tree.leaves(item.payload))


def test_a_follower_takes_what_the_leader_took() -> None:
    ours, theirs = _links()
    leader = Leader([ours])
    leader.say("take", {"count": 1, "version": 3})
    _give(leader, _item())
    leader.end()
    follower = _follower(theirs)
    items = follower.take(1, 3)
    assert items is not None
    (item,) = items
    assert (item.ticket, item.policy_version_min, item.policy_version_max, item.nbytes) == (
        *(_item().ticket, 2, 3, 144),
    )
    assert item.info is None
    for name, value in _item().payload.items():
        np.testing.assert_array_equal(item.payload[name], value)
        assert item.payload[name].sharding.is_equivalent_to(_placement(8), value.ndim)
    assert follower.take(1, 4) is None
    follower.finish()


def test_actions_come_in_the_order_of_the_words() -> None:
    ours, theirs = _links()
    leader, done = Leader([ours]), []
    for version in (1, 2):
        leader.say("save", {"version": version})
    leader.say("take", {"count": 1, "version": 0})
    _give(leader, _item())
    leader.say("save", {"version": 3})
    leader.end()
    leader.end()
    follower = _follower(theirs, save=lambda fields: done.append(fields["version"]))
    assert follower.take(1, 0) is not None and done == [1, 2]
    follower.finish()
    assert done == [1, 2, 3] and ours.sent.empty()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([("take", {"count": 1, "version": 4})], "about to take 1 at version 3"),
        ([("take", {"count": 2, "version": 3})], "about to take 1 at version 3"),
        ([("dance", {})], "the leader says 'dance'"),
        ([("take", {"count": 1, "version": 3}), ("end", {})], "'end' instead of a trajectory"),
    ],
)
def test_words_that_do_not_fit_are_refused(words: Any, message: str) -> None:
    ours, theirs = _links()
    for word, fields in words:
        Leader([ours]).say(word, fields)
    with pytest.raises(ValueError, match=message):
        _follower(theirs).take(1, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a", np.zeros((3, 4), np.float32), r"leaf a: float32\[3, 4\], want float32\[3, 8\]"),
        ("b", np.zeros((3, 8, 2), np.uint8), r"leaf b: uint8"),
        ("c", np.zeros(1), "3 arrays, want 2"),
    ],
)
def test_trajectories_of_another_shape_are_refused(name: str, value: Any, message: str) -> None:
    ours, theirs = _links()
    leader, item = Leader([ours]), _item()
    item.payload[name] = value
    leader.say("take", {"count": 1, "version": 3})
    _give(leader, item)
    with pytest.raises(ValueError, match=message):
        _follower(theirs).take(1, 3)


def test_a_take_after_the_last_update_is_refused() -> None:
    ours, theirs = _links()
    Leader([ours]).say("take", {"count": 1, "version": 9})
    with pytest.raises(ValueError, match="after this process's last update"):
        _follower(theirs).finish()


def test_a_lost_leader_is_no_end() -> None:
    ours, theirs = _links()
    ours.close()
    with pytest.raises(ConnectionResetError):
        _follower(theirs).take(1, 0)


class WaitingQueue:
    """Nothing comes; closed when told."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def take(self, count: int, learner_version: int, timeout_s: float | None = None) -> None:
        assert self._closed.wait(TIMEOUT_S)

    def close(self, reason: str) -> None:
        self._closed.set()


def test_a_lost_follower_wakes_the_leader() -> None:
    ours, theirs = _links()
    leader, source = Leader([ours]), WaitingQueue()
    leader.watch(on_stop=lambda: None, on_lost=lambda: source.close("lost"))
    theirs.close()
    with pytest.raises(FollowerLostError, match="learner process 1 is gone"):
        LeaderQueue(source, leader, _placement).take(1, 0)
    leader.end()  # says nothing more
    with pytest.raises(FollowerLostError):
        leader.say("save")


def test_a_send_that_fails_is_a_lost_follower() -> None:
    ours, _ = _links()
    ours.close()
    with pytest.raises(FollowerLostError, match="learner process 1 is gone: closed"):
        Leader([ours]).say("save")


def test_a_follower_asks_the_leader_to_stop() -> None:
    ours, theirs = _links()
    leader, asked = Leader([ours]), threading.Event()
    leader.watch(on_stop=asked.set, on_lost=lambda: None)
    follower = _follower(theirs)
    follower.ask_stop()
    assert asked.wait(TIMEOUT_S)
    leader.end()
    assert follower.take(1, 0) is None
    leader.close()


def _watched(*links: MemoryLink) -> Leader:
    leader = Leader(links)
    leader.watch(on_stop=lambda: None, on_lost=lambda: None)
    return leader


def test_all_line_up_before_any_goes_on() -> None:
    (ours_1, theirs_1), (ours_2, theirs_2) = _links(), _links()
    leader, gone_on = _watched(ours_1, ours_2), threading.Event()

    def follow(link: MemoryLink) -> None:
        line_up(link)
        gone_on.set()

    first = threading.Thread(target=follow, args=(theirs_1,))
    first.start()
    lead = threading.Thread(target=leader.line_up)
    lead.start()
    theirs_2.send(Frame(kind="stop"))  # another word of a follower is no arrival
    lead.join(0.05)
    assert lead.is_alive() and not gone_on.is_set()
    follow(theirs_2)
    for thread in (lead, first):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_nobody_lines_up_with_one_that_is_gone() -> None:
    ours, theirs = _links()
    leader = _watched(ours)
    theirs.close()
    with pytest.raises(FollowerLostError, match="learner process 1 is gone"):
        leader.line_up()


def test_a_follower_that_lines_up_hears_nothing_else() -> None:
    ours, theirs = _links()
    ours.send(Frame(kind="end"))
    with pytest.raises(ValueError, match="says 'end', this process is about to line up"):
        line_up(theirs)
