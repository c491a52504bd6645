"""Behavior weights, the split of the log-ratio and the metrics, against float64 loops."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scaled_policy import B, N, T, make_batch, make_trajectory

from jaxvla.algorithms import corrections
from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig
from jaxvla.algorithms.policy import Evaluation
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import ConfigError

CONFIG = CorrectionConfig(cap=2.0, rho_cap=1.5, trace_cap=1.0, sigma=0.5)


def weight_reference(kind: str, log_ratio: float, config: CorrectionConfig) -> tuple[float, bool]:
    """(behavior weight, whether a cap changed it)."""
    if kind == "none":
        return 1.0, False
    if kind == "gaussian":
        return math.exp(log_ratio) * math.exp(-(log_ratio**2) / (2 * config.sigma**2)), False
    ratio = math.exp(log_ratio)
    if kind in ("decoupled", "interpolated"):
        return (0.0, True) if ratio > config.cap else (ratio, False)
    cap = config.rho_cap if kind == "vtrace" else config.cap
    return min(ratio, cap), ratio > cap


def weigh(kind: str, log_ratio: Any, config: CorrectionConfig = CONFIG) -> tuple[Any, Any]:
    weight, is_capped = CORRECTIONS[kind].weigh(jnp.asarray(log_ratio, jnp.float32), config)
    return np.asarray(weight), np.asarray(is_capped)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_weights_equal_float64(kind: str) -> None:
    log_ratio = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    weight, is_capped = weigh(kind, log_ratio)
    expected = [weight_reference(kind, float(x), CONFIG) for x in log_ratio]
    np.testing.assert_allclose(weight, [x for x, _ in expected], rtol=2e-6)
    np.testing.assert_array_equal(is_capped, [x for _, x in expected])
    is_one = kind == "none"
    has_cap = kind not in ("none", "gaussian")
    assert np.all(weight == 1.0) == is_one and is_capped.any() == has_cap


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_sample_that_is_not_stale_weighs_exactly_1(kind: str) -> None:
    lowest = CorrectionConfig(cap=1.0, rho_cap=1.0, trace_cap=1.0, sigma=0.01)
    for config in (CONFIG, lowest):
        weight, is_capped = weigh(kind, [0.0], config)
        assert weight[0] == 1.0 and not is_capped[0]


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("none", 1.0, 1.0),
        ("decoupled", 0.0, 0.0),
        ("interpolated", 0.0, 0.0),
        ("truncated", 0.0, 2.0),
        ("vtrace", 0.0, 1.5),
        ("gaussian", 0.0, 0.0),
    ],
)
def test_weights_of_ratios_that_overflow(kind: str, least: float, most: float) -> None:
    weight, _ = weigh(kind, [-1e30, -1e4, 1e4, 1e30])
    np.testing.assert_allclose(weight, [least, least, most, most], rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in CORRECTIONS if kind != "none"])
def test_nan_shows(kind: str) -> None:
    assert np.isnan(weigh(kind, [np.nan])[0][0])


def test_the_gaussian_weight_has_its_peak_where_it_is_said_to_be() -> None:
    grid = np.linspace(-3.0, 3.0, 6001)
    weight, _ = weigh("gaussian", grid)
    assert grid[weight.argmax()] == pytest.approx(CONFIG.sigma**2, abs=1e-3)
    assert weight.max() == pytest.approx(math.exp(CONFIG.sigma**2 / 2), rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in CORRECTIONS if kind != "interpolated"])
def test_split_at_the_proximal_policy(kind: str) -> None:
    batch = make_batch(proximal_log_prob=jnp.linspace(-1.0, 1.0, N))
    log_prob = jnp.linspace(-2.0, 0.5, N)
    after, before = CORRECTIONS[kind].split(log_prob, batch)
    np.testing.assert_allclose(after, log_prob - batch.proximal_log_prob, rtol=1e-6)
    np.testing.assert_allclose(before, batch.proximal_log_prob - batch.behavior_log_prob, rtol=1e-6)


def test_interpolation_gives_this_update_its_share() -> None:
    """Of a log-ratio of 6 the s updates before this one get s / (s + 1)."""
    batch = make_batch(
        behavior_log_prob=jnp.full(N, -7.0), staleness=jnp.arange(N) % 3, weight=jnp.ones(N)
    )
    after, before = CORRECTIONS["interpolated"].split(jnp.full(N, -1.0), batch)
    np.testing.assert_allclose(before, [0.0, 3.0, 4.0] * 4, rtol=1e-6)
    np.testing.assert_allclose(after, [6.0, 3.0, 2.0] * 4, rtol=1e-6)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_gradients_pass_through_the_first_part_alone(kind: str) -> None:
    batch = make_batch(staleness=jnp.arange(N) % 3)

    def part(log_prob: jax.Array, index: int) -> jax.Array:
        return CORRECTIONS[kind].split(log_prob, batch)[index].sum()

    slopes = [jax.grad(part)(jnp.linspace(-2.0, 0.5, N), index) for index in (0, 1)]
    np.testing.assert_array_equal(slopes[0], np.ones(N))
    np.testing.assert_array_equal(slopes[1], np.zeros(N))


def test_only_stale_valid_samples_take_the_evaluation() -> None:
    record = make_trajectory()
    valid, staleness = np.ones((T, B), bool), np.zeros((T, B), np.int32)
    valid[1, 0] = False
    staleness[:2] = 3
    record = dataclasses.replace(record, valid=valid)
    new = np.full((T, B), 5.0, np.float32)
    new[1, 0] = np.nan
    evaluation = Evaluation(log_prob=jnp.asarray(new), value=jnp.asarray(2.0 * new))
    made = corrections.at_start_of_update(record, jnp.asarray(staleness), evaluation)
    is_new = valid & (staleness > 0)
    np.testing.assert_array_equal(
        made.log_prob, np.where(is_new, 5.0, record.behavior_log_prob).astype(np.float32)
    )
    np.testing.assert_array_equal(
        made.value, np.where(is_new, 10.0, record.value).astype(np.float32)
    )
    acting = corrections.at_start_of_update(record, jnp.asarray(staleness), None)
    np.testing.assert_array_equal(acting.log_prob, record.behavior_log_prob)
    np.testing.assert_array_equal(acting.value, record.value)


@pytest.mark.parametrize("kind", [kind for kind in CORRECTIONS if kind != "none"])
def test_metrics_equal_float64(kind: str) -> None:
    rng = np.random.default_rng(3)
    is_used = rng.uniform(size=200) < 0.7
    log_ratio = np.where(is_used, rng.normal(size=200), 0.0).astype(np.float32)
    weight, is_capped = CORRECTIONS[kind].weigh(jnp.asarray(log_ratio), CONFIG)
    made = corrections.metrics(
        log_ratio=jnp.asarray(log_ratio),
        behavior_weight=weight,
        is_capped=is_capped,
        weight=jnp.asarray(is_used, jnp.float32),
    )
    used = [float(x) for x in log_ratio[is_used]]
    weights = np.array([weight_reference(kind, x, CONFIG)[0] for x in used])
    expected = {
        "behavior_weight/mean": weights.mean(),
        "behavior_weight/max": weights.max(),
        "behavior_weight/capped_fraction": np.mean(
            [weight_reference(kind, x, CONFIG)[1] for x in used]
        ),
        "behavior_weight/mean_square": np.square(weights).mean(),
        "behavior_approx_kl": np.mean([math.exp(x) - 1.0 - x for x in used]),
    }
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5, err_msg=name)


def test_metrics_without_a_sample_are_0() -> None:
    zeros = jnp.zeros(5)
    made = corrections.metrics(
        log_ratio=zeros, behavior_weight=zeros, is_capped=zeros > 0, weight=zeros
    )
    assert all(float(x) == 0.0 for x in made.values())


@pytest.mark.parametrize(
    ("settings", "name", "allowed"),
    [
        ({"kind": "retrace"}, "kind", "must be one of none, decoupled, interpolated, truncated"),
        ({"cap": 0.9}, "cap", "must be >= 1"),
        ({"cap": float("nan")}, "cap", "must be >= 1"),
        ({"rho_cap": 0.5}, "rho_cap", "must be >= 1"),
        ({"trace_cap": 0.5}, "trace_cap", "must be in"),
        ({"trace_cap": 1.5}, "trace_cap", r"must be in \[1, rho_cap = 1.0\]"),
        ({"sigma": 0.0}, "sigma", "must be > 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], name: str, allowed: str) -> None:
    config = PPOConfig(correction=CorrectionConfig(**settings))
    match = rf"algorithm\.correction\.{name} = .*{allowed}.*Fix: --config\.algorithm\.correction"
    with pytest.raises(ConfigError, match=match):
        config.validate()


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_every_kind_is_allowed(kind: str) -> None:
    settings: dict[str, Any] = {"kind": kind, "cap": 1.0, "rho_cap": 3.0, "trace_cap": 3.0}
    PPOConfig(correction=CorrectionConfig(**settings)).validate()
