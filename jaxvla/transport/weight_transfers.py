"""Transfers of weights to a policy server of another process: the sender's side.

consumes    versions on the host; the server's word on each transfer
produces    frames
waits for   a newer version, in a thread per server, and for the server to have staged the last one
unblocked by  whoever has the versions, the server, the loss of its connection

A version crosses as one `weights_begin`, a `weights_part` for every piece of every leaf, and one
`weights_end`. Each leaf carries its SHA-256, and the end that of all of them, so that a server
stages exactly what was sent or nothing. Two have versions to send: the learner
(`transport.remote_weights`), and a policy server that hands its own on (`transport.weight_relay`).
The other side is `transport.weight_receiver`.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.dispatch import Handler, Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import read_bool, read_int, read_text

_LOG = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20
"""Largest piece of a leaf in one frame."""

_MOST_FAILURES = 2
"""Transfers in a row that a server may find damaged."""


class HostLeaf:
    """A leaf of a version, on the host. Its contents never change."""

    def __init__(self, array: np.ndarray, digest: bytes = b""):
        """Args:
        array: in C order.
        digest: its SHA-256, if that is known.
        """
        self.array = array
        self._lock = threading.Lock()
        self._digest = digest

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


class VersionSource(Protocol):
    """Whoever has versions to send."""

    changed: threading.Condition
    """Guards everything here and in the transfers; never held while sending."""
    is_closed: bool
    """There will be no more."""

    @property
    def newest(self) -> HostWeights | None:
        """The newest version."""
        ...

    def count_fault(self, cause: str) -> None:
        """Counts a transfer that failed: "digest" or "lost". Called without the lock."""
        ...


class Transfers:
    """All versions that go to one server over one connection.

    A server that is slow gets the newest version when it has taken the last one, and none of those
    between. The lock of the source guards the attributes.
    """

    def __init__(
        self, source: VersionSource, name: str, connection: Connection, *, is_held: bool = False
    ):
        """Args:
        source: of the versions.
        name: of the server.
        connection: to it.
        is_held: nothing is sent for now.
        """
        self.name = name
        self.connection = connection
        self.has_frozen = False
        """It has staged a whole tree, from which it keeps the leaves that do not change."""
        self.staged_version = -1
        """Newest that it has staged, as far as is known here."""
        self.is_held = is_held
        self.is_over = False
        self.handlers: dict[str, Handler] = {
            "weights_staged": self._on_staged,
            "weights_refused": self._on_refused,
        }
        self._source = source
        self._awaited: int | None = None
        """Version in transfer."""
        self._num_failures = 0

    def run(self, others: Handlers, *, leave: Callable[[], None]) -> None:
        """Sends versions until the connection is lost.

        Args:
          others: functions for frames of other conversations on the connection.
          leave: called then; sets `is_over`.
        """
        sender = threading.Thread(target=self._send_all, name=f"weights {self.name}", daemon=True)
        sender.start()
        try:
            dispatch(self.connection, {**others, **self.handlers})
        finally:
            self.connection.close()
            leave()
            sender.join()

    def _send_all(self) -> None:
        """In a thread of its own."""
        try:
            while (weights := self._next()) is not None:
                self._transfer(weights, is_full=not self.has_frozen)
        except ConnectionLostError as error:
            self._source.count_fault("lost")
            _LOG.warning("%s: lost during a transfer: %s", self.name, error)
        except FrameError:
            _LOG.exception("%s: weights cannot be sent", self.name)
            self.connection.close()

    def _next(self) -> HostWeights | None:
        """Waits for a version to send; None when there will be none."""
        source = self._source

        def is_due() -> bool:
            newest = source.newest
            is_new = newest is not None and newest.version > self.staged_version
            return is_new and self._awaited is None and not self.is_held

        with source.changed:
            source.changed.wait_for(lambda: self.is_over or source.is_closed or is_due())
            newest = source.newest
            if self.is_over or source.is_closed or newest is None:
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
        with self._source.changed:
            if version != self._awaited:
                raise FrameError(f"version = {version} was not sent, but {self._awaited}")
            self._awaited = None
            if is_sound:
                self.has_frozen, self.staged_version, self._num_failures = True, version, 0
            else:
                self._num_failures += 1
            self._source.changed.notify_all()
        if not is_sound:
            self._source.count_fault("digest")
            _LOG.error("%s: version %d arrived damaged", self.name, version)
            if self._num_failures == _MOST_FAILURES:
                raise FrameError(f"{_MOST_FAILURES} transfers in a row arrived damaged")

    def _on_refused(self, frame: Frame) -> None:
        raise FrameError(f"the server refuses the weights: {read_text(frame.fields, 'text')}")
