"""The policy servers of a run, and the clients that the simulators reach them by."""

import functools
from collections.abc import Callable, Sequence

from jaxvla.assignment import parse_assignment
from jaxvla.config import ExperimentConfig
from jaxvla.runtime.build import Parts
from jaxvla.runtime.groups import group_name
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.serving.server import PolicyServer
from jaxvla.simulation.group import EnvGroup
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Recorder
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
        recorder: Recorder,
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
        self._router = make_router(parts.config, schedule)
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
        return [
            RoutedClient(
                [InferenceClient(batcher, group.name) for batcher in self._batchers],
                self._router,
                rows=group.num_envs,
            )
            for group in groups
        ]


def make_router(config: ExperimentConfig, schedule: Schedule = FREE) -> Router:
    """Who asks which policy server, as `serving.assignment` says.

    Args:
      config: resolved.
      schedule: of a run that is recorded or replayed.
    """
    num_groups, num_servers = config.simulation.num_groups, config.serving.num_servers
    servers = parse_assignment(
        config.serving.assignment, num_groups=num_groups, num_servers=num_servers
    )
    fixed = None
    if servers is not None:
        fixed = {group_name(index): server for index, server in enumerate(servers)}
    return Router(num_servers, fixed, schedule)
