"""One update made both ways: from trajectories that stream in, and from the same ones in a batch.

`training` is what the fixture of that name makes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxvla.learning.streaming import GradientStream
from jaxvla.learning.train_state import TrainState
from jaxvla.types import Trajectory


def one_streamed_step(
    training: Any, trajectories: Sequence[Trajectory], version: jax.Array
) -> tuple[TrainState, dict[str, Any]]:
    """An update from trajectories that come one by one: the state, and metrics on the host."""
    functions, state = training.functions, training.fresh_state()
    stream = GradientStream(
        functions, params=state.params, version=version, num_trajectories=len(trajectories)
    )
    for trajectory in trajectories:
        stream.add(functions.place(trajectory))
    return _on_host(*stream.finish(state))


def one_batched_step(
    training: Any, trajectories: Sequence[Trajectory], version: jax.Array
) -> tuple[TrainState, dict[str, Any]]:
    """An update from the same trajectories in one batch and one minibatch."""
    functions, state = training.functions, training.fresh_state()
    placed = [functions.place(x) for x in trajectories]
    batch = functions.prepare(state.params, placed, version)
    order = functions.draw(jax.random.key(0), batch.weight.shape)
    return _on_host(*functions.step(state, batch, order, jnp.int32(0)))


def _on_host(state: TrainState, metrics: Any) -> tuple[TrainState, dict[str, Any]]:
    return state, {name: float(x) for name, x in jax.device_get(metrics).items()}
