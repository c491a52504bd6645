"""Normalisation against openpi's own transforms (recorded in float64) and round trips."""

import json
import pathlib

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.data.normalization import (
    KINDS,
    FieldStats,
    NormStats,
    load_norm_stats,
    normalize,
    normalize_on_host,
    save_norm_stats,
    unnormalize,
    unnormalize_on_host,
)

CASES_PATH = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "transforms.npz"


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    with np.load(CASES_PATH) as file:
        return dict(file)


def recorded_stats(cases: dict[str, np.ndarray], field: str) -> FieldStats:
    names = ("mean", "std", "q01", "q99")
    return FieldStats(**{name: cases[f"stats/{field}/{name}"] for name in names})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["state", "actions"])
def test_normalize_matches_recorded(cases, kind: str, field: str) -> None:
    x = jnp.asarray(cases[f"in/{field}"], jnp.float32)
    actual = normalize(x, recorded_stats(cases, field), kind)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, cases[f"norm/{kind}/{field}"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unnormalize_of_padded_actions_matches_recorded(cases, kind: str) -> None:
    x = jnp.asarray(cases["in/actions32"], jnp.float32)
    actual = unnormalize(x, recorded_stats(cases, "actions"), kind)
    np.testing.assert_allclose(actual, cases[f"unnorm32/{kind}/actions"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["state", "actions"])
def test_host_gives_the_recorded_bits(cases, kind: str, field: str) -> None:
    stats = recorded_stats(cases, field)
    normalized = normalize_on_host(cases[f"in/{field}"], stats, kind)
    assert normalized.dtype == np.float64
    np.testing.assert_array_equal(normalized, cases[f"norm/{kind}/{field}"])
    padded = cases["in/actions32" if field == "actions" else "in/state"]
    expected = cases[f"unnorm32/{kind}/{field}"]
    np.testing.assert_array_equal(unnormalize_on_host(padded, stats, kind), expected)


def test_host_maps_the_first_percentile_to_the_edge_of_a_bin() -> None:
    stats = FieldStats.from_array(np.random.default_rng(0).normal(size=(99, 8)))
    q01, _ = stats.quantiles()
    np.testing.assert_array_equal(normalize_on_host(q01, stats, "quantile"), np.full(8, -1.0))


@hypothesis.given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 999), size=st.sampled_from([1, 3, 4, 6])
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_host_round_trip_and_agreement(kind: str, seed: int, size: int) -> None:
    """For x shorter, as long and longer than the statistics."""
    rng = np.random.default_rng(seed)
    stats = FieldStats.from_array(rng.normal(3.0, 2.0, (50, 4)))
    x = rng.normal(size=(2, 3, size)).astype(np.float32)
    there = normalize_on_host(x, stats, kind)
    back = unnormalize_on_host(there, stats, kind)
    np.testing.assert_allclose(back, x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normalize(jnp.asarray(x), stats, kind), there, atol=1e-5)
    device = unnormalize(jnp.asarray(x), stats, kind)
    np.testing.assert_allclose(device, unnormalize_on_host(x, stats, kind), atol=1e-5)


@pytest.mark.parametrize("transform", [normalize_on_host, unnormalize_on_host])
def test_host_refuses_what_is_not_defined(transform) -> None:
    stats = FieldStats(mean=np.zeros(2), std=np.ones(2))
    with pytest.raises(ValueError, match="kind = 'minmax' is none of zscore, quantile"):
        transform(np.zeros(2), stats, "minmax")
    with pytest.raises(ValueError, match="not recorded"):
        transform(np.zeros(2), stats, "quantile")


def test_stats_longer_than_x_are_cut(cases) -> None:
    stats = recorded_stats(cases, "actions")
    x = jnp.asarray(cases["in/actions"], jnp.float32)
    full = normalize(x, stats, "quantile")
    np.testing.assert_array_equal(normalize(x[:, :3], stats, "quantile"), full[:, :3])


@hypothesis.given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 999), lead=st.sampled_from([(), (2,), (2, 3)])
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_round_trip(kind: str, seed: int, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    stats = FieldStats.from_array(rng.normal(3.0, 2.0, (50, 4)))
    x = jnp.asarray(rng.normal(size=(*lead, 6)), jnp.float32)
    np.testing.assert_allclose(normalize(unnormalize(x, stats, kind), stats, kind), x, atol=1e-5)


def test_from_array_over_all_leading_axes() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5, 3))
    stats, flat = FieldStats.from_array(values), values.reshape(35, 3)
    np.testing.assert_allclose(stats.mean, flat.mean(0))
    np.testing.assert_allclose(stats.std, np.sqrt(((flat - flat.mean(0)) ** 2).mean(0)))
    np.testing.assert_allclose(stats.quantiles(), np.percentile(flat, [1, 99], axis=0))


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_map_to_unit_interval(kind: str) -> None:
    stats = FieldStats.from_bounds([-2.0, 0.0], [4.0, 0.5])
    x = jnp.array([[-2.0, 0.0], [1.0, 0.25], [4.0, 0.5]])
    expected = [[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]
    np.testing.assert_allclose(normalize(x, stats, kind), expected, atol=1e-5)


def test_norm_stats_from_bounds_keep_actions() -> None:
    stats = NormStats.from_bounds([0.0, 0.0], [1.0, 2.0], action_dim=3)
    actions = jnp.array([[-1.0, 0.3, 1.0]])
    assert stats.action_dim == 3
    np.testing.assert_allclose(stats.normalize_actions(actions), actions, atol=2e-6)
    np.testing.assert_allclose(stats.unnormalize_actions(actions), actions, atol=2e-6)
    np.testing.assert_allclose(stats.normalize_state(jnp.array([1.0, 1.0])), [1.0, 0.0], atol=2e-6)


def test_file_round_trip(cases, tmp_path: pathlib.Path) -> None:
    stats = NormStats(
        state=recorded_stats(cases, "state"), actions=recorded_stats(cases, "actions")
    )
    path = tmp_path / "norm_stats.json"
    save_norm_stats(stats, path)
    assert set(json.loads(path.read_text())["norm_stats"]) == {"state", "actions"}
    loaded = load_norm_stats(path, "quantile")
    for field in ("state", "actions"):
        for name in ("mean", "std", "q01", "q99"):
            ours, theirs = (getattr(getattr(s, field), name) for s in (loaded, stats))
            np.testing.assert_array_equal(ours, theirs)


def test_file_without_quantiles_serves_zscore_only(tmp_path: pathlib.Path) -> None:
    field = {"mean": [0.0], "std": [1.0], "q01": None, "q99": None}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": field, "actions": field}}))
    assert load_norm_stats(path, "zscore").action_dim == 1
    with pytest.raises(ValueError, match="q01 and q99"):
        load_norm_stats(path, "quantile")


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"norm_stats": {"state": {}}}'])
def test_malformed_file_is_named(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "norm_stats.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"norm_stats\.json"):
        load_norm_stats(path, "zscore")


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        FieldStats(mean=np.zeros(2), std=np.ones(3))
    with pytest.raises(ValueError, match="come together"):
        FieldStats(mean=np.zeros(2), std=np.ones(2), q01=np.zeros(2))
    with pytest.raises(ValueError, match="low < high"):
        FieldStats.from_bounds([0.0], [0.0])
    with pytest.raises(ValueError, match="finite"):
        FieldStats.from_array(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="zscore, quantile"):
        NormStats(
            state=FieldStats.from_bounds([0], [1]),
            actions=FieldStats.from_bounds([0], [1]),
            kind="minmax",
        )
