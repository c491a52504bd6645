"""The simulators and policy servers of a run, as the controller sees them.

`LocalCrew` runs them as programs of the controller's process, `runtime.remote_crew` leaves them
to processes of their own. The controller's part is the same: a weight store that they pull from,
a queue that they fill, and the point from which they go on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jaxvla import rng
from jaxvla.config import ExperimentConfig
from jaxvla.runtime.build import Parts
from jaxvla.runtime.groups import Groups, groups_of
from jaxvla.runtime.policy_servers import PolicyServers
from jaxvla.runtime.program import Program
from jaxvla.runtime.telemetry import Telemetry
from jaxvla.serving.adaptive import Tuner
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.routing import RoutedClient
from jaxvla.simulation.group import EnvGroup
from jaxvla.simulation.simulator import GroupSnapshot, Simulator
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Recorder
from jaxvla.transport.base import TrajectoryQueue, TrajectorySink, WeightStore
from jaxvla.transport.in_process import InProcessWeightStore
from jaxvla.transport.schedule import FREE_SERVER, Schedule, ServerSchedule


class Crew(Protocol):
    """What the controller needs of it. Its methods are called in this order, once each."""

    def make_store(self, on_acknowledged: Callable[[int], None]) -> WeightStore:
        """The way of weights to the policy servers; see `InProcessWeightStore`."""
        ...

    def attach(self, queue: TrajectoryQueue) -> None:
        """From now on policy servers may pull weights."""
        ...

    def programs(self, snapshots: Mapping[str, GroupSnapshot]) -> Sequence[Program]:
        """Those of this process, to be run beside the learner. Others may begin now.

        Args:
          snapshots: where env groups continue, by name; others begin anew.
        """
        ...

    def close(self) -> None:
        """Ends what does not run in this process. May be called at any time, more than once."""
        ...


class LocalCrew:
    """Programs of this process. Implements Crew."""

    def __init__(self, parts: Parts, groups: Groups, telemetry: Telemetry, schedule: Schedule):
        """Args:
        parts: with compiled samplers.
        groups: with compiled steppers.
        telemetry: of the run.
        schedule: of a run that is recorded or replayed.
        """
        self._parts = parts
        self._groups = groups
        self._telemetry = telemetry
        self._schedule = schedule

    def make_store(self, on_acknowledged: Callable[[int], None]) -> WeightStore:
        """See `Crew.make_store`."""
        self._store = InProcessWeightStore(
            on_acknowledged=on_acknowledged,
            trainable=self._parts.config.optimizer.trainable,
            schedule=self._schedule,
        )
        return self._store

    def attach(self, queue: TrajectoryQueue) -> None:
        """See `Crew.attach`."""
        self._queue = queue
        self._servers = PolicyServers(
            self._parts,
            make_batcher=lambda schedule: make_batcher(self._parts.config, schedule),
            store=self._store,
            recorder=self._telemetry.recorder,
            meter=self._telemetry.meters["serving"],
            schedule=self._schedule,
        )

    def programs(self, snapshots: Mapping[str, GroupSnapshot]) -> Sequence[Program]:
        """See `Crew.programs`."""
        num_simulators = self._parts.config.simulation.num_simulators
        return (
            *self._servers.programs,
            *(self._simulator(index, snapshots) for index in range(num_simulators)),
        )

    def _simulator(self, index: int, snapshots: Mapping[str, GroupSnapshot]) -> Simulator:
        groups = self._groups.training(index)
        simulator = make_simulator(
            self._parts,
            index,
            groups=groups,
            clients=self._servers.clients(groups),
            queue=self._queue,
            recorder=self._telemetry.recorder,
            meter=self._telemetry.meters["simulation"],
        )
        simulator.restore(snapshots)
        return simulator

    def close(self) -> None:
        """See `Crew.close`. The programs are closed by who runs them."""


def make_simulator(
    parts: Parts,
    index: int,
    *,
    groups: list[EnvGroup],
    clients: list[RoutedClient],
    queue: TrajectorySink,
    recorder: Recorder,
    meter: ActivityMeter,
) -> Simulator:
    """Simulator `index` of a run.

    Args:
      parts: of the run.
      index: from 0.
      groups: its groups.
      clients: one for each.
      queue: where trajectories go.
      recorder, meter: of the simulation role.
    """
    simulation = parts.config.simulation
    return Simulator(
        groups=groups,
        clients=clients,
        queue=queue,
        key=rng.stream(parts.root, "simulator", 0),
        segment_length=simulation.segment_length,
        overlap_rollout=parts.config.schedule.overlap_rollout,
        recorder=recorder,
        meter=meter,
        group_size=simulation.group_size,
        first_group=groups_of(index, simulation)[0],
    )


def make_batcher(config: ExperimentConfig, schedule: ServerSchedule = FREE_SERVER) -> Batcher:
    """Dynamic batching, or lockstep: one batch when every client has asked.

    A replay has no use for timers.
    """
    serving, simulation = config.serving, config.simulation
    total = simulation.envs_per_group * simulation.num_groups
    is_dynamic = config.schedule.overlap_rollout and not schedule.is_replay
    deadline_s = serving.deadline_ms / 1e3 or float("inf")
    tuner = Tuner(
        buckets=serving.buckets, max_rows=serving.max_batch, longest_wait_s=deadline_s / 2
    )
    return Batcher(
        trigger_rows=serving.trigger_size if is_dynamic else serving.max_batch,
        max_wait_s=serving.max_wait_ms / 1e3 if is_dynamic else float("inf"),
        max_rows=serving.max_batch,
        capacity_rows=max(total, serving.max_batch),
        deadline_s=float("inf") if schedule.is_replay else deadline_s,
        tuner=tuner if is_dynamic and serving.batching == "adaptive" else None,
        schedule=schedule,
    )
