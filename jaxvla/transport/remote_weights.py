"""Weights for policy servers of other processes: the learner's side.

consumes    parameters of the learner; acknowledgements of the servers
produces    a host copy per version; frames to every server
waits for   the learner's devices, while it publishes; in a thread per server, for a newer version
            and for the server to have staged the last one
unblocked by  `publish`, the server, the loss of its connection, `close`

How a version crosses is told in `transport.weight_transfers`. With a tree of servers
(`runtime.weights_fanout`) most of them get their weights from another server; here are the accounts
of all, and the weights for those that have lost the other one.
"""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxvla.transport.base import WeightSubscription
from jaxvla.transport.channel import Connection
from jaxvla.transport.dispatch import Handlers
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import read_int
from jaxvla.transport.weight_accounts import Account, AccountingStore
from jaxvla.transport.weight_copy import named_leaves
from jaxvla.transport.weight_transfers import HostLeaf, HostWeights, Transfers, VersionSource
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)

Fetch = Callable[[Sequence[jax.Array]], Sequence[np.ndarray]]
"""Host copies of arrays, in order. They share no memory with what may be donated."""


def fetch_to_host(leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    """Copies arrays all of whose shards this process can reach.

    On CPU, what numpy shows of a JAX array is the array's own buffer, which dies when the learner
    donates it; from other devices it comes in memory of its own.
    """
    for leaf in leaves:
        leaf.copy_to_host_async()
    return [np.array(leaf, order="C", copy=True if _is_on_cpu(leaf) else None) for leaf in leaves]


class RemoteWeightStore(AccountingStore, VersionSource):
    """A store whose servers are reached over connections.

    `publish` returns when the host has its copy; transfers follow, in a thread per server, while
    the learner trains. A server that is slow gets the newest version when it has taken the last
    one, and none of those between.

    Args:
      on_acknowledged: called with the new `acknowledged_version` whenever it rises, without
        locks held, so that calls of two threads may overtake each other. Meant for
        `TrajectoryQueue.advance`.
      trainable: regular expression over leaf paths. Other leaves must be the same in every
        version: the host copies them once, and each server gets them once.
      fetch: makes the host copies; of arrays that span hosts it has to gather first.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        on_acknowledged: Callable[[int], None] | None = None,
        trainable: str = ".*",
        fetch: Fetch = fetch_to_host,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(on_acknowledged, clock)
        self._trainable = re.compile(trainable)
        self._fetch = fetch
        self._publishing = threading.Lock()
        """Serialises `publish`; taken before `changed`, held while copying."""
        self._newest: HostWeights | None = None
        self._structure: Any = None
        """Tree structure of the parameters."""
        self._servers: set[_Server] = set()
        self._local: set[_LocalSubscription] = set()
        self._faults: Counter[str] = Counter()

    @property
    def newest(self) -> HostWeights | None:
        """The newest version; with the lock `changed` held."""
        return self._newest

    def faults(self) -> dict[str, int]:
        """Transfers that failed, by cause: "digest" or "lost"; and "parent": servers that have lost
        the one that their weights came from."""
        with self.changed:
            return dict(self._faults)

    def publish(self, version: int, params: Params) -> None:
        """See `WeightStore.publish`. Servers that are far away get their copies later."""
        with self._publishing:
            start_s = self.clock()
            self._check(version, params)
            weights = self._copy(version, params)
            with self.changed:
                self._newest = weights
                self._structure = jax.tree.structure(params)
                local = list(self._local)
                near = [x for x in self._servers if not x.is_held]
                full = [not x.has_frozen for x in (*near, *local)] or [True]
                nbytes = sum(weights.nbytes(is_full=is_full) for is_full in full)
                self._published(version, start_s=start_s, nbytes=nbytes)
        for subscription in local:
            if subscription.on_publish is not None:
                subscription.on_publish()

    def subscribe(
        self, name: str, shardings: Any, on_publish: Callable[[], None] | None = None
    ) -> WeightSubscription:
        """See `WeightStore.subscribe`: for a server in the learner's own process."""
        subscription = _LocalSubscription(self, name, shardings, on_publish)
        with self.changed:
            self.open_account(subscription)
            self._local.add(subscription)
        return subscription

    def serve(
        self,
        connection: Connection,
        *,
        name: str,
        is_relayed: bool = False,
        others: Handlers | None = None,
    ) -> None:
        """Serves one server until its connection is lost, which ends its subscription.

        A server that subscribes under a name in use is taken for the same one, restarted: the
        other connection is closed first.

        Args:
          connection: after the server said who it is.
          name: of the server.
          is_relayed: it gets its weights from another server, until it says that it has lost that.
          others: functions for frames of other conversations on the connection.

        Raises:
          ValueError: a server of this process has the name.
          ConnectionLostError: the server was lost at once.
        """
        server = _Server(self, name, connection, is_relayed=is_relayed)
        least = self._replace(server)
        try:
            if is_relayed:
                connection.send(Frame(kind="weights_relayed", fields={"least": least}))
            server.run(others or {}, leave=lambda: self.unsubscribe(server))
        finally:
            self.unsubscribe(server)

    def unsubscribe(self, subscription: "_Server | _LocalSubscription") -> None:
        """Ends a subscription. Ending it twice changes nothing."""
        with self.changed:
            self._servers = {x for x in self._servers if x is not subscription}
            self._local = {x for x in self._local if x is not subscription}
            subscription.is_over = True
            self._forget(subscription)
        self._settle()

    def count_fault(self, cause: str) -> None:
        """Counts a transfer that failed."""
        with self.changed:
            self._faults[cause] += 1

    def tree(self, leaves: Mapping[str, Any]) -> Params:
        """Parameters from their leaves by path, once a version is published."""
        return jax.tree.unflatten(self._structure, [leaves[name] for name in self._spec])

    def _copy(self, version: int, params: Params) -> HostWeights:
        """The host's copy of what changes; at first of everything."""
        leaves = named_leaves(params)
        if self._newest is not None:
            leaves = {name: x for name, x in leaves.items() if self._trainable.search(name)}
        copies = self._fetch(list(leaves.values()))
        host = {name: HostLeaf(copy) for name, copy in zip(leaves, copies, strict=True)}
        if self._newest is not None:
            return HostWeights(version, host, self._newest.frozen)
        frozen = {name: x for name, x in host.items() if not self._trainable.search(name)}
        trainable = {name: x for name, x in host.items() if name not in frozen}
        return HostWeights(version, trainable, frozen)

    def _replace(self, server: "_Server") -> int:
        """Opens the account of a server, after it has closed that of its predecessor.

        Returns:
          The oldest version that it may begin with: `acknowledged_version`, which it holds there.
        """
        with self.changed:
            while rivals := [x for x in self._servers if x.name == server.name]:
                _LOG.warning("%s replaces a connection", server.name)
                for rival in rivals:
                    rival.connection.close()
                self.changed.wait_for(lambda rivals=rivals: not self._servers & {*rivals})
            self.open_account(server)
            self._servers.add(server)
            return self.acknowledged_version or 0


class _Server(Transfers, Account):
    """One connection of a `RemoteWeightStore`, whose lock guards the attributes.

    While `is_held` its weights come from another server, and only its account is kept here.
    """

    def __init__(
        self, store: RemoteWeightStore, name: str, connection: Connection, *, is_relayed: bool
    ):
        Account.__init__(self, name)
        Transfers.__init__(self, store, name, connection, is_held=is_relayed)
        self._store = store
        self.handlers |= {
            "weights_swapped": self._on_swapped,
            "weights_orphaned": self._on_orphaned,
            "weights_left": lambda frame: store.unsubscribe(self),
        }

    def _on_swapped(self, frame: Frame) -> None:
        version = read_int(frame.fields, "version")
        with self._store.changed:
            newest = self._newest_possible()
            if not self.acknowledged_version < version <= newest:
                raise FrameError(
                    f"version = {version} is swapped in, after {self.acknowledged_version}; "
                    f"{newest} is {'published' if self.is_held else 'staged'}"
                )
            if self.is_over:
                return
            self._require_current(version)
            self.pulled_version = version
        self._store.acknowledge(self, version)

    def _on_orphaned(self, frame: Frame) -> None:
        """The server has lost the one that its weights came from.

        What it has staged from there, -1 for nothing, was complete: it has all that never changes.
        """
        version = read_int(frame.fields, "version", least=-1)
        with self._store.changed:
            if self.is_over:
                return
            if not self.is_held or not self.acknowledged_version <= version:
                raise FrameError(f"version = {version} is left without a source that it had")
            if version >= 0:
                self._require_current(version)
            self.has_frozen, self.staged_version = version >= 0, version
            self.is_held = False
            self._store.changed.notify_all()
        self._store.count_fault("parent")
        _LOG.warning("%s: gets its weights from the learner from now on", self.name)

    def _newest_possible(self) -> int:
        """The newest version that it may have."""
        if not self.is_held:
            return self.staged_version
        newest = self._store.newest
        return -1 if newest is None else newest.version

    def _require_current(self, version: int) -> None:
        if not self._store.is_current(version):
            raise FrameError(f"version = {version} was not published, or is older than all in use")


class _LocalSubscription(Account, WeightSubscription):
    """A server in the learner's process. Guarded by the store's lock; one thread polls."""

    def __init__(
        self,
        store: RemoteWeightStore,
        name: str,
        shardings: Any,
        on_publish: Callable[[], None] | None,
    ):
        super().__init__(name)
        self.on_publish = on_publish
        self.is_over = False
        self._store = store
        self._shardings = shardings
        self._frozen: dict[str, jax.Array] = {}

    @property
    def has_frozen(self) -> bool:
        """It keeps the leaves that do not change."""
        return self.pulled_version >= 0

    def poll(self) -> tuple[int, Params] | None:
        """See `WeightSubscription.poll`. Copies to the devices here."""
        with self._store.changed:
            newest = self._store.newest
            if self.is_over or newest is None or newest.version <= self.pulled_version:
                return None
        leaves = newest.leaves(is_full=not self.has_frozen)
        place = shardings_by_name(self._shardings, leaves)
        placed = self._frozen | {
            name: jax.device_put(leaf.array, place[name]) for name, leaf in leaves.items()
        }
        self._frozen = {name: placed[name] for name in newest.frozen}
        params = jax.block_until_ready(self._store.tree(placed))
        with self._store.changed:
            self.pulled_version = newest.version
        return newest.version, params

    def acknowledge(self, version: int) -> None:
        """See `WeightSubscription.acknowledge`."""
        self._store.acknowledge(self, version)

    def close(self) -> None:
        """See `WeightSubscription.close`."""
        self._store.unsubscribe(self)


def shardings_by_name(shardings: Any, names: Any) -> Mapping[str, Any]:
    """Leaf path -> sharding, from one sharding for all leaves or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(names, shardings)
    return named_leaves(shardings)


def _is_on_cpu(leaf: jax.Array) -> bool:
    return any(device.platform == "cpu" for device in leaf.devices())
