"""Labelled observations in memory: what a supervised start trains on."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxvla.types import SupervisedBatch


def concatenate(parts: Sequence[SupervisedBatch]) -> SupervisedBatch:
    """Joins parts along the samples, on the host."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def alternate(
    streams: Sequence[Iterator[SupervisedBatch]], num_batches: int
) -> Iterator[SupervisedBatch]:
    """`num_batches` batches, from each stream in turn."""
    return itertools.islice(itertools.chain.from_iterable(zip(*streams, strict=True)), num_batches)


def num_samples(samples: SupervisedBatch) -> int:
    """N of [N, ...]."""
    return len(samples.observation.state)


class ShuffledOrder:
    """Which samples each batch has: all in random order, then all in another one, ...

    No sample comes twice before a reshuffle, which is due when what is left fills no batch. The
    rows of a batch are a function of the seed and of its number, so that a run can go on anywhere.
    """

    def __init__(self, total: int, *, batch_size: int, seed: int):
        """Args:
        total: samples.
        batch_size: samples per batch.
        seed: order of the samples.

        Raises:
          ValueError: there are fewer samples than a batch holds.
        """
        if total < batch_size:
            raise ValueError(f"{total} samples, a batch needs {batch_size}")
        self._total, self._size, self._seed = total, batch_size, seed
        self._start()

    def rows(self, batch: int) -> np.ndarray:
        """Numbers of the samples of a batch, int64 [batch_size]."""
        epoch, index = divmod(batch, self._total // self._size)
        if epoch < self._epoch:
            self._start()
        while self._epoch < epoch:
            self._order = self._random.permutation(self._total)
            self._epoch += 1
        return self._order[index * self._size : (index + 1) * self._size]

    def _start(self) -> None:
        self._random = np.random.default_rng(self._seed)
        self._epoch, self._order = -1, np.empty(0, np.int64)


def shuffled_batches(
    samples: SupervisedBatch, *, batch_size: int, num_batches: int, seed: int
) -> Iterator[SupervisedBatch]:
    """Batches of [batch_size, ...] of samples in the order of `ShuffledOrder`.

    Args:
      samples: numpy arrays [N, ...].
      batch_size: samples per batch.
      num_batches: batches to yield.
      seed: order of the samples.

    Raises:
      ValueError: there are fewer samples than a batch holds.
    """
    order = ShuffledOrder(num_samples(samples), batch_size=batch_size, seed=seed)
    for batch in range(num_batches):
        rows = order.rows(batch)
        yield jax.tree.map(lambda x, r=rows: x[r], samples)
