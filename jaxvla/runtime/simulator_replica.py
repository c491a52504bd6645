"""A simulator in a process of its own.

consumes    the learner's welcome and tickets; answers of the policy servers
produces    trajectories and metrics, to the learner
waits for   a learner, the policy servers of its session, then what a simulator waits for
unblocked by  the supervisor, the learner, the policy servers
"""

import contextlib
import dataclasses
import logging
import pathlib
import threading
from collections.abc import Iterator

from jaxvla.assignment import GREEDY, ROUND_ROBIN
from jaxvla.config import ExperimentConfig
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.control import CONNECT_TIMEOUT_S, Control
from jaxvla.runtime.crew import make_simulator
from jaxvla.runtime.groups import Groups, group_name, groups_of
from jaxvla.runtime.policy_servers import make_router
from jaxvla.runtime.remote_schemas import inference_schema, segment_codec
from jaxvla.runtime.remote_telemetry import ReplicaTelemetry
from jaxvla.runtime.replica_spec import SIMULATOR, ReplicaSpec
from jaxvla.runtime.sessions import Session, sessions
from jaxvla.runtime.welcome import WelcomeCodec
from jaxvla.serving.remote_client import RemoteInferenceClient, ServerLink
from jaxvla.serving.routing import RoutedClient
from jaxvla.simulation.group import EnvGroup
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.remote_queue import RemoteQueue

_LOG = logging.getLogger("jaxvla.simulation")


class SimulatorReplica:
    """Compiles once; then one simulator program per session."""

    def __init__(
        self, spec: ReplicaSpec, blueprint: Blueprint, control: Control, channel: ChannelConfig
    ):
        """Args:
        spec: of this process.
        blueprint: with devices of its own.
        control: line to the supervisor.
        channel: of all connections.
        """
        self._spec = spec
        self._config = blueprint.config
        self._control = control
        self._channel = channel
        self._parts = Parts(blueprint)
        self._telemetry = ReplicaTelemetry("simulation", is_tracing=self._config.telemetry.trace)
        log_dir = pathlib.Path(spec.workdir) / "logs"
        self._groups = Groups(self._parts, log_dir=log_dir, recorder=self._telemetry.recorder)
        places = groups_of(spec.index, self._config.simulation)
        self._names = tuple(group_name(index) for index in places)
        self._welcome = WelcomeCodec(self._groups, self._names)
        self._codec = segment_codec(blueprint, self._groups)
        self._schema = inference_schema(blueprint)

    def run(self) -> None:
        """Until a stop is asked for."""
        for stepper in self._groups.steppers:
            stepper.compile()
        for session in sessions(self._control):
            try:
                self._run(session)
            except ConnectionLostError as error:
                _LOG.warning("session %s: %s", session.name, error)

    def _run(self, session: Session) -> None:
        """One session.

        Raises:
          ConnectionLostError: the learner was lost before the simulator could begin.
          ProgramFailedError: the simulator failed.
        """
        hello = {"session": session.name, "index": self._spec.index}
        with connect(
            session.learner, self._channel, name=self._spec.name, timeout_s=CONNECT_TIMEOUT_S
        ) as connection:
            connection.send(Frame(kind=SIMULATOR, fields=hello))
            with _closing_at_the_end_of(session, connection):
                snapshots = self._welcome.decode(connection.receive())
                if self._wait_for_servers(session):
                    self._simulate(session, connection, snapshots)

    def _wait_for_servers(self, session: Session) -> bool:
        """False when the session is over before all of its policy servers are there."""
        wanted = set(self._live(session))
        directory = self._control.wait_for(
            lambda known: known.session != session.name or wanted <= known.servers.keys()
        )
        return directory is not None and directory.session == session.name

    def _simulate(
        self, session: Session, connection: Connection, snapshots: dict[str, GroupSnapshot]
    ) -> None:
        queue = RemoteQueue(connection, self._codec)
        links = [self._link(session, index) for index in self._live(session)]
        groups = self._groups.training(self._spec.index)
        simulator = make_simulator(
            self._parts,
            self._spec.index,
            groups=groups,
            clients=self._clients(groups, links),
            queue=queue,
            recorder=self._telemetry.recorder,
            meter=self._telemetry.meter,
        )
        simulator.restore(snapshots)

        def receive() -> None:
            queue.run(self._telemetry.handlers)
            session.lose()

        def close() -> None:
            for link in links:
                link.close("the session is over")
            queue.close()

        receiver = threading.Thread(target=receive, name="simulation/receive", daemon=True)
        receiver.start()
        for link in links:
            link.start()
        meter, grace_s = self._telemetry.meter, self._config.runtime.grace_s / 2
        with self._telemetry.forwarding(connection):
            session.run(simulator, meter, close=close, grace_s=grace_s)
        receiver.join()

    def _live(self, session: Session) -> list[int]:
        """Policy servers that there are."""
        every = range(self._config.serving.num_servers)
        return [index for index in every if index not in session.given_up]

    def _link(self, session: Session, index: int) -> ServerLink:
        return ServerLink(
            lambda: self._control.server(session.name, index),
            self._channel,
            self._schema,
            name=self._spec.name,
            session=session.name,
            patience_s=self._config.simulation.lease_s,
        )

    def _clients(self, groups: list[EnvGroup], links: list[ServerLink]) -> list[RoutedClient]:
        router = make_router(_served_by(self._config, len(links)))
        return [
            RoutedClient(
                [RemoteInferenceClient(link, group.name) for link in links],
                router,
                rows=group.num_envs,
            )
            for group in groups
        ]


@contextlib.contextmanager
def _closing_at_the_end_of(session: Session, connection: Connection) -> Iterator[None]:
    """While the block runs, the end of the session closes a connection that waits."""

    def close() -> None:
        session.is_over.wait()
        connection.close()

    thread = threading.Thread(target=close, name="simulation/session", daemon=True)
    thread.start()
    try:
        yield
    finally:
        session.is_over.set()
        thread.join()


def _served_by(config: ExperimentConfig, num_servers: int) -> ExperimentConfig:
    """The config when some policy servers will not come back: the others share their groups."""
    if num_servers == config.serving.num_servers:
        return config
    is_greedy = config.serving.assignment == GREEDY
    assignment = GREEDY if is_greedy else ROUND_ROBIN
    serving = dataclasses.replace(config.serving, num_servers=num_servers, assignment=assignment)
    return dataclasses.replace(config, serving=serving)
