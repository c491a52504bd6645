"""Demonstrations in memory: what a supervised start trains on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxvla.types import Observation


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstrations:
    """Samples of (observation, the actions that followed). Leading axis N, on the host."""

    observation: Observation
    """numpy arrays [N, ...]."""
    actions: np.ndarray
    """float32 [N, H, A], in the env's units."""

    def __len__(self) -> int:
        return len(self.actions)

    @classmethod
    def concatenate(cls, parts: Sequence["Demonstrations"]) -> "Demonstrations":
        """Joins parts along the samples."""
        observations = [part.observation for part in parts]
        return cls(
            observation=jax.tree.map(lambda *x: np.concatenate(x), *observations),
            actions=np.concatenate([part.actions for part in parts]),
        )

    def batches(
        self, batch_size: int, num_batches: int, seed: int
    ) -> Iterator[tuple[Observation, np.ndarray]]:
        """Batches of [batch_size, ...], reshuffled each time all samples have been seen.

        Raises:
          ValueError: there are fewer samples than a batch holds.
        """
        if len(self) < batch_size:
            raise ValueError(f"{len(self)} demonstration samples, a batch needs {batch_size}")
        random = np.random.default_rng(seed)
        order = np.empty(0, np.int64)
        for _ in range(num_batches):
            if len(order) < batch_size:
                order = random.permutation(len(self))
            rows, order = order[:batch_size], order[batch_size:]
            yield jax.tree.map(lambda x, r=rows: x[r], self.observation), self.actions[rows]
