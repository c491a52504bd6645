"""The websocket between openpi's own client and answers that do what they are told."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fault_rows import FaultRow

from jaxvla.config import WebsocketConfig
from jaxvla.serving import websocket, wire
from jaxvla.serving.requests import RequestError
from jaxvla.serving.websocket import WebsocketServer, open_listener
from jaxvla.telemetry.metrics import MetricRecorder

_INSTALL = "scripts/environment.sh installs it with the openpi extra"
openpi: Any = pytest.importorskip("openpi_client.websocket_client_policy", reason=_INSTALL)
client: Any = pytest.importorskip("websockets.sync.client", reason=_INSTALL)
exceptions: Any = pytest.importorskip("websockets.exceptions", reason=_INSTALL)

# openpi-client uses websockets as was usual before its release 16.
pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""

METADATA = {"model": "fake", "action_horizon": 3, "cameras": ["a", "b"]}
SETTINGS = WebsocketConfig(port=0, max_message_mib=1, max_connections=3)

Answer = Callable[[bytes], Awaitable[dict[str, Any]]]


async def echo(data: bytes) -> dict[str, Any]:
    return {"actions": wire.unpack(data)["x"], "policy_timing": {"infer_ms": 1.0}}


class Hold:
    """An answer that waits until it is released."""

    def __init__(self) -> None:
        self.asked: Future[None] = Future()
        self._release: Future[None] = Future()

    async def __call__(self, data: bytes) -> dict[str, Any]:
        self.asked.set_result(None)
        await asyncio.wrap_future(self._release)
        return await echo(data)

    def release(self) -> None:
        self._release.set_result(None)


class Rig:
    """A running server."""

    def __init__(self, answer: Answer, token: str | None, settings: WebsocketConfig):
        self.recorder = MetricRecorder()
        self.server = WebsocketServer(
            answer, settings=settings, metadata=METADATA, token=token, recorder=self.recorder
        )
        self.ended = threading.Event()
        listener = open_listener(settings)
        self.port: int = listener.getsockname()[1]
        self.server.start(listener, on_end=self.ended.set)

    def policy(self, token: str | None = None) -> Any:
        """openpi's client."""
        return openpi.WebsocketClientPolicy("127.0.0.1", self.port, api_key=token)

    @contextlib.contextmanager
    def connect(self, **options: Any) -> Iterator[Any]:
        """A connection that has read the metadata."""
        given = {"compression": None, "max_size": None} | options
        with client.connect(f"ws://127.0.0.1:{self.port}", **given) as connection:
            assert wire.unpack(connection.recv(TIMEOUT_S)) == METADATA
            yield connection

    def totals(self) -> tuple[Any, Any]:
        """Requests, and those with errors."""
        record = self.recorder.totals()
        return record["serving/requests"], record["serving/request_errors"]


@contextlib.contextmanager
def serving(answer: Answer = echo, *, token: str | None = None, **settings: Any) -> Iterator[Rig]:
    rig = Rig(answer, token, dataclasses.replace(SETTINGS, **settings))
    try:
        yield rig
    finally:
        rig.server.stop(0.0)
        assert rig.ended.wait(TIMEOUT_S) and rig.server.error is None


# ------------------------------------------------------------------------ conversation


def test_metadata_then_answers_with_openpis_timing() -> None:
    with serving() as rig:
        policy = rig.policy()
        assert policy.get_server_metadata() == METADATA
        x = np.arange(6, dtype=np.float32).reshape(3, 2)
        first, second = policy.infer({"x": x}), policy.infer({"x": x + 1})
        np.testing.assert_array_equal(first["actions"], x)
        np.testing.assert_array_equal(second["actions"], x + 1)
        assert first["policy_timing"] == {"infer_ms": 1.0}
        assert set(first["server_timing"]) == {"infer_ms"}
        assert set(second["server_timing"]) == {"infer_ms", "prev_total_ms"}
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"] >= 0
        assert rig.totals() == (2, 0)
        assert rig.recorder.flush(update=0, time_s=0.0, extra={})["serving/request_ms/max"] > 0


def test_a_client_that_does_not_wait_gets_its_answers_in_order() -> None:
    with serving() as rig, rig.connect() as connection:
        for value in range(5):
            connection.send(wire.pack({"x": value}))
        answers = [wire.unpack(connection.recv(TIMEOUT_S))["actions"] for _ in range(5)]
        assert answers == [0, 1, 2, 3, 4]


def test_compression_is_not_agreed_on() -> None:
    with serving() as rig, rig.connect(compression="deflate") as connection:
        assert connection.response.headers.get("Sec-WebSocket-Extensions") is None


def _refusal(connection: Any) -> tuple[str, int]:
    """The error's text, and the code that the connection is closed with."""
    text = connection.recv(TIMEOUT_S)
    with pytest.raises(exceptions.ConnectionClosed):
        connection.recv(TIMEOUT_S)
    return text, connection.close_code


def test_an_error_is_one_line_and_the_end_of_the_connection() -> None:
    async def refuse(data: bytes) -> dict[str, Any]:
        raise RequestError("'x' is wrong:\n  send\tanother " + "x" * 1000)

    with serving(refuse) as rig:
        with rig.connect() as connection:
            connection.send(b"")
            text, code = _refusal(connection)
        assert code == 1011
        assert text == "'x' is wrong: send another " + "x" * 473 + " ..."
        with pytest.raises(RuntimeError, match=r"Error in inference server:\n'x' is wrong"):
            rig.policy().infer({"x": 1})
        assert rig.totals() == (2, 2)


def test_what_broke_is_told_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(data: bytes) -> dict[str, Any]:
        raise KeyError("secret")

    with serving(fail) as rig:
        with pytest.raises(RuntimeError, match="internal error") as raised:
            rig.policy().infer({"x": 1})
        assert "secret" not in str(raised.value) and "Traceback" not in str(raised.value)
        assert rig.policy().get_server_metadata() == METADATA
    assert "secret" in caplog.text


def test_an_answer_that_cannot_be_sent_is_an_internal_error() -> None:
    async def odd(data: bytes) -> dict[str, Any]:
        return {"actions": object()}

    with serving(odd) as rig, pytest.raises(RuntimeError, match="internal error"):
        rig.policy().infer({"x": 1})


def test_text_is_refused() -> None:
    with serving() as rig, rig.connect() as connection:
        connection.send("hello")
        assert _refusal(connection) == (
            "the request is a text message: send a binary one, packed by msgpack",
            1011,
        )


# ------------------------------------------------------------------------------ limits


@pytest.mark.fault(27)
def test_a_message_that_is_too_long_ends_its_connection_only(fault_row: FaultRow) -> None:
    with serving() as rig, rig.connect() as other:
        with rig.connect() as connection:
            with contextlib.suppress(exceptions.ConnectionClosed):  # while it is still sending
                connection.send(bytes(2**20 + 1))
            with pytest.raises(exceptions.ConnectionClosed):
                connection.recv(TIMEOUT_S)
            assert connection.close_code == 1009
        with rig.connect() as connection:  # in pieces
            with contextlib.suppress(exceptions.ConnectionClosed):
                connection.send(bytes(2**18) for _ in range(5))
            with pytest.raises(exceptions.ConnectionClosed):
                connection.recv(TIMEOUT_S)
            assert connection.close_code == 1009
        longest = {"x": np.zeros(2**20 - 100, np.uint8)}
        other.send(wire.pack(longest))
        assert wire.unpack(other.recv(TIMEOUT_S))["actions"].size == 2**20 - 100
    fault_row(survived=True)


@pytest.mark.fault(26)
def test_there_are_no_more_connections_than_allowed() -> None:
    with serving() as rig, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(rig.connect()) for _ in range(3)]
        with pytest.raises(exceptions.InvalidStatus) as raised, rig.connect():
            pass
        assert raised.value.response.status_code == 503
        assert b"3 clients are connected" in raised.value.response.body
        connections.pop().close()
        while True:  # the server learns of it soon
            try:
                stack.enter_context(rig.connect())
                return
            except exceptions.InvalidStatus:
                continue


def test_a_request_without_an_answer_in_time_gets_an_error() -> None:
    cancelled: Future[None] = Future()

    async def never(data: bytes) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set_result(None)
        raise AssertionError

    with serving(never, deadline_s=0.05) as rig:
        with pytest.raises(RuntimeError, match=r"no answer within .*deadline_s = 0.05 s"):
            rig.policy().infer({"x": 1})
        cancelled.result(TIMEOUT_S)  # nobody computes it any more


def test_a_client_that_answers_no_ping_is_dropped() -> None:
    with serving(ping_interval_s=0.05, ping_timeout_s=0.05) as rig:
        with socket.create_connection(("127.0.0.1", rig.port), TIMEOUT_S) as raw:
            raw.sendall(
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            received = b""
            while data := raw.recv(4096):
                received += data
        assert received.startswith(b"HTTP/1.1 101 ") and b"keepalive ping timeout" in received
        with rig.connect() as connection:  # answers pings by itself
            connection.send(wire.pack({"x": 1}))
            assert wire.unpack(connection.recv(TIMEOUT_S))["actions"] == 1


# ------------------------------------------------------------------------------ access


def _get(rig: Rig, path: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{rig.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_health_needs_no_token() -> None:
    with serving(token="s3cret") as rig:
        assert _get(rig, "/healthz") == (200, b"OK\n")
        assert _get(rig, "/healthz?x=1")[0] == 200
        assert _get(rig, "/")[0] == 401
        assert _get(rig, "/", Authorization="Api-Key s3cret")[0] == 426  # no websocket
    with pytest.raises(urllib.error.URLError):
        _get(rig, "/healthz")


def test_the_token_of_the_real_client() -> None:
    with serving(token="s3cret") as rig:
        policy = rig.policy("s3cret")
        assert policy.infer({"x": 5})["actions"] == 5


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Api-Key")],
        [("Authorization", "Api-Key s3cre")],
        [("Authorization", "Api-Key s3crett")],
        [("Authorization", "Bearer s3cret")],
        [("Authorization", "s3cret")],
        [("Authorization", "Api-Key wrong"), ("Authorization", "Api-Key s3cret")],
    ],
    ids=str,
)
def test_without_the_token_nobody_gets_in(headers: list[tuple[str, str]]) -> None:
    with serving(token="s3cret") as rig:
        with (
            pytest.raises(exceptions.InvalidStatus) as raised,
            rig.connect(additional_headers=headers),
        ):
            pass
        assert raised.value.response.status_code == 401
        assert b"Api-Key TOKEN" in raised.value.response.body
        assert b"s3cret" not in raised.value.response.body


def test_browsers_are_refused() -> None:
    with serving() as rig:
        with (
            pytest.raises(exceptions.InvalidStatus) as raised,
            rig.connect(origin="http://127.0.0.1"),
        ):
            pass
        assert raised.value.response.status_code == 403


def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as rig:
        with socket.create_connection(("127.0.0.1", rig.port), TIMEOUT_S) as raw:
            raw.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            while raw.recv(4096):
                pass
        assert rig.policy().get_server_metadata() == METADATA
    assert [x for x in caplog.records if x.levelno > logging.INFO] == []


# -------------------------------------------------------------------------------- stop


def test_stop_answers_what_was_asked_and_ends_the_rest() -> None:
    hold = Hold()
    with serving(hold) as rig, rig.connect() as idle, ThreadPoolExecutor(2) as pool:
        policy = rig.policy()
        answer = pool.submit(policy.infer, {"x": 7})
        hold.asked.result(TIMEOUT_S)
        stop = pool.submit(rig.server.stop, TIMEOUT_S)
        with pytest.raises(exceptions.ConnectionClosed):
            idle.recv(TIMEOUT_S)
        assert idle.close_code == 1001
        with pytest.raises(OSError), rig.connect():  # nobody listens any more
            pass
        assert not answer.done() and not stop.done()
        hold.release()
        assert answer.result(TIMEOUT_S)["actions"] == 7
        stop.result(TIMEOUT_S)
        with pytest.raises(exceptions.ConnectionClosed):
            policy.infer({"x": 8})


def test_stop_gives_up_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an answer that does not come, and on a connection that never says what it wants."""
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT_S", 0.1)
    hold = Hold()
    with serving(hold) as rig, ThreadPoolExecutor(1) as pool:
        with socket.create_connection(("127.0.0.1", rig.port), TIMEOUT_S):
            answer = pool.submit(rig.policy().infer, {"x": 7})
            hold.asked.result(TIMEOUT_S)
            rig.server.stop(0.1)
            with pytest.raises(exceptions.ConnectionClosed):
                answer.result(TIMEOUT_S)
        rig.server.stop(0.1)  # once more harms nobody


def test_an_address_in_use_is_an_error_before_anything_listens() -> None:
    with serving() as rig, pytest.raises(OSError):
        open_listener(dataclasses.replace(SETTINGS, port=rig.port))


def test_the_metadata_is_plain() -> None:
    """`wire.pack` says what it cannot send, before there is a server."""
    json.dumps(METADATA)
    with pytest.raises(TypeError, match="cannot be sent"):
        WebsocketServer(
            echo, settings=SETTINGS, metadata={"x": {1}}, token=None, recorder=MetricRecorder()
        )
