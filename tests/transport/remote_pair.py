"""A queue and simulators that reach it over real connections."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from local_connections import CONFIG, Dial, in_thread, listening

from jaxvla.transport.base import TrajectoryQueue
from jaxvla.transport.channel import ChannelConfig, Connection
from jaxvla.transport.dispatch import Handlers
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.remote_queue import QueueService, RemoteQueue
from jaxvla.transport.schema import check_array


class NumberCodec:
    """Payloads are integers, infos plain values."""

    def encode(self, payload: int, info: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        return {"info": info}, [np.asarray(payload, np.int64)]

    def decode(
        self, owner: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> tuple[int, Any]:
        if len(arrays) != 1:
            raise FrameError(f"a payload of {len(arrays)} arrays")
        check_array(arrays[0], "payload", np.int64, ())
        return int(arrays[0]), fields.get("info")


class Served:
    """A queue that simulators can connect to."""

    def __init__(self, service: QueueService, dial: Dial):
        self.service = service
        self.dial = dial

    def join(self, name: str, owners: Sequence[str]) -> tuple[RemoteQueue, dict[str, Any]]:
        """Connects a simulator; its queue, and the newest infos that it was welcomed with."""
        connection = greet(self.dial(name), owners)
        newest = connection.receive().fields["newest"]
        remote = RemoteQueue(connection, NumberCodec())
        in_thread(remote.run)
        return remote, newest


@contextlib.contextmanager
def serving(
    queue: TrajectoryQueue, others: Handlers | None = None, config: ChannelConfig = CONFIG
) -> Iterator[Served]:
    """Serves a queue while the block runs."""
    service = QueueService(queue, NumberCodec())

    def serve(connection: Connection) -> None:
        owners = connection.receive().fields["owners"]

        def welcome(newest: Mapping[str, Any]) -> None:
            connection.send(Frame(kind="welcome", fields={"newest": dict(newest)}))

        service.serve(connection, owners, welcome=welcome, others=others)

    with listening(serve, config) as dial:
        yield Served(service, dial)


def greet(connection: Connection, owners: Sequence[str]) -> Connection:
    """Says which owners the simulator has."""
    connection.send(Frame(kind="simulator", fields={"owners": list(owners)}))
    return connection


class RemotePair:
    """Looks like one queue: simulators' calls go over a connection, the rest does not."""

    def __init__(self, queue: Any, remote: RemoteQueue):
        self._queue = queue
        self.admit, self.put, self.fail = remote.admit, remote.put, remote.fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)
