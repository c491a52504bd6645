"""A simulator's way to a policy server in the same process."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvla.serving.batcher import Batcher, Busy, Expired
from jaxvla.types import Observation

_LOG = logging.getLogger(__name__)

PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Between the attempts of a `PendingAnswer`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What a request carries."""

    observation: Observation
    """Leading axis: rows."""
    keys: np.ndarray
    """uint32 [rows, 2], see `serving.sampling.row_keys`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a request's future resolves to."""

    result: Any
    """PolicySample of numpy arrays, or values float32 [rows] for kind "value"."""
    policy_version: int
    """Weights that made the result."""


class InferenceClient:
    """Sends chunk queries under one name."""

    def __init__(self, batcher: Batcher, name: str):
        self.name = name
        self._batcher = batcher

    def join(self) -> None:
        """Counts as a live client from now on: batches are held back for its requests."""
        self._batcher.register(self.name)

    def leave(self) -> None:
        """Stops counting, for the time in which the client waits for something else."""
        self._batcher.unregister(self.name)

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        """Queues one request; the future gives an Answer. Raises as `Batcher.submit`."""
        query = Query(observation=observation, keys=keys)
        return self._batcher.submit(rows=len(keys), client=self.name, kind=kind, payload=query)


class PendingAnswer:
    """An answer that is asked for again, a few times, when the server turns the request away.

    The request carries its random keys, so asking again changes no result.
    """

    def __init__(
        self, submit: Callable[[], Future], *, pause: Callable[[float], None] = time.sleep
    ):
        """Asks for the first time. Raises as `submit`, but never Busy.

        Args:
          submit: queues the request.
          pause: waits for some seconds.
        """
        self._submit = submit
        self._pause = pause
        self._future = self._ask()

    def result(self) -> Answer:
        """Waits for the answer.

        Raises:
          Busy, Expired: the last attempt was turned away as well.
          Exception: whatever else the server answers.
        """
        for pause_s in PAUSES_S:
            try:
                return self._future.result()
            except (Busy, Expired) as refusal:
                _LOG.warning("%s; asking again in %g s", refusal, pause_s)
            self._pause(pause_s)
            self._future = self._ask()
        return self._future.result()

    def _ask(self) -> Future:
        """A refusal becomes a future, so that it is dealt with where there is time to wait."""
        try:
            return self._submit()
        except Busy as refusal:
            refused: Future[Answer] = Future()
            refused.set_exception(refusal)
            return refused
