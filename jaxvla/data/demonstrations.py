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


def shuffled_batches(
    samples: SupervisedBatch, *, batch_size: int, num_batches: int, seed: int
) -> Iterator[SupervisedBatch]:
    """Batches of [batch_size, ...] of samples in random order.

    No sample comes twice before a reshuffle, which is due when what is left fills no batch.

    Args:
      samples: numpy arrays [N, ...].
      batch_size: samples per batch.
      num_batches: batches to yield.
      seed: order of the samples.

    Raises:
      ValueError: there are fewer samples than a batch holds.
    """
    total = num_samples(samples)
    if total < batch_size:
        raise ValueError(f"{total} samples, a batch needs {batch_size}")
    random = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(num_batches):
        if len(order) < batch_size:
            order = random.permutation(total)
        rows, order = order[:batch_size], order[batch_size:]
        yield jax.tree.map(lambda x, r=rows: x[r], samples)
