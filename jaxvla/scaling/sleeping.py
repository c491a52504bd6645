"""An env and a policy whose stages take the time of an accelerator's, and no processor's.

Plug-ins for whole runs of any `runtime.kind`: programs, queue, connections and weights are those of
a training, and the functions that they call sleep on the host before they answer. So what a
runtime costs is seen on a machine whose processor cores would be busy with the real stages. What
`scaling.emulation` does in emulated time within one process is done here in real time.
"""

import time
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.config import ConfigError, EnvConfig, override
from jaxvla.envs.base import EnvState
from jaxvla.models.pi import Encoding, PiPolicy
from jaxvla.models.pi_config import PiConfig
from jaxvla.types import EnvObservation, EnvSpec, Observation, Params, PolicySample

_LIMIT = 50
"""Chunks of an episode."""


@dataclass(kw_only=True, slots=True)
class SleepingEnvConfig(EnvConfig):
    """An env without content."""

    name: str = "jaxvla.scaling.sleeping:SleepingEnv"
    image_size: int = 32
    """Pixels per side of its camera; observations cross to the policy server at full size."""
    chunk_s: float = 0.2
    """Seconds that a group takes for an action chunk, whatever its size."""

    def validate(self) -> None:
        """Raises ConfigError on a time that is none."""
        _require_seconds("env.chunk_s", self.chunk_s)


@dataclass(kw_only=True, slots=True)
class SleepingPiConfig(PiConfig):
    """A pi model that takes its time."""

    name: str = "jaxvla.scaling.sleeping:SleepingPolicy"
    forward_s: float = 0.05
    """Seconds of an inference, whatever its rows."""
    forward_row_s: float = 0.001
    """The same, of every row on top."""
    train_row_s: float = 0.001
    """Seconds of training for every row of a minibatch."""

    def validate(self) -> None:
        """Raises ConfigError on a time that is none."""
        PiConfig.validate(self)
        for name in ("forward_s", "forward_row_s", "train_row_s"):
            _require_seconds(f"model.{name}", getattr(self, name))


@flax.struct.dataclass(kw_only=True)
class SleepingState(EnvState):
    """A world in which nothing happens."""


class SleepingEnv:
    """Implements DeviceEnv. Episodes end by their time limit alone."""

    task_ids = (0,)

    def __init__(self, config: SleepingEnvConfig):
        self.config = config
        self.spec = EnvSpec(
            cameras=("dark",),
            image_size=config.image_size,
            state_dim=1,
            state_low=(0.0,),
            state_high=(1.0,),
            action_dim=2,
            action_names=("x", "y"),
            tasks=("wait",),
            instructions=("wait",),
            max_episode_steps=(_LIMIT * config.num_executed,),
            control_hz=10.0,
        )

    def reset(self, key: jax.Array, task: jax.Array) -> SleepingState:
        """See `DeviceEnv.reset`."""
        del key
        off = jnp.zeros((), bool)
        return SleepingState(
            task=jnp.asarray(task, jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
            reward=jnp.zeros(()),
            terminated=off,
            truncated=off,
            success=off,
            contact_overflow=jnp.zeros((), jnp.int32),
        )

    def step(self, state: SleepingState, action: jax.Array) -> SleepingState:
        """The reward is 1 for no action and falls with its square: there is a gradient."""
        num_steps = state.num_steps + 1
        return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
            num_steps=num_steps,
            reward=1.0 - jnp.mean(jnp.square(action)),
            truncated=num_steps >= self.spec.max_episode_steps[0],
        )

    def observe(self, states: SleepingState) -> EnvObservation:
        """Takes the time of a chunk: groups observe once after each."""
        rows, size = len(states.num_steps), self.config.image_size
        zero = asleep(self.config.chunk_s, states.num_steps)
        return EnvObservation(
            images=jnp.broadcast_to(zero.astype(jnp.uint8), (rows, 1, size, size, 3)),
            state=jnp.zeros((rows, 1)),
            instruction=self.instruction_ids(states),
        )

    def instruction_ids(self, states: SleepingState) -> jax.Array:
        """See `DeviceEnv.instruction_ids`."""
        return states.task

    def is_finite(self, state: SleepingState) -> jax.Array:
        """See `DeviceEnv.is_finite`."""
        del state
        return jnp.ones((), bool)

    def expert_action(self, state: SleepingState) -> jax.Array:
        """Nobody knows better.

        Raises:
          ValueError: always.
        """
        del state
        raise ValueError("nothing can be imitated in the sleeping env")


class SleepingPolicy(PiPolicy):
    """Implements Policy: what a pi model answers, later."""

    def __init__(self, config: SleepingPiConfig, normalizer: Any):
        super().__init__(config, normalizer)
        self._times = config

    def act(
        self, params: Params, observation: Observation, keys: jax.Array, explore: bool
    ) -> PolicySample:
        """See `Policy.act`."""
        sample = super().act(params, observation, keys, explore)
        rows = len(observation.state)
        zero = asleep(self._times.forward_s + rows * self._times.forward_row_s, sample.log_prob)
        # Every output: nobody shall have any of them before.
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), sample)

    def evaluate(
        self, params: Params, encoding: Encoding, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `Policy.evaluate`."""
        log_prob, entropy, value = super().evaluate(params, encoding, trace)
        zero = asleep(len(log_prob) * self._times.train_row_s, jax.lax.stop_gradient(log_prob))
        return log_prob + zero, entropy, value


def asleep(seconds: float, after: jax.Array) -> jax.Array:
    """float32 [], 0, when `seconds` have passed after `after` was there. The host sleeps."""

    def sleep(_: Any) -> np.ndarray:
        _sleep(seconds)
        return np.zeros((), np.float32)

    return jax.pure_callback(sleep, jax.ShapeDtypeStruct((), np.float32), after)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _require_seconds(name: str, value: float) -> None:
    if not 0 <= value <= 60:
        raise ConfigError(name, value, "must be in [0, 60] s", override(name, 0.1))
