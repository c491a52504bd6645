"""Connections over loopback: what goes through them, and how they end."""

import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transport.loopback import (
    TIMEOUT_S,
    TOKEN,
    Acceptor,
    Task,
    channel_config,
    dial,
    served,
    served_through,
)

from jaxvla.transport import channel, connection
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, Listener
from jaxvla.transport.frames import Frame, FrameError, Limits
from jaxvla.transport.handshake import Party

_SILENCE_S = 0.4
_QUICK = {"silence_s": _SILENCE_S, "ping_s": 0.1}
_MIB = 2**20


@pytest.fixture(scope="module", params=["plain", "tls"])
def config(request: Any) -> ChannelConfig:
    """For both ends; pings are too far apart to come within a test."""
    if request.param == "plain":
        return channel_config()
    return channel_config(tls=request.getfixturevalue("certificates")["signed"])


@pytest.fixture(scope="module")
def quick(config: ChannelConfig) -> ChannelConfig:
    """The same, and silence is noticed soon."""
    return channel_config(tls=config.tls, **_QUICK)


def _numbers(seed: int, nbytes: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)


def _require_lost(call: Callable[[], Any], match: str = "is lost") -> None:
    with pytest.raises(ConnectionLostError, match=match):
        call()


def _send_until_lost(sender: Connection) -> str:
    """The reason. What fills the buffers of the system is sent to nobody without an error."""
    frame = Frame(kind="fill", arrays=[np.zeros(_MIB, np.uint8)])
    with pytest.raises(ConnectionLostError) as raised:
        while True:
            sender.send(frame)
    return str(raised.value)


# ------------------------------------------------------------------------ what goes through


def test_frames_go_both_ways(config: ChannelConfig) -> None:
    with served(config) as (server, client):
        assert (server.peer, client.peer) == ("sim-0", "learner")
        image = _numbers(0, 8 * 224 * 224 * 3).reshape(8, 224, 224, 3)
        client.send(Frame(kind="ask", fields={"id": 1}, arrays=[image, np.zeros(0), image.T]))
        asked = server.receive()
        np.testing.assert_array_equal(asked.arrays[0], image)
        np.testing.assert_array_equal(asked.arrays[2], image.T)
        server.send(Frame(kind="answer", fields=asked.fields))
        assert client.receive().fields == {"id": 1}
        assert not server.is_lost and not client.is_lost
        # The handshake's deadline does not hold for what follows it.
        assert server._stream.deadline_s is None and client._stream.deadline_s is None


def test_both_sides_send_more_than_the_system_buffers_at_once(config: ChannelConfig) -> None:
    """Who sends must not keep the same connection from receiving: both would wait for ever."""
    size = 16 * _MIB
    with served(config) as ends:
        sent = [
            Task(lambda x=x: ends[x].send(Frame(kind="a", arrays=[_numbers(x, size)])))
            for x in (0, 1)
        ]
        received = [Task(ends[x].receive) for x in (0, 1)]
        for task in sent:
            task.result()
        for x in (0, 1):
            assert np.array_equal(received[x].result().arrays[0], _numbers(1 - x, size))


def test_many_small_arrays_arrive(config: ChannelConfig) -> None:
    """More than one call of sendmsg takes."""
    arrays = [np.full(x % 7, x, np.int32) for x in range(2000)]
    with served(config) as (server, client):
        client.send(Frame(kind="a", arrays=arrays))
        for found, array in zip(server.receive().arrays, arrays, strict=True):
            np.testing.assert_array_equal(found, array)


def test_threads_send_whole_frames_in_their_order(config: ChannelConfig) -> None:
    num_threads, num_frames = 6, 40
    with served(config) as (server, client):

        def send(thread: int) -> None:
            for x in range(num_frames):
                seed = thread * num_frames + x
                array = _numbers(seed, seed % 5 * 40_000)
                client.send(Frame(kind="a", fields={"thread": thread, "x": x}, arrays=[array]))

        tasks = [Task(lambda x=x: send(x)) for x in range(num_threads)]
        following = [0] * num_threads
        for _ in range(num_threads * num_frames):
            frame = server.receive()
            thread, x = frame.fields["thread"], frame.fields["x"]
            assert x == following[thread]
            following[thread] += 1
            seed = thread * num_frames + x
            np.testing.assert_array_equal(frame.arrays[0], _numbers(seed, seed % 5 * 40_000))
        for task in tasks:
            task.result()


def test_arrays_may_be_changed_once_they_were_sent(config: ChannelConfig) -> None:
    with served(config) as (server, client):
        array = np.ones(_MIB)
        task = Task(server.receive)
        client.send(Frame(kind="a", arrays=[array]))
        array[:] = 2
        assert (task.result().arrays[0] == 1).all()


def test_a_frame_that_cannot_be_sent_leaves_the_connection_alone(config: ChannelConfig) -> None:
    with served(config) as (server, client):
        with pytest.raises(FrameError):
            client.send(Frame(kind="a", fields={"x": object()}))
        with pytest.raises(FrameError, match="more than the limit"):
            client.send(Frame(kind="a", arrays=[np.broadcast_to(np.uint8(0), (2**26 + 1,))]))
        with pytest.raises(FrameError, match="belongs to the channel"):
            client.send(Frame(kind="ping"))
        client.send(Frame(kind="b"))
        assert server.receive().kind == "b"


def test_a_frame_beyond_the_receivers_limit_ends_the_connection() -> None:
    small = channel_config(limits=Limits(max_payload_bytes=1000))
    with served(small, channel_config()) as (server, client):
        client.send(Frame(kind="a", arrays=[np.zeros(1001, np.uint8)]))
        _require_lost(server.receive, "arrays of 1001 bytes are more than the limit, 1000")
        assert server.is_malformed and server.is_lost
        _require_lost(client.receive)


# ------------------------------------------------------------------------ how it ends


def test_close_wakes_who_receives_on_either_side(config: ChannelConfig) -> None:
    with served(config) as (server, client):
        there, here = Task(server.receive), Task(client.receive)
        client.close()
        client.close()
        _require_lost(there.result, "sim-0 is lost")
        _require_lost(here.result, "learner is lost: it was closed here")
        _require_lost(client.receive, "it was closed here")
        _require_lost(lambda: client.send(Frame(kind="a")), "it was closed here")
        _require_lost(lambda: server.send(Frame(kind="a")))
        assert client.is_lost and server.is_lost


@pytest.mark.parametrize("end", [0, 1])
def test_close_wakes_who_sends_on_either_side(config: ChannelConfig, end: int) -> None:
    with served(config) as ends:
        task = Task(lambda: _send_until_lost(ends[0]))
        # Nobody reads, so the sender has to wait when this has come.
        ends[1].receive()
        ends[end].close()
        assert "is lost" in task.result()


def test_what_has_arrived_before_the_end_is_received(config: ChannelConfig) -> None:
    """Also when a sender has noticed the end first."""
    with served(config) as (server, client):
        for x in range(20):
            client.send(Frame(kind="a", fields={"x": x}, arrays=[np.zeros(10)]))
        client.close()
        _wait_until(server._stream.is_peer_gone)
        _require_lost(lambda: server.send(Frame(kind="b")))
        assert server.is_lost
        assert [server.receive().fields["x"] for _ in range(20)] == list(range(20))
        _require_lost(server.receive)


def test_a_side_that_only_sends_notices_the_end(quick: ChannelConfig) -> None:
    """Nobody receives, and the system takes what is sent: it has to be looked for."""
    with served(quick) as (server, client):
        client.close()
        _require_lost(lambda: [server.send(Frame(kind="a")) for _ in range(100)])


def test_a_reset_is_noticed_by_all_who_wait(config: ChannelConfig) -> None:
    with served_through(config) as (server, client, proxy):
        receivers = [Task(lambda x=x: _receive_until_lost(x)) for x in (server, client)]
        client.send(Frame(kind="a"))
        proxy.reset()
        assert all("is lost" in task.result() for task in receivers)
        assert "is lost" in _send_until_lost(server)
        assert "is lost" in _send_until_lost(client)


def test_a_sender_that_waits_notices_a_reset(config: ChannelConfig) -> None:
    with served_through(config) as (server, client, proxy):
        sender = Task(lambda: _send_until_lost(client))
        server.receive()
        proxy.reset()
        assert "is lost" in sender.result()
        assert client.is_lost


def test_an_idle_connection_lives(quick: ChannelConfig) -> None:
    with served(quick) as (server, client):
        tasks = [Task(server.receive), Task(client.receive)]
        threading.Event().wait(4 * _SILENCE_S)
        assert not server.is_lost and not client.is_lost
        server.send(Frame(kind="a"))
        client.send(Frame(kind="b"))
        assert [task.result().kind for task in tasks] == ["b", "a"]


def test_who_does_not_read_is_not_silent(quick: ChannelConfig) -> None:
    """It pings; the sender waits, and nothing is lost."""
    with served(quick) as (server, client):
        array = _numbers(0, 16 * _MIB)
        task = Task(lambda: client.send(Frame(kind="a", arrays=[array])))
        threading.Event().wait(4 * _SILENCE_S)
        assert not server.is_lost and not client.is_lost
        assert np.array_equal(server.receive().arrays[0], array)
        task.result()
        # The pings that came meanwhile have not broken what follows.
        server.send(Frame(kind="b"))
        assert client.receive().kind == "b"


@pytest.mark.parametrize("size", [0, 1, 25])
@pytest.mark.parametrize("by_a_ping", [False, True])
def test_half_a_ping_is_completed(size: int, by_a_ping: bool, monkeypatch: Any) -> None:
    """By whoever sends next."""
    with served(channel_config()) as (server, client):
        try_write = client._stream.try_write
        monkeypatch.setattr(client._stream, "try_write", lambda data: try_write(data[:size]))
        client._ping()
        monkeypatch.undo()
        if by_a_ping:
            client._ping()
        client.send(Frame(kind="a", arrays=[np.arange(9)]))
        assert server.receive().kind == "a"
        client._ping()
        client.send(Frame(kind="b"))
        assert server.receive().kind == "b"


@pytest.mark.fault(31)
def test_silence_is_noticed_by_all_who_wait(quick: ChannelConfig) -> None:
    with served_through(quick) as (server, client, proxy):
        tasks = [Task(server.receive), Task(client.receive)]
        proxy.cut()
        start_s = time.monotonic()
        for task in tasks:
            _require_lost(task.result, "nothing was heard for 0.4 s")
        assert time.monotonic() - start_s < 20 * _SILENCE_S
        _require_lost(lambda: server.send(Frame(kind="a")), "nothing was heard")


def test_silence_is_noticed_where_nobody_receives(quick: ChannelConfig) -> None:
    """Pings have come that nobody has read, and none come any more."""
    with served_through(quick) as (server, client, proxy):
        threading.Event().wait(2 * _SILENCE_S)
        assert not server.is_lost and not client.is_lost
        proxy.cut()
        _wait_until(lambda: server.is_lost and client.is_lost)
        _require_lost(lambda: client.send(Frame(kind="a")), "nothing was heard")


def test_silence_is_noticed_by_a_sender_that_waits(quick: ChannelConfig) -> None:
    """It fills all buffers on the way, and nobody receives on its side."""
    with served_through(quick) as (server, client, proxy):
        server.send(Frame(kind="a"))
        sender = Task(lambda: _send_until_lost(client))
        _wait_until(lambda: len(proxy.from_client) > _MIB)
        proxy.cut()
        assert "nothing was heard" in sender.result()


def test_silence_within_a_frame_is_noticed(quick: ChannelConfig) -> None:
    with served_through(quick) as (server, client, proxy):
        receiver = Task(server.receive)
        client.send(Frame(kind="a"))
        receiver.result()
        receiver = Task(server.receive)
        sender = Task(lambda: client.send(Frame(kind="a", arrays=[np.zeros(2**26, np.uint8)])))
        _wait_until(lambda: len(proxy.from_client) > _MIB)
        proxy.cut()
        _require_lost(receiver.result, "nothing was heard")
        _require_lost(sender.result)


@pytest.mark.parametrize("method", ["read", "write"])
def test_half_a_frame_is_never_followed_by_another(method: str, monkeypatch: Any) -> None:
    """What interrupts a thread, such as a signal, may leave the stream in the middle."""
    with served(channel_config()) as (server, client):
        client.send(Frame(kind="a"))

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(server._stream, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.receive() if method == "read" else server.send(Frame(kind="b"))
        assert server.is_lost
        _require_lost(client.receive)


def test_one_broken_connection_does_not_stop_the_pings_of_others(
    quick: ChannelConfig, monkeypatch: Any
) -> None:
    with served(quick) as (server, client), served(quick) as (_, other):

        def broken() -> int:
            raise RuntimeError("no such thing")

        monkeypatch.setattr(other._stream, "num_unread", broken)
        _require_lost(other.receive, "no such thing")
        threading.Event().wait(2 * _SILENCE_S)
        server.send(Frame(kind="a"))
        assert client.receive().kind == "a"


# ------------------------------------------------------------------------- listeners


@pytest.mark.fault(35)
def test_a_listener_leaves_nothing_behind(config: ChannelConfig) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    if not pathlib.Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")
    before, threads = descriptors(), set(threading.enumerate())
    listener = Listener("127.0.0.1", 0, config, _serve_until_lost)
    listener.start()
    clients = [dial(listener.address, config) for _ in range(3)]
    tasks = [Task(client.receive) for client in clients]
    listener.close()
    listener.close()
    for task, client in zip(tasks, clients, strict=True):
        _require_lost(task.result)
        client.close()
    left = [x for x in threading.enumerate() if x not in threads]
    for thread in left:
        thread.join(TIMEOUT_S)
    assert descriptors() == before
    _require_lost(lambda: dial(listener.address, config), "refused")


def test_a_listener_comes_back_at_its_address(config: ChannelConfig) -> None:
    with Acceptor(config) as first:
        client = dial(first.address, config)
        first.next().close()
    with Acceptor(config, port=first.address[1]) as second, dial(second.address, config) as ours:
        second.next().send(Frame(kind="a"))
        assert ours.receive().kind == "a"
    client.close()


def test_a_listener_closed_before_its_start() -> None:
    listener = Listener("127.0.0.1", 0, channel_config(), _serve_until_lost)
    _require_lost(lambda: dial(listener.address, channel_config()), "refused")
    listener.close()


def test_an_address_in_use_is_an_error() -> None:
    with Acceptor(channel_config()) as acceptor, pytest.raises(OSError, match="in use"):
        Listener("127.0.0.1", acceptor.address[1], channel_config(), _serve_until_lost)


def test_the_most_connections() -> None:
    config = channel_config(max_connections=2)
    with Acceptor(config) as acceptor:
        first, second = (dial(acceptor.address, config) for _ in range(2))
        _require_lost(lambda: dial(acceptor.address, config), "has its most connections")
        for connected in (first, second):
            acceptor.next()
            connected.send(Frame(kind="a"))  # they are none the worse for it
            connected.close()
    # Counted after the client has been told, so that only the end makes sure of it.
    assert acceptor.listener.counts["turned_away"] == 1


def test_an_ended_connection_leaves_its_place() -> None:
    config = channel_config(max_connections=1)
    listener = Listener("127.0.0.1", 0, config, _serve_until_lost)
    listener.start()
    for _ in range(5):
        with _dial_until_accepted(listener, config) as client:
            client.send(Frame(kind="a"))
    listener.close()  # a connection is counted after the client has been told
    assert listener.counts["accepted"] == 5


def test_serving_that_fails_ends_its_connection_alone(caplog: Any) -> None:
    def serve(connection: Connection) -> None:
        if connection.receive().kind == "fail":
            raise RuntimeError("a fault of ours")
        connection.send(Frame(kind="answer"))

    listener = Listener("127.0.0.1", 0, channel_config(), serve)
    listener.start()
    with dial(listener.address, channel_config()) as good:
        with dial(listener.address, channel_config()) as bad:
            bad.send(Frame(kind="fail"))
            _require_lost(bad.receive)
        good.send(Frame(kind="ask"))
        assert good.receive().kind == "answer"
    listener.close()
    assert "serving sim-0 failed" in caplog.text and "a fault of ours" in caplog.text


def test_who_pings_too_rarely_is_turned_away() -> None:
    slow, quick = channel_config(silence_s=10, ping_s=5), channel_config(**_QUICK)
    for ours, theirs in ((slow, quick), (quick, slow)):
        with Acceptor(ours) as acceptor:
            _require_lost(lambda a=acceptor, c=theirs: dial(a.address, c), "more than half")


def test_a_listener_that_says_nothing_is_given_up() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(ConnectionLostError, match="takes too long"):
        channel.connect(silent.getsockname(), channel_config(), name="a", timeout_s=0.2)


def test_a_socket_connected_to_itself_is_no_listener(monkeypatch: Any) -> None:
    def itself(*_: Any) -> socket.socket:
        made = socket.socket()
        made.bind(("127.0.0.1", 0))
        made.connect(made.getsockname())
        return made

    monkeypatch.setattr(socket, "create_connection", itself)
    with pytest.raises(ConnectionLostError, match="nobody listens"):
        channel.connect(("127.0.0.1", 1), channel_config(), name="a", timeout_s=1)


def test_an_unencrypted_listener_for_other_machines_says_so(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        Listener("127.0.0.1", 0, channel_config(), _serve_until_lost).close()
        assert not caplog.records
        Listener("0.0.0.0", 0, channel_config(), _serve_until_lost).close()
    assert "0.0.0.0: no TLS" in caplog.text


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"token": b"x" * 15}, "the token has 15 bytes, fewer than 16"),
        ({"silence_s": 0.0}, "silence_s = 0.0"),
        ({"silence_s": float("nan")}, "silence_s = nan"),
        ({"handshake_s": -1.0}, "handshake_s = -1.0"),
        ({"ping_s": 5.0, "silence_s": 9.9}, "at most half of silence_s"),
        ({"max_connections": 0}, "max_connections = 0"),
        ({"max_handshakes": 0}, "max_handshakes = 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        channel_config(**settings)


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a\n", "ä", "a/b", "a\0"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="is not 1 to 64 of"):
        Party(name=name, ping_ms=1)


def test_the_token_is_not_shown() -> None:
    assert TOKEN.decode() not in repr(channel_config())


def test_the_longest_name_arrives() -> None:
    name, config = "aZ0_.-" * 10 + "abcd", channel_config()
    with Acceptor(config) as acceptor:
        address = acceptor.address
        client = channel.connect(address, config, name=name, timeout_s=TIMEOUT_S)
        assert acceptor.next().peer == name
        client.close()


def test_no_thread_is_left_without_connections() -> None:
    with served(channel_config()):
        pinger = connection._PINGER._thread
        assert pinger is not None
    pinger.join(TIMEOUT_S)
    assert not pinger.is_alive()


def _wait_until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < end_s
        threading.Event().wait(0.005)


def _serve_until_lost(connection: Connection) -> None:
    while True:
        connection.receive()


def _receive_until_lost(receiver: Connection) -> str:
    with pytest.raises(ConnectionLostError) as raised:
        _serve_until_lost(receiver)
    return str(raised.value)


def _dial_until_accepted(listener: Listener, config: ChannelConfig) -> Connection:
    """A place is free as soon as the listener has noticed that its connection ended."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return dial(listener.address, config)
        except ConnectionLostError:
            if time.monotonic() > end_s:
                raise
