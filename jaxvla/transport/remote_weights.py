"""Weights for policy servers of other processes: the learner's side.

consumes    parameters of the learner; acknowledgements of the servers
produces    a host copy per version; frames to every server
waits for   the learner's devices, while it publishes; in a thread per server, for a newer version
            and for the server to have staged the last one
unblocked by  `publish`, the server, the loss of its connection, `close`

A version crosses as one `weights_begin`, a `weights_part` for every piece of every leaf, and one
`weights_end`. Each leaf carries its SHA-256, and the end that of all of them, so that a server
stages exactly what was published or nothing. The server's side is `transport.weight_receiver`.
"""

import hashlib
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
from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.dispatch import Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import read_bool, read_int, read_text
from jaxvla.transport.weight_accounts import Account, AccountingStore
from jaxvla.transport.weight_copy import named_leaves
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)

Fetch = Callable[[Sequence[jax.Array]], Sequence[np.ndarray]]
"""Host copies of arrays, in order. They share no memory with what may be donated."""

PART_BYTES = 16 * 2**20
"""Largest piece of a leaf in one frame."""

_MOST_FAILURES = 2
"""Transfers in a row that a server may find damaged."""


def fetch_to_host(leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    """Copies arrays all of whose shards this process can reach.

    On CPU, what numpy shows of a JAX array is the array's own buffer, which dies when the learner
    donates it; from other devices it comes in memory of its own.
    """
    for leaf in leaves:
        leaf.copy_to_host_async()
    return [np.array(leaf, order="C", copy=True if _is_on_cpu(leaf) else None) for leaf in leaves]


class HostLeaf:
    """A leaf of a version, on the host. Its contents never change."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self._lock = threading.Lock()
        self._digest = b""

    @property
    def octets(self) -> np.ndarray:
        """uint8 [nbytes], the memory of the array."""
        return self.array.reshape(-1).view(np.uint8)

    @property
    def digest(self) -> bytes:
        """SHA-256, made by the first sender that needs it."""
        with self._lock:
            if not self._digest:
                self._digest = hashlib.sha256(self.octets.data).digest()
            return self._digest


class HostWeights:
    """A version on the host, by leaf path."""

    def __init__(
        self, version: int, trainable: Mapping[str, HostLeaf], frozen: Mapping[str, HostLeaf]
    ):
        self.version = version
        self.trainable = trainable
        self.frozen = frozen
        """The same objects in every version."""

    def leaves(self, *, is_full: bool) -> dict[str, HostLeaf]:
        """All leaves, or those that change."""
        return {**self.frozen, **self.trainable} if is_full else dict(self.trainable)

    def nbytes(self, *, is_full: bool) -> int:
        """Bytes of these leaves."""
        return sum(leaf.array.nbytes for leaf in self.leaves(is_full=is_full).values())


def transfer_digest(version: int, digests: Mapping[str, bytes]) -> str:
    """SHA-256 in hex of a transfer: its version, and the name and digest of every leaf."""
    whole = hashlib.sha256(str(version).encode())
    for name in sorted(digests):
        whole.update(f"\n{name}\n".encode() + digests[name])
    return whole.hexdigest()


class RemoteWeightStore(AccountingStore):
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
        """Transfers that failed, by cause: "digest" or "lost"."""
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
                full = [not x.has_frozen for x in (*self._servers, *local)] or [True]
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

    def serve(self, connection: Connection, *, name: str, others: Handlers | None = None) -> None:
        """Serves one server until its connection is lost, which ends its subscription.

        A server that subscribes under a name in use is taken for the same one, restarted: the
        other connection is closed first.

        Args:
          connection: after the server said who it is.
          name: of the server.
          others: functions for frames of other conversations on the connection.

        Raises:
          ValueError: a server of this process has the name.
        """
        server = _Server(self, name, connection)
        self._replace(server)
        sender = threading.Thread(target=server.send_all, name=f"weights {name}", daemon=True)
        sender.start()
        try:
            dispatch(connection, {**(others or {}), **server.handlers})
        finally:
            connection.close()
            self.unsubscribe(server)
            sender.join()

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

    def _replace(self, server: "_Server") -> None:
        """Opens the account of a server, after it has closed that of its predecessor."""
        with self.changed:
            while rivals := [x for x in self._servers if x.name == server.name]:
                _LOG.warning("%s replaces a connection", server.name)
                for rival in rivals:
                    rival.connection.close()
                self.changed.wait_for(lambda rivals=rivals: not self._servers & {*rivals})
            self.open_account(server)
            self._servers.add(server)


class _Server(Account):
    """One connection of a `RemoteWeightStore`, whose lock guards the attributes."""

    def __init__(self, store: RemoteWeightStore, name: str, connection: Connection):
        super().__init__(name)
        self.connection = connection
        self.has_frozen = False
        """It has staged a whole tree, from which it keeps the leaves that do not change."""
        self.is_over = False
        self._store = store
        self._changed = store.changed
        self._awaited: int | None = None
        """Version in transfer."""
        self._staged_version = -1
        self._num_failures = 0
        self.handlers: Handlers = {
            "weights_staged": self._on_staged,
            "weights_swapped": self._on_swapped,
            "weights_refused": self._on_refused,
            "weights_left": lambda frame: store.unsubscribe(self),
        }

    def send_all(self) -> None:
        """Sends versions until the subscription ends. A thread of its own."""
        try:
            while (weights := self._next()) is not None:
                self._transfer(weights, is_full=not self.has_frozen)
        except ConnectionLostError as error:
            self._store.count_fault("lost")
            _LOG.warning("%s: lost during a transfer: %s", self.name, error)
        except FrameError:
            _LOG.exception("%s: weights cannot be sent", self.name)
            self.connection.close()

    def _next(self) -> HostWeights | None:
        """Waits for a version to send; None when there will be none."""

        def is_due() -> bool:
            newest = self._store.newest
            is_new = newest is not None and newest.version > self._staged_version
            return is_new and self._awaited is None

        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self._store.is_closed or is_due())
            newest = self._store.newest
            if self.is_over or self._store.is_closed or newest is None:
                return None
            self._awaited = newest.version
            return newest

    def _transfer(self, weights: HostWeights, *, is_full: bool) -> None:
        version, leaves = weights.version, weights.leaves(is_full=is_full)
        send = self.connection.send
        begin = {"version": version, "is_full": is_full}
        send(Frame(kind="weights_begin", fields=begin))
        for name, leaf in leaves.items():
            about = {"version": version, "leaf": name, "digest": leaf.digest.hex()}
            about |= {"dtype": leaf.array.dtype.name, "shape": list(leaf.array.shape)}
            octets = leaf.octets
            for start in range(0, max(octets.size, 1), PART_BYTES):
                part = octets[start : start + PART_BYTES]
                send(Frame(kind="weights_part", fields=about | {"offset": start}, arrays=[part]))
        whole = transfer_digest(version, {name: leaf.digest for name, leaf in leaves.items()})
        send(Frame(kind="weights_end", fields={"version": version, "digest": whole}))

    def _on_staged(self, frame: Frame) -> None:
        """The server has read a transfer, and says whether it was sound."""
        version, is_sound = read_int(frame.fields, "version"), read_bool(frame.fields, "is_sound")
        with self._changed:
            if version != self._awaited:
                raise FrameError(f"version = {version} was not sent, but {self._awaited}")
            self._awaited = None
            if is_sound:
                self.has_frozen, self._staged_version, self._num_failures = True, version, 0
            else:
                self._num_failures += 1
            self._changed.notify_all()
        if not is_sound:
            self._store.count_fault("digest")
            _LOG.error("%s: version %d arrived damaged", self.name, version)
            if self._num_failures == _MOST_FAILURES:
                raise FrameError(f"{_MOST_FAILURES} transfers in a row arrived damaged")

    def _on_swapped(self, frame: Frame) -> None:
        version = read_int(frame.fields, "version")
        with self._changed:
            if not self.acknowledged_version < version <= self._staged_version:
                raise FrameError(
                    f"version = {version} is swapped in, after {self.acknowledged_version}; "
                    f"{self._staged_version} is staged"
                )
            self.pulled_version = version
            if self.is_over:
                return
        self._store.acknowledge(self, version)

    def _on_refused(self, frame: Frame) -> None:
        raise FrameError(f"the server refuses the weights: {read_text(frame.fields, 'text')}")


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
