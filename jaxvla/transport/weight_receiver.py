"""Weights from a learner of another process: the policy server's side.

consumes    transfers of `transport.remote_weights`
produces    whole versions on the server's devices; acknowledgements
waits for   the next frame
unblocked by  the learner, the loss of the connection

Each leaf goes to its devices as soon as it is complete, so the host holds one leaf at a time; the
devices hold the version in use, the staged one until it is swapped in, and the one that arrives.
"""

import hashlib
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxvla.transport.base import WeightSubscription
from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.dispatch import Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.remote_weights import shardings_by_name, transfer_digest
from jaxvla.transport.schema import check_array, read_bool, read_int, read_text, shown
from jaxvla.transport.weight_copy import named_leaves
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)


class RemoteSubscription(WeightSubscription):
    """A policy server's end of a `RemoteWeightStore`.

    `poll`, `acknowledge` and `close` are for the server's thread, `run` for another one. After the
    connection is lost nothing new is staged; what was may still be pulled.
    """

    def __init__(
        self,
        connection: Connection,
        params: Params,
        shardings: Any,
        *,
        trainable: str = ".*",
        on_publish: Callable[[], None] | None = None,
    ):
        """Args:
        connection: to the learner, which knows whose it is.
        params: shapes and dtypes of the parameters.
        shardings: one sharding, or a pytree of them that matches the parameters.
        trainable: regular expression over the paths of the leaves that change, as the learner
          has it.
        on_publish: called whenever a version has been staged, in the thread that receives.
        """
        self._connection = connection
        self._structs = named_leaves(params)
        self._treedef = jax.tree.structure(params)
        self._shardings = shardings_by_name(shardings, self._structs)
        self._trainable = {name for name in self._structs if re.search(trainable, name)}
        self._on_publish = on_publish
        self._frozen: dict[str, jax.Array] = {}
        self._transfer: _Transfer | None = None
        self._version = -1
        """Newest that was staged."""
        self._lock = threading.Lock()
        """Guards what follows."""
        self._staged: tuple[int, Params] | None = None
        self._pulled_version = -1
        self._is_closed = False
        self.handlers: Handlers = {
            "weights_begin": self._refusing(self._on_begin),
            "weights_part": self._refusing(self._on_part),
            "weights_end": self._refusing(self._on_end),
        }
        """For `dispatch`; `run` calls it."""

    def run(self, others: Handlers | None = None) -> None:
        """Receives until the connection is lost.

        Args:
          others: functions for frames of other conversations on the connection.
        """
        dispatch(self._connection, {**(others or {}), **self.handlers})

    def poll(self) -> tuple[int, Params] | None:
        """See `WeightSubscription.poll`."""
        with self._lock:
            staged, self._staged = self._staged, None
            if staged is not None:
                self._pulled_version = staged[0]
            return staged

    def acknowledge(self, version: int) -> None:
        """See `WeightSubscription.acknowledge`."""
        with self._lock:
            if version != self._pulled_version:
                raise ValueError(
                    f"the server acknowledges version {version}, pulled {self._pulled_version}"
                )
        self._say("weights_swapped", version=version)

    def close(self) -> None:
        """See `WeightSubscription.close`. The connection goes on, for other conversations."""
        with self._lock:
            is_first = not self._is_closed
            self._is_closed, self._staged = True, None
        if is_first:
            self._say("weights_left")

    def _on_begin(self, frame: Frame) -> None:
        version, is_full = read_int(frame.fields, "version"), read_bool(frame.fields, "is_full")
        if self._transfer is not None or version <= self._version:
            raise FrameError(f"version = {version} begins, after {self._version}")
        if not is_full and self._version < 0:
            raise FrameError(f"version = {version} lacks the leaves that do not change")
        names = set(self._structs) if is_full else self._trainable
        self._transfer = _Transfer(
            version, {name: self._structs[name] for name in names}, self._shardings
        )

    def _on_part(self, frame: Frame) -> None:
        self._current(frame).add(frame)

    def _on_end(self, frame: Frame) -> None:
        transfer = self._current(frame)
        self._transfer = None
        is_sound = transfer.ends_well(read_text(frame.fields, "digest"))
        if is_sound:
            self._stage(transfer)
        else:
            _LOG.error("weights version %d arrived damaged", transfer.version)
            self._say("weights_staged", version=transfer.version, is_sound=False)

    def _stage(self, transfer: "_Transfer") -> None:
        placed = self._frozen | transfer.placed
        self._frozen = {name: x for name, x in placed.items() if name not in self._trainable}
        params = jax.tree.unflatten(self._treedef, [placed[name] for name in self._structs])
        self._version = transfer.version
        # First the word, so that the learner never hears of a swap of what it has not staged.
        self._say("weights_staged", version=transfer.version, is_sound=True)
        with self._lock:
            if self._is_closed:
                return
            self._staged = transfer.version, params
        if self._on_publish is not None:
            self._on_publish()

    def _current(self, frame: Frame) -> "_Transfer":
        version = read_int(frame.fields, "version")
        if self._transfer is None or version != self._transfer.version:
            raise FrameError(f"version = {version} has not begun")
        return self._transfer

    def _refusing(self, handler: Callable[[Frame], None]) -> Callable[[Frame], None]:
        """Tells the learner, too, when what it sends does not fit: it is no passing fault."""

        def handle(frame: Frame) -> None:
            try:
                handler(frame)
            except FrameError as error:
                self._say("weights_refused", text=str(error))
                raise

        return handle

    def _say(self, kind: str, **fields: Any) -> None:
        try:
            self._connection.send(Frame(kind=kind, fields=fields))
        except ConnectionLostError as error:
            _LOG.info("%s: %s", kind, error)  # whoever receives notices


class _Transfer:
    """A version on its way in."""

    def __init__(self, version: int, structs: Mapping[str, Any], shardings: Mapping[str, Any]):
        """Args:
        version: which.
        structs: leaf path -> shape and dtype, of every leaf that must come.
        shardings: leaf path -> where it goes, of these and maybe more.
        """
        self.version = version
        self.placed: dict[str, jax.Array] = {}
        """Complete leaves."""
        self._structs = structs
        self._shardings = shardings
        self._digests: dict[str, bytes] = {}
        self._is_sound = True
        self._name: str | None = None
        """Leaf of which a part has come, but not all."""
        self._memory = np.empty(0, np.uint8)
        self._filled = 0

    def add(self, frame: Frame) -> None:
        """Takes a piece of a leaf; the last one sends the leaf to its devices."""
        fields = frame.fields
        name, digest = read_text(fields, "leaf"), read_text(fields, "digest")
        nbytes = self._expect(name, fields)
        if len(frame.arrays) != 1:
            raise FrameError(f"leaf {name!r}: a part of {len(frame.arrays)} arrays")
        (part,) = frame.arrays
        check_array(part, f"a part of leaf {name!r}", np.uint8, (None,))
        offset = read_int(fields, "offset")
        if offset != self._filled or offset + part.size > nbytes or (nbytes and not part.size):
            raise FrameError(
                f"leaf {name!r} of {nbytes} bytes: {part.size} at {offset}, after {self._filled}"
            )
        if part.size == nbytes:
            self._memory = part
        else:
            if offset == 0:
                self._memory = np.empty(nbytes, np.uint8)
            self._memory[offset : offset + part.size] = part
        self._filled += part.size
        self._name = name
        if self._filled == nbytes:
            self._complete(name, digest)

    def ends_well(self, digest: str) -> bool:
        """Whether what has come is what was sent.

        Raises:
          FrameError: leaves are missing.
        """
        missing = self._structs.keys() - self.placed.keys()
        if missing:
            raise FrameError(f"leaf {min(missing)!r} is missing")
        return self._is_sound and digest == transfer_digest(self.version, self._digests)

    def _expect(self, name: str, fields: Mapping[str, Any]) -> int:
        """Checks that a part of this leaf may come now; bytes of the whole leaf."""
        struct = self._structs.get(name)
        if struct is None:
            raise FrameError(f"leaf {shown(name)}: this server has no such leaf")
        if name in self.placed or self._name not in (None, name):
            raise FrameError(f"leaf {name!r} comes out of turn")
        dtype = np.dtype(struct.dtype)
        if (fields.get("dtype"), fields.get("shape")) != (dtype.name, list(struct.shape)):
            sent = f"{shown(fields.get('dtype'))} {shown(fields.get('shape'))}"
            raise FrameError(f"leaf {name!r} is {sent}, here {dtype.name!r} {list(struct.shape)}")
        return math.prod(struct.shape) * dtype.itemsize

    def _complete(self, name: str, digest: str) -> None:
        self._digests[name] = hashlib.sha256(self._memory.data).digest()
        self._is_sound &= self._digests[name].hex() == digest
        struct, memory = self._structs[name], self._memory
        self._name, self._memory, self._filled = None, np.empty(0, np.uint8), 0
        array = memory.view(struct.dtype).reshape(struct.shape)
        # Until it is there: else the host would hold many leaves at a time.
        self.placed[name] = jax.device_put(array, self._shardings[name]).block_until_ready()
