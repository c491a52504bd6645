"""Statistics of demonstrations: what a policy's states and actions are normalised by."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxvla.data.episodes import EpisodeDataset
from jaxvla.data.normalization import FieldStats, NormStats

_NARROW = 1e-5
"""Width between percentiles, as a share of the whole range, below which they coincide."""


def compute_norm_stats(
    dataset: EpisodeDataset, kind: str, *, delta_dims: int = 0, action_horizon: int = 1
) -> NormStats:
    """Exact statistics of the states and actions of all control steps.

    Where actions are learned relative to the state, their statistics are those of the chunks of
    all samples, as the loss sees them: a_{t+i} - s_t in the first `delta_dims` dimensions, a_{t+i}
    in the others, i in [0, action_horizon), the last action repeated beyond the end. So does
    openpi (scripts/compute_norm_stats.py), which estimates percentiles from histograms. Else every
    action counts once; openpi counts it once for every chunk that it lies in, which is nearly
    the same.

    Args:
      dataset: demonstrations; their states and actions are held in memory meanwhile, and one
        dimension of all chunks.
      kind: "zscore" or "quantile".
      delta_dims: first dimensions in which actions are relative to the state at the start of
        the chunk.
      action_horizon: steps of a chunk; of no effect when `delta_dims` is 0.

    Raises:
      ValueError: a value is not finite; or, for quantiles, a dimension is constant in 98 % of the
        steps and not in the others, which would be normalised to millions.
    """
    states = [dataset.states(episode) for episode in range(len(dataset.num_steps))]
    actions = [dataset.actions(episode) for episode in range(len(dataset.num_steps))]
    learned = [x[: len(state)] for x, state in zip(actions, states, strict=True)]
    for name, parts in (("state", states), ("actions", actions if delta_dims else learned)):
        if not all(np.isfinite(x).all() for x in parts):
            raise ValueError(f"{name} of the data set are not all finite")
    fields = {"state": _field("state", kind, _columns(states))}
    if delta_dims:
        chunks = _chunk_columns(states, actions, delta_dims, action_horizon)
        fields["actions"] = _field("actions", kind, chunks)
    else:
        fields["actions"] = _field("actions", kind, _columns(learned))
    return NormStats(state=fields["state"], actions=fields["actions"], kind=kind)


def _columns(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """float64 [N] of every dimension of the parts [n, D]."""
    for dim in range(parts[0].shape[-1]):
        yield np.concatenate([part[:, dim] for part in parts]).astype(np.float64)


def _chunk_columns(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], delta_dims: int, horizon: int
) -> Iterator[np.ndarray]:
    """float64 [N H] of every dimension of the chunks. All of them at once would not fit: they are
    H times the data set."""
    ahead = np.arange(horizon)
    for dim in range(actions[0].shape[-1]):
        parts = []
        for state, action in zip(states, actions, strict=True):
            steps = np.arange(len(state))[:, None] + ahead
            chunks = action[np.minimum(steps, len(action) - 1), dim].astype(np.float64)
            parts.append(chunks - state[:, dim, None] if dim < delta_dims else chunks)
        yield np.concatenate(parts).ravel()


def _field(name: str, kind: str, columns: Iterable[np.ndarray]) -> FieldStats:
    """Statistics of a vector whose dimensions come one by one."""
    found = []
    for dim, values in enumerate(columns):
        found.append(FieldStats.from_array(values[:, None]))
        if kind == "quantile":
            _require_width(name, dim, values, found[-1])
    return FieldStats(
        mean=np.concatenate([x.mean for x in found]),
        std=np.concatenate([x.std for x in found]),
        q01=np.concatenate([x.quantiles()[0] for x in found]),
        q99=np.concatenate([x.quantiles()[1] for x in found]),
    )


def _require_width(name: str, dim: int, values: np.ndarray, stats: FieldStats) -> None:
    q01, q99 = stats.quantiles()
    extent = values.max() - values.min()
    if extent > 0.0 and q99[0] - q01[0] < _NARROW * extent:
        raise ValueError(
            f"dimension {dim} of {name} is constant in 98 % of the steps and not in the "
            "others: its percentiles coincide, and quantile normalisation would divide by about 0"
        )
