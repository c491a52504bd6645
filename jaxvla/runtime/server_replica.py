"""A policy server in a process of its own.

consumes    the weights, of the learner or of another policy server; chunk queries of the simulators
produces    answers to them; metrics, to the learner; weights, to its children if it has some
waits for   a learner, its parent if it has one, and the first weights; then what a policy server
            waits for
unblocked by  the supervisor, the learner, the parent, the simulators
"""

import contextlib
import logging
import threading

from jaxvla.cluster import weights_children, weights_parent
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.channels import own_host
from jaxvla.runtime.control import CONNECT_TIMEOUT_S, Control
from jaxvla.runtime.crew import make_batcher
from jaxvla.runtime.directory import Directory
from jaxvla.runtime.remote_schemas import inference_schema
from jaxvla.runtime.remote_telemetry import ReplicaTelemetry
from jaxvla.runtime.replica_spec import SERVER, ReplicaSpec
from jaxvla.runtime.sessions import Session, sessions
from jaxvla.serving.remote import InferenceService
from jaxvla.serving.server import PolicyServer
from jaxvla.transport.channel import (
    ChannelConfig,
    Connection,
    ConnectionLostError,
    Listener,
    connect,
)
from jaxvla.transport.frames import Frame
from jaxvla.transport.weight_receiver import RemoteSubscription
from jaxvla.transport.weight_relay import CHILD, WeightRelay, child_hello

_LOG = logging.getLogger("jaxvla.serving")

_PARENT_TIMEOUT_S = 10.0
"""To connect to a parent, which listens if it is there; the others wait for this server by then."""


class ServerReplica:
    """Compiles once; then one policy server program per session."""

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
        self._blueprint = blueprint
        self._config = blueprint.config
        self._control = control
        self._channel = channel
        self._sampler = Parts(blueprint).sampler
        self._telemetry = ReplicaTelemetry("serving", is_tracing=self._config.telemetry.trace)
        self._schema = inference_schema(blueprint)
        fanout = self._config.runtime.weights_fanout
        num_servers = self._config.serving.num_servers
        self._parent = weights_parent(spec.index, fanout)
        self._has_children = bool(weights_children(spec.index, fanout, num_servers))

    def run(self) -> None:
        """Until a stop is asked for."""
        blueprint = self._blueprint
        self._sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
        for session in sessions(self._control):
            try:
                self._run(session)
            except ConnectionLostError as error:
                _LOG.warning("session %s: %s", session.name, error)

    def _run(self, session: Session) -> None:
        """One session.

        Raises:
          ConnectionLostError: the learner was lost before the server could begin.
          ProgramFailedError: the server failed.
        """
        if not self._has_parent_begun(session):
            return
        hello = {"session": session.name, "index": self._spec.index}
        with connect(
            session.learner, self._channel, name=self._spec.name, timeout_s=CONNECT_TIMEOUT_S
        ) as connection:
            connection.send(Frame(kind=SERVER, fields=hello))
            self._serve(session, connection)

    def _serve(self, session: Session, connection: Connection) -> None:
        batcher = make_batcher(self._config)
        has_weights = threading.Event()

        def staged() -> None:
            has_weights.set()
            batcher.wake()

        relay = WeightRelay(session=session.name) if self._has_children else None
        subscription = RemoteSubscription(
            connection,
            self._blueprint.params_struct(),
            self._sampler.params_shardings,
            trainable=self._config.optimizer.trainable,
            on_publish=staged,
            dial=lambda: self._dial_parent(session),
            relay=relay,
        )

        def receive() -> None:
            subscription.run(self._telemetry.handlers)
            session.lose()
            has_weights.set()

        receiver = threading.Thread(target=receive, name="serving/receive", daemon=True)
        receiver.start()
        service = InferenceService(batcher, self._schema, session=session.name)

        def serve(connection: Connection) -> None:
            hello = connection.receive()
            if relay is not None and hello.kind == CHILD:
                relay.serve(connection, hello)
            else:
                service.serve(connection, hello)

        listener = Listener(
            own_host(self._config.runtime), 0, self._channel, serve, name=self._spec.name
        )

        def close() -> None:
            # The batcher last: to clients the server is lost, not the run over. They look for it.
            service.close()
            if relay is not None:
                relay.close()
            listener.close()
            batcher.close("the session is over")
            connection.close()
            receiver.join()

        with contextlib.ExitStack() as undo:
            undo.callback(close)
            program = PolicyServer(
                name=self._spec.name,
                sampler=self._sampler,
                batcher=batcher,
                subscribe=lambda wake: subscription,
                recorder=self._telemetry.recorder,
                meter=self._telemetry.meter,
            )
            self._wait(session, has_weights)
            if session.is_over.is_set():
                return
            listener.start()
            self._control.tell("listening", address=list(listener.address), session=session.name)
            undo.pop_all()
            meter, grace_s = self._telemetry.meter, self._config.runtime.grace_s / 2
            with self._telemetry.forwarding(connection):
                session.run(program, meter, close=close, grace_s=grace_s)

    def _has_parent_begun(self, session: Session) -> bool:
        """Waits until the parent has weights, if this server has one; False if the session ends.

        Before this server has joined, so that nobody waits for it meanwhile. One that is given up
        has its children go on without it.
        """
        parent = self._parent
        if parent is None:
            return True

        def is_settled(known: Directory) -> bool:
            is_known = parent in known.servers or parent in known.given_up
            return is_known or known.session != session.name

        known = self._control.wait_for(is_settled)
        return known is not None and known.session == session.name

    def _dial_parent(self, session: Session) -> Connection:
        """Connects to the parent.

        Raises:
          ConnectionLostError: it is not there.
        """
        address = None
        if self._parent is not None:
            address = self._control.server(session.name, self._parent)
        if address is None:
            raise ConnectionLostError(f"{SERVER}_{self._parent} is not there")
        connection = connect(
            address, self._channel, name=self._spec.name, timeout_s=_PARENT_TIMEOUT_S
        )
        try:
            connection.send(child_hello(session.name))
        except ConnectionLostError:
            connection.close()
            raise
        return connection

    def _wait(self, session: Session, has_weights: threading.Event) -> None:
        """For the first weights, or the end of the session."""
        with self._control.ending(has_weights):
            has_weights.wait()
