"""Who gets a connection, and what those who do not can do."""

import contextlib
import hashlib
import hmac
import pickle
import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fault_rows import FaultRow
from transport.loopback import (
    TIMEOUT_S,
    TOKEN,
    Acceptor,
    Proxy,
    Task,
    abort,
    channel_config,
    dial,
)

from jaxvla.transport import connection, handshake
from jaxvla.transport.channel import ChannelConfig, ConnectionLostError, Listener, TlsConfig
from jaxvla.transport.frames import Frame, Limits, encode

_PREAMBLE = b"jaxvla channel 1"
_NONCE = bytes(range(32))


@contextlib.contextmanager
def _echo(config: ChannelConfig) -> Iterator[Listener]:
    """A listener that answers with what was asked."""

    def serve(connection: Any) -> None:
        while True:
            connection.send(connection.receive())

    listener = Listener("127.0.0.1", 0, config, serve)
    listener.start()
    try:
        yield listener
    finally:
        listener.close()


def _require_works(listener: Listener, config: ChannelConfig) -> None:
    with dial(listener.address, config) as client:
        client.send(Frame(kind="ask", arrays=[np.arange(100)]))
        np.testing.assert_array_equal(client.receive().arrays[0], np.arange(100))


def _wait_for(listener: Listener, what: str, count: int) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while listener.counts[what] < count and time.monotonic() < end_s:
        threading.Event().wait(0.005)
    assert listener.counts[what] == count


def _raw(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, TIMEOUT_S)


def _all_of(connected: socket.socket) -> bytes:
    """What comes until the end."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it closed without reading all
        while piece := connected.recv(65_536):
            data += piece
    return data


def _exactly(connected: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connected.recv(size - len(data))
        assert piece, "closed"
        data += piece
    return data


def _proof(
    role: bytes, server: bytes, client: bytes, message: bytes, token: bytes = TOKEN
) -> bytes:
    """As the docstring of `handshake` has it, without TLS."""
    text = role + bytes(16 - len(role)) + _PREAMBLE + client + server + bytes(32) + message
    return hmac.new(token, text, hashlib.sha256).digest()


def _claim(name: bytes = b"sim-0", ping_ms: int = 5000) -> bytes:
    return struct.pack("<64sI", name, ping_ms)


def _introduced(address: tuple[str, int], claim: bytes) -> tuple[socket.socket, bytes]:
    """A client written from the docs: (its socket, the listener's answer)."""
    connected = _raw(address)
    connected.sendall(_PREAMBLE + _NONCE)
    greeting = _exactly(connected, 48)
    assert greeting[:16] == _PREAMBLE
    connected.sendall(claim + _proof(b"client", greeting[16:], _NONCE, claim))
    answer = _exactly(connected, 69)
    proof = _exactly(connected, 32)
    assert proof == _proof(b"listener", greeting[16:], _NONCE, claim + answer)
    return connected, answer


# ------------------------------------------------------------------- the handshake as documented


def test_the_handshake_is_the_documented_one() -> None:
    with Acceptor(channel_config()) as acceptor:
        connected, answer = _introduced(acceptor.address, _claim())
        assert struct.unpack("<B64sI", answer) == (0, b"learner".ljust(64, b"\0"), 5000)
        connected.sendall(b"".join(encode(Frame(kind="a"), Limits())))
        assert acceptor.next().receive().kind == "a"
        connected.close()


def test_every_connection_has_new_nonces() -> None:
    with Acceptor(channel_config()) as acceptor:
        seen = set()
        for _ in range(10):
            with _raw(acceptor.address) as connected:
                seen.add(_exactly(connected, 48)[16:])
        assert len(seen) == 10


@pytest.mark.fault(28)
@pytest.mark.parametrize("byte", [0, 63, 64, 67, 68, 83, 99])
def test_every_byte_of_a_claim_is_proven(byte: int, fault_row: FaultRow) -> None:
    with _echo(channel_config()) as listener, _raw(listener.address) as connected:
        connected.sendall(_PREAMBLE + _NONCE)
        greeting = _exactly(connected, 48)
        message = bytearray(_claim() + _proof(b"client", greeting[16:], _NONCE, _claim()))
        message[byte] ^= 1
        connected.sendall(message)
        assert _all_of(connected) == b""
        _wait_for(listener, "refused", 1)
        _require_works(listener, channel_config())
    fault_row(survived=True)


@pytest.mark.fault(28)
@pytest.mark.parametrize("token", [b"", b"x" * 16, TOKEN[:-1], TOKEN + b"x"])
def test_a_stranger_is_refused_before_anything_is_parsed(token: bytes, monkeypatch: Any) -> None:
    """And learns nothing but that somebody listens."""
    parsed, compared = [], []
    compare = hmac.compare_digest

    def compare_digest(*both: bytes) -> bool:
        compared.append(both)
        return compare(*both)

    monkeypatch.setattr(handshake, "_party", lambda *x: parsed.append(x))
    monkeypatch.setattr(connection, "read_frame", lambda *x: parsed.append(x))
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    with _echo(channel_config()) as listener, _raw(listener.address) as connected:
        connected.sendall(_PREAMBLE + _NONCE)
        greeting = _exactly(connected, 48)
        claim = _claim(b"\xff")
        connected.sendall(claim + _proof(b"client", greeting[16:], _NONCE, claim, token))
        assert _all_of(connected) == b""
        _wait_for(listener, "refused", 1)
    assert not parsed
    assert len(compared) == 1, "compared in constant time"


@pytest.mark.parametrize(
    ("name", "ping_ms"), [(b"", 1), (b"a b", 1), (b"\xff", 1), (b"a\0b", 1), (b"a", 0)]
)
def test_a_claim_that_no_client_makes_is_refused(name: bytes, ping_ms: int) -> None:
    """By one who holds the token."""
    with _echo(channel_config()) as listener:
        with pytest.raises((AssertionError, ConnectionResetError)):
            _introduced(listener.address, _claim(name, ping_ms))
        _wait_for(listener, "refused", 1)


@pytest.mark.fault(28)
def test_a_replayed_handshake_is_refused() -> None:
    config = channel_config()
    with _echo(config) as listener:
        with Proxy(listener.address) as proxy, dial(proxy.address, config) as client:
            client.send(Frame(kind="ask", fields={"x": 1}))
            client.receive()
            recorded = bytes(proxy.from_client)
        with _raw(listener.address) as connected:
            connected.sendall(recorded)
            assert len(_all_of(connected)) <= 48
        _wait_for(listener, "refused", 1)
        assert listener.counts["accepted"] == 1


def _impostor(answer: Any) -> tuple[socket.socket, Task]:
    """One who listens, and answers a client in its own way."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connected, _ = listening.accept()
        with connected, contextlib.suppress(OSError):
            answer(connected)

    return listening, Task(serve)


def _answer_without_token(connected: socket.socket) -> None:
    connected.sendall(_PREAMBLE + _NONCE)
    _exactly(connected, 48 + 100)
    connected.sendall(struct.pack("<B64sI32s", 0, b"learner", 5000, secrets.token_bytes(32)))


def _reflect(connected: socket.socket) -> None:
    """The client's own words, which carry a proof with the token."""
    connected.sendall(_exactly(connected, 48))
    claim = _exactly(connected, 100)
    connected.sendall(claim + b"\0")


def _answer_another_handshake(connected: socket.socket) -> None:
    connected.sendall(_PREAMBLE + _NONCE)
    greeting, claim = _exactly(connected, 48), _exactly(connected, 100)[:68]
    answer = struct.pack("<B64sI", 0, b"learner", 5000)
    proof = _proof(b"listener", _NONCE, greeting[16:-1] + b"\0", claim + answer)
    connected.sendall(answer + proof)


def _speak_http(connected: socket.socket) -> None:
    connected.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    while connected.recv(4096):  # what is closed with bytes unread takes the answer back
        pass


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (_answer_without_token, "does not hold the same token"),
        (_reflect, "does not hold the same token"),
        (_answer_another_handshake, "does not hold the same token"),
        (_speak_http, "does not speak jaxvla's protocol"),
    ],
)
def test_an_impostor_gets_no_client(answer: Any, match: str) -> None:
    listening, task = _impostor(answer)
    with listening, pytest.raises(ConnectionLostError, match=match):
        dial(listening.getsockname(), channel_config())
    task.result()


# ------------------------------------------------------------------- strangers that cost


def test_a_stranger_who_says_nothing_is_sent_away() -> None:
    config = channel_config(handshake_s=0.2)
    with _echo(config) as listener, _raw(listener.address) as connected:
        assert _all_of(connected)[:16] == _PREAMBLE
        assert listener.counts["refused"] == 1


def test_a_stranger_who_drips_is_sent_away() -> None:
    """The time is for the whole handshake, not for each byte."""
    config = channel_config(handshake_s=0.3)
    with _echo(config) as listener, _raw(listener.address) as connected:
        start_s = time.monotonic()
        with contextlib.suppress(OSError):
            for octet in _PREAMBLE + bytes(132):
                connected.sendall(bytes([octet]))
                threading.Event().wait(0.05)
                if listener.counts["refused"]:
                    break
        assert listener.counts["refused"] == 1
        assert time.monotonic() - start_s < 4


@pytest.mark.parametrize("use_tls", [False, True])
def test_strangers_cannot_keep_others_out(use_tls: bool, certificates: Any) -> None:
    """Many who say nothing: the one that came first has to go, and threads stay few."""
    tls = certificates["signed"] if use_tls else None
    config = channel_config(max_handshakes=3, handshake_s=3600, tls=tls)
    with _echo(config) as listener, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(_raw(listener.address)) for _ in range(8)]
        _require_works(listener, config)
        _wait_for(listener, "turned_away", 6)
        for stranger in strangers[:6]:
            assert _all_of(stranger)[:16] in (b"", _PREAMBLE)
        alive, _, _ = select.select(strangers[6:], [], [], 0)
        assert not any(stranger.recv(99)[48:] for stranger in alive)


def test_strangers_do_not_take_the_places_of_clients() -> None:
    config = channel_config(max_connections=1)
    with _echo(config) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(_raw(listener.address))
        _require_works(listener, config)


def test_strangers_do_not_fill_the_log(caplog: Any) -> None:
    with _echo(channel_config()) as listener:
        for _ in range(40):
            with _raw(listener.address) as connected:
                connected.sendall(bytes(48))
                _all_of(connected)
        _wait_for(listener, "refused", 40)
    assert len(caplog.records) == 6  # 1, 2, 4, 8, 16, 32


@pytest.mark.fault(27)
def test_any_bytes_are_survived() -> None:
    """From strangers, and from those who hold the token."""
    config, rng = channel_config(limits=Limits(max_payload_bytes=1000)), np.random.default_rng(0)
    good = b"".join(encode(Frame(kind="ask", arrays=[np.arange(9)]), Limits()))
    harm = [rng.bytes(int(size)) for size in rng.integers(1, 3000, 20)]
    harm += [_PREAMBLE + rng.bytes(200), pickle.dumps(print) * 9, b"GET / HTTP/1.1\r\n\r\n"]
    malformed = [*harm[:20], b"jvla" + rng.bytes(16), good[:4] + b"\xff" * 16, good * 2 + b"x" * 20]
    with _echo(config) as listener:
        for data in harm:
            with _raw(listener.address) as connected:
                connected.sendall(data)
                connected.shutdown(socket.SHUT_WR)
                assert _all_of(connected)[48:] == b""
        _wait_for(listener, "refused", len(harm))
        for data in malformed:
            connected, _ = _introduced(listener.address, _claim())
            with connected:
                connected.sendall(data.ljust(20, b"\1"))
                _all_of(connected)
        _wait_for(listener, "accepted", len(malformed))
        _wait_for(listener, "malformed", len(malformed))
        for _ in range(5):  # and those who just go
            connected, _ = _introduced(listener.address, _claim())
            abort(connected)
        _require_works(listener, config)


# --------------------------------------------------------------------------------- TLS


def test_a_certificate_that_is_trusted_itself(certificates: Any) -> None:
    config = channel_config(tls=certificates["own"])
    with _echo(config) as listener:
        _require_works(listener, config)


def test_other_certificates_are_refused(certificates: Any) -> None:
    with _echo(channel_config(tls=certificates["own"])) as listener:
        with pytest.raises(ConnectionLostError, match="certificate verify failed"):
            dial(listener.address, channel_config(tls=certificates["signed"]))
        _wait_for(listener, "refused", 1)


def test_tls_does_not_replace_the_token(certificates: Any) -> None:
    with _echo(channel_config(tls=certificates["signed"])) as listener:
        wrong = channel_config(tls=certificates["signed"], token=b"x" * 16)
        with pytest.raises(ConnectionLostError, match="same token"):
            dial(listener.address, wrong)
        _wait_for(listener, "refused", 1)


@pytest.mark.parametrize("listens_with_tls", [False, True])
def test_one_side_without_tls_is_refused_soon(listens_with_tls: bool, certificates: Any) -> None:
    both = channel_config(), channel_config(tls=certificates["signed"])
    with _echo(both[listens_with_tls]) as listener:
        start_s = time.monotonic()
        with pytest.raises(ConnectionLostError):
            dial(listener.address, both[not listens_with_tls])
        assert time.monotonic() - start_s < 5, "by what was said, not by the time-out"
        _wait_for(listener, "refused", 1)


def test_old_versions_of_tls_are_refused(certificates: Any) -> None:
    context = certificates["signed"].client_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with _echo(channel_config(tls=certificates["signed"])) as listener:
        with _raw(listener.address) as connected, pytest.raises(ssl.SSLError):
            context.wrap_socket(connected)
        _wait_for(listener, "refused", 1)


def test_another_certificate_of_the_authority_cannot_stand_between(certificates: Any) -> None:
    """Its owner passes on the handshake, in which the client proves that it holds the token."""
    config = channel_config(tls=certificates["signed"])
    with _echo(config) as listener:
        context = certificates["other"].server_context()

        def pass_on(connected: socket.socket) -> None:
            inner = certificates["signed"].client_context().wrap_socket(_raw(listener.address))
            with context.wrap_socket(connected, server_side=True) as outer, inner:
                outer.sendall(_exactly(inner, 48))
                inner.sendall(_exactly(outer, 48 + 100))
                outer.sendall(_exactly(inner, 101))

        listening, task = _impostor(pass_on)
        with listening, pytest.raises(ConnectionLostError):
            dial(listening.getsockname(), config)
        with pytest.raises(AssertionError, match="closed"):
            task.result()
        _wait_for(listener, "refused", 1)


@pytest.mark.parametrize("name", ["certificate", "key"])
def test_a_listeners_tls_files_are_checked(name: str, certificates: Any) -> None:
    for path, match in (("", f"tls.{name} is empty"), ("/no/such.pem", "cannot be used")):
        files = {x: getattr(certificates["own"], x) for x in ("certificate", "key")} | {name: path}
        with pytest.raises(ValueError, match=match):
            Listener("127.0.0.1", 0, channel_config(tls=TlsConfig(**files)), lambda _: None)


def test_a_clients_tls_files_are_checked() -> None:
    for path, match in (("", "tls.authority is empty"), ("/no/such.pem", "cannot be used")):
        with pytest.raises(ValueError, match=match):
            dial(("127.0.0.1", 1), channel_config(tls=TlsConfig(authority=path)))
