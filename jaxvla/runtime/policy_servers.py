"""The policy servers of a run, and the clients that the simulators reach them by."""

import functools
from collections.abc import Callable, Sequence

from jaxvla.assignment import parse_assignment
from jaxvla.runtime.build import Parts
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.serving.server import PolicyServer
from jaxvla.simulation.group import EnvGroup
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.transport.base import WeightStore
from jaxvla.transport.schedule import FREE, Schedule, ServerSchedule


class PolicyServers:
    """`serving.num_servers` programs, each with its own batcher and weight subscription.

    Their metrics go to the same names, their time to the same meter: rates and counts add up,
    fractions are of the time of all of them together.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        make_batcher: Callable[[ServerSchedule], Batcher],
        store: WeightStore,
        recorder: MetricRecorder,
        meter: ActivityMeter,
        schedule: Schedule = FREE,
    ):
        """Subscribes every server, so that the store waits for all of them.

        Args:
          parts: with a sampler for each server.
          make_batcher: called once per server, with the server's schedule.
          store: where weights come from.
          recorder, meter: of the serving role.
          schedule: of a run that is recorded or replayed.
        """
        self._schedule = schedule
        self._serving = parts.config.serving
        names = [f"server_{index}" for index in range(len(parts.samplers))]
        schedules = [schedule.server(name) for name in names]
        self._batchers = [make_batcher(part) for part in schedules]
        self.programs = tuple(
            PolicyServer(
                name=name,
                sampler=sampler,
                batcher=batcher,
                subscribe=functools.partial(store.subscribe, name, sampler.params_shardings),
                recorder=recorder,
                meter=meter,
                schedule=part,
            )
            for name, sampler, batcher, part in zip(
                names, parts.samplers, self._batchers, schedules, strict=True
            )
        )

    def clients(self, groups: Sequence[EnvGroup]) -> list[RoutedClient]:
        """One client per env group, as `serving.assignment` says."""
        servers = parse_assignment(
            self._serving.assignment, num_groups=len(groups), num_servers=len(self.programs)
        )
        names = [group.name for group in groups]
        fixed = None if servers is None else dict(zip(names, servers, strict=True))
        router = Router(len(self.programs), fixed, self._schedule)
        return [
            RoutedClient(
                [InferenceClient(batcher, group.name) for batcher in self._batchers],
                router,
                rows=group.num_envs,
            )
            for group in groups
        ]
