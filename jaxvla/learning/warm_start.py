"""The supervised start: imitation of scripted demonstrations before RL."""

from collections.abc import Callable

import jax

from jaxvla import rng
from jaxvla.config import WarmStartConfig
from jaxvla.data.demonstrations import Demonstrations
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.train_step import TrainFunctions


def warm_start(
    functions: TrainFunctions,
    state: TrainState,
    demonstrations: Demonstrations,
    *,
    config: WarmStartConfig,
    key: jax.Array,
    seed: int,
    should_stop: Callable[[], bool],
) -> tuple[TrainState, float] | None:
    """Trains on demonstrations.

    Args:
      functions: train functions with the warm start's own optimizer.
      state: a fresh train state; donated.
      demonstrations: samples.
      config: steps and batch size.
      key: typed key for noise and flow times.
      seed: order of the samples.
      should_stop: polled between steps.

    Returns:
      The trained state and the loss of the last step, or None when asked to stop.
    """
    loss = jax.numpy.zeros(())
    batches = demonstrations.batches(config.batch_size, config.num_steps, seed)
    for step, (observation, actions) in enumerate(batches):
        if should_stop():
            return None
        observation, actions = jax.device_put((observation, actions), functions.rows)
        state, metrics = functions.supervised_step(
            state, observation, actions, rng.stream(key, "flow", step)
        )
        loss = metrics["loss/total"]
    return state, float(loss)
