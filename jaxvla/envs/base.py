"""The environment protocols.

A device env is a set of pure functions of one world; the env group vmaps and jits them. Its
worlds all have the same shapes, so an env whose tasks need several scenes is a `SceneFamily`: a
device env per scene. A host env runs simulators in worker processes; see
`jaxvla.envs.libero_host`.
"""

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax

from jaxvla.config import EnvConfig
from jaxvla.types import EnvObservation, EnvSpec


@flax.struct.dataclass(kw_only=True)
class EnvState:
    """One world between control steps. Envs subclass it with their physics arrays."""

    task: jax.Array
    """int32 [], task id of the running episode."""
    num_steps: jax.Array
    """int32 [], control steps of the running episode so far."""
    reward: jax.Array
    """float32 [], of the last control step."""
    terminated: jax.Array
    """bool [], the episode ended by success or failure."""
    truncated: jax.Array
    """bool [], the episode reached its time limit without terminating."""
    success: jax.Array
    """bool [], the task is solved."""
    contact_overflow: jax.Array
    """int32 [], contacts of the running episode that exceeded the physics' fixed buffers."""


@runtime_checkable
class DeviceEnv(Protocol):
    """Pure functions of one world (no batch axis). All are traced under vmap and jit."""

    spec: EnvSpec
    task_ids: tuple[int, ...]
    """Tasks of the spec that `reset` can start."""
    config: EnvConfig
    """Resolved: no -1 left."""

    def reset(self, key: jax.Array, task: jax.Array) -> EnvState:
        """Starts an episode of `task` (int32 []); everything random comes from `key`."""
        ...

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Runs one control step with `action`, float32 [A], clipped to [-1, 1]."""
        ...

    def observe(self, states: EnvState) -> EnvObservation:
        """Renders a batch of worlds: leading axis [E] on `states` and on the result."""
        ...

    def instruction_ids(self, states: EnvState) -> jax.Array:
        """int32 [E], index into `spec.instructions` of each running episode."""
        ...

    def is_finite(self, state: EnvState) -> jax.Array:
        """bool [], False when the physics of this world has blown up."""
        ...

    def expert_action(self, state: EnvState) -> jax.Array:
        """float32 [A], a scripted action that uses the full state."""
        ...


@runtime_checkable
class FixedStartsEnv(DeviceEnv, Protocol):
    """A device env whose benchmark numbers the episodes of a task."""

    def reset_to(self, key: jax.Array, task: jax.Array, seed: jax.Array) -> EnvState:
        """Starts episode `seed` (uint32 []) of a task; what is left to chance comes from `key`."""
        ...


@runtime_checkable
class SceneFamily(Protocol):
    """Device envs of one spec, each for the tasks that share a scene."""

    spec: EnvSpec
    config: EnvConfig
    """Resolved: no -1 left."""
    scenes: tuple[DeviceEnv, ...]
    """Their `task_ids` are a partition of the spec's."""


def device_scenes(env: Any) -> tuple[DeviceEnv, ...]:
    """The device envs that an env plug-in consists of; none if it is a host env."""
    if isinstance(env, SceneFamily):
        return env.scenes
    return (env,) if isinstance(env, DeviceEnv) else ()


@runtime_checkable
class GroundedEnv(DeviceEnv, Protocol):
    """A device env that knows which pixels its instructions speak of."""

    def scene(self, key: jax.Array, task: jax.Array) -> EnvState:
        """A random world to look at, not to step: no physics has settled it."""
        ...

    def observe_target(self, states: EnvState) -> tuple[EnvObservation, jax.Array]:
        """`observe`, and bool [E, C, h, w]: visible pixels of what each instruction names."""
        ...
