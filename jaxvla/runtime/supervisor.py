"""Supervisor: keeps the processes of a run alive, and tells them where the others are.

consumes    reports of the processes: where they listen, what the screen shall show, how they ended
produces    processes; the directory, after every change; the exit code
waits for   the learner's last word, the end of a process, a signal
unblocked by  the processes

A process that ends too soon is started again, after a wait that doubles with every time in a row.
One that has used up its restarts is given up: the run goes on with fewer simulators or policy
servers, and ends when there are none left. A process that is silent for too long is killed first.
The learner goes on from its last checkpoint; the others then begin a new session with it.
The processes of one learner, its gang, live and die together: when one ends, all are started again.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from jaxvla.config import RuntimeConfig
from jaxvla.runtime.directory import Address, Directory
from jaxvla.runtime.launch import Launched, Launcher
from jaxvla.runtime.replica_spec import LEARNER, REPLICA_ROLES, SERVER, SIMULATOR, ReplicaSpec
from jaxvla.runtime.screen_forwarding import ScreenReceiver
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, Listener
from jaxvla.transport.frames import Frame

_LOG = logging.getLogger(__name__)

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 3

HEALTHY_S = 600.0
"""A process that ran for so long begins to count its restarts anew."""
MAX_BACKOFF_S = 30.0
_POLL_S = 0.2
"""A signal handler cannot wake the loop, so it looks this often whether a stop was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Event:
    """Something that a process did."""

    name: str
    launch: int
    ended: str | None = None
    """How the process ended, in a few words."""
    lost: str | None = None
    """Why its control connection was lost."""
    frame: Frame | None = None
    """What it said."""
    connection: Connection | None = None
    """By which it says everything from now on."""


@dataclass(kw_only=True)
class _Replica:
    """A process, over all its starts."""

    spec: ReplicaSpec
    """Of the latest start."""
    launched: Launched | None = None
    connection: Connection | None = None
    num_in_a_row: int = 0
    """Restarts since it was last healthy."""
    started_s: float = 0.0
    start_at_s: float = math.inf
    """When it is to be started."""
    is_doomed: bool = False
    """It was killed because another process of its gang had ended."""
    is_given_up: bool = False
    how_it_ended: str | None = None
    """In a few words, once the process is gone."""
    last_words: str = ""
    """Its own account of why it ended."""

    @property
    def is_running(self) -> bool:
        return self.launched is not None


@dataclass(kw_only=True)
class _Totals:
    """Restarts by role of the program, since the command began."""

    restarts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        role = REPLICA_ROLES[kind]
        self.restarts[role] = self.restarts.get(role, 0) + 1


class Supervisor:
    """Sees one run through."""

    def __init__(
        self,
        make_spec: Callable[[str, int, Address, str], ReplicaSpec],
        *,
        num_learners: int = 1,
        num_servers: int,
        num_simulators: int,
        launcher: Launcher,
        channel: ChannelConfig,
        host: str,
        screen: ScreenReceiver,
        stop_requested: threading.Event,
        settings: RuntimeConfig,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        make_spec: from kind, index, the supervisor's address and the run's token.
        num_learners, num_servers, num_simulators: how many processes of these kinds. Those of
          the learner are one gang; the first one leads it.
        launcher: starts them; closed at the end.
        channel: of all connections.
        host: to listen on.
        screen: shows what the learner says.
        stop_requested: set by signals.
        settings: restarts and grace.
        clock: monotonic seconds.

        Raises:
          OSError: the host is none of this machine's addresses.
        """
        self._launcher = launcher
        self._screen = screen
        self._stop_requested = stop_requested
        self._settings = settings
        self._clock = clock
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._listener = Listener(host, 0, channel, self._serve)
        kinds = [(LEARNER, num_learners), (SERVER, num_servers), (SIMULATOR, num_simulators)]
        self._replicas = {
            spec.name: _Replica(spec=spec, start_at_s=-math.inf)
            for kind, count in kinds
            for spec in (
                make_spec(kind, index, self._listener.address, channel.token.hex())
                for index in range(count)
            )
        }
        self._directory = Directory()
        self._totals = _Totals()
        self._gang_end = ""
        """How the end of a gang began, until all of it is gone."""
        self._code: int | None = None
        """The exit code, once it is known."""
        self._stop_by_s = math.inf
        """When the learner must have ended that was asked to."""

    @property
    def _learner(self) -> _Replica:
        """The first of its gang."""
        return next(self._of(LEARNER))

    def _of(self, kind: str) -> Iterator[_Replica]:
        return (x for x in self._replicas.values() if x.spec.kind == kind)

    def run(self) -> int:
        """Runs to the end; returns the exit code of the contract."""
        self._listener.start()
        try:
            while self._code is None:
                self._start_those_due()
                self._look_for_stop()
                event = self._next_event()
                if event is not None:
                    self._handle(event)
            self._stop_all()
            return self._code
        finally:
            self._launcher.close()  # first: what is left shall not take us for lost
            self._listener.close()

    # ------------------------------------------------------------------------- events

    def _serve(self, connection: Connection) -> None:
        """A control connection, in its own thread."""
        name, _, launch = connection.peer.rpartition(".")
        if name not in self._replicas or not launch.isdecimal():
            connection.close()
            return
        event = _Event(name=name, launch=int(launch))
        self._events.put(replace(event, connection=connection))
        try:
            while True:
                self._events.put(replace(event, frame=connection.receive()))
        except ConnectionLostError as error:
            self._events.put(replace(event, lost=str(error)))

    def _next_event(self) -> _Event | None:
        """Waits for one until something else is due."""
        due_s = min(x.start_at_s for x in self._replicas.values()) - self._clock()
        try:
            return self._events.get(timeout=max(0.0, min(_POLL_S, due_s)))
        except Empty:
            return None

    def _handle(self, event: _Event) -> None:
        replica = self._replicas[event.name]
        if event.launch != replica.spec.launch or not replica.is_running:
            if event.connection is not None:
                event.connection.close()
            return  # of an earlier start
        if event.connection is not None:
            replica.connection = event.connection
            self._tell(replica, self._directory_frame())
        elif event.ended is not None:
            replica.how_it_ended = event.ended
        elif event.lost is not None:
            replica.connection = None
            if replica.launched is not None and replica.how_it_ended is None:
                # A healthy process keeps its connection. What has hung does not end by itself.
                _LOG.warning("%s: %s", event.name, event.lost)
                replica.launched.kill()
        elif event.frame is not None:
            self._heard(replica, event.frame)
        # Its last words may still be on the way when a process has ended.
        if replica.how_it_ended is not None and replica.connection is None:
            self._ended(replica, replica.how_it_ended)

    def _heard(self, replica: _Replica, frame: Frame) -> None:
        """What a process says of itself."""
        if frame.kind == "ended":
            replica.last_words = frame.fields["detail"]
            code = frame.fields["code"]
            if self._is_last_word(replica, code):
                self._end(code, replica)
        elif replica.is_doomed:
            return  # the next start will be elsewhere
        elif frame.kind == "listening":
            self._listening(replica, frame)
        elif frame.kind == "gathering":
            host, port = frame.fields["address"]
            self._announce(replace(self._directory, gang=(host, port)))
        elif replica.spec.kind == LEARNER:
            self._screen.show(frame)
        else:
            _LOG.error("%s said %r, which is unknown", replica.spec.name, frame.kind)

    def _is_last_word(self, replica: _Replica, code: int) -> bool:
        """Whether the run ends with this exit code of a process."""
        if code == EXIT_USAGE:
            return True  # wrong settings are wrong at every start
        # The learner's word is the run's. But what fails in one process of a gang may be another
        # one's death: the next start shows.
        is_gang = len(list(self._of(LEARNER))) > 1
        return replica is self._learner and not (is_gang and code == EXIT_FAILED)

    def _listening(self, replica: _Replica, frame: Frame) -> None:
        host, port = frame.fields["address"]
        address, session = (host, port), frame.fields["session"]
        known = self._directory
        if replica.spec.kind == LEARNER:
            known = replace(known, session=session, learner=address, servers={})
            self._tell_restarts(replica)
        elif session == known.session:
            known = replace(known, servers={**known.servers, replica.spec.index: address})
        self._announce(known)

    def _announce(self, directory: Directory) -> None:
        """Makes a change known."""
        self._directory = directory
        for replica in self._replicas.values():
            self._tell(replica, self._directory_frame())

    def _directory_frame(self) -> Frame:
        return Frame(kind="directory", fields=self._directory.fields(), arrays=())

    def _tell(self, replica: _Replica, frame: Frame) -> None:
        if replica.connection is None:
            return
        try:
            replica.connection.send(frame)
        except ConnectionLostError:
            _LOG.warning("%s does not hear %r", replica.spec.name, frame.kind)

    def _tell_restarts(self, learner: _Replica) -> None:
        fields = {"restarts": self._totals.restarts}
        self._tell(learner, Frame(kind="restarts", fields=fields, arrays=()))

    # ----------------------------------------------------------------- starts and ends

    def _start_those_due(self) -> None:
        for replica in self._replicas.values():
            if replica.start_at_s <= self._clock():
                self._start(replica)

    def _start(self, replica: _Replica) -> None:
        replica.start_at_s, replica.started_s = math.inf, self._clock()
        replica.is_doomed, replica.last_words = False, ""
        event = _Event(name=replica.spec.name, launch=replica.spec.launch)
        replica.launched = self._launcher.launch(
            replica.spec, lambda how: self._events.put(replace(event, ended=how))
        )

    def _ended(self, replica: _Replica, how: str) -> None:
        """A process is gone that was not asked to go."""
        spec = replica.spec
        replica.launched, replica.how_it_ended = None, None
        # The next start has another number, and what is still under way of this one is no news.
        replica.spec = replace(spec, launch=spec.launch + 1)
        self._forget(spec)
        why = f"{spec.name} ended ({how}: {replica.last_words})"
        if not replica.last_words:
            why = f"{spec.name} ended ({how})"
        if self._stop_by_s < math.inf:
            if spec.kind == LEARNER:
                self._code = EXIT_STOPPED  # it was in the middle of something; a checkpoint counts
            return
        if spec.kind == LEARNER:
            self._end_gang(why)
        else:
            self._restart([replica], why)

    def _end_gang(self, why: str) -> None:
        """A process of the learner is gone: all of them go, and when they have, start again."""
        gang = list(self._of(LEARNER))
        self._gang_end = self._gang_end or why
        for replica in gang:
            if replica.launched is not None and not replica.is_doomed:
                replica.is_doomed = True
                replica.launched.kill()
        if not any(replica.is_running for replica in gang):
            why, self._gang_end = self._gang_end, ""
            self._restart(gang, why)

    def _restart(self, replicas: Sequence[_Replica], why: str) -> None:
        """Starts processes that live together once more, later; the first one's count is theirs."""
        first, spec = replicas[0], replicas[0].spec
        if self._clock() - first.started_s >= HEALTHY_S:
            first.num_in_a_row = 0
        if first.num_in_a_row >= self._settings.max_restarts:
            self._give_up(replicas, why)
            return
        wait_s = min(self._settings.restart_backoff_s * 2**first.num_in_a_row, MAX_BACKOFF_S)
        first.num_in_a_row += 1
        for replica in replicas:
            replica.start_at_s = self._clock() + wait_s
        count = f"{first.num_in_a_row} of {self._settings.max_restarts} in a row"
        what = f"restart of all {len(replicas)} of its kind" if len(replicas) > 1 else "restart"
        self._screen.message(f"{why}; {what} in {wait_s:g} s ({count})")
        self._totals.add(spec.kind)
        self._tell_restarts(self._learner)

    def _forget(self, spec: ReplicaSpec) -> None:
        """Takes a process that is gone out of the directory."""
        if spec.kind == LEARNER:
            self._announce(Directory(given_up=self._directory.given_up))
        elif spec.kind == SERVER and spec.index in self._directory.servers:
            left = {i: x for i, x in self._directory.servers.items() if i != spec.index}
            self._announce(replace(self._directory, servers=left))

    def _give_up(self, replicas: Sequence[_Replica], why: str) -> None:
        """Goes on without them, if there are others of their kind."""
        replica, spec = replicas[0], replicas[0].spec
        for each in replicas:
            each.is_given_up = True
        left = [x for x in self._of(spec.kind) if not x.is_given_up]
        num = self._settings.max_restarts
        self._screen.message(f"error: {why} after {num} restarts in a row")
        if not left:
            self._end(EXIT_FAILED, replica)
        elif spec.kind == SERVER:
            gone = self._directory.given_up | {spec.index}
            self._announce(replace(self._directory, given_up=gone))
        if left:
            self._screen.message(f"going on with {len(left)} of its kind")

    def _end(self, code: int, replica: _Replica) -> None:
        """The run is over."""
        if self._code is None:
            self._code = code
        if replica.last_words:
            self._screen.message(f"error: {replica.spec.name}: {replica.last_words}")

    # ---------------------------------------------------------------------------- stops

    def _look_for_stop(self) -> None:
        """Asks the learner to stop, once, and gives up on it when its time is over."""
        if not self._stop_requested.is_set():
            return
        now_s = self._clock()
        if self._stop_by_s == math.inf:
            self._stop_by_s = now_s + self._settings.grace_s
            self._tell(self._learner, Frame(kind="stop", fields={}, arrays=()))
        if not self._learner.is_running or now_s >= self._stop_by_s:
            self._code = EXIT_STOPPED  # the last checkpoint counts

    def _stop_all(self) -> None:
        """Lets every process end by itself, for a while."""
        stop = Frame(kind="stop", fields={}, arrays=())
        for replica in self._replicas.values():
            self._tell(replica, stop)
        end_s = self._clock() + self._settings.grace_s / 2
        while any(x.is_running for x in self._replicas.values()) and self._clock() < end_s:
            event = self._next_event()
            if event is None:
                continue
            replica = self._replicas[event.name]
            if event.connection is not None:  # it had only just started
                replica.connection = event.connection
                self._tell(replica, stop)
            elif event.ended is not None and event.launch == replica.spec.launch:
                replica.launched = None


def new_token() -> bytes:
    """256 random bits for the connections of a run."""
    return secrets.token_bytes(32)
