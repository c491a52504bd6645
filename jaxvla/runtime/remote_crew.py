"""Simulators and policy servers in processes of their own, as the learner's process sees them.

consumes    connections of simulators (tickets, trajectories) and policy servers (weights), with
            the metrics of both
produces    the welcome, which says where a simulator goes on; calls of queue and weight store
waits for   a process to connect; the controller, until simulators may begin
unblocked by  the processes, the controller, close
"""

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

from jaxvla.cluster import weights_parent
from jaxvla.runtime.build import Parts
from jaxvla.runtime.control import Control
from jaxvla.runtime.groups import Groups, group_name, groups_of
from jaxvla.runtime.program import Program
from jaxvla.runtime.remote_schemas import segment_codec
from jaxvla.runtime.remote_telemetry import make_sink, telemetry_handlers
from jaxvla.runtime.replica_spec import SERVER, SIMULATOR
from jaxvla.runtime.telemetry import Telemetry
from jaxvla.runtime.welcome import WelcomeCodec
from jaxvla.simulation.assembler import SegmentInfo
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.telemetry.metrics import Last, Total
from jaxvla.transport.base import TrajectoryQueue, WeightStore
from jaxvla.transport.channel import ChannelConfig, Connection, Listener
from jaxvla.transport.dispatch import Handlers
from jaxvla.transport.frames import FrameError
from jaxvla.transport.remote_queue import QueueService
from jaxvla.transport.remote_weights import Fetch, RemoteWeightStore
from jaxvla.transport.schedule import Schedule
from jaxvla.transport.schema import read_int, read_text

_LOG = logging.getLogger(__name__)


class RemoteCrew:
    """Implements Crew."""

    def __init__(
        self,
        parts: Parts,
        groups: Groups,
        telemetry: Telemetry,
        schedule: Schedule,
        *,
        control: Control,
        channel: ChannelConfig,
        host: str,
        fetch: Fetch,
    ):
        """Args:
        parts, groups, telemetry: of the run.
        schedule: the free one: what several processes do cannot be recorded.
        control: line to the supervisor, which tells the others where the learner listens.
        channel: of all connections.
        host: to listen on.
        fetch: brings parameters to this host.
        """
        del schedule
        self._fetch = fetch
        self._config = parts.config
        self._groups = groups
        self._telemetry = telemetry
        self._control = control
        self._session = secrets.token_hex(8)
        """Of this start of the learner."""
        self._codec = segment_codec(parts.blueprint, groups)
        self._snapshots: Mapping[str, GroupSnapshot] = {}
        self._may_begin = threading.Event()
        self._is_closed = False
        self._listener = Listener(host, 0, channel, self._serve, name="learner")

    def make_store(self, on_acknowledged: Callable[[int], None]) -> WeightStore:
        """See `Crew.make_store`."""
        self._store = RemoteWeightStore(
            on_acknowledged=on_acknowledged,
            trainable=self._config.optimizer.trainable,
            fetch=self._fetch,
        )
        return self._store

    def attach(self, queue: TrajectoryQueue) -> None:
        """See `Crew.attach`. From now on the others know where the learner is.

        Counters of the run that is continued have been restored by now.
        """
        self._service = QueueService(queue, self._codec)
        self._sink = make_sink(self._telemetry)
        # Policy servers report a moment later; a record before that has it all the same.
        self._telemetry.recorder.add("serving/recompiles", 0, Total)
        self._control.on_restarts = self._note_restarts
        self._listener.start()
        self._control.tell("listening", address=list(self._listener.address), session=self._session)

    def programs(self, snapshots: Mapping[str, GroupSnapshot]) -> Sequence[Program]:
        """See `Crew.programs`."""
        self._snapshots = snapshots
        self._may_begin.set()
        return ()

    def close(self) -> None:
        """See `Crew.close`."""
        self._is_closed = True
        self._may_begin.set()
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        """A process, in a thread of its own, until it is lost."""
        try:
            hello = connection.receive()
            if read_text(hello.fields, "session") != self._session:
                raise FrameError("it is of another session")
            index = read_int(hello.fields, "index")
            if hello.kind == SIMULATOR and index < self._config.simulation.num_simulators:
                self._serve_simulator(connection, index)
            elif hello.kind == SERVER and index < self._config.serving.num_servers:
                self._serve_server(connection, index)
            else:
                raise FrameError(f"{hello.kind!r} {index} is no process of this run")
        except FrameError as error:
            _LOG.error("%s: %s; the connection is closed", connection.peer, error)
        finally:
            connection.close()

    def _serve_simulator(self, connection: Connection, index: int) -> None:
        # A simulator that is lost meanwhile is noticed when it is welcomed.
        self._may_begin.wait()
        if self._is_closed:
            return
        names = tuple(group_name(i) for i in groups_of(index, self._config.simulation))
        welcome = WelcomeCodec(self._groups, names)

        def send_welcome(newest: Mapping[str, SegmentInfo]) -> None:
            put = {
                name: GroupSnapshot(next_segment=info.next_segment, end_state=info.end_state)
                for name, info in newest.items()
            }
            connection.send(welcome.encode({**self._snapshots, **put}))

        handlers = self._telemetry_handlers(connection)
        self._service.serve(connection, names, welcome=send_welcome, others=handlers)

    def _serve_server(self, connection: Connection, index: int) -> None:
        handlers = self._telemetry_handlers(connection)
        is_relayed = weights_parent(index, self._config.runtime.weights_fanout) is not None
        self._store.serve(
            connection, name=f"server_{index}", is_relayed=is_relayed, others=handlers
        )

    def _telemetry_handlers(self, connection: Connection) -> Handlers:
        _LOG.info("%s has joined session %s", connection.peer, self._session)
        return telemetry_handlers(self._sink, connection, self._telemetry.tracer.clock)

    def _note_restarts(self, restarts: Mapping[str, int]) -> None:
        for role, count in restarts.items():
            self._telemetry.recorder.add(f"faults/restarts/{role}", count, Last)
