"""The supervised start: labelled observations, before RL."""

from collections.abc import Callable, Iterable, Iterator

import jax

from jaxvla.algorithms.base import Metrics
from jaxvla.learning.supervised import supervised_steps
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
    is_stopped = False

    def until_stopped() -> Iterator[SupervisedBatch]:
        nonlocal is_stopped
        for batch in batches:
            is_stopped = should_stop()
            if is_stopped:
                return
            yield batch

    steps = supervised_steps(
        functions.supervised_step, state, until_stopped(), placement=functions.rows, key=key
    )
    for step, trained, metrics in steps:
        state = trained
        if (step + 1) % REPORT_INTERVAL == 0:
            report(step + 1, jax.device_get(metrics))
    return None if is_stopped else (state, jax.device_get(metrics))
