"""Statistics of a data set against numpy, and those that cannot be used."""

import pathlib
from typing import Any

import numpy as np
import pytest

from jaxvla.data.normalization import load_norm_stats, normalize_on_host, save_norm_stats
from jaxvla.data.running_stats import RunningStats
from jaxvla.data.statistics import compute_norm_stats


class Vectors:
    """A data set of which only the vectors are read; actions go on beyond the last step."""

    def __init__(self, *parts: tuple[Any, Any]):
        self._parts = parts
        self.num_steps = [len(state) for state, _ in parts]

    def states(self, episode: int) -> np.ndarray:
        return np.asarray(self._parts[episode][0], np.float32)

    def actions(self, episode: int) -> np.ndarray:
        actions = np.asarray(self._parts[episode][1], np.float32)
        return np.concatenate([actions, np.full((3, actions.shape[1]), 1e6, np.float32)])


def random_parts(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [(random.normal(2.0, 3.0, (n, 4)), random.uniform(-1, 1, (n, 2))) for n in (300, 1, 700)]


def stats_of(parts: Any, kind: str = "quantile", **settings: int) -> Any:
    return compute_norm_stats(Vectors(*parts), kind, **settings)  # pyright: ignore


@pytest.mark.parametrize("kind", ["zscore", "quantile"])
def test_against_numpy(kind: str, tmp_path: pathlib.Path) -> None:
    parts = random_parts()
    stats = stats_of(parts, kind)
    assert stats.kind == kind
    for field, index in ((stats.state, 0), (stats.actions, 1)):
        values = np.concatenate([part[index] for part in parts]).astype(np.float32)
        values = values.astype(np.float64)
        np.testing.assert_allclose(field.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(field.std, values.std(0), rtol=1e-12)
        np.testing.assert_allclose(field.q01, np.quantile(values, 0.01, axis=0), rtol=1e-12)
        np.testing.assert_allclose(field.q99, np.quantile(values, 0.99, axis=0), rtol=1e-12)
    path = tmp_path / "norm_stats.json"
    save_norm_stats(stats, path)
    again = load_norm_stats(path, kind)
    np.testing.assert_array_equal(again.state.q01, stats.state.q01)
    np.testing.assert_array_equal(again.actions.std, stats.actions.std)


def test_openpis_estimate_is_close() -> None:
    """Its histograms have 5000 bins over the range; 20,000 uniform values leave no larger gaps."""
    random = np.random.default_rng(0)
    parts = [(random.uniform(-2, 3, (10_000, 3)), random.uniform(-1, 1, (10_000, 2)))] * 2
    running = RunningStats()
    for state, _ in parts:
        running.update(state)
    exact, estimate = stats_of(parts).state, running.stats()
    np.testing.assert_allclose(estimate.q01, exact.q01, atol=5.0 * 2 / 5000)
    np.testing.assert_allclose(estimate.q99, exact.q99, atol=5.0 * 2 / 5000)
    np.testing.assert_allclose(estimate.mean, exact.mean, atol=1e-6)
    np.testing.assert_allclose(estimate.std, exact.std, atol=1e-6)


def test_a_constant_dimension_stays_finite() -> None:
    states = np.full((50, 2), 0.25)
    stats = stats_of([(states, np.linspace(-1, 1, 50)[:, None])])
    normalized = normalize_on_host(states, stats.state, "quantile")
    np.testing.assert_allclose(normalized, -1.0)


def test_a_dimension_that_hardly_ever_moves_is_refused() -> None:
    actions = np.zeros((1000, 3))
    actions[:, 0], actions[:, 2] = np.linspace(-1, 1, 1000), np.linspace(0, 1, 1000)
    actions[500, 1] = 1.0
    parts = [(np.linspace(0, 1, 1000)[:, None], actions)]
    with pytest.raises(ValueError, match="dimension 1 of actions is constant in 98 %"):
        stats_of(parts)
    assert stats_of(parts, "zscore").actions.std[1] > 0.0


def test_values_must_be_finite() -> None:
    with pytest.raises(ValueError, match="state of the data set are not all finite"):
        stats_of([([[1.0], [np.nan]], [[0.0], [1.0]])])


@pytest.mark.parametrize("delta_dims", [1, 2])
def test_relative_actions_are_those_of_the_samples(delta_dims: int) -> None:
    """Chunk by chunk, against what the loss subtracts: the state at the start of the chunk."""
    random, horizon = np.random.default_rng(0), 5
    parts = [(random.normal(9.0, 2.0, (n, 3)), random.uniform(-1, 1, (n, 2))) for n in (40, 1, 70)]
    dataset, chunks = Vectors(*parts), []
    for episode, num_steps in enumerate(dataset.num_steps):
        state, actions = dataset.states(episode), dataset.actions(episode)
        for step in range(num_steps):
            padded = np.concatenate([actions, np.repeat(actions[-1:], horizon, axis=0)])
            chunk = padded[step : step + horizon].astype(np.float64)
            chunk[:, :delta_dims] -= state[step, :delta_dims]
            chunks.append(chunk)
    stats = stats_of(parts, "zscore", delta_dims=delta_dims, action_horizon=horizon)
    values = np.concatenate(chunks)
    np.testing.assert_allclose(stats.actions.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.actions.std, values.std(0), rtol=1e-12)
    np.testing.assert_allclose(stats.actions.q01, np.quantile(values, 0.01, axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.actions.q99, np.quantile(values, 0.99, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(stats.state.mean, stats_of(parts, "zscore").state.mean)
