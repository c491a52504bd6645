"""A device env in which one can read off every number what the expert did; compiles at once."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.config import EnvConfig
from jaxvla.envs.base import EnvState
from jaxvla.types import EnvObservation, EnvSpec

LIMITS = (4, 6)
"""Control steps per task."""
MAX_GOAL = 7
"""Some episodes run out of time."""
IMAGE_SIZE = 4


def expert_move(num_steps: Any) -> Any:
    """First component of the expert's action; from step 7 on it is out of range."""
    return 0.25 * num_steps - 0.5


@flax.struct.dataclass(kw_only=True)
class WalkState(EnvState):
    """Where one is, and when to stop."""

    identity: jax.Array
    """float32 [], tells episodes apart."""
    place: jax.Array
    """float32 [], sum of the moves."""
    goal: jax.Array
    """int32 [], control steps that the task takes."""


class WalkEnv:
    """Implements DeviceEnv. An action is (move, grip); closing the grip ends the episode.

    The state vector is (identity, control steps, place, goal). Pictures hold the task.
    """

    config = EnvConfig(name="walk")
    task_ids = (0, 1)
    spec = EnvSpec(
        cameras=("eye",),
        image_size=IMAGE_SIZE,
        state_dim=4,
        state_low=(0.0, 0.0, -9.0, 1.0),
        state_high=(1.0, 9.0, 9.0, 9.0),
        action_dim=2,
        action_names=("move", "grip"),
        tasks=("short", "long"),
        instructions=("walk", "walk far"),
        max_episode_steps=LIMITS,
        control_hz=10.0,
    )

    def reset(self, key: jax.Array, task: jax.Array) -> WalkState:
        keys = jax.random.split(key)
        off = jnp.zeros((), bool)
        return WalkState(
            identity=jax.random.uniform(keys[0]),
            place=jnp.zeros(()),
            goal=jax.random.randint(keys[1], (), 1, MAX_GOAL + 1),
            task=jnp.asarray(task, jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
            reward=jnp.zeros(()),
            terminated=off,
            truncated=off,
            success=off,
            contact_overflow=jnp.zeros((), jnp.int32),
        )

    def step(self, state: Any, action: jax.Array) -> Any:
        move, grip = action
        num_steps = state.num_steps + 1
        terminated = grip == 1.0
        return state.replace(
            num_steps=num_steps,
            place=state.place + move,
            terminated=terminated,
            truncated=~terminated & (num_steps >= jnp.asarray(LIMITS)[state.task]),
            success=terminated,
        )

    def observe(self, states: Any) -> EnvObservation:
        E = len(states.num_steps)
        pixels = states.task.astype(jnp.uint8)[:, None, None, None, None]
        columns = (states.identity, states.num_steps, states.place, states.goal)
        return EnvObservation(
            images=jnp.broadcast_to(pixels, (E, 1, IMAGE_SIZE, IMAGE_SIZE, 3)),
            state=jnp.stack([x.astype(jnp.float32) for x in columns], -1),
            instruction=self.instruction_ids(states),
        )

    def instruction_ids(self, states: Any) -> jax.Array:
        return states.task

    def is_finite(self, state: Any) -> jax.Array:
        return jnp.isfinite(state.place)

    def expert_action(self, state: Any) -> jax.Array:
        is_last = state.num_steps + 1 >= state.goal
        return jnp.stack([expert_move(state.num_steps), is_last.astype(jnp.float32)])


class GroundedWalkEnv(WalkEnv):
    """Implements GroundedEnv: the instruction names the pixel of its goal."""

    def scene(self, key: jax.Array, task: jax.Array) -> WalkState:
        state: Any = self.reset(key, task)
        return state.replace(place=jnp.float32(-1.0))

    def observe_target(self, states: Any) -> tuple[EnvObservation, jax.Array]:
        pixel = jax.nn.one_hot(states.goal, IMAGE_SIZE**2, dtype=bool)
        mask = pixel.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        return self.observe(states), mask
