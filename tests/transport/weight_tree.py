"""A learner and policy servers that hand weights on to each other, over real connections."""

import threading
from collections.abc import Callable
from typing import Any

import jax
from local_connections import CONFIG, TIMEOUT_S, in_thread
from test_remote_weights import Wire
from weight_pair import WeightHost, struct_of

from jaxvla.transport.channel import Connection, Listener, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.weight_receiver import RemoteSubscription
from jaxvla.transport.weight_relay import WeightRelay, child_hello

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
SESSION = "s1"


def same(frame: Frame) -> Frame:
    return frame


class Edge(Wire):
    """The sender's end of a connection; counts what is sent, and may change it."""

    def __init__(self, connection: Connection, change: Callable[[Frame], Frame] = same):
        super().__init__(connection, change)
        self.kinds: list[str] = []
        self.nbytes = 0
        """Of all arrays."""

    def send(self, frame: Frame) -> None:
        self.kinds.append(frame.kind)
        self.nbytes += sum(array.nbytes for array in frame.arrays)
        super().send(frame)


class TreeServer:
    """A policy server that pulls whatever is staged, and hands it on."""

    def __init__(
        self,
        host: WeightHost,
        name: str,
        params: Any,
        *,
        parent: "TreeServer | None" = None,
        trainable: str = ".*",
    ):
        self.name = name
        self.wrap: Callable[[Connection], Edge] = Edge
        """Put around connections of children."""
        self.edges: dict[str, Edge] = {}
        """To the children."""
        self.staged: list[tuple[int, Any]] = []
        """Versions and parameters, in order."""
        self.relay = WeightRelay(session=SESSION)
        self._host = host
        self._parent = parent
        self._has_staged = threading.Condition()
        self.listener = Listener("127.0.0.1", 0, CONFIG, self._serve, name=name)
        self.listener.start()
        if parent is not None:
            host.relayed.add(name)
        self.connection = host.dial(name)
        self.remote = RemoteSubscription(
            self.connection,
            struct_of(params),
            ONE,
            trainable=trainable,
            on_publish=self._pull,
            dial=self._dial,
            relay=self.relay,
        )
        self.receiving = in_thread(self.remote.run)

    @property
    def versions(self) -> list[int]:
        """All that were staged."""
        return [version for version, _ in self.staged]

    def settle(self, version: int) -> Any:
        """Waits until a version is staged, or a newer one, and the learner knows; parameters."""
        with self._has_staged:
            assert self._has_staged.wait_for(
                lambda: bool(self.staged) and self.staged[-1][0] >= version, TIMEOUT_S
            )
        self._host.sync(self.connection)
        return self.staged[-1][1]

    def acknowledge(self, version: int) -> None:
        self.remote.acknowledge(version)
        self._host.sync(self.connection)

    def close(self) -> None:
        self.relay.close()
        self.listener.close()
        self.connection.close()
        self.receiving.result(TIMEOUT_S)

    def _pull(self) -> None:
        with self._has_staged:
            got = self.remote.poll()
            assert got is not None
            self.staged.append(got)
            self._has_staged.notify_all()

    def _dial(self) -> Connection:
        assert self._parent is not None
        address = self._parent.listener.address
        connection = connect(address, CONFIG, name=self.name, timeout_s=TIMEOUT_S)
        connection.send(child_hello(SESSION))
        return connection

    def _serve(self, connection: Connection) -> None:
        edge = self.edges[connection.peer] = self.wrap(connection)
        self.relay.serve(edge, edge.receive())  # type: ignore[arg-type]
