"""What a device env can teach by itself: demonstrations of its expert, and labelled scenes."""

from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxvla import rng, sharding
from jaxvla.data.demonstrations import concatenate, num_samples
from jaxvla.data.recorded import RecordedEpisode
from jaxvla.envs.base import DeviceEnv, EnvState, GroundedEnv
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import SupervisedBatch, stand_in


@flax.struct.dataclass(kw_only=True)
class _Path:
    """H control steps of E episodes, step by step: leading axes [E, H]."""

    state: EnvState
    """Before the step."""
    action: jax.Array
    """float32 [E, H, A], what the expert would do there."""
    ended: jax.Array
    """bool [E, H], the task had been solved, or the time was up, before the step."""


@flax.struct.dataclass(kw_only=True)
class _Episodes:
    """E running episodes, leading axis [E]."""

    state: EnvState
    ended: jax.Array
    """bool [E]."""


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
        self._scale = np.asarray([noise_std] * (env.spec.action_dim - 1) + [0.0], np.float32)
        table = table.on_device()
        self._placed = placed = sharding.batch_sharding(mesh)
        rows = PartitionSpec("data")

        def label(states: EnvState) -> SupervisedBatch:
            if isinstance(env, GroundedEnv):
                seen, target_mask = env.observe_target(states)
            else:
                seen, target_mask = env.observe(states), None
            return SupervisedBatch(
                observation=table.complete(seen), actions=None, target_mask=target_mask
            )

        self._label = jax.jit(label, in_shardings=placed, out_shardings=placed)
        self._reset = jax.jit(jax.vmap(env.reset), out_shardings=placed)
        if isinstance(env, GroundedEnv):
            self._scene = jax.jit(jax.vmap(env.scene), out_shardings=placed)
        self._record = jax.jit(
            # MJX's loops start from constants, which the varying-axes check rejects.
            jax.shard_map(
                jax.vmap(self._advance),
                mesh=mesh,
                in_specs=(rows, rows),
                out_specs=(rows, rows),
                check_vma=False,
            )
        )

    def compile(self) -> None:
        """Compiles the physics, which takes as long as that of a simulator."""
        keys = jax.random.split(jax.random.key(0), self._num_envs)
        tasks = jnp.zeros(self._num_envs, jnp.int32)
        states = jax.eval_shape(self._reset, keys, tasks)
        running = jax.ShapeDtypeStruct((self._num_envs,), bool, sharding=self._placed)
        self._record.lower(_Episodes(state=states, ended=stand_in(running)), keys).compile()

    def batch_struct(self, batch_size: int) -> SupervisedBatch:
        """Shapes and dtypes of a batch of demonstrations."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
        tasks = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        seen = jax.eval_shape(self._label, jax.eval_shape(self._reset, keys, tasks))
        shape = (batch_size, self._horizon, self._env.spec.action_dim)
        return seen.replace(actions=jax.ShapeDtypeStruct(shape, jnp.float32))

    def scenes(
        self, *, batch_size: int, num_batches: int, key: jax.Array
    ) -> Iterator[SupervisedBatch]:
        """Batches of random scenes with the mask of what the instruction names, no actions.

        Only for a GroundedEnv.

        Args:
          batch_size: rows per batch; a multiple of the simulation mesh's data axis.
          num_batches: batches to yield.
          key: typed key.
        """
        tasks = self._tasks(0, batch_size)
        for batch in range(num_batches):
            keys = jax.random.split(rng.stream(key, "scene", batch), batch_size)
            yield self._label(self._scene(keys, tasks))

    def collect(
        self,
        num_episodes: int,
        key: jax.Array,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> SupervisedBatch | None:
        """Runs at least `num_episodes` episodes, evenly over the tasks.

        Args:
          num_episodes: rounded up to whole batches of `num_envs`.
          key: typed key.
          should_stop: polled before each batch of episodes.

        Returns:
          One sample per control step until the task is solved or the time is up: numpy arrays
          [N, ...], ordered by batch, then by time, then by env. None when asked to stop.
        """
        parts = []
        for batch in range(-(-num_episodes // self._num_envs)):
            if should_stop():
                return None
            parts += self._samples(self._run(key, batch))
        return concatenate(parts)

    def episodes(self, num_episodes: int, key: jax.Array) -> Iterator[RecordedEpisode]:
        """The same episodes one by one, to be recorded. Their samples are those of `collect`.

        Args:
          num_episodes: rounded up to whole batches of `num_envs`.
          key: typed key.
        """
        for batch in range(-(-num_episodes // self._num_envs)):
            path = self._run(key, batch)
            samples = concatenate(self._samples(path))
            _, envs = self._seen(path)
            begun = jax.tree.map(lambda x: x[:, 0], path.state)
            texts = np.asarray(self._env.instruction_ids(begun))
            for env in range(self._num_envs):
                rows = envs == env
                own: SupervisedBatch = jax.tree.map(lambda x, r=rows: x[r], samples)
                # The last sample's chunk reaches this far beyond the end.
                actions = path.action[env, : num_samples(own) + self._horizon - 1]
                mask = own.target_mask
                yield RecordedEpisode(
                    instruction=self._env.spec.instructions[texts[env]],
                    images=np.asarray(own.observation.images),
                    state=np.asarray(own.observation.state),
                    actions=np.clip(np.asarray(actions), -1.0, 1.0),
                    target_mask=None if mask is None else np.asarray(mask),
                )

    def _tasks(self, first: int, count: int) -> np.ndarray:
        """Tasks of episodes `first` to `first + count`, in turn, int32."""
        ids = np.asarray(self._env.task_ids, np.int32)
        return ids[np.arange(first, first + count) % len(ids)]

    def _run(self, key: jax.Array, batch: int) -> _Path:
        """One batch of episodes, as numpy arrays [E, T + H, ...]."""
        tasks = self._tasks(batch * self._num_envs, self._num_envs)
        key = rng.stream(key, "demonstration", batch)

        def keys(block: int) -> jax.Array:
            return jax.random.split(jax.random.fold_in(key, block), self._num_envs)

        # Placed like what `_record` returns, or else the second block would compile it again.
        running = jax.device_put(np.zeros(self._num_envs, bool), self._placed)
        episodes = _Episodes(state=self._reset(keys(0), tasks), ended=running)
        blocks: list[_Path] = []
        # One block more than the longest episode has: the last chunks reach beyond its end.
        while not (blocks and np.asarray(blocks[-1].ended).all()):
            episodes, path = self._record(episodes, keys(len(blocks) + 1))
            blocks.append(path)
        return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *blocks)

    def _advance(self, episode: _Episodes, key: jax.Array) -> tuple[_Episodes, _Path]:
        """H control steps of one world."""

        def advance(episode: _Episodes, key: jax.Array) -> tuple[_Episodes, _Path]:
            state, ended = episode.state, episode.ended
            action = self._env.expert_action(state)
            noise = self._scale * jax.random.normal(key, action.shape)
            # The expert goes on after success, so that the last chunks have real labels.
            stepped = self._env.step(state, action + noise)
            seen = _Path(state=state, action=action, ended=ended)
            ended = ended | stepped.terminated | stepped.truncated
            return _Episodes(state=stepped, ended=ended), seen

        return jax.lax.scan(advance, episode, jax.random.split(key, self._horizon))

    def _samples(self, path: _Path) -> list[SupervisedBatch]:
        """Renders the steps before the ends of a batch of episodes, `num_envs` at a time."""
        steps, envs = self._seen(path)
        parts = []
        for first in range(0, len(steps), self._num_envs):
            rows = slice(first, first + self._num_envs)
            parts.append(self._sample(path, envs[rows], steps[rows]))
        return parts

    def _seen(self, path: _Path) -> tuple[np.ndarray, np.ndarray]:
        """(steps, envs) of the steps before the ends, int [n] each, in the order of time."""
        steps, envs = np.nonzero(~np.asarray(path.ended)[:, : -self._horizon].T)
        return steps, envs

    def _sample(self, path: _Path, envs: np.ndarray, steps: np.ndarray) -> SupervisedBatch:
        """Samples of given steps (int [n] each, n <= num_envs); renders full batches only."""
        padding = (0, self._num_envs - len(envs))
        index = np.pad(envs, padding, "edge"), np.pad(steps, padding, "edge")
        seen = self._label(jax.tree.map(lambda x: x[index], path.state))
        chunk = path.action[envs[:, None], steps[:, None] + np.arange(self._horizon)]
        batch = jax.tree.map(lambda x: np.asarray(x)[: len(envs)], seen)
        return batch.replace(actions=np.clip(chunk, -1.0, 1.0))
