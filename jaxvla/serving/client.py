"""A simulator's way to a policy server in the same process."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvla.serving.batcher import Batcher
from jaxvla.types import Observation


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
