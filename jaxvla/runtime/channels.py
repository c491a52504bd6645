"""The connections of a run with a process for every program."""

import pathlib

from jaxvla.cluster import NODE, TLS_FILES
from jaxvla.config import RuntimeConfig
from jaxvla.transport.channel import ChannelConfig, TlsConfig
from jaxvla.transport.frames import Limits

MAX_PAYLOAD_BYTES = 2**32
"""Of a frame: more than a trajectory has, and what one process can make another one allocate."""


def channel_config(settings: RuntimeConfig, token: bytes) -> ChannelConfig:
    """What both ends of every connection need.

    Args:
      settings: of the run.
      token: of the run.
    """
    return ChannelConfig(
        token=token,
        tls=_tls(settings),
        limits=Limits(max_payload_bytes=MAX_PAYLOAD_BYTES),
        silence_s=settings.silence_s,
        ping_s=min(5.0, settings.silence_s / 4),
    )


def own_host(settings: RuntimeConfig) -> str:
    """The address of this machine that a process listens on."""
    if settings.host != NODE:
        return settings.host
    from jaxvla.runtime.ray_cluster import node_address

    return node_address()


def _tls(settings: RuntimeConfig) -> TlsConfig | None:
    """One certificate for all, which therefore trust it and nothing else."""
    if not settings.tls_directory:
        return None
    directory = pathlib.Path(settings.tls_directory).expanduser()
    certificate, key = (str(directory / name) for name in TLS_FILES)
    return TlsConfig(certificate=certificate, key=key, authority=certificate)
