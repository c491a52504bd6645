"""Normalisation of states and actions, and openpi's norm_stats.json.

Two kinds, as openpi's models were trained with them and without clipping:
z-score (pi0), (x - mean) / (std + 1e-6), and quantile (pi0.5),
2 (x - q01) / (q99 - q01 + 1e-6) - 1. Both are affine, so both are an offset and a scale:
normalised = (x - offset) / scale. Statistics longer than x are cut; where they are shorter
the remaining dimensions are padding, which is kept (by z-score as mean 0, std 1).

`normalize` and `unnormalize` work on devices in float32. `normalize_on_host` and
`unnormalize_on_host` repeat openpi's float64 results to the last bit: pi0.5 reads the bins that
a normalised state lies in, and at the edge of a bin one rounding decides.
"""

import hashlib
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

KINDS = ("zscore", "quantile")
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldStats:
    """Statistics of one vector, each float64 [D]."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    """1st percentile; None where it was not recorded."""
    q99: np.ndarray | None = None
    """99th percentile; None together with q01."""

    def __post_init__(self) -> None:
        if (self.q01 is None) != (self.q99 is None):
            raise ValueError("q01 and q99 come together, one is missing")
        given = [array for array in (self.mean, self.std, self.q01, self.q99) if array is not None]
        if not all(np.isfinite(array).all() for array in given) or (self.std < 0.0).any():
            raise ValueError("statistics must be finite, and std not negative")
        if {array.shape for array in given} != {(len(self.mean),)}:
            raise ValueError(
                f"statistics must be vectors of one length: {[array.shape for array in given]}"
            )

    @property
    def size(self) -> int:
        """Dimensions D."""
        return len(self.mean)

    def quantiles(self) -> tuple[np.ndarray, np.ndarray]:
        """q01 and q99.

        Raises:
          ValueError: they were not recorded.
        """
        if self.q01 is None or self.q99 is None:
            raise ValueError("quantile normalisation needs q01 and q99, which are not recorded")
        return self.q01, self.q99

    def cut(self, size: int) -> "FieldStats":
        """Those of the first dimensions."""

        def first(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[:size]

        return FieldStats(
            mean=self.mean[:size], std=self.std[:size], q01=first(self.q01), q99=first(self.q99)
        )

    @classmethod
    def from_array(cls, values: np.ndarray) -> "FieldStats":
        """Statistics of [..., D] over all leading axes; percentiles are exact.

        Raises:
          ValueError: there are no values, or some are not finite.
        """
        flat = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
        if not flat.size or not np.isfinite(flat).all():
            raise ValueError(f"statistics need finite values; the array is {np.shape(values)}")
        q01, q99 = np.quantile(flat, [0.01, 0.99], axis=0)
        return cls(mean=flat.mean(axis=0), std=flat.std(axis=0), q01=q01, q99=q99)

    @classmethod
    def from_bounds(cls, low: ArrayLike, high: ArrayLike) -> "FieldStats":
        """Statistics that map [low, high] to [-1, 1] in either kind.

        Raises:
          ValueError: low is not below high in some dimension.
        """
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if not (low < high).all():
            raise ValueError(f"bounds need low < high: low = {low}, high = {high}")
        return cls(mean=(low + high) / 2.0, std=(high - low) / 2.0, q01=low, q99=high)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormStats:
    """Statistics of a data set, and the normaliser that they define."""

    state: FieldStats
    actions: FieldStats
    kind: str = "quantile"
    """"zscore" or "quantile"."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "quantile":
            self.state.quantiles()
            self.actions.quantiles()

    @classmethod
    def from_bounds(
        cls,
        state_low: ArrayLike,
        state_high: ArrayLike,
        action_dim: int,
        *,
        kind: str = "quantile",
    ) -> "NormStats":
        """Maps the state from [low, high] to [-1, 1] and keeps actions, in [-1, 1] already."""
        ones = np.ones(action_dim)
        return cls(
            state=FieldStats.from_bounds(state_low, state_high),
            actions=FieldStats.from_bounds(-ones, ones),
            kind=kind,
        )

    def cut(self, state_dim: int, action_dim: int) -> "NormStats":
        """Those of the first dimensions: published statistics reach into the model's padding.

        Raises:
          ValueError: there are fewer.
        """
        for name, field, size in (
            ("state", self.state, state_dim),
            ("actions", self.actions, action_dim),
        ):
            if field.size < size:
                raise ValueError(
                    f"statistics of {name} have {field.size} dimensions, the env has {size}"
                )
        return NormStats(
            state=self.state.cut(state_dim), actions=self.actions.cut(action_dim), kind=self.kind
        )

    @property
    def fingerprint(self) -> str:
        """Equal for two that normalise alike to the last bit."""
        body = json.dumps([_field_to_json(self.state), _field_to_json(self.actions), self.kind])
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    def state_affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(offset, scale), float64 [S] each: normalised state = (state - offset) / scale."""
        return _offset_and_scale(self.state, self.kind)

    @property
    def state_dim(self) -> int:
        """Dimensions of an env state."""
        return self.state.size

    @property
    def action_dim(self) -> int:
        """Dimensions of an env action."""
        return self.actions.size

    def normalize_state(self, state: jax.Array) -> jax.Array:
        """float32 [..., S], env units -> normalised."""
        return normalize(state, self.state, self.kind)

    def normalize_actions(self, actions: jax.Array) -> jax.Array:
        """float32 [..., A], env units -> normalised."""
        return normalize(actions, self.actions, self.kind)

    def unnormalize_actions(self, actions: jax.Array) -> jax.Array:
        """float32 [..., A], normalised -> env units."""
        return unnormalize(actions, self.actions, self.kind)


def normalize(x: jax.Array, stats: FieldStats, kind: str) -> jax.Array:
    """(x - offset) / scale over the last axis.

    Args:
      x: float32 [..., D].
      stats: statistics of at least or at most D dimensions, see the module docstring.
      kind: "zscore" or "quantile".
    """
    offset, scale = _affine(stats, kind, x)
    return (x - offset) / scale


def unnormalize(x: jax.Array, stats: FieldStats, kind: str) -> jax.Array:
    """x * scale + offset over the last axis, the inverse of `normalize`."""
    offset, scale = _affine(stats, kind, x)
    return x * scale + offset


def _affine(stats: FieldStats, kind: str, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale, computed in float64, as float32 constants with the rank of x."""
    offset, scale = _offset_and_scale(stats, kind)
    return _fit(offset, x, 0.0), _fit(scale, x, 1.0 + _EPSILON if kind == "zscore" else 1.0)


def _offset_and_scale(stats: FieldStats, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [D] each."""
    if kind == "zscore":
        return stats.mean, stats.std + _EPSILON
    q01, q99 = stats.quantiles()
    scale = (q99 - q01 + _EPSILON) / 2.0
    return q01 + scale, scale


def _fit(vector: np.ndarray, x: jax.Array, padding: float) -> np.ndarray:
    """Cuts or pads to the last axis of x; leading axes of size 1 match the rank of x."""
    size = x.shape[-1]
    fitted = np.full((1,) * (x.ndim - 1) + (size,), padding, np.float32)
    fitted[..., : len(vector)] = vector[:size]
    return fitted


def normalize_on_host(x: ArrayLike, stats: FieldStats, kind: str) -> np.ndarray:
    """As `normalize`, in float64 and in openpi's order of operations.

    Args:
      x: [..., D] of any real dtype, env units.
      stats: statistics of at least or at most D dimensions, see the module docstring.
      kind: "zscore" or "quantile".

    Returns:
      float64 [..., D].

    Raises:
      ValueError: the kind is unknown, or quantiles were not recorded.
    """
    known, padding = _split(x, stats)
    offset, width = _offset_and_width(stats, kind, known.shape[-1])
    if kind == "zscore":
        return np.concatenate([(known - offset) / width, padding / (1.0 + _EPSILON)], axis=-1)
    return np.concatenate([(known - offset) / width * 2.0 - 1.0, padding], axis=-1)


def unnormalize_on_host(x: ArrayLike, stats: FieldStats, kind: str) -> np.ndarray:
    """As `unnormalize`, in float64 and in openpi's order of operations.

    Arguments, result and errors are those of `normalize_on_host`, the units exchanged.
    """
    known, padding = _split(x, stats)
    offset, width = _offset_and_width(stats, kind, known.shape[-1])
    if kind == "zscore":
        return np.concatenate([known * width + offset, padding * (1.0 + _EPSILON)], axis=-1)
    return np.concatenate([(known + 1.0) / 2.0 * width + offset, padding], axis=-1)


def _split(x: ArrayLike, stats: FieldStats) -> tuple[np.ndarray, np.ndarray]:
    """float64 x where there are statistics, and what lies beyond them."""
    values = np.asarray(x, np.float64)
    return values[..., : stats.size], values[..., stats.size :]


def _offset_and_width(stats: FieldStats, kind: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [size]: mean and std, or q01 and its distance to q99; widths are never 0."""
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is none of {', '.join(KINDS)}")
    if kind == "zscore":
        return stats.mean[:size], stats.std[:size] + _EPSILON
    q01, q99 = stats.quantiles()
    return q01[:size], q99[:size] - q01[:size] + _EPSILON


def load_norm_stats(path: pathlib.Path, kind: str) -> NormStats:
    """Reads openpi's norm_stats.json.

    Args:
      path: the file.
      kind: "zscore" (pi0) or "quantile" (pi0.5); the file does not say.

    Raises:
      ValueError: the file has not the expected structure, or lacks percentiles that the
        quantile kind needs.
    """
    try:
        fields = json.loads(path.read_text())["norm_stats"]
        state, actions = (_field_from_json(fields[name]) for name in ("state", "actions"))
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no norm_stats.json: {error!r}") from error
    return NormStats(state=state, actions=actions, kind=kind)


def save_norm_stats(stats: NormStats, path: pathlib.Path) -> None:
    """Writes openpi's norm_stats.json. The kind is not part of that format."""
    fields = {"state": _field_to_json(stats.state), "actions": _field_to_json(stats.actions)}
    path.write_text(json.dumps({"norm_stats": fields}, indent=2))


def _field_from_json(entry: dict[str, Any]) -> FieldStats:
    def vector(name: str) -> np.ndarray:
        return np.asarray(entry[name], np.float64)

    if entry.get("q01") is None:
        return FieldStats(mean=vector("mean"), std=vector("std"))
    return FieldStats(mean=vector("mean"), std=vector("std"), q01=vector("q01"), q99=vector("q99"))


def _field_to_json(stats: FieldStats) -> dict[str, list[float] | None]:
    return {
        name: None if array is None else array.tolist()
        for name, array in (
            ("mean", stats.mean),
            ("std", stats.std),
            ("q01", stats.q01),
            ("q99", stats.q99),
        )
    }
