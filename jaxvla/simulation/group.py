"""Env groups: batches of envs that step together, behind one interface.

A device group is one vectorised batch on the simulation mesh and is never split. A host
group is a set of worker processes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxvla import rng, sharding
from jaxvla.envs.base import DeviceEnv, EnvState
from jaxvla.simulation import unroll
from jaxvla.simulation.unroll import TokenTable, Worlds
from jaxvla.types import ChunkResult, EnvSpec, Observation, stand_in


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a group stands: every random draw of the group is a function of it."""

    segment: int = 0
    """Segments begun so far; survives restarts."""
    chunk: int = 0
    """Chunk queries of the running segment so far."""


class EnvGroup(Protocol):
    """E envs that take one action chunk each per call."""

    name: str
    spec: EnvSpec
    task_ids: tuple[int, ...]
    """Tasks of the spec that it can play."""
    num_envs: int
    frames_per_s: float
    """Rate of the pictures that `frames` gives."""

    def reset(self, cursor: Cursor) -> Observation:
        """Starts fresh episodes of random tasks in every env.

        With a group size G, envs iG to iG + G - 1 begin alike: same task, same initial state.
        """
        ...

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        """Starts episode `seeds[e]` (uint32) of task `tasks[e]` in env e, for evaluation."""
        ...

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        """Runs the executed part of `actions`, float32 [E, H, A], and restarts ended episodes.

        With a group size an env stands still instead, from the end of its episode to the next
        reset; its actions are not read.
        """
        ...

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Pictures of the latest chunk in some envs, each uint8 [n, C, h, w, 3]; for videos."""
        ...

    def instruction(self, row: int) -> str:
        """Sentence of the episode running in env `row`."""
        ...

    def state(self) -> Any:
        """Host copy of what `load_state` needs to continue exactly here."""
        ...

    def load_state(self, state: Any) -> Observation:
        """Continues from `state()` of an earlier process; returns what the policy reads."""
        ...

    def close(self) -> None:
        """Frees processes and shared memory."""
        ...


class DeviceStepper:
    """The compiled functions of a device env, shared by all groups of the same size.

    Rows are computed independently on every device of the mesh (`shard_map`), so that the
    solver's data-dependent loops never wait for another device's rows.
    """

    def __init__(
        self,
        env: DeviceEnv,
        table: TokenTable,
        *,
        num_envs: int,
        num_executed: int,
        mesh: Mesh,
        observe_final: bool = True,
        group_size: int = 0,
    ):
        """Args:
        env: the env.
        table: tokenised instructions.
        num_envs: E of every group.
        num_executed: control steps run of each chunk.
        mesh: simulation mesh.
        observe_final: see `unroll.run_chunk`.
        group_size: see `SimulationConfig.group_size`.
        """
        self.env = env
        self.num_envs = num_envs
        self.num_executed = num_executed
        self.mesh = mesh
        rows = sharding.batch_sharding(mesh)
        table = table.on_device()

        def sharded(function: Any, num_arguments: int) -> Any:
            spec = PartitionSpec("data")
            # MJX's loops start from constants, which the varying-axes check rejects.
            return jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(spec,) * num_arguments,
                out_specs=spec,
                check_vma=False,
            )

        def observe(worlds: Worlds) -> Observation:
            return table.complete(env.observe(worlds.env))

        def start(keys: jax.Array, tasks: jax.Array, seeds: jax.Array) -> Worlds:
            return unroll.start_episodes(env, keys, tasks, seeds)

        def draw(keys: jax.Array) -> Worlds:
            return unroll.draw_worlds(env, keys)

        def step(
            worlds: Worlds, actions: jax.Array, keys: jax.Array
        ) -> tuple[Worlds, ChunkResult, EnvState]:
            return unroll.run_chunk(
                env,
                table,
                worlds,
                actions,
                keys,
                observe_final=observe_final,
                restarts=not group_size,
            )

        def split(key: jax.Array) -> jax.Array:
            return jax.random.split(key, num_envs)

        def draw_alike(key: jax.Array) -> Worlds:
            # Copies, not the same draw made anew: they are equal to the bit wherever they lie.
            first = np.arange(num_envs) // group_size * group_size
            return jax.tree.map(lambda x: x[first], sharded(draw, 1)(split(key)))

        self.start = jax.jit(sharded(start, 3), in_shardings=rows, out_shardings=rows)
        self.draw = jax.jit(
            draw_alike if group_size else lambda key: sharded(draw, 1)(split(key)),
            out_shardings=rows,
        )
        self.observe = jax.jit(sharded(observe, 1), in_shardings=rows, out_shardings=rows)
        self.step = jax.jit(
            lambda worlds, actions, key: sharded(step, 3)(worlds, actions, split(key)),
            donate_argnums=0,
            out_shardings=rows,
        )

    def compile(self) -> None:
        """Compiles all of them from shapes alone. The chunk step takes longest."""
        key = jax.random.key(0)
        rows = sharding.batch_sharding(self.mesh)
        worlds = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
            jax.eval_shape(self.draw, key),
        )
        actions = jax.ShapeDtypeStruct(
            (self.num_envs, self.num_executed, self.env.spec.action_dim), np.float32
        )
        self.step.lower(worlds, actions, key).compile()
        self.draw.lower(key).compile()
        self.observe.lower(worlds).compile()
        keys = jax.eval_shape(lambda: jax.random.split(key, self.num_envs))
        tasks = jax.ShapeDtypeStruct((self.num_envs,), np.int32)
        seeds = jax.ShapeDtypeStruct((self.num_envs,), np.uint32)
        self.start.lower(keys, tasks, seeds).compile()


class DeviceEnvGroup:
    """A batch of device-env worlds. Implements EnvGroup."""

    def __init__(self, stepper: DeviceStepper, *, name: str, key: jax.Array):
        """Args: the shared functions, a unique name, and the group's typed root key."""
        self.name = name
        self.spec = stepper.env.spec
        self.task_ids = stepper.env.task_ids
        self.num_envs = stepper.num_envs
        self.frames_per_s = self.spec.control_hz
        self._stepper = stepper
        self._key = key
        self._worlds: Worlds | None = None
        self._path: EnvState | None = None

    def reset(self, cursor: Cursor) -> Observation:
        """See EnvGroup.reset."""
        key = rng.stream(self._key, "reset", cursor.segment)
        self._worlds = self._stepper.draw(key)
        return self._stepper.observe(self._worlds)

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        """See EnvGroup.reset_to."""
        key, seeds = rng.stream(self._key, "episode"), seeds.astype(np.uint32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)
        self._worlds = self._stepper.start(keys, tasks.astype(np.int32), seeds)
        return self._stepper.observe(self._worlds)

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        """See EnvGroup.step_chunk. Returns once the device has finished."""
        key = rng.stream(self._key, "step", cursor.segment, cursor.chunk)
        # Cut here, not in the compiled function: it was compiled for this shape.
        executed = actions[:, : self._stepper.num_executed]
        self._worlds, result, self._path = self._stepper.step(self._worlds, executed, key)
        return jax.block_until_ready(result)

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        """See EnvGroup.frames. Renders the states between control steps, a batch at a time."""
        path = jax.tree.map(lambda x: np.asarray(x)[list(rows)], self._path)
        num_rows, num_steps = path.num_steps.shape
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), path)
        images = self._render(flat, num_rows * num_steps)
        return list(images.reshape(num_rows, num_steps, *images.shape[1:]))

    def _render(self, states: EnvState, count: int) -> np.ndarray:
        """Images of `count` states, with the function compiled for E worlds."""
        parts = []
        no_return = stand_in(np.zeros(self.num_envs, np.float32))
        for first in range(0, count, self.num_envs):
            index = np.minimum(np.arange(first, first + self.num_envs), count - 1)
            batch = jax.tree.map(lambda x, i=index: x[i], states)
            worlds = Worlds(env=batch, episode_return=no_return)
            parts.append(np.asarray(self._stepper.observe(worlds).images))
        return np.concatenate(parts)[:count]

    def instruction(self, row: int) -> str:
        """See EnvGroup.instruction."""
        assert self._worlds is not None, "an instruction belongs to an episode: reset first"
        shown = self._stepper.env.instruction_ids(self._worlds.env)
        return self.spec.instructions[int(shown[row])]

    def state(self) -> Any:
        """See EnvGroup.state."""
        return jax.device_get(self._worlds)

    def load_state(self, state: Any) -> Observation:
        """See EnvGroup.load_state."""
        rows = sharding.batch_sharding(self._stepper.mesh)
        self._worlds = jax.device_put(state, rows)
        return self._stepper.observe(self._worlds)

    def close(self) -> None:
        """Nothing to free."""
