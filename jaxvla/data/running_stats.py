"""Statistics of a data set that does not fit into memory, batch by batch."""

import numpy as np
from numpy.typing import ArrayLike

from jaxvla.data.normalization import FieldStats

NUM_BINS = 5000
"""Histogram bins of a dimension, as in openpi: percentiles are exact to 1/5000 of the range."""

_MARGIN = 1e-10


class RunningStats:
    """Mean, std and percentiles of vectors [D], computed as openpi (commit 15a9616) does.

    Percentiles come from one histogram a dimension over the range seen so far. When a batch
    leaves the range, the counts move to bins of the wider one, each by its bin's left edge.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._mean_square = np.zeros(0)
        self._low = self._high = np.zeros(0)
        self._edges = self._counts = np.zeros((0, 0))

    def update(self, values: ArrayLike) -> None:
        """Counts vectors in.

        Args:
          values: [..., D], finite; all leading axes are samples.

        Raises:
          ValueError: there are no values, some are not finite, or D is another than before.
        """
        array = np.asarray(values, np.float64)
        if array.ndim < 1 or not array.size or not np.isfinite(array).all():
            raise ValueError(f"values of shape {array.shape}: pass finite vectors [..., D]")
        if self._count and array.shape[-1] != len(self._mean):
            raise ValueError(f"values have {array.shape[-1]} dimensions, not {len(self._mean)}")
        samples = array.reshape(-1, array.shape[-1])
        if self._count:
            self._widen(samples.min(axis=0), samples.max(axis=0))
        else:
            self._start(samples)
        self._count += len(samples)
        share = len(samples) / self._count
        self._mean = self._mean + (samples.mean(axis=0) - self._mean) * share
        square = np.mean(samples**2, axis=0)
        self._mean_square = self._mean_square + (square - self._mean_square) * share
        self._counts += _histograms(samples, self._edges)

    def stats(self) -> FieldStats:
        """The statistics of all vectors so far.

        std is sqrt(E[x^2] - E[x]^2); q01 and q99 are the left edge of the bin in which the
        count reaches that share of the samples.

        Raises:
          ValueError: there are fewer than two vectors.
        """
        if self._count < 2:
            raise ValueError(f"statistics need at least 2 vectors, there are {self._count}")
        variance = np.maximum(self._mean_square - self._mean**2, 0.0)
        q01, q99 = self._quantile(0.01), self._quantile(0.99)
        return FieldStats(mean=self._mean, std=np.sqrt(variance), q01=q01, q99=q99)

    def _start(self, samples: np.ndarray) -> None:
        self._low, self._high = samples.min(axis=0), samples.max(axis=0)
        # The margin gives a constant dimension bins of some width.
        self._edges = _edges(self._low - _MARGIN, self._high + _MARGIN)
        self._counts = np.zeros((len(self._low), NUM_BINS))
        self._mean, self._mean_square = np.zeros_like(self._low), np.zeros_like(self._low)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Moves the counts to bins that hold [low, high] as well."""
        low, high = np.minimum(self._low, low), np.maximum(self._high, high)
        if (low == self._low).all() and (high == self._high).all():
            return
        old, self._edges = self._edges, _edges(low, high)
        self._low, self._high = low, high
        # openpi leaves the margin out here. Where only the upper end moved, the lowest bin of
        # the first batch begins 1e-10 before the new range, and its count is lost. It is kept
        # so, because policies were trained with such statistics.
        for row, (left, edges) in enumerate(zip(old[:, :-1], self._edges, strict=True)):
            self._counts[row], _ = np.histogram(left, bins=edges, weights=self._counts[row])

    def _quantile(self, share: float) -> np.ndarray:
        target = share * self._count
        rows = zip(self._edges, np.cumsum(self._counts, axis=1), strict=True)
        return np.array([edges[np.searchsorted(total, target)] for edges, total in rows])


def _edges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float64 [D, NUM_BINS + 1]."""
    return np.linspace(low, high, NUM_BINS + 1, axis=1)


def _histograms(samples: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """float64 [D, NUM_BINS] of [N, D]."""
    rows = zip(samples.T, edges, strict=True)
    return np.array([np.histogram(values, bins=bins)[0] for values, bins in rows], np.float64)
