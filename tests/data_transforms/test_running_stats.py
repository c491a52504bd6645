"""Running statistics against openpi's, recorded, and against those of the whole array."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.data.normalization import FieldStats
from jaxvla.data.running_stats import NUM_BINS, RunningStats

FIELDS = ("mean", "std", "q01", "q99")


def running(batches) -> FieldStats:
    """Statistics after all batches."""
    stats = RunningStats()
    for batch in batches:
        stats.update(batch)
    return stats.stats()


@pytest.mark.parametrize("field", FIELDS)
def test_running_stats_match_recorded(cases, field: str) -> None:
    actual = getattr(running(cases["running/in"]), field)
    # Every quantile is the edge of a bin; a neighbouring bin is 1e-3 away.
    np.testing.assert_allclose(actual, cases[f"running/{field}"], rtol=1e-13, atol=1e-15)


def test_recorded_batches_widen_the_range(cases) -> None:
    first, *others = cases["running/in"]
    assert any((batch.max(axis=0) > first.max(axis=0)).any() for batch in others)
    assert any((batch.min(axis=0) < first.min(axis=0)).any() for batch in others)


@hypothesis.given(
    seed=st.integers(0, 9999), splits=st.lists(st.integers(1, 299), max_size=4, unique=True)
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_close_to_exact_statistics_however_split(seed: int, splits: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.normal(size=3), [0.1, 1.0, 5.0], (300, 3))
    actual, exact = running(np.split(values, sorted(splits))), FieldStats.from_array(values)
    np.testing.assert_allclose(actual.mean, exact.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(actual.std, exact.std, rtol=1e-9)
    # Each widening shifts a count by at most a bin and can lose the lowest sample.
    slack = (len(splits) + 2) * np.ptp(values, axis=0) / NUM_BINS
    ordered = np.sort(values, axis=0)
    for quantile, rank in zip(actual.quantiles(), (3, 297), strict=True):
        assert (quantile >= ordered[max(rank - 2, 0)] - slack).all()
        assert (quantile <= ordered[min(rank + 1, 299)] + slack).all()


def test_leading_axes_are_samples(cases) -> None:
    batches = cases["running/in"]
    actual, expected = running(batches.reshape(3, 20, 5, 4, 4)), running(batches)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))


def test_constant_dimension() -> None:
    stats = running([np.full((5, 1), 0.25), np.full((5, 1), 0.25)])
    assert stats.mean == 0.25 and stats.std == 0.0
    np.testing.assert_allclose(stats.quantiles(), 0.25, atol=1e-9)


def test_statistics_do_not_change_with_later_updates() -> None:
    running_stats = RunningStats()
    running_stats.update([[0.0], [1.0]])
    stats = running_stats.stats()
    running_stats.update([[9.0], [9.0]])
    assert stats.mean == 0.5 and running_stats.stats().mean == 4.75


def test_bad_values_are_refused() -> None:
    stats = RunningStats()
    with pytest.raises(ValueError, match="at least 2 vectors, there are 0"):
        stats.stats()
    for values in (1.0, np.zeros((0, 2)), [[np.nan, 0.0]]):
        with pytest.raises(ValueError, match="pass finite vectors"):
            stats.update(values)
    stats.update([0.0, 1.0])
    with pytest.raises(ValueError, match="there are 1"):
        stats.stats()
    with pytest.raises(ValueError, match="values have 3 dimensions, not 2"):
        stats.update(np.zeros((4, 3)))
