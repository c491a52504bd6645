"""A simulator's way to one of several policy servers.

A client keeps its server while it has joined, which is a segment long. With a fixed map it is
the same server every time. Without one (greedy) a client that joins gets the server with the
fewest rows registered, the first of several such. A slow server keeps its clients for longer
and so gets fewer new ones; and as none is given a client while it has more than another,
groups of one size are never spread more unevenly than n and n + 1 by joining. In a replay
(`transport.schedule`) it gets the one that it had.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from jaxvla.serving.client import QueryClient
from jaxvla.transport.schedule import FREE, Schedule
from jaxvla.types import Observation


class Router:
    """Who is registered with which server. Thread-safe."""

    def __init__(
        self,
        num_servers: int,
        fixed: Mapping[str, int] | None = None,
        schedule: Schedule = FREE,
    ):
        """Args:
        num_servers: policy servers.
        fixed: client -> server index; None for greedy.
        schedule: of a run that is recorded or replayed.
        """
        self.schedule = schedule
        self._fixed = fixed
        self._rows = [0] * num_servers
        """Rows registered, by server."""
        self._clients: dict[str, tuple[int, int]] = {}
        """Joined client -> (server, rows)."""
        self._lock = threading.Lock()

    def join(self, client: str, rows: int) -> int:
        """Registers a client that asks for `rows` rows at a time; returns its server's index.

        Raises:
          ValueError: the client is registered already, or the map does not name it.
        """
        with self._lock:
            if client in self._clients:
                raise ValueError(f"client {client!r} is registered already")
            if self._fixed is None:
                server = self._rows.index(min(self._rows))
            elif client in self._fixed:
                server = self._fixed[client]
            else:
                raise ValueError(f"client {client!r} has no server; {sorted(self._fixed)} have")
            server = self.schedule.joined(client, server)
            self._clients[client] = server, rows
            self._rows[server] += rows
            return server

    def leave(self, client: str) -> None:
        """Removes a client.

        Raises:
          ValueError: no such client.
        """
        with self._lock:
            if client not in self._clients:
                raise ValueError(f"client {client!r} is not registered")
            server, rows = self._clients.pop(client)
            self._rows[server] -= rows
            self.schedule.left(client)


class RoutedClient(QueryClient):
    """A `QueryClient` of whichever server the router says."""

    def __init__(self, ways: Sequence[QueryClient], router: Router, *, rows: int):
        """Args:
        ways: one client per server, all of one name.
        router: shared by all clients.
        rows: rows of every request to explore; at most so many of others.
        """
        self.name = ways[0].name
        self._ways = ways
        self._router = router
        self._rows = rows
        self._joined: QueryClient | None = None

    def join(self) -> None:
        """See `QueryClient.join`. Picks the server for the time until `leave`."""
        way = self._ways[self._router.join(self.name, self._rows)]
        way.join()
        self._joined = way

    def leave(self) -> None:
        """See `QueryClient.leave`."""
        if self._joined is None:
            raise ValueError(f"client {self.name!r} is not registered")
        way, self._joined = self._joined, None
        way.leave()
        self._router.leave(self.name)

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        """See `QueryClient.submit`."""
        if self._joined is None:
            raise ValueError(f"client {self.name!r} is not registered")
        future = self._joined.submit(kind, observation, keys)
        self._router.schedule.asked(
            self.name, kind, len(keys)
        )  # what was turned away does not count
        return future
