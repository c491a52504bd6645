"""Makes env groups for whichever kind of env the run has."""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxvla import rng
from jaxvla.envs.base import DeviceEnv
from jaxvla.runtime.build import Parts
from jaxvla.simulation.demonstrator import Demonstrator
from jaxvla.simulation.group import DeviceEnvGroup, DeviceStepper, EnvGroup
from jaxvla.simulation.host_group import HostEnvGroup
from jaxvla.telemetry.metrics import MetricRecorder


class Groups:
    """Factory of env groups that share compiled functions."""

    def __init__(self, parts: Parts, *, log_dir: pathlib.Path, recorder: MetricRecorder):
        self._parts = parts
        self._env = parts.blueprint.env
        self._config = parts.config
        self._log_dir = log_dir
        self._recorder = recorder

    @property
    def is_device_env(self) -> bool:
        """The env is a set of pure functions, not worker processes."""
        return isinstance(self._env, DeviceEnv)

    @functools.cached_property
    def stepper(self) -> DeviceStepper:
        """Shared functions of a device env."""
        return DeviceStepper(
            self._env,
            self._parts.blueprint.table,
            num_envs=self._config.simulation.envs_per_group,
            num_executed=self._config.env.num_executed,
            mesh=self._parts.meshes["simulation"],
            observe_final=self._config.algorithm.reads_final_values(),
        )

    @functools.cached_property
    def demonstrator(self) -> Demonstrator:
        """The env's expert."""
        return Demonstrator(
            self._env,
            self._parts.blueprint.table,
            num_envs=self._config.simulation.envs_per_group,
            action_horizon=self._config.model.action_horizon,
            noise_std=self._config.warm_start.noise_std,
            mesh=self._parts.meshes["simulation"],
        )

    def training(self) -> list[EnvGroup]:
        """The simulator's groups."""
        return [self._make(f"group_{i}", i) for i in range(self._config.simulation.num_groups)]

    def evaluation(self) -> EnvGroup:
        """A group for one evaluation. It repeats the same episodes whatever the run's seed."""
        return self._make("evaluation", 0, root=rng.root_key(self._config.evaluation.seed))

    def targets(self, names: Iterable[str]) -> dict[str, Any]:
        """What a checkpoint must hold of the named groups: host arrays like their states."""
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._state_struct())
        return dict.fromkeys(names, state)

    def _state_struct(self) -> Any:
        if self.is_device_env:
            return jax.eval_shape(self.stepper.draw, jax.random.key(0))
        return HostEnvGroup.state_struct(self._config.simulation.envs_per_group)

    def _make(self, name: str, index: int, root: jax.Array | None = None) -> EnvGroup:
        if self.is_device_env:
            root = self._parts.root if root is None else root
            return DeviceEnvGroup(
                self.stepper, name=name, key=rng.stream(root, "simulation", index)
            )
        num_envs = self._config.simulation.envs_per_group
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
        )
