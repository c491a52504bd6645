"""PPO: targets, the loss in float64, the policy gradient at ratio 1, samples that do not count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scaled_policy import PARAMS, B, N, ScaledPolicy, T, loss_and_grad, make_batch, make_trajectory

from jaxvla.algorithms import ALGORITHMS, losses
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.config import ConfigError
from jaxvla.types import Observation, Params, TrainingBatch, Trajectory


def ppo(**settings: Any) -> PPO:
    return PPO(PPOConfig(**settings))


def acted(samples: TrainingBatch, log_prob: Any) -> TrainingBatch:
    """The samples as if weights that gave them `log_prob` had made them and begun the update."""
    return dataclasses.replace(samples, behavior_log_prob=log_prob, proximal_log_prob=log_prob)


def prepare(algorithm: PPO, record: Trajectory) -> TrainingBatch:
    """Without staleness."""
    return algorithm.prepare(record, version=jnp.int32(0), evaluation=None)


def test_registry_names_ppo() -> None:
    assert ALGORITHMS.get("ppo") is PPO and PPOConfig().name == "ppo"


def test_targets() -> None:
    record = make_trajectory()
    made = prepare(ppo(discount=0.5, trace_decay=0.0, standardize_advantages=False), record)
    t, b = 3, 1  # goes on beyond the record
    expected = record.reward[t, b] + 0.5 * record.bootstrap_value[t, b] - record.value[t, b]
    np.testing.assert_allclose(made.advantage[t, b], expected, rtol=1e-5)
    np.testing.assert_allclose(made.return_, made.advantage + record.value, rtol=1e-6)
    np.testing.assert_array_equal(made.behavior_log_prob, record.behavior_log_prob)
    np.testing.assert_array_equal(made.proximal_log_prob, record.behavior_log_prob)
    np.testing.assert_array_equal(made.proximal_value, record.value)
    np.testing.assert_array_equal(made.trace, record.trace)
    assert made.weight.dtype == jnp.float32 and np.all(made.weight == 1.0)


def test_targets_are_not_standardized() -> None:
    """That is the learner's, who knows all samples of an update."""
    plain, scaled = (ppo(standardize_advantages=x) for x in (False, True))
    assert (plain.standardizes_advantages, scaled.standardizes_advantages) == (False, True)
    made, expected = (prepare(x, make_trajectory()) for x in (scaled, plain))
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_invalid_steps_change_no_other_target() -> None:
    """Every number of an invalid step but the critic's is NaN; as weight they get 0."""
    valid = np.ones((T, B), bool)
    valid[2, 0] = valid[3, 2] = False
    record = dataclasses.replace(make_trajectory(), valid=valid)
    noisy = dataclasses.replace(
        record,
        reward=np.where(valid, record.reward, np.nan),
        bootstrap_value=np.where(valid, record.bootstrap_value, np.nan),
        trace=np.where(valid, record.trace, np.nan),
        behavior_log_prob=np.where(valid, record.behavior_log_prob, np.nan),
    )
    clean, made = (prepare(ppo(), x) for x in (record, noisy))
    np.testing.assert_array_equal(made.weight, valid)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(made))
    for name in ("advantage", "return_"):
        np.testing.assert_array_equal(getattr(made, name), getattr(clean, name))


def test_loss_and_metrics_equal_float64() -> None:
    weight = np.array([1, 1, 0, 1] * 3, np.float64)
    samples = make_batch(weight=jnp.asarray(weight, jnp.float32))
    settings = {"clip_low": 0.1, "clip_high": 0.3, "value_clip": 0.2, "value_coef": 0.7}
    (total, metrics), _ = loss_and_grad(ppo(entropy_coef=0.05, **settings), samples)

    x = np.asarray(samples.trace, np.float64)
    old, advantage, target = (
        np.asarray(v, np.float64)
        for v in (samples.behavior_log_prob, samples.advantage, samples.return_)
    )
    ratio = np.exp(0.7 * x - old)
    v, v_old = -0.4 * x, np.asarray(samples.proximal_value, np.float64)
    near = v_old + np.clip(v - v_old, -0.2, 0.2)

    def mean(values: np.ndarray) -> float:
        return (values * weight).sum() / weight.sum()

    expected = {
        "loss/policy": mean(np.maximum(-ratio * advantage, -np.clip(ratio, 0.9, 1.3) * advantage)),
        "loss/value": mean(0.5 * np.maximum((v - target) ** 2, (near - target) ** 2)),
        "loss/entropy": mean(0.3 * x),
        "ratio/mean": mean(ratio),
        "ratio/max": ratio[weight > 0].max(),
        "clip_fraction": mean((ratio < 0.9) | (ratio > 1.3)),
        "approx_kl": mean(ratio - 1 - np.log(ratio)),
    }
    expected["loss/total"] = (
        expected["loss/policy"] + 0.7 * expected["loss/value"] - 0.05 * expected["loss/entropy"]
    )
    assert metrics.keys() == expected.keys()
    assert 0.0 < expected["clip_fraction"] < 1.0
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert float(total) == float(metrics["loss/total"])


def test_dual_clip_and_huber_reach_the_loss() -> None:
    samples = make_batch()
    samples = acted(samples, 0.7 * samples.trace - 1.5)  # every ratio is exp(1.5), above 3
    settings = {"dual_clip": 3.0, "value_huber": 0.3, "value_clip": 1e6}
    (_, metrics), _ = loss_and_grad(ppo(**settings), samples)
    advantage = np.float64(samples.advantage)
    expected = np.where(advantage < 0, -3.0 * advantage, -1.2 * advantage).mean()
    np.testing.assert_allclose(metrics["loss/policy"], expected, rtol=1e-5)
    error = np.abs(-0.4 * np.float64(samples.trace) - np.float64(samples.return_))
    assert (error > 0.3).any() and (error < 0.3).any()
    expected = np.where(error > 0.3, 0.3 * (error - 0.15), 0.5 * error**2).mean()
    np.testing.assert_allclose(metrics["loss/value"], expected, rtol=1e-5)


def test_at_ratio_1_the_gradient_is_the_policy_gradient() -> None:
    """Sutton et al. 1999: the mean of -A grad log pi."""
    samples = make_batch()
    samples = acted(samples, PARAMS["log_prob"] * samples.trace)
    (_, metrics), grads = loss_and_grad(ppo(value_coef=0.0), samples)
    expected = -np.mean(np.float64(samples.advantage) * np.float64(samples.trace))
    np.testing.assert_allclose(grads["log_prob"], expected, rtol=1e-5)
    assert metrics["ratio/mean"] == 1.0
    # The log-ratio is rounding, 1e-8, and what is left of it is to be its square.
    assert 0.0 <= metrics["approx_kl"] < 1e-14
    assert metrics["clip_fraction"] == 0.0
    assert grads["value"] == 0.0 and grads["entropy"] == 0.0


def test_entropy_is_raised_and_the_value_error_lowered() -> None:
    samples = make_batch()
    _, grads = loss_and_grad(ppo(value_coef=2.0, entropy_coef=0.5, value_clip=1e6), samples)
    x = np.asarray(samples.trace, np.float64)
    np.testing.assert_allclose(grads["entropy"], -0.5 * x.mean(), rtol=1e-5)
    error = -0.4 * x - np.asarray(samples.return_, np.float64)
    np.testing.assert_allclose(grads["value"], 2.0 * (error * x).mean(), rtol=1e-5)


def test_samples_of_weight_0_change_nothing_not_even_as_nan() -> None:
    used = np.arange(N) % 3 != 1
    samples = make_batch()

    def spoil(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(used.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.nan)

    weight = jnp.asarray(used, jnp.float32)
    spoiled = dataclasses.replace(jax.tree.map(spoil, samples), weight=weight)
    spoiled = losses.blank_unused(spoiled, weight)  # as `prepare` does
    kept = jax.tree.map(lambda x: x[used], samples)
    algorithm = ppo(entropy_coef=0.1)
    (loss, metrics), grads = loss_and_grad(algorithm, spoiled)
    (loss_kept, metrics_kept), grads_kept = loss_and_grad(algorithm, kept)
    np.testing.assert_allclose(loss, loss_kept, rtol=1e-6)
    for name in grads:
        np.testing.assert_allclose(grads[name], grads_kept[name], rtol=1e-5, err_msg=name)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_kept[name], rtol=1e-5, err_msg=name)


def test_an_unlikely_looking_blank_sample_does_not_overflow() -> None:
    """exp(log-ratio) of a sample of weight 0 must not be infinite: its slope would be NaN."""

    class Shifted(ScaledPolicy):
        def evaluate(self, params: Params, encoding: Observation, trace: Any) -> Any:
            return super().evaluate(
                params, dataclasses.replace(encoding, state=jnp.ones((N, 1))), trace + 300.0
            )

    samples = make_batch(weight=jnp.ones(N).at[5].set(0.0))
    samples = acted(samples, 0.7 * (samples.trace + 300.0))
    samples = losses.blank_unused(samples, samples.weight)

    def loss(params: Params) -> jax.Array:
        return ppo().loss(Shifted(), params, samples)[0]

    assert all(np.isfinite(x) for x in jax.grad(loss)(PARAMS).values())


def test_a_batch_without_weight_has_no_gradient() -> None:
    samples = make_batch(weight=jnp.zeros(N), trace=jnp.full(N, jnp.nan))
    samples = losses.blank_unused(samples, samples.weight)
    (loss, metrics), grads = loss_and_grad(ppo(), samples)
    assert float(loss) == 0.0
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(float(x) == 0.0 for x in grads.values())


def test_nan_of_a_used_sample_shows() -> None:
    samples = make_batch()
    samples = acted(samples, samples.behavior_log_prob.at[3].set(jnp.nan))
    (loss, _), grads = loss_and_grad(ppo(), samples)
    assert np.isnan(loss) and np.isnan(grads["log_prob"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discount", 1.01),
        ("discount", -0.1),
        ("trace_decay", 1.5),
        ("trace_decay", float("nan")),
        ("clip_low", 0.0),
        ("clip_high", -0.2),
        ("dual_clip", 1.2),
        ("dual_clip", -3.0),
        ("value_clip", 0.0),
        ("value_huber", -1.0),
        ("value_coef", -1.0),
        ("entropy_coef", -0.01),
    ],
)
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"algorithm\.{name} = {value}.*Fix: --config"):
        dataclasses.replace(PPOConfig(), **{name: value}).validate()


def test_edges_of_the_ranges_are_allowed() -> None:
    PPOConfig(discount=1.0, trace_decay=0.0, value_coef=0.0, entropy_coef=0.0).validate()
    PPOConfig(dual_clip=1.21, value_huber=0.0).validate()
