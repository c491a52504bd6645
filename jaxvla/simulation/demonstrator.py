"""Scripted demonstrations from a device env's own expert."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxvla import rng, sharding
from jaxvla.data.demonstrations import Demonstrations
from jaxvla.envs.base import DeviceEnv, EnvState
from jaxvla.simulation.unroll import TokenTable


@flax.struct.dataclass(kw_only=True)
class _Path:
    """A batch of episodes, step by step: leading axes [steps, E]."""

    state: EnvState
    """Before the step."""
    action: jax.Array
    """float32 [steps, E, A], what the expert would do there."""
    ended: jax.Array
    """bool [steps, E], the task had been solved before the step."""


class Demonstrator:
    """Lets the expert act, with noise on its actions, and records what it meant to do.

    The noise drives the expert off its path, so that the demonstrations show how to come
    back; labels are the noiseless actions (DART, https://arxiv.org/abs/1703.09327).
    """

    def __init__(
        self,
        env: DeviceEnv,
        table: TokenTable,
        *,
        num_envs: int,
        action_horizon: int,
        noise_std: float,
        mesh: Mesh,
    ):
        """Args:
        env: the env; its last action dimension (the grip) is not disturbed.
        table: tokenised instructions.
        num_envs: episodes run at a time.
        action_horizon: steps H per recorded chunk.
        noise_std: standard deviation of the disturbance, in units of the action.
        mesh: simulation mesh.
        """
        self._env = env
        self._num_envs = num_envs
        self._horizon = action_horizon
        self._noise_std = noise_std
        num_steps = max(env.spec.max_episode_steps) + action_horizon
        table = table.on_device()
        rows = PartitionSpec("data")
        columns = PartitionSpec(None, "data")

        def record(keys: jax.Array, tasks: jax.Array) -> _Path:
            return jax.vmap(self._episode, in_axes=(0, 0, None), out_axes=1)(keys, tasks, num_steps)

        self._record = jax.jit(
            # MJX's loops start from constants, which the varying-axes check rejects.
            jax.shard_map(
                record, mesh=mesh, in_specs=(rows, rows), out_specs=columns, check_vma=False
            )
        )
        self._observe = jax.jit(
            lambda states: table.complete(env.observe(states)),
            in_shardings=sharding.batch_sharding(mesh),
            out_shardings=sharding.batch_sharding(mesh),
        )

    def compile(self) -> None:
        """Compiles the episode function, which takes as long as that of a simulator."""
        keys = jax.random.split(jax.random.key(0), self._num_envs)
        self._record.lower(keys, jnp.zeros(self._num_envs, jnp.int32)).compile()

    def collect(self, num_episodes: int, key: jax.Array) -> Demonstrations:
        """Runs at least `num_episodes` episodes, evenly over the tasks.

        Args:
          num_episodes: rounded up to whole batches of `num_envs`.
          key: typed key.

        Returns:
          One sample per control step until the task is solved.
        """
        num_tasks = len(self._env.spec.tasks)
        parts = []
        for batch in range(-(-num_episodes // self._num_envs)):
            first = batch * self._num_envs
            tasks = np.arange(first, first + self._num_envs) % num_tasks
            keys = jax.random.split(rng.stream(key, "demonstration", batch), self._num_envs)
            parts += self._samples(self._record(keys, tasks.astype(np.int32)))
        return Demonstrations.concatenate(parts)

    def _episode(self, key: jax.Array, task: jax.Array, num_steps: int) -> _Path:
        reset_key, noise_key = jax.random.split(key)
        scale = jnp.ones(self._env.spec.action_dim).at[-1].set(0.0) * self._noise_std

        def advance(
            carry: tuple[EnvState, jax.Array], key: jax.Array
        ) -> tuple[tuple[EnvState, jax.Array], _Path]:
            state, ended = carry
            action = self._env.expert_action(state)
            noise = scale * jax.random.normal(key, action.shape)
            # The expert goes on after success, so that the last chunks have real labels.
            stepped = self._env.step(state, action + noise)
            seen = _Path(state=state, action=action, ended=ended)
            return (stepped, ended | stepped.terminated), seen

        start = (self._env.reset(reset_key, task), jnp.zeros((), bool))
        return jax.lax.scan(advance, start, jax.random.split(noise_key, num_steps))[1]

    def _samples(self, path: _Path) -> list[Demonstrations]:
        """Renders a batch of episodes step by step, dropping what follows the solution."""
        actions, ended = np.asarray(path.action), np.asarray(path.ended)
        parts = []
        for t in range(len(actions) - self._horizon):
            alive = ~ended[t]
            if not alive.any():
                break
            observation = self._observe(jax.tree.map(lambda x, t=t: x[t], path.state))
            chunk = np.moveaxis(actions[t : t + self._horizon], 0, 1)
            parts.append(
                Demonstrations(
                    observation=jax.tree.map(lambda x, a=alive: np.asarray(x)[a], observation),
                    actions=np.clip(chunk[alive], -1.0, 1.0),
                )
            )
        return parts
