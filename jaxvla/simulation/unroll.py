"""Pure functions that advance a batch of device-env worlds by one action chunk."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.envs.base import DeviceEnv, EnvState, FixedStartsEnv
from jaxvla.models.state_prompts import StateText
from jaxvla.types import ChunkResult, EnvObservation, Observation, stand_in


@flax.struct.dataclass(kw_only=True)
class Worlds:
    """A batch of worlds between chunks. Leading axis E."""

    env: EnvState
    episode_return: jax.Array
    """float32 [E], undiscounted reward of the running episode so far."""


@flax.struct.dataclass(kw_only=True)
class TokenTable:
    """Tokenised instructions, looked up by instruction id."""

    tokens: jax.Array
    """int32 [instructions, N]; only the prompt's head where `state_text` is to follow."""
    mask: jax.Array
    """bool [instructions, N]."""
    state_text: StateText | None = None
    """How prompts tell the state, for policies that read it there."""

    def on_device(self) -> "TokenTable":
        """The same table as jax arrays, for use inside jitted functions."""
        return jax.tree.map(jnp.asarray, self)

    def complete(self, seen: EnvObservation) -> Observation:
        """Adds the tokens of the instruction to what the env shows."""
        tokens, mask = self.tokens[seen.instruction], self.mask[seen.instruction]
        if self.state_text is not None:
            tokens, mask = self.state_text.append(tokens, mask, seen.state)
        return Observation(
            images=seen.images,
            image_mask=stand_in(np.ones(seen.images.shape[:-3], bool)),
            state=seen.state,
            tokens=tokens,
            token_mask=mask,
        )


def start_worlds(env: DeviceEnv, keys: jax.Array, tasks: jax.Array) -> Worlds:
    """Fresh episodes of given tasks (int32 [E]) from given typed keys [E]."""
    return Worlds(env=jax.vmap(env.reset)(keys, tasks), episode_return=jnp.zeros(len(tasks)))


def start_episodes(env: DeviceEnv, keys: jax.Array, tasks: jax.Array, seeds: jax.Array) -> Worlds:
    """Episode `seeds[e]` (uint32 [E]) of task `tasks[e]` (int32 [E]), for evaluation.

    Where the benchmark does not number its episodes, they are what typed keys [E] make them.
    """
    if not isinstance(env, FixedStartsEnv):
        return start_worlds(env, keys, tasks)
    return Worlds(
        env=jax.vmap(env.reset_to)(keys, tasks, seeds), episode_return=jnp.zeros(len(tasks))
    )


def draw_worlds(env: DeviceEnv, keys: jax.Array) -> Worlds:
    """Fresh episodes of tasks drawn uniformly, one per typed key [E]."""
    pairs = jax.vmap(jax.random.split)(keys)
    num_tasks = len(env.task_ids)
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_tasks))(pairs[:, 0])
    return start_worlds(env, pairs[:, 1], jnp.asarray(env.task_ids)[drawn])


def run_chunk(
    env: DeviceEnv,
    table: TokenTable,
    worlds: Worlds,
    actions: jax.Array,
    keys: jax.Array,
    *,
    observe_final: bool = True,
    restarts: bool = True,
) -> tuple[Worlds, ChunkResult, EnvState]:
    """Runs an action chunk in every world and restarts the worlds whose episode ended.

    A world stops at the control step that ends its episode; the rest of its chunk is not
    executed. A world whose physics is no longer finite is restarted and marked invalid.

    Without restarts a world stands still from there on, one that is no longer finite where it
    was before the chunk.

    Args:
      env: the env.
      table: tokenised instructions.
      worlds: [E].
      actions: float32 [E, n, A], the executed part of the chunk.
      keys: typed keys [E] for the episodes that may begin.
      observe_final: render the last state of episodes that the time limit cuts.
      restarts: a new episode follows each one that ended.

    Returns:
      The worlds to continue from, what happened, and the state after every control step
      (leading axes [E, n]; for videos).
    """
    before = worlds.env
    ran = ~(before.terminated | before.truncated)
    env_states, reward, path = jax.vmap(lambda state, chunk: _run_steps(env, state, chunk))(
        worlds.env, actions
    )
    invalid = ~jax.vmap(env.is_finite)(env_states)
    reward = jnp.where(invalid, 0.0, reward)
    terminated = env_states.terminated & ~invalid & ran
    truncated = env_states.truncated & ~invalid & ran
    episode_return = worlds.episode_return + reward

    final = _observe_if(env, table, env_states, truncated.any()) if observe_final else None
    reached = Worlds(env=env_states, episode_return=episode_return)
    if restarts:
        # Also where an episode was over before its first step.
        ended = env_states.terminated | env_states.truncated | invalid
        worlds = _where(ended, draw_worlds(env, keys), reached)
    else:
        stopped = dataclasses.replace(before, truncated=jnp.ones_like(before.truncated))
        worlds = _where(invalid, Worlds(env=stopped, episode_return=episode_return), reached)
    result = ChunkResult(
        observation=table.complete(env.observe(worlds.env)),
        final_observation=final,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        success=env_states.success & ~invalid & ran,
        num_steps=env_states.num_steps - before.num_steps,
        episode_return=episode_return,
        episode_steps=env_states.num_steps,
        task=env_states.task,
        invalid=invalid,
        contact_overflow=env_states.contact_overflow - before.contact_overflow,
    )
    return worlds, result, path


def _run_steps(
    env: DeviceEnv, state: EnvState, actions: jax.Array
) -> tuple[EnvState, jax.Array, EnvState]:
    """Control steps of one world until its episode ends: last state, summed reward, all states."""

    def advance(
        carry: tuple[EnvState, jax.Array], action: jax.Array
    ) -> tuple[tuple[EnvState, jax.Array], EnvState]:
        state, total = carry
        ended = state.terminated | state.truncated
        stepped = env.step(state, action)
        state = jax.tree.map(lambda old, new: jnp.where(ended, old, new), state, stepped)
        return (state, total + jnp.where(ended, 0.0, stepped.reward)), state

    (last, total), path = jax.lax.scan(advance, (state, jnp.zeros(())), actions)
    return last, total, path


def _observe_if(
    env: DeviceEnv, table: TokenTable, states: EnvState, wanted: jax.Array
) -> Observation:
    """Observes the worlds when `wanted`, else returns zeros: rendering costs, few need it."""
    shapes = jax.eval_shape(lambda s: table.complete(env.observe(s)), states)
    return jax.lax.cond(
        wanted,
        lambda s: table.complete(env.observe(s)),
        lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        states,
    )


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Row-wise choice between two batches; `condition` is bool [E]."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, yes, no)
