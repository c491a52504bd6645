"""Where the websocket server listens and whom it answers: `config.websocket`. No jax."""

import ipaddress
import math
import os
import pathlib
import re

from jaxvla.config import ConfigError, WebsocketConfig, override
from jaxvla.layout import RoleLayout

_DEFAULT_MULTIPLES = (1, 2, 4, 8)
_MAX_SPAN_S = 3600.0
_MAX_MESSAGE_MIB = 1024
_MAX_CONNECTIONS = 10_000


def is_loopback(host: str) -> bool:
    """Whether an address is reached from the machine itself only. Names are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def batch_sizes(settings: WebsocketConfig, data: int) -> tuple[int, ...]:
    """The compiled batch sizes, ascending.

    Args:
      settings: validated.
      data: size of the serving mesh's data axis.
    """
    return settings.buckets or tuple(data * multiple for multiple in _DEFAULT_MULTIPLES)


def read_token(settings: WebsocketConfig) -> str | None:
    """What clients must send, None if nothing.

    Raises:
      ConfigError: the file or the variable holds no token.
    """
    variable = settings.token_variable
    if variable:
        fix = f"export {variable}=TOKEN"
        return _checked_token(settings, "token_variable", os.environ.get(variable), fix)
    if not settings.token_file:
        return None
    path, fix = settings.token_file, f"write a token to {settings.token_file}"
    try:
        text = pathlib.Path(path).expanduser().read_text("ascii")
    except (OSError, ValueError) as error:
        raise ConfigError("websocket.token_file", path, f"cannot be read: {error}", fix) from error
    return _checked_token(settings, "token_file", text, fix)


def validate_websocket(settings: WebsocketConfig, where: RoleLayout) -> None:
    """Checks what needs neither the network nor the token.

    Args:
      settings: types are right.
      where: layout of the serving role.

    Raises:
      ConfigError: a setting cannot work.
    """
    _validate_limits(settings)
    _validate_access(settings)
    data = where.axes["data"]
    buckets = batch_sizes(settings, data)
    ascends = list(buckets) == sorted(set(buckets))
    _require(
        settings,
        "buckets",
        ascends and all(0 < size < 2**31 and size % data == 0 for size in buckets),
        f"must ascend and be multiples of the serving mesh's data axis, {data}",
        (data,),
    )


def _validate_limits(settings: WebsocketConfig) -> None:
    for name, low, high in (
        ("port", 0, 65_535),
        ("max_message_mib", 1, _MAX_MESSAGE_MIB),
        ("max_connections", 1, _MAX_CONNECTIONS),
    ):
        value, default = getattr(settings, name), getattr(WebsocketConfig(), name)
        _require(settings, name, low <= value <= high, f"must be in [{low}, {high}]", default)
    for name in ("deadline_s", "ping_interval_s", "ping_timeout_s"):
        value, default = getattr(settings, name), getattr(WebsocketConfig(), name)
        holds = math.isfinite(value) and 0 < value <= _MAX_SPAN_S
        _require(settings, name, holds, "must be in (0, 3600], at most an hour", default)


def _validate_access(settings: WebsocketConfig) -> None:
    is_name = re.fullmatch(r"[0-9A-Za-z_.:%-]+", settings.host) is not None
    _require(settings, "host", is_name, "must be an address or a host's name", "127.0.0.1")
    variable = settings.token_variable
    is_variable = not variable or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable) is not None
    _require(
        settings,
        "token_variable",
        is_variable,
        "must be the name of an environment variable",
        "JAXVLA_TOKEN",
    )
    _require(
        settings,
        "token_file",
        not (settings.token_file and variable),
        f"must be empty with websocket.token_variable = {variable!r}: there is one token",
        "",
    )
    _require(
        settings,
        "host",
        is_loopback(settings.host) or bool(settings.token_file or variable),
        "can be reached from other machines, so websocket.token_file must name a token",
        "127.0.0.1",
    )


def _checked_token(settings: WebsocketConfig, name: str, text: str | None, fix: str) -> str:
    """The token without the line break behind it. It goes into an HTTP header as it is."""
    token = (text or "").strip()
    if not re.fullmatch(r"[!-~]+", token):
        allowed = "must hold one token of printable ASCII characters without blanks"
        raise ConfigError(f"websocket.{name}", getattr(settings, name), allowed, fix)
    return token


def _require(settings: WebsocketConfig, name: str, holds: bool, allowed: str, fix: object) -> None:
    if not holds:
        name, value = f"websocket.{name}", getattr(settings, name)
        raise ConfigError(name, value, allowed, override(name, fix))
