"""The tabletop env with its functions compiled for one batch size."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxvla.envs.tabletop import Tabletop, TabletopConfig, TabletopState
from jaxvla.types import EnvObservation

NUM_WORLDS = 8
"""Batch size that the step is compiled for."""


@dataclass(frozen=True, kw_only=True)
class CompiledTabletop:
    """The env's functions, vmapped. `step` takes NUM_WORLDS worlds and is traced only once."""

    env: Tabletop
    step: Callable[[TabletopState, ArrayLike], TabletopState]
    look: Callable[[TabletopState], tuple[EnvObservation, jax.Array]]
    """What `observe_target` gives."""
    expert: Callable[[TabletopState], jax.Array]
    draw: Callable[[jax.Array, jax.Array], TabletopState]

    def reset(self, seed: int, tasks: ArrayLike) -> TabletopState:
        """NUM_WORLDS fresh episodes of `tasks`, int32 [] or [E]."""
        ids = jnp.broadcast_to(jnp.asarray(tasks, jnp.int32), (NUM_WORLDS,))
        return self.draw(jax.random.split(jax.random.key(seed), NUM_WORLDS), ids)

    def task(self, name: str) -> int:
        """Task id of a name."""
        return self.env.spec.tasks.index(name)

    def run_expert(self, task: str, seed: int) -> "ExpertRun":
        """Episodes up to the time limit; the expert goes on after success."""
        states = self.reset(seed, self.task(task))
        path, actions = [states], []
        for _ in range(self.env.spec.max_episode_steps[self.task(task)]):
            actions.append(self.expert(states))
            states = self.step(states, actions[-1])
            path.append(states)
        return ExpertRun(
            path=jax.tree.map(lambda *x: np.stack(x), *path), actions=np.stack(actions)
        )


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """NUM_WORLDS episodes of the expert, numpy arrays."""

    path: TabletopState
    """[T + 1, E, ...], before and after every control step."""
    actions: np.ndarray
    """float32 [T, E, 4]."""

    @property
    def solved(self) -> np.ndarray:
        """bool [E]."""
        return self.path.success.any(0)


def compile_tabletop() -> CompiledTabletop:
    """All tasks, small images. Functions compile on first use; the step takes about 15 s."""
    env = Tabletop(TabletopConfig(image_size=48))
    # Without optimisation XLA takes a fraction of the time. The step is worth it: it runs often.
    quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    return CompiledTabletop(
        env=env,
        step=jax.jit(jax.vmap(chex.assert_max_traces(env.step, n=1))),
        look=quick_jit(env.observe_target),
        expert=quick_jit(jax.vmap(env.expert_action)),
        draw=quick_jit(jax.vmap(env.reset)),
    )
