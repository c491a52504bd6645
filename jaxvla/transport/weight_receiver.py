"""Weights from other processes: the policy server's side.

consumes    transfers of `transport.weight_transfers`
produces    whole versions on the server's devices; acknowledgements; versions for a relay
waits for   the next frame; in a thread of its own, for the next of a parent
unblocked by  the learner, the parent, the loss of the connection

Each leaf goes to its devices as soon as it is complete, so the host holds one leaf at a time, and
with a relay a version and the one that arrives; the devices hold the version in use, the staged one
until it is swapped in, and the one that arrives.

Weights come from the learner. When it says `weights_relayed` they come from another server, the
parent, over a connection that the server makes; it still tells the learner alone what it has in
use. If that connection cannot be made or is lost, for whatever reason, it says `weights_orphaned`
to the learner, which sends from then on.
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
from jaxvla.transport.dispatch import Handler, Handlers, dispatch
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.remote_weights import shardings_by_name
from jaxvla.transport.schema import check_array, read_bool, read_int, read_text, shown
from jaxvla.transport.weight_copy import named_leaves
from jaxvla.transport.weight_relay import WeightRelay
from jaxvla.transport.weight_transfers import HostLeaf, HostWeights, transfer_digest
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)

Dial = Callable[[], Connection]
"""Connects to the parent and says who it is. Raises ConnectionLostError when it cannot."""


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
        dial: Dial | None = None,
        relay: WeightRelay | None = None,
    ):
        """Args:
        connection: to the learner, which knows whose it is.
        params: shapes and dtypes of the parameters.
        shardings: one sharding, or a pytree of them that matches the parameters.
        trainable: regular expression over the paths of the leaves that change, as the learner
          has it.
        on_publish: called whenever a version has been staged, in the thread that receives.
        dial: to the parent, for a server that may have one; called in a thread of its own.
        relay: is handed every version that was staged, for servers whose parent this one is.
        """
        self._learner = connection
        self._dial = dial
        self._relay = relay
        self._hosted: dict[str, HostLeaf] = {}
        """Leaves that do not change, for the relay."""
        self._structs = named_leaves(params)
        self._treedef = jax.tree.structure(params)
        self._shardings = shardings_by_name(shardings, self._structs)
        self._trainable = {name for name in self._structs if re.search(trainable, name)}
        self._on_publish = on_publish
        self._frozen: dict[str, jax.Array] = {}
        self._transfer: _Transfer | None = None
        self._version = -1
        """Newest that was staged."""
        self._least = 0
        """What other servers have in use: nothing older is staged."""
        self._taker: threading.Thread | None = None
        """Receives from the parent."""
        self._lock = threading.Lock()
        """Guards what follows."""
        self._staged: tuple[int, Params] | None = None
        self._pulled_version = -1
        self._is_closed = False
        self._source: Connection | None = connection
        """Where weights come from; None while the parent is dialled."""
        relayed = self._refusing(connection, self._on_relayed)
        self.handlers: Handlers = self._receiving(connection) | {"weights_relayed": relayed}
        """For `dispatch`; `run` calls it."""

    def run(self, others: Handlers | None = None) -> None:
        """Receives until the connection to the learner is lost.

        Args:
          others: functions for frames of other conversations on the connection.
        """
        try:
            dispatch(self._learner, {**(others or {}), **self.handlers})
        finally:
            with self._lock:
                self._is_closed = True
            if self._leave_parent() and self._taker is not None:
                self._taker.join()

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
        self._say(self._learner, "weights_swapped", version=version)

    def close(self) -> None:
        """See `WeightSubscription.close`. The connection goes on, for other conversations."""
        with self._lock:
            is_first = not self._is_closed
            self._is_closed, self._staged = True, None
        if is_first:
            self._leave_parent()
            self._say(self._learner, "weights_left")

    def _receiving(self, source: Connection) -> dict[str, Handler]:
        """Functions for the frames of a transfer from a source."""
        return {
            "weights_begin": self._refusing(source, self._on_begin),
            "weights_part": self._refusing(source, self._on_part),
            "weights_end": self._refusing(source, self._on_end),
        }

    def _on_relayed(self, frame: Frame) -> None:
        """The learner leaves it to the parent to send weights."""
        if self._dial is None or self._taker is not None or self._version >= 0:
            raise FrameError("this server takes its weights from the learner")
        self._least = read_int(frame.fields, "least")
        self._source = None
        self._taker = threading.Thread(target=self._take, name="weights/parent", daemon=True)
        self._taker.start()

    def _take(self) -> None:
        """Receives from the parent until it is lost; then the learner is to send."""
        assert self._dial is not None, "who has no parent is not told to take weights from one"
        try:
            with self._dial() as parent:
                with self._lock:
                    self._source, is_closed = parent, self._is_closed
                if not is_closed:
                    dispatch(parent, self._receiving(parent))
        except ConnectionLostError as error:
            _LOG.info("weights/parent: %s", error)
        finally:
            self._turn_to_learner()

    def _turn_to_learner(self) -> None:
        """What has come of a version is of no use, what is staged stays."""
        with self._lock:
            self._transfer, self._source = None, self._learner
            if self._is_closed:
                return
        _LOG.warning("the parent is lost; weights come from the learner, after %d", self._version)
        self._say(self._learner, "weights_orphaned", version=self._version)

    def _leave_parent(self) -> bool:
        """Ends the connection to the parent; False if there is none, or none yet."""
        with self._lock:
            parent = self._source
        if parent is None or parent is self._learner:
            return False
        parent.close()
        return True

    def _on_begin(self, frame: Frame) -> None:
        version, is_full = read_int(frame.fields, "version"), read_bool(frame.fields, "is_full")
        newest = max(self._version, self._least - 1)
        if self._transfer is not None or version <= newest:
            raise FrameError(f"version = {version} begins, after {newest}")
        if not is_full and self._version < 0:
            raise FrameError(f"version = {version} lacks the leaves that do not change")
        names = set(self._structs) if is_full else self._trainable
        self._transfer = _Transfer(
            version,
            {name: self._structs[name] for name in names},
            self._shardings,
            keeps_host=self._relay is not None,
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
            self._answer(transfer, is_sound=False)

    def _stage(self, transfer: "_Transfer") -> None:
        placed = self._frozen | transfer.placed
        self._frozen = {name: x for name, x in placed.items() if name not in self._trainable}
        params = jax.tree.unflatten(self._treedef, [placed[name] for name in self._structs])
        self._version = transfer.version
        # First the word, so that the learner never hears of a swap of what it has not staged.
        self._answer(transfer, is_sound=True)
        with self._lock:
            if self._is_closed:
                return
            self._staged = transfer.version, params
        if self._relay is not None:
            self._hand_on(transfer, self._relay)
        if self._on_publish is not None:
            self._on_publish()

    def _hand_on(self, transfer: "_Transfer", relay: WeightRelay) -> None:
        """With the digests that came with it, so that damage on this host is noticed elsewhere."""
        trainable, hosted = self._trainable, transfer.hosted
        self._hosted |= {name: leaf for name, leaf in hosted.items() if name not in trainable}
        changing = {name: leaf for name, leaf in hosted.items() if name in trainable}
        relay.offer(HostWeights(transfer.version, changing, self._hosted))

    def _answer(self, transfer: "_Transfer", *, is_sound: bool) -> None:
        if self._source is not None:
            about = {"version": transfer.version, "is_sound": is_sound}
            self._say(self._source, "weights_staged", **about)

    def _current(self, frame: Frame) -> "_Transfer":
        version = read_int(frame.fields, "version")
        if self._transfer is None or version != self._transfer.version:
            raise FrameError(f"version = {version} has not begun")
        return self._transfer

    def _refusing(self, source: Connection, handler: Handler) -> Handler:
        """Tells the sender, too, when what it sends does not fit: it is no passing fault."""

        def handle(frame: Frame) -> None:
            try:
                if source is not self._source:
                    raise FrameError(f"{frame.kind!r}: weights come from elsewhere now")
                handler(frame)
            except FrameError as error:
                self._say(source, "weights_refused", text=str(error))
                raise

        return handle

    def _say(self, connection: Connection, kind: str, **fields: Any) -> None:
        try:
            connection.send(Frame(kind=kind, fields=fields))
        except ConnectionLostError as error:
            _LOG.info("%s: %s", kind, error)  # whoever receives notices


class _Transfer:
    """A version on its way in."""

    def __init__(
        self,
        version: int,
        structs: Mapping[str, Any],
        shardings: Mapping[str, Any],
        *,
        keeps_host: bool,
    ):
        """Args:
        version: which.
        structs: leaf path -> shape and dtype, of every leaf that must come.
        shardings: leaf path -> where it goes, of these and maybe more.
        keeps_host: keeps the host's memory of every leaf.
        """
        self.version = version
        self.placed: dict[str, jax.Array] = {}
        """Complete leaves."""
        self.hosted: dict[str, HostLeaf] = {}
        """The same on the host, if they are kept."""
        self._keeps_host = keeps_host
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
        if self._keeps_host:
            self.hosted[name] = HostLeaf(array, self._digests[name])
        # Until it is there: else the host would hold many leaves at a time.
        self.placed[name] = jax.device_put(array, self._shardings[name]).block_until_ready()
