"""Makes env groups for whichever kind of env the run has."""

import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxvla import rng
from jaxvla.config import SimulationConfig
from jaxvla.envs.base import device_scenes
from jaxvla.runtime.build import Parts
from jaxvla.simulation.demonstrator import Demonstrator
from jaxvla.simulation.group import DeviceEnvGroup, DeviceStepper, EnvGroup
from jaxvla.simulation.host_group import HostEnvGroup
from jaxvla.telemetry.metrics import Recorder

_PREFIX = "group_"


def group_name(index: int) -> str:
    """Of the env group at a place among those of the run."""
    return f"{_PREFIX}{index}"


def groups_of(simulator: int, config: SimulationConfig) -> range:
    """Places of a simulator's groups among those of the run."""
    size = config.num_groups // config.num_simulators
    return range(simulator * size, (simulator + 1) * size)


class Groups:
    """Factory of env groups that share compiled functions.

    Group i of a device env plays scene i mod n of its n scenes.
    """

    def __init__(self, parts: Parts, *, log_dir: pathlib.Path, recorder: Recorder):
        self._parts = parts
        self._env = parts.blueprint.env
        self._scenes = device_scenes(self._env)
        self._config = parts.config
        self._log_dir = log_dir
        self._recorder = recorder

    @property
    def is_device_env(self) -> bool:
        """The env is a set of pure functions, not worker processes."""
        return bool(self._scenes)

    @functools.cached_property
    def steppers(self) -> tuple[DeviceStepper, ...]:
        """Shared functions of a device env, one set per scene."""
        return tuple(
            DeviceStepper(
                scene,
                self._parts.blueprint.table,
                num_envs=self._config.simulation.envs_per_group,
                num_executed=self._config.env.num_executed,
                mesh=self._parts.meshes["simulation"],
                observe_final=self._config.algorithm.reads_final_values(),
                group_size=self._config.simulation.group_size,
            )
            for scene in self._scenes
        )

    @functools.cached_property
    def demonstrators(self) -> tuple[Demonstrator, ...]:
        """The env's expert in each scene, as disturbed as in a warm start."""
        return self.make_demonstrators(self._config.warm_start.noise_std)

    def make_demonstrators(self, noise_std: float) -> tuple[Demonstrator, ...]:
        """The env's expert in each scene.

        Args:
          noise_std: standard deviation of the disturbance of its actions.
        """
        return tuple(
            Demonstrator(
                scene,
                self._parts.blueprint.table,
                num_envs=self._config.simulation.envs_per_group,
                action_horizon=self._config.model.action_horizon,
                noise_std=noise_std,
                mesh=self._parts.meshes["simulation"],
            )
            for scene in self._scenes
        )

    def training(self, simulator: int) -> list[EnvGroup]:
        """The groups of one simulator."""
        places = groups_of(simulator, self._config.simulation)
        return [self._make(group_name(i), i) for i in places]

    def evaluation(self) -> Iterator[EnvGroup]:
        """Groups for one evaluation, which together play all tasks. They repeat the same
        episodes whatever the run's seed."""
        root = rng.root_key(self._config.evaluation.seed)
        for index in range(max(1, len(self._scenes))):
            yield self._make("evaluation", index, root=root)

    def targets(self, names: Iterable[str]) -> dict[str, Any]:
        """What a checkpoint must hold of the named groups: host arrays like their states."""
        return {name: self._target(int(name.removeprefix(_PREFIX))) for name in names}

    def _target(self, index: int) -> Any:
        if self._config.simulation.group_size:
            return {}  # no episode runs between trajectories
        if self.is_device_env:
            struct = jax.eval_shape(self._stepper(index).draw, jax.random.key(0))
        else:
            struct = HostEnvGroup.state_struct(self._config.simulation.envs_per_group)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), struct)

    def _stepper(self, index: int) -> DeviceStepper:
        return self.steppers[index % len(self._scenes)]

    def _make(self, name: str, index: int, root: jax.Array | None = None) -> EnvGroup:
        if self.is_device_env:
            root = self._parts.root if root is None else root
            key = rng.stream(root, "simulation", index)
            return DeviceEnvGroup(self._stepper(index), name=name, key=key)
        simulation = self._config.simulation
        num_envs = simulation.envs_per_group
        return HostEnvGroup(
            name=name,
            spec=self._env.spec,
            table=self._parts.blueprint.table,
            make_pool=lambda count: self._env.make_pool(count, self._log_dir / name),
            num_envs=num_envs,
            first_env=index * num_envs,
            num_executed=self._config.env.num_executed,
            seed=self._config.seed,
            recorder=self._recorder,
            observe_final=self._config.algorithm.reads_final_values(),
            group_size=simulation.group_size,
            num_starts=simulation.num_groups * num_envs // max(simulation.group_size, 1),
        )
