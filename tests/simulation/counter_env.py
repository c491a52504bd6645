"""A device env whose episodes do what the actions say; compiles at once."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.config import EnvConfig
from jaxvla.envs.base import EnvState
from jaxvla.types import EnvObservation, EnvSpec

WALK, SUCCEED, FAIL, EXPLODE = 0.0, 0.25, 0.5, 0.75
"""First component of an action: what the control step does. The second one is its reward."""


@flax.struct.dataclass(kw_only=True)
class CounterState(EnvState):
    """A number drawn at reset, and the sum of the rewards of the episode."""

    identity: jax.Array
    """float32 [], tells episodes apart."""
    total: jax.Array
    """float32 []."""


class CounterEnv:
    """Implements DeviceEnv. Pictures hold the step count, the state vector all the rest."""

    config = EnvConfig(name="counter")
    task_ids = (0, 1)
    spec = EnvSpec(
        cameras=("eye",),
        image_size=2,
        state_dim=2,
        state_low=(0.0, 0.0),
        state_high=(1.0, 1.0),
        action_dim=2,
        action_names=("event", "reward"),
        tasks=("short", "long"),
        instructions=("count to three", "count to five"),
        max_episode_steps=(3, 5),
        control_hz=10.0,
    )

    def reset(self, key: jax.Array, task: jax.Array) -> CounterState:
        off = jnp.zeros((), bool)
        return CounterState(
            identity=jax.random.uniform(key),
            total=jnp.zeros(()),
            task=jnp.asarray(task, jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
            reward=jnp.zeros(()),
            terminated=off,
            truncated=off,
            success=off,
            contact_overflow=jnp.zeros((), jnp.int32),
        )

    def step(self, state: CounterState, action: jax.Array) -> CounterState:
        event, reward = action
        num_steps = state.num_steps + 1
        terminated = (event == SUCCEED) | (event == FAIL)
        limit = jnp.asarray(self.spec.max_episode_steps)[state.task]
        return state.replace(
            num_steps=num_steps,
            total=jnp.where(event == EXPLODE, jnp.nan, state.total + reward),
            reward=reward,
            terminated=terminated,
            truncated=~terminated & (num_steps >= limit),
            success=event == SUCCEED,
        )

    def observe(self, states: CounterState) -> EnvObservation:
        E = len(states.num_steps)
        pixels = states.num_steps.astype(jnp.uint8)[:, None, None, None, None]
        return EnvObservation(
            images=jnp.broadcast_to(pixels, (E, 1, 2, 2, 3)),
            state=jnp.stack([states.identity, states.total], -1),
            instruction=self.instruction_ids(states),
        )

    def instruction_ids(self, states: CounterState) -> jax.Array:
        return states.task

    def is_finite(self, state: CounterState) -> jax.Array:
        return jnp.isfinite(state.total)

    def expert_action(self, state: CounterState) -> jax.Array:
        return jnp.asarray([SUCCEED, 1.0])
