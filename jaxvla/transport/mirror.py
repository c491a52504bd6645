"""One order of work for all processes of a learner.

    queue -> LeaderQueue.take -> frames -> FollowerQueue.take
                |                              |
          the leader's Learner         a follower's Learner       the same steps on global arrays

Whatever takes all processes (`jaxvla.multihost`: "collective") follows from what the leader says:
"take" brings a trajectory, another word names an action, "end" is the last one. A follower does
one thing after the other as it hears of them, so all execute the same functions in the same
order. Only one thread of the leader may speak at a time, the one that computes.

Every follower gets the part of a trajectory that its devices hold.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxvla.sharding import path_name
from jaxvla.transport.base import QueueItem, Ticket, TrajectorySource
from jaxvla.transport.frames import Frame
from jaxvla.transport.weight_copy import gather_leaves
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)

Placement = Callable[[int], jax.sharding.Sharding]
"""From the number of envs E of a trajectory to where its arrays [T, E, ...] lie."""

_AXIS = 1
"""Of the envs."""
_LOOK_S = 0.5
"""The leader, while it waits for followers, looks this often whether one is gone."""


class Link(Protocol):
    """A way between the leader and one follower, in both directions."""

    def send(self, frame: Frame) -> None:
        """Raises when the other side is lost."""
        ...

    def receive(self) -> Frame:
        """Waits for the next frame. Raises when the other side is lost or the link is closed."""
        ...

    def close(self) -> None:
        """Wakes both sides."""
        ...


def line_up(link: Link) -> None:
    """A follower's side of `Leader.line_up`, before it has a `FollowerQueue`.

    Args:
      link: to the leader.

    Raises:
      ValueError: the leader does something else.
    """
    link.send(Frame(kind="here"))
    frame = link.receive()
    if frame.kind != "go":
        raise ValueError(f"the leader says {frame.kind!r}, this process is about to line up")


class FollowerLostError(RuntimeError):
    """A process of the learner is gone: the others cannot go on without it."""


class Leader:
    """The leader's way to its followers."""

    def __init__(self, links: Sequence[Link]):
        """Args:
        links: to processes 1, 2, ... in order.
        """
        self._links = list(links)
        self._lost: str | None = None
        self._has_ended = False
        self._arrivals = threading.Semaphore(0)
        """Of followers at the next point where all line up."""

    def watch(self, *, on_stop: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Starts to listen to the followers, in a daemon thread each.

        Args:
          on_stop: a follower was asked to stop, and asks the leader to.
          on_lost: a follower is gone. Meant to wake the thread that speaks, whose next words
            raise FollowerLostError.
        """
        for index, link in enumerate(self._links, start=1):
            threading.Thread(
                target=self._listen,
                args=(index, link, on_stop, on_lost),
                name=f"learning/follower_{index}",
                daemon=True,
            ).start()

    def say(self, word: str, fields: Mapping[str, Any] | None = None) -> None:
        """Tells all followers what is done next.

        Raises:
          FollowerLostError: one is gone.
        """
        self._send([Frame(kind=word, fields=fields or {})] * len(self._links))

    def line_up(self) -> None:
        """Returns when all followers have called `line_up` too, however long they take. To be done
        before collectives that follow upon work of unlike length: between CPUs, gloo gives up
        when another process comes 30 s later. After `watch`.

        Raises:
          FollowerLostError: one is gone.
        """
        for _ in self._links:
            while not self._arrivals.acquire(timeout=_LOOK_S):
                self.require_all()
        self.say("go")

    def fetch(self, leaves: Sequence[jax.Array], params: Params) -> list[np.ndarray]:
        """Collective, of which the followers hear: copies of leaves on this host, see
        `weight_copy.gather_leaves`.

        Args:
          leaves: what is wanted of `params`.
          params: those of the train state that all processes have now.

        Raises:
          FollowerLostError: a follower is gone.
          ValueError: a leaf is none of those.
        """
        positions = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(params))}
        if any(id(leaf) not in positions for leaf in leaves):
            raise ValueError("a leaf to fetch is not one of the present parameters")
        self.say("fetch", {"leaves": [positions[id(leaf)] for leaf in leaves]})
        return gather_leaves(leaves)

    def give(self, item: QueueItem, arrays_of: Callable[[int], list[np.ndarray]]) -> None:
        """Hands a trajectory on.

        Args:
          item: what was taken.
          arrays_of: from the index of a process to its part of the payload.

        Raises:
          FollowerLostError: a follower is gone.
        """
        fields = {
            "ticket": item.ticket.id,
            "admission_version": int(item.ticket.admission_version),
            "owner": item.ticket.owner,
            "policy_version_min": int(item.policy_version_min),
            "policy_version_max": int(item.policy_version_max),
            "nbytes": int(item.nbytes),
        }
        indices = range(1, len(self._links) + 1)
        self._send([Frame(kind="item", fields=fields, arrays=arrays_of(i)) for i in indices])

    def require_all(self) -> None:
        """Raises FollowerLostError when a follower is known to be gone."""
        if self._lost is not None:
            raise FollowerLostError(self._lost)

    def end(self) -> None:
        """The last word; nothing, where a follower is gone or it has been said."""
        if not self._has_ended and self._lost is None:
            self.say("end")
        self._has_ended = True

    def close(self) -> None:
        """Closes the links. Followers that have not heard the last word fail."""
        self._has_ended = True
        for link in self._links:
            link.close()

    def _send(self, frames: Sequence[Frame]) -> None:
        self.require_all()
        for index, (link, frame) in enumerate(zip(self._links, frames, strict=True), start=1):
            try:
                link.send(frame)
            except (OSError, RuntimeError) as error:
                self._lost = f"learner process {index} is gone: {error}"
                raise FollowerLostError(self._lost) from error

    def _listen(
        self, index: int, link: Link, on_stop: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        try:
            while (kind := link.receive().kind) in ("stop", "here"):
                if kind == "stop":
                    on_stop()
                else:
                    self._arrivals.release()
        except (OSError, RuntimeError, ValueError) as error:
            if not self._has_ended:
                self._lost = f"learner process {index} is gone: {error}"
                _LOG.error("%s", self._lost)
                on_lost()


class LeaderQueue:
    """The leader's queue, of which the followers hear."""

    def __init__(self, queue: TrajectorySource, leader: Leader, placement: Placement):
        """Args:
        queue: the real one. Its payloads have the shapes that the followers expect.
        leader: the way to the followers.
        placement: where trajectories lie on the learning mesh.
        """
        self._queue = queue
        self._leader = leader
        self._placement = placement

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        """See `TrajectoryQueue.take`. Payloads are global arrays on the learning mesh.

        Raises:
          FollowerLostError: a follower is gone.
        """
        items = self._queue.take(count, learner_version, timeout_s)
        self._leader.require_all()
        if items is None:
            return None
        self._leader.say("take", {"count": count, "version": learner_version})
        return [self._shared(item) for item in items]

    def close(self, reason: str) -> None:
        """See `TrajectoryQueue.close`."""
        self._queue.close(reason)

    def _shared(self, item: QueueItem) -> QueueItem:
        payload = jax.tree.map(np.asarray, item.payload)
        leaves = jax.tree.leaves(payload)
        spans = _spans(self._placement, leaves[0].shape[_AXIS])

        def arrays_of(process: int) -> list[np.ndarray]:
            return [np.ascontiguousarray(leaf[:, spans[process]]) for leaf in leaves]

        self._leader.give(item, arrays_of)
        placed = jax.tree.map(lambda x: _assemble(x, 0, x.shape, self._placement), payload)
        return dataclasses.replace(item, payload=placed)


class FollowerQueue:
    """A follower's end: its learner takes what the leader took.

    `info` of an item is None: the leader keeps the books.
    """

    def __init__(
        self,
        link: Link,
        *,
        struct: Any,
        placement: Placement,
        actions: Mapping[str, Callable[[Mapping[str, Any]], None]],
    ):
        """Args:
        link: to the leader.
        struct: shapes and dtypes of a whole trajectory [T, E, ...].
        placement: where trajectories lie on the learning mesh.
        actions: word of the leader -> what this process has to do in it, given its fields.
        """
        self._link = link
        self._struct = struct
        self._placement = placement
        self._actions = actions
        self._has_ended = False

    def take(
        self, count: int, learner_version: int, timeout_s: float | None = None
    ) -> list[QueueItem] | None:
        """What the leader takes next; until then, what it says is done.

        Args:
          count, learner_version: as the leader's.
          timeout_s: not used: the leader's time-out counts.

        Returns:
          The trajectories, on the learning mesh; None at the end.

        Raises:
          ValueError: the leader's words do not fit this process's own state.
        """
        del timeout_s
        frame = self._next()
        if frame is None:
            return None
        told = (frame.fields.get("count"), frame.fields.get("version"))
        if frame.kind != "take" or told != (count, learner_version):
            raise ValueError(
                f"the leader says {frame.kind!r} {dict(frame.fields)}, this process is about to "
                f"take {count} at version {learner_version}"
            )
        return [self._item(self._link.receive()) for _ in range(count)]

    def finish(self) -> None:
        """Does what the leader says after its last take, to the end.

        Raises:
          ValueError: it takes once more.
        """
        frame = self._next()
        if frame is not None:
            raise ValueError(f"the leader says {frame.kind!r} after this process's last update")

    def ask_stop(self) -> None:
        """Asks the leader to stop, which ends this process too; nothing, where it has."""
        with contextlib.suppress(OSError, RuntimeError):  # `take` says that the leader is gone
            self._link.send(Frame(kind="stop"))

    def close(self, reason: str) -> None:
        """Leaves the others, which cannot go on then."""
        _LOG.warning("leaves the learner: %s", reason)
        self._link.close()

    def _next(self) -> Frame | None:
        """The next word that is no action; None at the end."""
        while not self._has_ended:
            frame = self._link.receive()
            if frame.kind in self._actions:
                self._actions[frame.kind](frame.fields)
                continue
            self._has_ended = frame.kind == "end"
            if not self._has_ended:
                return frame
        return None

    def _item(self, frame: Frame) -> QueueItem:
        if frame.kind != "item":
            raise ValueError(f"the leader says {frame.kind!r} instead of a trajectory")
        fields = frame.fields
        return QueueItem(
            ticket=Ticket(
                id=fields["ticket"],
                admission_version=fields["admission_version"],
                owner=fields["owner"],
            ),
            payload=self._payload(frame.arrays),
            policy_version_min=fields["policy_version_min"],
            policy_version_max=fields["policy_version_max"],
            nbytes=fields["nbytes"],
        )

    def _payload(self, arrays: Sequence[np.ndarray]) -> Any:
        """Global arrays from this process's part of them."""
        named, tree = jax.tree_util.tree_flatten_with_path(self._struct)
        if len(arrays) != len(named):
            raise ValueError(f"a trajectory of {len(arrays)} arrays, want {len(named)}")
        part = _spans(self._placement, named[0][1].shape[_AXIS])[jax.process_index()]
        placed = []
        for (path, struct), array in zip(named, arrays, strict=True):
            wanted = (struct.shape[0], part.stop - part.start, *struct.shape[2:])
            if array.shape != wanted or array.dtype != struct.dtype:
                raise ValueError(
                    f"trajectory leaf {path_name(path)}: {array.dtype}{list(array.shape)}, "
                    f"want {struct.dtype}{list(wanted)}"
                )
            placed.append(_assemble(array, part.start, struct.shape, self._placement))
        return jax.tree.unflatten(tree, placed)


def _spans(placement: Placement, num_envs: int) -> dict[int, slice]:
    """Process -> the envs that its devices need, from the first to the last."""
    shape = (1,) * _AXIS + (num_envs,)
    found: dict[int, tuple[int, int]] = {}
    for device, index in placement(num_envs).devices_indices_map(shape).items():
        begin, end, _ = index[_AXIS].indices(num_envs)
        low, high = found.get(device.process_index, (begin, end))
        found[device.process_index] = min(low, begin), max(high, end)
    return {process: slice(*bounds) for process, bounds in found.items()}


def _assemble(
    part: np.ndarray, first: int, shape: tuple[int, ...], placement: Placement
) -> jax.Array:
    """A global array from the envs that this process has of it.

    Args:
      part: [T, e, ...].
      first: which env of all its first one is.
      shape: of the whole.
      placement: where it lies.
    """

    def shard(index: Any) -> np.ndarray:
        begin, end, _ = index[_AXIS].indices(shape[_AXIS])
        return part[(*index[:_AXIS], slice(begin - first, end - first), *index[_AXIS + 1 :])]

    return jax.make_array_from_callback(shape, placement(shape[_AXIS]), shard)
