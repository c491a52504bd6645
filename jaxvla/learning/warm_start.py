"""The supervised start: labelled observations, before RL."""

from collections.abc import Callable, Iterable

import jax

from jaxvla import rng
from jaxvla.algorithms.base import Metrics
from jaxvla.learning.train_state import TrainState
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.types import SupervisedBatch

REPORT_INTERVAL = 500
"""Steps; some minutes on a CPU."""


def fit(
    functions: TrainFunctions,
    state: TrainState,
    batches: Iterable[SupervisedBatch],
    *,
    key: jax.Array,
    should_stop: Callable[[], bool],
    report: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> tuple[TrainState, Metrics] | None:
    """One optimizer step per batch.

    Args:
      functions: train functions with the warm start's own optimizer.
      state: a train state; donated.
      batches: what to learn, leading axis B.
      key: typed key for noise and flow times.
      should_stop: polled between steps.
      report: called every REPORT_INTERVAL steps with their number and the last metrics.

    Returns:
      The trained state and the metrics of the last step, or None when asked to stop.
    """
    metrics: Metrics = {}
    for step, batch in enumerate(batches):
        if should_stop():
            return None
        batch = jax.device_put(batch, functions.rows)
        state, metrics = functions.supervised_step(state, batch, rng.stream(key, "flow", step))
        if (step + 1) % REPORT_INTERVAL == 0:
            report(step + 1, jax.device_get(metrics))
    return state, jax.device_get(metrics)
