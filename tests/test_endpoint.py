"""Who may reach the websocket server, and with which token."""

import pathlib
from typing import Any

import pytest

from jaxvla.config import ConfigError, WebsocketConfig
from jaxvla.endpoint import batch_sizes, is_loopback, read_token, validate_websocket
from jaxvla.layout import parse_layout


def _validate(layout: str = "colocated=1", **settings: Any) -> None:
    validate_websocket(WebsocketConfig(**settings), parse_layout(layout).roles["serving"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_alone_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    _validate(host=host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "192.168.1.5",
        "robot",
        "128.0.0.1",
        "localhost.evil.net",
        "127.0.0.1.nip.io",
    ],
)
def test_other_machines_need_a_token(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=f"websocket.host = '{host}': can be reached from other"):
        _validate(host=host)
    _validate(host=host, token_file="token")
    _validate(host=host, token_variable="TOKEN")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"host": ""}, "host"),
        ({"host": "a b"}, "host"),
        ({"host": "127.0.0.1\n"}, "host"),
        ({"port": -1}, "port"),
        ({"port": 65_536}, "port"),
        ({"max_message_mib": 0}, "max_message_mib"),
        ({"max_message_mib": 1025}, "max_message_mib"),
        ({"max_connections": 0}, "max_connections"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": 3601.0}, "deadline_s"),
        ({"ping_interval_s": -1.0}, "ping_interval_s"),
        ({"ping_timeout_s": 0.0}, "ping_timeout_s"),
        ({"token_variable": "A=B"}, "token_variable"),
        ({"token_variable": "1A"}, "token_variable"),
        ({"token_variable": "A", "token_file": "b"}, "token_file"),
        ({"buckets": (4, 2)}, "buckets"),
        ({"buckets": (0, 2)}, "buckets"),
        ({"buckets": (2, 2)}, "buckets"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_a_fix_that_can(
    settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"^config.websocket.{name} = ") as raised:
        _validate(**settings)
    assert f"Fix: --config.websocket.{name}=" in str(raised.value)


def test_buckets_divide_over_the_serving_devices() -> None:
    layout = "simulation=1 serving=4 learning=1"
    assert batch_sizes(WebsocketConfig(), 4) == (4, 8, 16, 32)
    assert batch_sizes(WebsocketConfig(buckets=(3,)), 1) == (3,)
    _validate(layout)
    _validate(layout, buckets=(4, 12))
    with pytest.raises(ConfigError, match=r"axis, 4. Fix: --config.websocket.buckets='\(4,\)'"):
        _validate(layout, buckets=(1, 2, 4))


def test_tokens_come_from_a_file_or_the_environment(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text("s3cret!\n")
    assert read_token(WebsocketConfig(token_file=str(path))) == "s3cret!"
    monkeypatch.setenv("A_TOKEN", "other")
    assert read_token(WebsocketConfig(token_variable="A_TOKEN")) == "other"
    assert read_token(WebsocketConfig()) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"a\nb", b"caf\xc3\xa9", b"a\0b"])
def test_what_is_no_token_is_refused_and_not_shown(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"websocket\.token_file") as raised:
        read_token(WebsocketConfig(token_file=str(path)))
    assert "words" not in str(raised.value)


def test_a_token_that_is_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="Fix: export NO_TOKEN=TOKEN"):
        read_token(WebsocketConfig(token_variable="NO_TOKEN"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(WebsocketConfig(token_file=str(tmp_path / "none")))
