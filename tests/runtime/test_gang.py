"""How the processes of a learner find each other, and what the leader says to the others."""

import contextlib
import queue
import threading
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.runtime.gang import Alone, Gathering, LedGang, NotGatheredError
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.mirror import Leader

CHANNEL = ChannelConfig(token=b"0" * 32, silence_s=60.0, ping_s=5.0)
WAIT_S = 60.0
LAUNCH = 3


class Line:
    """What the leader needs of its line to the supervisor."""

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.waiting: queue.Queue[threading.Event] = queue.Queue()

    @contextlib.contextmanager
    def ending(self, event: threading.Event) -> Iterator[None]:
        self.waiting.put(event)
        yield


def _spec() -> ReplicaSpec:
    return ReplicaSpec(
        kind="learner",
        index=0,
        launch=LAUNCH,
        control=("127.0.0.1", 1),
        token="",
        host="127.0.0.1",
        workdir="/nowhere",
        command="",
        config={},
    )


@pytest.fixture
def gathering() -> Iterator[Gathering]:
    """For two followers."""
    with contextlib.closing(Gathering(_spec(), CHANNEL, "127.0.0.1", 2)) as made:
        yield made


def _come(
    gathering: Gathering, index: int, kind: str = "follower", launch: int = LAUNCH
) -> Connection:
    connection = connect(gathering.address, CHANNEL, name=f"learner_{index}", timeout_s=WAIT_S)
    connection.send(Frame(kind=kind, fields={"index": index, "launch": launch}))
    return connection


def _wait(gathering: Gathering, timeout_s: float = WAIT_S, line: Line | None = None) -> Any:
    return gathering.wait(line or Line(), timeout_s)  # pyright: ignore[reportArgumentType]


def test_followers_may_come_in_any_order(gathering: Gathering):
    second, first = _come(gathering, 2), _come(gathering, 1)
    links = _wait(gathering)
    assert [link.peer for link in links] == ["learner_1", "learner_2"]
    for link, follower in zip(links, (first, second), strict=True):
        link.send(Frame(kind="hello"))
        assert follower.receive().kind == "hello"


@pytest.mark.parametrize(
    "stranger",
    [
        {"index": 0},
        {"index": 3},
        {"index": 1},
        {"index": 2, "kind": "simulator"},
        {"index": 2, "launch": LAUNCH - 1},
    ],
)
def test_who_is_no_follower_of_this_start_has_to_go(gathering: Gathering, stranger: dict[str, Any]):
    first = _come(gathering, 1)
    with pytest.raises(NotGatheredError, match=r"no learner_2 within 0\.05 s"):
        while True:  # until the first one is known
            with contextlib.suppress(NotGatheredError):
                _wait(gathering, 0.0)
            if 1 in gathering._links:
                _wait(gathering, 0.05)
    with pytest.raises(ConnectionLostError):
        _come(gathering, **stranger).receive()
    second = _come(gathering, 2)
    links = _wait(gathering)
    links[0].send(Frame(kind="one"))
    links[1].send(Frame(kind="two"))
    assert (first.receive().kind, second.receive().kind) == ("one", "two")


def test_a_stop_ends_the_wait(gathering: Gathering):
    line, found = Line(), queue.Queue[Any]()
    threading.Thread(target=lambda: found.put(_wait(gathering, line=line))).start()
    event = line.waiting.get(timeout=WAIT_S)
    line.stop_requested.set()
    event.set()
    assert found.get(timeout=WAIT_S) is None


class Heard:
    """A link that keeps what was said."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.is_lost = False

    def send(self, frame: Frame) -> None:
        if self.is_lost:
            raise ConnectionLostError("gone")
        self.frames.append(frame)

    def receive(self) -> NoReturn:
        raise ConnectionLostError("gone")

    def close(self) -> None:
        self.is_lost = True


class LeftError(Exception):
    """Stands for the end of the process."""


def _leave(reason: str) -> NoReturn:
    raise LeftError(reason)


def _learner() -> Any:
    """Parameters to fetch."""
    params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
    return types.SimpleNamespace(state=types.SimpleNamespace(params=params))


def test_what_takes_all_processes_is_said_to_the_followers():
    links, learner = [Heard(), Heard()], _learner()
    gang = LedGang(Leader(links), _leave)
    gang.lead(learner)
    placed = gang.to_place(learner.state.params)
    fetched = gang.fetch([learner.state.params["b"]["c"]])
    gang.save(4)
    gang.end()
    for link in links:
        said = [(frame.kind, dict(frame.fields)) for frame in link.frames]
        assert said == [
            ("fetch", {"leaves": [0, 1]}),
            ("fetch", {"leaves": [1]}),
            ("save", {"version": 4}),
            ("end", {}),
        ]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, learner.state.params)
    np.testing.assert_array_equal(fetched[0], learner.state.params["b"]["c"])
    # The next update donates the parameters: copies must outlive them.
    learner.state.params["a"].delete()
    np.testing.assert_array_equal(placed["a"], [0.0, 1.0, 2.0])


def test_a_follower_that_is_gone_after_the_end_does_not_matter():
    link = Heard()
    link.close()
    LedGang(Leader([link]), _leave).end()


def test_what_fails_ends_the_process_of_a_leader_and_not_a_learner_alone():
    gang = LedGang(Leader([Heard()]), _leave)
    with pytest.raises(LeftError, match="RuntimeError: a collective failed"):
        gang.give_up(RuntimeError("a collective failed"))
    Alone().give_up(RuntimeError("the caller says so"))


def test_a_learner_alone_takes_and_places_what_it_has():
    source, learner = object(), _learner()
    alone = Alone()
    assert alone.source(source, None) is source  # pyright: ignore[reportArgumentType]
    assert alone.to_place(learner.state.params) is learner.state.params
    fetched = alone.fetch([learner.state.params["a"]])
    learner.state.params["a"].delete()
    np.testing.assert_array_equal(fetched[0], [0.0, 1.0, 2.0])
