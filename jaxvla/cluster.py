"""Where the programs of a run with `runtime.kind` "processes" or "ray" run: `config.runtime`. No
jax."""

import math
import pathlib
import re

from jaxvla.config import ConfigError, ExperimentConfig, RuntimeConfig, override
from jaxvla.endpoint import is_loopback
from jaxvla.layout import Layout

KINDS = ("local", "processes", "ray")
PLACEMENTS = ("", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
"""Strategies of Ray's placement groups."""
NODE = "node"
"""As `runtime.host`: the address that Ray knows a machine by."""
TLS_FILES = ("cert.pem", "key.pem")
RESOURCES = (
    "learner_resources",
    "follower_resources",
    "server_resources",
    "simulator_resources",
)


def parse_resources(text: str) -> dict[str, float]:
    """Ray resources of a setting such as "CPU=8,GPU=1".

    Raises:
      ValueError: it is no such list.
    """
    amounts: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_.:-]*)=([0-9]+(?:\.[0-9]+)?)", part.strip())
        if match is None or match[1] in amounts:
            raise ValueError(f"{part!r} is not RESOURCE=AMOUNT, or is given twice")
        amounts[match[1]] = float(match[2])
    return amounts


def weights_parent(index: int, fanout: int) -> int | None:
    """Policy server that another one gets its weights from; None for the learner.

    Servers 0 to fanout-1 hang on the learner, the next fanout on server 0, and so on: a complete
    tree, in which a parent always comes before its children.

    Args:
      index: of the server.
      fanout: `runtime.weights_fanout`; 0: all hang on the learner.
    """
    return index // fanout - 1 if 0 < fanout <= index else None


def weights_children(index: int, fanout: int, num_servers: int) -> range:
    """Policy servers that get their weights from this one; see `weights_parent`."""
    first = fanout * (index + 1)
    return range(min(first, num_servers), min(first + fanout, num_servers))


def validate_cluster(config: ExperimentConfig) -> None:
    """Checks what needs neither Ray nor the network.

    Raises:
      ConfigError: a setting cannot work.
    """
    settings, simulation = config.runtime, config.simulation
    for name in RESOURCES:
        try:
            parse_resources(getattr(settings, name))
        except ValueError as error:
            raise _error(settings, name, str(error), "CPU=1") from error
    _require(settings, "host", _is_host(settings.host), "must be an address, or node", "127.0.0.1")
    if simulation.num_groups % simulation.num_simulators:
        raise ConfigError(
            "simulation.num_simulators",
            simulation.num_simulators,
            f"must divide simulation.num_groups = {simulation.num_groups}",
            override("simulation.num_simulators", 1),
        )
    if settings.kind == "local":
        holds, allowed = settings.weights_fanout == 0, "must be 0 with kind local, one process"
        _require(settings, "weights_fanout", holds, allowed, 0)
        return
    if config.serving.split_devices:
        raise ConfigError(
            "serving.split_devices",
            True,
            f"with runtime.kind = {settings.kind} every policy server has devices of its own",
            override("serving.split_devices", False),
        )
    if settings.kind == "processes":
        own = settings.host == "localhost" or is_loopback(settings.host)
        _require(settings, "host", own, "must be this machine's with kind processes", "127.0.0.1")
        _require(settings, "address", not settings.address, "is for kind ray", "")
    if settings.tls_directory:
        _require_files(settings)


def validate_gang(config: ExperimentConfig, layout: Layout) -> None:
    """Checks what a learner of several processes needs of the other settings.

    Args:
      config: types and ranges are right.
      layout: parsed.

    Raises:
      ConfigError: a setting cannot work.
    """
    settings, count = config.runtime, config.runtime.learner_processes
    if count == 1:
        return
    holds = settings.kind != "local"
    _require(settings, "learner_processes", holds, "must be 1 with kind local, one process", 1)
    num_devices = layout.roles["learning"].num_devices
    holds, allowed = num_devices % count == 0, f"must divide the {num_devices} learning devices"
    _require(settings, "learner_processes", holds, allowed, math.gcd(count, num_devices))
    own = num_devices // count
    for role in ("simulation", "serving"):
        needed = layout.roles[role].num_devices
        if needed > own:
            raise ConfigError(
                "meshes.layout",
                config.meshes.layout,
                f"{role} may have {own} devices at most, those of one learner process, which "
                "evaluates",
                override("meshes.layout", f"simulation+serving={own}@0 learning={num_devices}@0"),
            )


def _require_files(settings: RuntimeConfig) -> None:
    directory = pathlib.Path(settings.tls_directory).expanduser()
    missing = [name for name in TLS_FILES if not (directory / name).is_file()]
    holds = not missing
    _require(settings, "tls_directory", holds, f"lacks {' and '.join(missing)}", "")


def _is_host(text: str) -> bool:
    return re.fullmatch(r"[0-9A-Za-z_.:%-]+", text) is not None


def _require(settings: RuntimeConfig, name: str, holds: bool, allowed: str, fix: object) -> None:
    if not holds:
        raise _error(settings, name, allowed, fix)


def _error(settings: RuntimeConfig, name: str, allowed: str, fix: object) -> ConfigError:
    value = getattr(settings, name)
    return ConfigError(f"runtime.{name}", value, allowed, override(f"runtime.{name}", fix))
