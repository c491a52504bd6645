"""The processes of one learner, as its first process, the leader, sees them.

    the leader listens -> the supervisor tells where -> followers connect -> all of them join one
    group of `jax.distributed` -> what the leader does next is said to them (`transport.mirror`)

consumes    connections of the followers; their wish to stop
produces    the leader's words to them; the end of this process when one of them is gone
waits for   the followers, at the start
unblocked by  the followers, a stop, the time-out
"""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import jax
import numpy as np

from jaxvla import multihost
from jaxvla.config import RuntimeConfig
from jaxvla.learning.learner import Learner
from jaxvla.runtime.control import Control
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.transport.base import TrajectoryQueue, TrajectorySource
from jaxvla.transport.channel import ChannelConfig, Connection, Listener
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.mirror import FollowerLostError, Leader, LeaderQueue, Placement
from jaxvla.transport.remote_weights import fetch_to_host
from jaxvla.transport.schema import read_int
from jaxvla.types import Params

_LOG = logging.getLogger("jaxvla.learning")

FOLLOWER, MEET, MET = "follower", "meet", "met"
"""Frames of a link before the leader's first word."""
BYSTANDER_S = 2.0
"""A process that fails for want of another one leaves it so long to be seen to have ended first:
then it is the other one's end that the user reads of, and the supervisor kills this one."""
_JOIN_S = 120
"""For `jax.distributed` to connect processes that are all there."""
_EXIT_FAILED = 1


class NotGatheredError(RuntimeError):
    """Not all processes of the learner came."""


class Gang(Protocol):
    """What the controller needs of it. Only one thread at a time may call, the one that computes;
    `source` and `lead` come first."""

    def source(self, queue: TrajectoryQueue, placement: Placement) -> TrajectorySource:
        """What the learner takes trajectories from.

        Args:
          queue: of the run.
          placement: where trajectories lie on the learning mesh.
        """
        ...

    def lead(self, learner: Learner) -> None:
        """From now on it is this learner's parameters that are fetched."""
        ...

    def fetch(self, leaves: Sequence[jax.Array]) -> list[np.ndarray]:
        """Copies of leaves of the present parameters on this host; see `RemoteWeightStore`."""
        ...

    def to_place(self, params: Params) -> Params:
        """The present parameters, in a form that can be placed on devices of this process."""
        ...

    @property
    def checked_role(self) -> str:
        """On whose mesh this process alone can evaluate samples, see `LogProbCheck`."""
        ...

    @property
    def is_one(self) -> bool:
        """There are no others."""
        ...

    def line_up(self) -> None:
        """What comes next takes all processes: returns when all are there."""
        ...

    def save(self, version: int) -> None:
        """A checkpoint of this version is saved next."""
        ...

    def end(self) -> None:
        """There is nothing more to do together."""
        ...

    def give_up(self, error: BaseException) -> None:
        """Something failed. Returns where that is the run's failure; else the process ends here, as
        the others cannot be told to go on, and the supervisor starts all of them again."""
        ...


class Alone:
    """A learner of one process. Implements Gang."""

    is_one = True
    checked_role = "learning"

    def source(self, queue: TrajectoryQueue, placement: Placement) -> TrajectorySource:
        """See `Gang.source`."""
        del placement
        return queue

    def lead(self, learner: Learner) -> None:
        """See `Gang.lead`."""

    def fetch(self, leaves: Sequence[jax.Array]) -> list[np.ndarray]:
        """See `Gang.fetch`."""
        return fetch_to_host(leaves)

    def to_place(self, params: Params) -> Params:
        """See `Gang.to_place`."""
        return params

    def line_up(self) -> None:
        """See `Gang.line_up`."""

    def save(self, version: int) -> None:
        """See `Gang.save`."""

    def end(self) -> None:
        """See `Gang.end`."""

    def give_up(self, error: BaseException) -> None:
        """See `Gang.give_up`."""


class LedGang:
    """Leader and followers. Implements Gang."""

    is_one = False
    checked_role = "serving"

    def __init__(self, leader: Leader, leave: Callable[[str], NoReturn]):
        """Args:
        leader: the way to the followers.
        leave: ends this process, given why.
        """
        self._leader = leader
        self._leave = leave
        self._learner: Learner | None = None

    def source(self, queue: TrajectoryQueue, placement: Placement) -> TrajectorySource:
        """See `Gang.source`."""
        return LeaderQueue(queue, self._leader, placement)

    def lead(self, learner: Learner) -> None:
        """See `Gang.lead`."""
        self._learner = learner

    def fetch(self, leaves: Sequence[jax.Array]) -> list[np.ndarray]:
        """See `Gang.fetch`."""
        assert self._learner is not None, "lead first"
        return self._leader.fetch(leaves, self._learner.state.params)

    def to_place(self, params: Params) -> Params:
        """See `Gang.to_place`: arrays on the host."""
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, self.fetch(leaves))

    def line_up(self) -> None:
        """See `Gang.line_up`."""
        self._leader.line_up()

    def save(self, version: int) -> None:
        """See `Gang.save`."""
        self._leader.say("save", {"version": version})

    def end(self) -> None:
        """See `Gang.end`."""
        try:
            self._leader.end()
        except FollowerLostError as error:
            _LOG.warning("after the end: %s", error)

    def give_up(self, error: BaseException) -> None:
        """See `Gang.give_up`: never returns."""
        _LOG.error("the learner's processes cannot go on", exc_info=error)
        self._leave(f"{type(error).__name__}: {error}")


class Gathering:
    """Where followers connect to the leader."""

    def __init__(self, spec: ReplicaSpec, channel: ChannelConfig, host: str, num_followers: int):
        """Listens.

        Args:
          spec: of this process.
          channel: of all connections.
          host: to listen on.
          num_followers: how many there will be, with indices from 1.

        Raises:
          OSError: the host is none of this machine's addresses.
        """
        self._launch = spec.launch
        self._host = host
        self._num_followers = num_followers
        self._links: dict[int, Connection] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        """All are there, or nobody waits any more."""
        self._over = threading.Event()
        self._listener = Listener(host, 0, channel, self._serve, name=spec.name)
        self._listener.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._listener.address

    def wait(self, control: Control, timeout_s: float) -> list[Connection] | None:
        """Links to all followers, in the order of their indices; None when a stop is asked for.

        Raises:
          NotGatheredError: they did not all come within the time-out.
        """
        with control.ending(self._changed):
            self._changed.wait(timeout_s)
        if control.stop_requested.is_set():
            return None
        with self._lock:
            missing = sorted(set(range(1, self._num_followers + 1)) - self._links.keys())
            if missing:
                names = ", ".join(f"learner_{index}" for index in missing)
                raise NotGatheredError(f"no {names} within {timeout_s:g} s")
            return [self._links[index] for index in sorted(self._links)]

    def meet(self, links: Sequence[Connection], settings: RuntimeConfig) -> list[Connection]:
        """Joins the group of `jax.distributed`, with the followers.

        Args:
          links: to all of them.
          settings: of the run.

        Returns:
          Links to JAX's processes 1, 2, ... in order. On TPUs their numbers follow from where they
          run, not from indices of ours.

        Raises:
          NotMetError: they do not see each other.
          NotGatheredError: this is not JAX's process 0.
          ConnectionLostError: a follower is gone.
        """
        # Only now, as nobody keeps the port until JAX takes it.
        coordinator = f"{_bracketed(self._host)}:{_free_port(self._host)}"
        for link in links:
            link.send(Frame(kind=MEET, fields={"coordinator": coordinator}))
        multihost.initialize(group_settings(settings, multihost.LEADER, coordinator))
        processes = {read_int(link.receive().fields, "process"): link for link in links}
        if jax.process_index() != multihost.LEADER:
            raise NotGatheredError(
                f"learner_0 is JAX's process {jax.process_index()}: it has to run on the first "
                "host of the slice, see docs/pods.md"
            )
        return [processes[process] for process in range(1, settings.learner_processes)]

    def close(self) -> None:
        """Ends all links."""
        self._over.set()
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        """A follower, in a thread of its own, until the end."""
        try:
            hello = connection.receive()
            index, launch = (read_int(hello.fields, name) for name in ("index", "launch"))
            with self._lock:
                is_known = hello.kind == FOLLOWER and 1 <= index <= self._num_followers
                if not is_known or launch != self._launch or index in self._links:
                    raise FrameError(f"{hello.kind!r} {index} is no follower of this start")
                self._links[index] = connection
                if len(self._links) == self._num_followers:
                    self._changed.set()
        except FrameError as error:
            _LOG.error("%s: %s; the connection is closed", connection.peer, error)
            return
        self._over.wait()


def gather(
    spec: ReplicaSpec,
    settings: RuntimeConfig,
    control: Control,
    channel: ChannelConfig,
    host: str,
) -> LedGang | None:
    """Brings the learner's processes together; this one leads. Before JAX starts its backend.

    Args:
      spec: of this process.
      settings: of the run.
      control: line to the supervisor, which tells the followers where this process listens.
      channel: of all connections.
      host: to listen on.

    Returns:
      The gang, or None when a stop is asked for.

    Raises:
      NotGatheredError, NotMetError, ConnectionLostError: not all followers came, or stayed.
      OSError: the host is none of this machine's addresses.
    """
    gathering = Gathering(spec, channel, host, settings.learner_processes - 1)
    control.tell("gathering", address=list(gathering.address))
    links = gathering.wait(control, settings.meeting_s)
    if links is None:
        gathering.close()
        return None

    def leave(reason: str) -> NoReturn:
        time.sleep(BYSTANDER_S)
        control.tell("ended", code=_EXIT_FAILED, detail=reason)
        # Whoever hangs in a collective cannot be woken.
        os._exit(_EXIT_FAILED)

    leader = Leader(gathering.meet(links, settings))

    def lost() -> None:
        try:
            leader.require_all()
        except RuntimeError as error:
            leave(str(error))

    leader.watch(on_stop=control.stop_requested.set, on_lost=lost)
    return LedGang(leader, leave)


def group_settings(
    settings: RuntimeConfig, index: int, coordinator: str
) -> multihost.GroupSettings:
    """How the learner's processes join one group of `jax.distributed`.

    Args:
      settings: of the run.
      index: of this process.
      coordinator: HOST:PORT.
    """
    return multihost.GroupSettings(
        num_processes=settings.learner_processes,
        process_index=index,
        coordinator=coordinator,
        connect_timeout_s=_JOIN_S,
        heartbeat_timeout_s=math.ceil(settings.silence_s),
    )


def _free_port(host: str) -> int:
    """One that was free a moment ago. When it is taken before JAX takes it, the gang fails, and is
    started again with another one."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family) as server:
        return server.getsockname()[1]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
