"""Statistics of demonstrations: what a policy's states and actions are normalised by."""

import numpy as np

from jaxvla.data.episodes import EpisodeDataset
from jaxvla.data.normalization import FieldStats, NormStats

_NARROW = 1e-5
"""Width between percentiles, as a share of the whole range, below which they coincide."""


def compute_norm_stats(dataset: EpisodeDataset, kind: str) -> NormStats:
    """Exact statistics of the states and actions of all control steps, each counted once.

    openpi (scripts/compute_norm_stats.py) counts an action once for every chunk that it lies in,
    and estimates percentiles from histograms; the difference is small.

    Args:
      dataset: demonstrations; their states and actions are held in memory meanwhile.
      kind: "zscore" or "quantile".

    Raises:
      ValueError: a value is not finite; or, for quantiles, a dimension is constant in 98 % of the
        steps and not in the others, which would be normalised to millions.
    """
    lengths = list(enumerate(dataset.num_steps))
    states = [dataset.states(episode) for episode, _ in lengths]
    actions = [dataset.actions(episode)[:length] for episode, length in lengths]
    fields = {}
    for name, parts in (("state", states), ("actions", actions)):
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of the data set are not all finite")
        fields[name] = FieldStats.from_array(values)
        if kind == "quantile":
            _require_width(name, values, fields[name])
    return NormStats(state=fields["state"], actions=fields["actions"], kind=kind)


def _require_width(name: str, values: np.ndarray, stats: FieldStats) -> None:
    q01, q99 = stats.quantiles()
    extent = values.max(axis=0).astype(np.float64) - values.min(axis=0)
    narrow = np.flatnonzero((extent > 0.0) & (q99 - q01 < _NARROW * extent))
    if narrow.size:
        raise ValueError(
            f"dimension {narrow[0]} of {name} is constant in 98 % of the steps and not in the "
            "others: its percentiles coincide, and quantile normalisation would divide by about 0"
        )
