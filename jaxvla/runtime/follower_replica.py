"""A process of the learner that is not its first one.

consumes    the leader's words: trajectories, publications, checkpoints
produces    its devices' part of all of them
waits for   the leader, to be there and for its every word
unblocked by  the supervisor, the leader
"""

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

from jaxvla import multihost, rng
from jaxvla.checkpoint import CorruptCheckpointError
from jaxvla.config import ExperimentConfig
from jaxvla.learning.follower import Follower
from jaxvla.learning.learner import NonFiniteError, Progress
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.control import CONNECT_TIMEOUT_S, Control
from jaxvla.runtime.gang import BYSTANDER_S, FOLLOWER, MET, group_settings
from jaxvla.runtime.local import ProgramFailedError
from jaxvla.runtime.pretrained import CHECKPOINTS, check_initial_weights
from jaxvla.runtime.program import ProgramThreads
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.tracing import NullTracer
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.mirror import line_up
from jaxvla.transport.schema import read_text

_LOG = logging.getLogger("jaxvla.learning")

_POLL_S = 0.2
"""A signal handler cannot wake a thread, so it looks this often whether a stop was asked for."""
_STATE = "state/"


class FollowerReplica:
    """Follows one start of the leader, and ends with it."""

    def __init__(
        self,
        spec: ReplicaSpec,
        config: ExperimentConfig,
        draw: Callable[[], Blueprint],
        control: Control,
        channel: ChannelConfig,
    ):
        """Args:
        spec: of this process.
        config: not resolved.
        draw: makes the run as this process sees it, once JAX knows all devices of the learner.
        control: line to the supervisor.
        channel: of all connections.
        """
        self._spec = spec
        self._settings = config.runtime
        self._draw = draw
        self._control = control
        self._channel = channel

    def run(self) -> None:
        """Until the leader has ended, or a stop is asked for before it has begun.

        Raises:
          UsageError: settings that cannot work here.
          ConnectionLostError: the leader is gone before its last word.
          ProgramFailedError: this process's part of the work failed.
        """
        directory = self._control.wait_for(lambda known: known.gang is not None)
        if directory is None or directory.gang is None:
            return
        with connect(
            directory.gang, self._channel, name=self._spec.name, timeout_s=CONNECT_TIMEOUT_S
        ) as link:
            try:
                self._follow(link)
            except (CorruptCheckpointError, NonFiniteError) as error:
                _LOG.error("%s; the leader says so", error)
            except (ConnectionLostError, ProgramFailedError):
                if self._control.stop_requested.is_set():
                    return
                time.sleep(BYSTANDER_S)
                raise
            _wait_for_end(link)

    def _follow(self, link: Connection) -> None:
        """Meets the leader, then does what it says.

        Raises:
          CorruptCheckpointError, NonFiniteError: which all processes find alike.
        """
        hello = {"index": self._spec.index, "launch": self._spec.launch}
        link.send(Frame(kind=FOLLOWER, fields=hello))
        with _closing_on_stop(self._control, link):
            coordinator = read_text(link.receive().fields, "coordinator")
        multihost.initialize(group_settings(self._settings, self._spec.index, coordinator))
        link.send(Frame(kind=MET, fields={"process": jax.process_index()}))
        meter = ActivityMeter("learning", tracer=NullTracer())
        self._work(self._make(self._draw(), link, meter), meter)

    def _make(self, blueprint: Blueprint, link: Connection, meter: ActivityMeter) -> Follower:
        """Does what the leader does at its start and what takes all processes, in its order."""
        config, parts = blueprint.config, Parts(blueprint)
        workdir = pathlib.Path(self._spec.workdir)
        training = parts.training(config.optimizer)

        def target(record: object) -> dict[str, object]:
            del record
            return {"state": training.target()}

        line_up(link)
        with contextlib.closing(blueprint.checkpointer(workdir)) as checkpointer:
            checkpointer.check(target, within=_STATE)
        if not (workdir / CHECKPOINTS).is_dir():
            check_initial_weights(blueprint.policy, config.model, blueprint.identity)
        multihost.agree(True)
        checkpointer = blueprint.checkpointer(workdir)
        restored = checkpointer.restore(target, within=_STATE)
        training.compile(parts)
        line_up(link)
        if restored is None:
            state, progress = training.init(parts.fresh_params(training)), Progress()
        else:
            skipped = restored.record["skipped_in_a_row"]
            progress = Progress(version=restored.step, skipped_in_a_row=skipped)
            state = restored.arrays["state"]
        return Follower(
            functions=training.functions,
            state=state,
            progress=progress,
            link=link,
            trajectory=blueprint.trajectory_struct(),
            checkpointer=checkpointer,
            key=rng.stream(parts.root, "learning"),
            learning=config.learning,
            schedule=config.schedule,
            algorithm=config.algorithm,
            meter=meter,
        )

    def _work(self, follower: Follower, meter: ActivityMeter) -> None:
        """Runs the follower to its end. A stop is the leader's to carry out."""
        over = threading.Event()
        threads = ProgramThreads(follower, meter, lambda _: over.set())
        threads.start()
        while not over.wait(_POLL_S) and not self._control.stop_requested.is_set():
            pass
        if not over.is_set():
            follower.stop("shutdown")
            over.wait()  # the leader's grace counts: what is left early, it cannot save
        error = threads.error
        if isinstance(error, (ConnectionLostError, NonFiniteError)):
            raise error
        if error is not None:
            raise ProgramFailedError(follower.role, error) from error


def _wait_for_end(link: Connection) -> None:
    """Of the leader: JAX takes a process that is gone before it for one that has died."""
    with contextlib.suppress(ConnectionLostError):
        while True:
            link.receive()


@contextlib.contextmanager
def _closing_on_stop(control: Control, link: Connection) -> Iterator[None]:
    """While the block runs, a stop closes a link that waits."""
    over = threading.Event()

    def close() -> None:
        over.wait()
        if control.stop_requested.is_set():
            link.close()

    with control.ending(over):
        thread = threading.Thread(target=close, name="learning/stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
