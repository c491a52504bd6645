"""PPO: targets, the loss in float64, the policy gradient at ratio 1, samples that do not count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.algorithms import ALGORITHMS
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.config import ConfigError
from jaxvla.types import Observation, Params, TrainingBatch, Trajectory

T, B, N = 4, 3, 12


class ScaledPolicy:
    """Scores sample n as params * trace[n]: every input of a sample reaches the gradient."""

    def evaluate(
        self, params: Params, observation: Observation, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = trace * observation.state[..., 0]
        return params["log_prob"] * x, params["entropy"] * x, params["value"] * x


PARAMS = {"log_prob": jnp.float32(0.7), "entropy": jnp.float32(0.3), "value": jnp.float32(-0.4)}


def observation(*shape: int) -> Observation:
    return Observation(
        images=jnp.zeros((*shape, 1, 2, 2, 3), jnp.uint8),
        image_mask=jnp.ones((*shape, 1), bool),
        state=jnp.ones((*shape, 1)),
        tokens=jnp.zeros((*shape, 2), jnp.int32),
        token_mask=jnp.ones((*shape, 2), bool),
    )


def trajectory(seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)

    def normal() -> Any:
        return rng.normal(size=(T, B)).astype(np.float32)

    terminated: Any = np.eye(T, B, dtype=bool)
    truncated: Any = np.eye(T, B, k=1, dtype=bool)
    valid: Any = np.ones((T, B), bool)
    version: Any = np.zeros((T, B), np.int32)
    return Trajectory(
        observation=observation(T, B),
        trace=normal(),
        behavior_log_prob=normal(),
        value=normal(),
        reward=normal(),
        terminated=terminated,
        truncated=truncated,
        bootstrap_value=normal(),
        valid=valid,
        policy_version=version,
    )


def batch(seed: int = 0, **changes: Any) -> TrainingBatch:
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        name: jnp.asarray(rng.normal(size=N), jnp.float32)
        for name in ("trace", "behavior_log_prob", "behavior_value", "advantage", "return_")
    }
    fields |= {"weight": jnp.ones(N), "observation": observation(N)}
    return TrainingBatch(**(fields | changes))


def ppo(**settings: Any) -> PPO:
    return PPO(PPOConfig(**settings))


def loss_and_grad(algorithm: PPO, samples: TrainingBatch) -> tuple[Any, Params]:
    def loss(params: Params) -> tuple[jax.Array, Any]:
        return algorithm.loss(ScaledPolicy(), params, samples)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)


def test_registry_names_ppo() -> None:
    assert ALGORITHMS.get("ppo") is PPO and PPOConfig().name == "ppo"


def test_targets() -> None:
    record = trajectory()
    made = ppo(discount=0.5, trace_decay=0.0, standardize_advantages=False).prepare(record)
    t, b = 3, 1  # goes on beyond the record
    expected = record.reward[t, b] + 0.5 * record.bootstrap_value[t, b] - record.value[t, b]
    np.testing.assert_allclose(made.advantage[t, b], expected, rtol=1e-5)
    np.testing.assert_allclose(made.return_, made.advantage + record.value, rtol=1e-6)
    np.testing.assert_array_equal(made.behavior_log_prob, record.behavior_log_prob)
    np.testing.assert_array_equal(made.behavior_value, record.value)
    np.testing.assert_array_equal(made.trace, record.trace)
    assert made.weight.dtype == jnp.float32 and np.all(made.weight == 1.0)


def test_only_the_advantage_is_standardized() -> None:
    plain = ppo(standardize_advantages=False).prepare(trajectory())
    scaled = ppo(standardize_advantages=True).prepare(trajectory())
    raw = np.asarray(plain.advantage, np.float64)
    np.testing.assert_allclose(
        scaled.advantage, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(scaled.return_, plain.return_)


def test_invalid_steps_change_no_other_target() -> None:
    """Every number of an invalid step but the critic's is NaN; as weight they get 0."""
    valid = np.ones((T, B), bool)
    valid[2, 0] = valid[3, 2] = False
    record = dataclasses.replace(trajectory(), valid=valid)
    noisy = dataclasses.replace(
        record,
        reward=np.where(valid, record.reward, np.nan),
        bootstrap_value=np.where(valid, record.bootstrap_value, np.nan),
        trace=np.where(valid, record.trace, np.nan),
        behavior_log_prob=np.where(valid, record.behavior_log_prob, np.nan),
    )
    clean, made = (ppo().prepare(x) for x in (record, noisy))
    np.testing.assert_array_equal(made.weight, valid)
    for name in ("advantage", "return_"):
        np.testing.assert_array_equal(getattr(made, name), getattr(clean, name))


def test_loss_and_metrics_equal_float64() -> None:
    weight = np.array([1, 1, 0, 1] * 3, np.float64)
    samples = batch(weight=jnp.asarray(weight, jnp.float32))
    settings = {"clip_low": 0.1, "clip_high": 0.3, "value_clip": 0.2, "value_coef": 0.7}
    (total, metrics), _ = loss_and_grad(ppo(entropy_coef=0.05, **settings), samples)

    x = np.asarray(samples.trace, np.float64)
    old, advantage, target = (
        np.asarray(v, np.float64)
        for v in (samples.behavior_log_prob, samples.advantage, samples.return_)
    )
    ratio = np.exp(0.7 * x - old)
    v, v_old = -0.4 * x, np.asarray(samples.behavior_value, np.float64)
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


def test_at_ratio_1_the_gradient_is_the_policy_gradient() -> None:
    """Sutton et al. 1999: the mean of -A grad log pi."""
    samples = batch()
    samples = dataclasses.replace(samples, behavior_log_prob=PARAMS["log_prob"] * samples.trace)
    (_, metrics), grads = loss_and_grad(ppo(value_coef=0.0), samples)
    expected = -np.mean(np.float64(samples.advantage) * np.float64(samples.trace))
    np.testing.assert_allclose(grads["log_prob"], expected, rtol=1e-5)
    assert metrics["ratio/mean"] == 1.0
    # The log-ratio is rounding, 1e-8, and what is left of it is to be its square.
    assert 0.0 <= metrics["approx_kl"] < 1e-14
    assert metrics["clip_fraction"] == 0.0
    assert grads["value"] == 0.0 and grads["entropy"] == 0.0


def test_entropy_is_raised_and_the_value_error_lowered() -> None:
    samples = batch()
    _, grads = loss_and_grad(ppo(value_coef=2.0, entropy_coef=0.5, value_clip=1e6), samples)
    x = np.asarray(samples.trace, np.float64)
    np.testing.assert_allclose(grads["entropy"], -0.5 * x.mean(), rtol=1e-5)
    error = -0.4 * x - np.asarray(samples.return_, np.float64)
    np.testing.assert_allclose(grads["value"], 2.0 * (error * x).mean(), rtol=1e-5)


def spoil(record: Trajectory, valid: np.ndarray) -> Trajectory:
    """NaN in every number of the samples that are not valid."""

    def blot(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, jnp.nan)

    return dataclasses.replace(jax.tree.map(blot, record), valid=valid)


def flatten(made: TrainingBatch) -> TrainingBatch:
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(N, *x.shape[2:]), made)


def test_samples_of_weight_0_change_nothing_not_even_as_nan() -> None:
    valid = (np.arange(N) % 3 != 1).reshape(T, B)
    algorithm = ppo(entropy_coef=0.1)
    made = flatten(algorithm.prepare(spoil(trajectory(), valid)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(made))
    kept = jax.tree.map(lambda x: x[valid.ravel()], made)
    (loss, metrics), grads = loss_and_grad(algorithm, made)
    (loss_kept, metrics_kept), grads_kept = loss_and_grad(algorithm, kept)
    np.testing.assert_allclose(loss, loss_kept, rtol=1e-6)
    for name in grads:
        np.testing.assert_allclose(grads[name], grads_kept[name], rtol=1e-5, err_msg=name)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_kept[name], rtol=1e-5, err_msg=name)


def test_an_unlikely_looking_blank_sample_does_not_overflow() -> None:
    """exp(log-ratio) of a sample of weight 0 must not be infinite: its slope would be NaN."""

    class Shifted(ScaledPolicy):
        def evaluate(self, params: Params, observation: Observation, trace: Any) -> Any:
            return super().evaluate(
                params, dataclasses.replace(observation, state=jnp.ones((N, 1))), trace + 300.0
            )

    samples = batch(weight=jnp.ones(N).at[5].set(0.0))
    samples = dataclasses.replace(samples, behavior_log_prob=0.7 * (samples.trace + 300.0))

    def loss(params: Params) -> jax.Array:
        return ppo().loss(Shifted(), params, samples)[0]

    assert all(np.isfinite(x) for x in jax.grad(loss)(PARAMS).values())


def test_a_batch_without_weight_has_no_gradient() -> None:
    made = ppo().prepare(spoil(trajectory(), np.zeros((T, B), bool)))
    (loss, metrics), grads = loss_and_grad(ppo(), flatten(made))
    assert float(loss) == 0.0
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(float(x) == 0.0 for x in grads.values())


def test_nan_of_a_used_sample_shows() -> None:
    samples = batch()
    samples = dataclasses.replace(
        samples, behavior_log_prob=samples.behavior_log_prob.at[3].set(jnp.nan)
    )
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
        ("value_clip", 0.0),
        ("value_coef", -1.0),
        ("entropy_coef", -0.01),
    ],
)
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"algorithm\.{name} = {value}.*Fix: --config"):
        dataclasses.replace(PPOConfig(), **{name: value}).validate()


def test_edges_of_the_ranges_are_allowed() -> None:
    PPOConfig(discount=1.0, trace_decay=0.0, value_coef=0.0, entropy_coef=0.0).validate()


def test_whole_batch_settings() -> None:
    assert PPOConfig().whole_batch_settings() == ("standardize_advantages",)
    assert PPOConfig(standardize_advantages=False).whole_batch_settings() == ()
