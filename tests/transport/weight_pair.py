"""A weight store and policy servers that it reaches over real connections."""

import threading
from collections.abc import Callable
from typing import Any

import jax
from local_connections import CONFIG, TIMEOUT_S, in_thread

from jaxvla.transport.channel import Connection, Listener, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.remote_weights import RemoteWeightStore
from jaxvla.transport.weight_receiver import RemoteSubscription


def same(connection: Connection) -> Any:
    return connection


class WeightHost:
    """Serves a store. `wrap` may put something around the learner's end of a connection."""

    def __init__(self, store: RemoteWeightStore, wrap: Callable[[Connection], Any] = same):
        self.store = store
        self.wrap = wrap
        self.relayed: set[str] = set()
        """Servers that get their weights from others."""
        self.has_synced = threading.Semaphore(0)
        self._listener = Listener("127.0.0.1", 0, CONFIG, self._serve)
        self._listener.start()
        self._dialled: list[Connection] = []

    def _serve(self, connection: Connection) -> None:
        others = {"sync": lambda frame: self.has_synced.release()}
        name = connection.peer
        is_relayed = name in self.relayed
        self.store.serve(self.wrap(connection), name=name, is_relayed=is_relayed, others=others)

    def dial(self, name: str) -> Connection:
        """A connection whose server has subscribed."""
        connection = connect(self._listener.address, CONFIG, name=name, timeout_s=TIMEOUT_S)
        self._dialled.append(connection)
        self.sync(connection)
        return connection

    def sync(self, connection: Connection) -> None:
        """Waits until the store has dealt with all that was said before."""
        connection.send(Frame(kind="sync"))
        assert self.has_synced.acquire(timeout=TIMEOUT_S)

    def close(self) -> None:
        for connection in self._dialled:
            connection.close()
        self._listener.close()


class FarSubscription:
    """A subscription that behaves as if nothing took time."""

    def __init__(self, host: WeightHost, name: str, shardings: Any, *, struct: Any, **options: Any):
        self._host = host
        self.connection = host.dial(name)
        self._has_staged = threading.Condition()
        self._staged_version = -1
        """Newest that can be pulled, or could."""
        self.remote = RemoteSubscription(
            self.connection, struct, shardings, on_publish=self._notify, **options
        )
        self.receiving = in_thread(self.remote.run)

    def _notify(self) -> None:
        with self._has_staged:
            self._staged_version = self.remote._version
            self._has_staged.notify_all()

    def settle(self, version: int | None) -> None:
        """Waits until a version is staged, and the store knows."""
        if version is not None:
            with self._has_staged:
                assert self._has_staged.wait_for(lambda: self._staged_version >= version, TIMEOUT_S)
            self._host.sync(self.connection)

    def poll(self) -> Any:
        return self.remote.poll()

    def acknowledge(self, version: int) -> None:
        self.remote.acknowledge(version)
        self._host.sync(self.connection)

    def close(self) -> None:
        self.remote.close()
        self._host.sync(self.connection)


class FarStore:
    """A store whose servers are elsewhere, which waits for them so that tests need not."""

    def __init__(self, struct: Any, **options: Any):
        self.store = RemoteWeightStore(**options)
        self.host = WeightHost(self.store)
        self._options = {x: options[x] for x in ("trainable",) if x in options}
        self._struct = struct
        self._live: list[FarSubscription] = []

    def subscribe(self, name: str, shardings: Any) -> FarSubscription:
        made = FarSubscription(self.host, name, shardings, struct=self._struct, **self._options)
        made.settle(self.store.latest_version)
        self._live.append(made)
        return made

    def publish(self, version: int, params: Any) -> None:
        self.store.publish(version, params)
        for subscription in self._live:
            if not subscription.remote._is_closed:
                subscription.settle(version)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def struct_of(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
