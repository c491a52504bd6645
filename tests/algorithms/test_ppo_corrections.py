"""PPO on stale samples: without staleness every kind is plain PPO; losses, gradients in float64."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from returns_reference import reference, vtrace_reference
from scaled_policy import (
    PARAMS,
    B,
    N,
    T,
    loss_and_grad,
    loss_and_grad_by_operation,
    make_batch,
    make_trajectory,
)
from test_corrections import weight_reference

from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig
from jaxvla.algorithms.policy import Evaluation
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.types import Observation, Params, TrainingBatch, Trajectory

CORRECTION: dict[str, Any] = {"cap": 1.5, "rho_cap": 1.3, "trace_cap": 1.1, "sigma": 0.6}
SETTINGS: dict[str, Any] = {
    "clip_low": 0.15,
    "clip_high": 0.3,
    "value_clip": 0.3,
    "entropy_coef": 0.05,
}
VERSION = jnp.int32(3)
CORRECTED = [kind for kind in CORRECTIONS if kind != "none"]
OUTCOMES = ("reward", "bootstrap_value", "terminated", "truncated", "valid")
RECOMPUTED = ["decoupled", "truncated", "vtrace", "gaussian"]


@functools.cache  # so that a test compiles once per setting
def ppo(kind: str, **settings: Any) -> PPO:
    correction = CorrectionConfig(kind=kind, **CORRECTION)
    return PPO(PPOConfig(correction=correction, **SETTINGS | settings))


def stale_trajectory(seed: int = 0) -> Trajectory:
    """Of versions 0 to 3, with two invalid samples that are NaN wherever they may be."""
    record = make_trajectory(seed)
    version: Any = np.random.default_rng(seed).integers(0, 4, (T, B), np.int32)
    valid: Any = np.ones((T, B), bool)
    valid[2, 0] = valid[1, 2] = False

    def spoil(x: Any) -> Any:
        return np.where(valid, x, np.float32(np.nan))

    return dataclasses.replace(
        record,
        trace=spoil(record.trace),
        behavior_log_prob=spoil(record.behavior_log_prob),
        reward=spoil(record.reward),
        valid=valid,
        policy_version=version,
    )


def evaluation_of(record: Trajectory, seed: int = 1) -> Evaluation:
    """Near the numbers of acting time; NaN where they are."""
    rng = np.random.default_rng(seed)

    def near(x: Any) -> Any:
        return (x + rng.normal(scale=0.7, size=(T, B))).astype(np.float32)

    value = np.where(record.valid, near(record.value), np.float32(np.nan))
    return Evaluation(log_prob=near(record.behavior_log_prob), value=jnp.asarray(value))


def prepare(algorithm: PPO, record: Trajectory, version: jax.Array = VERSION) -> TrainingBatch:
    evaluation = evaluation_of(record) if algorithm.needs_evaluation else None
    return compiled_prepare(algorithm)(record, version=version, evaluation=evaluation)


@functools.cache
def compiled_prepare(algorithm: PPO) -> Any:
    return jax.jit(algorithm.prepare)


def flat(batch: TrainingBatch) -> TrainingBatch:
    return jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), batch)


@pytest.mark.parametrize(
    ("kind", "recompute_value"),
    [*itertools.product(CORRECTED, [False, True]), ("none", True)],
)
def test_without_staleness_every_kind_is_plain_ppo_to_the_bit(
    kind: str, recompute_value: bool
) -> None:
    """Though the evaluation says otherwise, and also once the update has moved the weights.

    The targets also when compiled, the loss operation by operation.
    """
    record = dataclasses.replace(
        stale_trajectory(), policy_version=np.full((T, B), int(VERSION), np.int32)
    )
    corrected = ppo(kind, recompute_value=recompute_value)
    plain = ppo("none")
    expected, made = prepare(plain, record), prepare(corrected, record)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    moved = {"log_prob": jnp.float32(1.1), "entropy": jnp.float32(0.4), "value": jnp.float32(0.2)}
    for params in (PARAMS, moved):
        (loss, metrics), grads = loss_and_grad_by_operation(corrected, flat(made), params)
        (loss_0, metrics_0), grads_0 = loss_and_grad_by_operation(plain, flat(expected), params)
        np.testing.assert_array_equal(loss, loss_0)
        jax.tree.map(np.testing.assert_array_equal, grads, grads_0)
        for name, value in metrics_0.items():
            np.testing.assert_array_equal(metrics[name], value, err_msg=name)
        if kind != "none":
            assert metrics["behavior_weight/mean_square"] == 1.0
            assert metrics["behavior_approx_kl"] == 0.0
        assert float(loss_and_grad(corrected, flat(made), params)[0][0]) == pytest.approx(
            float(loss_0), rel=1e-6
        )


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_who_needs_an_evaluation(kind: str) -> None:
    assert ppo(kind).needs_evaluation == (kind in RECOMPUTED)
    assert ppo(kind, recompute_value=True).needs_evaluation


@pytest.mark.parametrize("recompute_value", [False, True])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_targets_of_stale_samples_equal_float64(kind: str, recompute_value: bool) -> None:
    record = stale_trajectory()
    algorithm = ppo(
        kind, recompute_value=recompute_value, standardize_advantages=False, discount=0.9
    )
    made, evaluation = prepare(algorithm, record), evaluation_of(record)
    staleness = 3 - np.asarray(record.policy_version)
    is_new = np.asarray(record.valid) & (staleness > 0)
    value, log_prob = (np.asarray(x) for x in (record.value, record.behavior_log_prob))
    if recompute_value or kind == "vtrace":
        value = np.where(is_new, evaluation.value, value)
    if kind in RECOMPUTED:
        log_prob = np.where(is_new, evaluation.log_prob, log_prob)
    arrays = {name: np.asarray(getattr(record, name)) for name in OUTCOMES} | {"value": value}
    advantage = reference(arrays, 0.9, 0.95)
    return_ = advantage + value
    if kind == "vtrace":
        arrays["log_ratio"] = log_prob - np.asarray(record.behavior_log_prob)
        advantage, return_ = vtrace_reference(arrays, 0.9, 0.95, 1.3, 1.1)
    used = np.asarray(record.valid)
    assert is_new.any() and (used & ~is_new).any()
    np.testing.assert_array_equal(made.staleness, staleness)
    np.testing.assert_allclose(made.advantage, advantage, rtol=1e-5, atol=1e-5)
    for name, expected in (
        ("return_", return_),
        ("proximal_value", value),
        ("proximal_log_prob", log_prob),
        ("behavior_log_prob", np.asarray(record.behavior_log_prob)),
    ):
        actual = np.asarray(getattr(made, name))
        np.testing.assert_allclose(actual[used], expected[used], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(actual[~used], 0.0, err_msg=name)


def test_a_time_limit_that_counts_as_failure_does_so_in_vtrace_too() -> None:
    record = stale_trajectory()
    failed = dataclasses.replace(
        record,
        terminated=record.terminated | record.truncated,
        truncated=np.zeros((T, B), bool),
    )
    made = prepare(ppo("vtrace", bootstrap_truncated=False), record)
    expected = prepare(ppo("vtrace"), failed)
    np.testing.assert_array_equal(made.advantage, expected.advantage)
    np.testing.assert_array_equal(made.return_, expected.return_)
    assert np.any(made.return_ != prepare(ppo("vtrace"), record).return_)


def stale_batch(seed: int = 0) -> TrainingBatch:
    """Samples whose three log-probs differ by up to about 1; the last two do not count."""
    rng = np.random.default_rng(seed)
    trace = rng.normal(size=N)
    proximal = 0.7 * trace + rng.normal(scale=0.3, size=N)
    behavior = proximal + rng.normal(scale=0.6, size=N)

    def put(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    return make_batch(
        seed,
        trace=put(trace),
        proximal_log_prob=put(proximal),
        behavior_log_prob=put(behavior),
        staleness=jnp.arange(N) % 4,
        weight=put(np.arange(N) < N - 2),
    )


def loss_reference(
    kind: str, batch: TrainingBatch, params: dict[str, float], start: dict[str, float]
) -> float:
    """Sample by sample. What is constant to the gradient is computed at `start`."""
    config = CorrectionConfig(kind=kind, **CORRECTION)
    total = 0.0
    for n in range(N - 2):
        x, behavior, proximal, advantage, return_, old = (
            float(getattr(batch, name)[n])
            for name in (
                "trace",
                "behavior_log_prob",
                "proximal_log_prob",
                "advantage",
                "return_",
                "proximal_value",
            )
        )
        if kind == "interpolated":
            s = float(batch.staleness[n])
            proximal = behavior + s / (s + 1) * (start["log_prob"] * x - behavior)
        weight, _ = weight_reference(kind, proximal - behavior, config)
        ratio = np.exp(params["log_prob"] * x - proximal)
        clipped = min(max(ratio, 0.85), 1.3)
        value = params["value"] * x
        near = old + min(max(value - old, -0.3), 0.3)
        total -= weight * min(ratio * advantage, clipped * advantage)
        total += 0.5 * 0.5 * max((value - return_) ** 2, (near - return_) ** 2)
        total -= 0.05 * params["entropy"] * x
    return total / (N - 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_losses_and_gradients_equal_float64(kind: str, seed: int) -> None:
    """Gradients against central differences."""
    batch = stale_batch(seed)
    if kind == "none":
        batch = dataclasses.replace(batch, proximal_log_prob=batch.behavior_log_prob)
    (loss, _), grads = loss_and_grad(ppo(kind), batch)
    start = {name: float(x) for name, x in PARAMS.items()}
    np.testing.assert_allclose(loss, loss_reference(kind, batch, start, start), rtol=1e-5)
    step = 1e-6
    for name in start:
        up, down = (
            loss_reference(kind, batch, start | {name: start[name] + sign * step}, start)
            for sign in (1, -1)
        )
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(grads[name], slope, rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_kinds_differ_on_stale_samples() -> None:
    losses = {kind: float(loss_and_grad(ppo(kind), stale_batch())[0][0]) for kind in CORRECTIONS}
    assert len(set(losses.values())) == len(CORRECTIONS)


@pytest.mark.parametrize("kind", CORRECTED)
def test_masked_and_damped_samples_make_the_others_no_heavier(kind: str) -> None:
    """The policy loss is a sum over the samples, divided by how many are valid."""
    batch = stale_batch()

    def policy_loss(index: Any) -> float:
        part = jax.tree.map(lambda x: x[index], batch)
        return float(loss_and_grad(ppo(kind), part)[0][1]["loss/policy"])

    alone = [policy_loss(np.array([n])) for n in range(N - 2)]
    assert policy_loss(np.arange(N)) == pytest.approx(np.mean(alone), rel=1e-5)


class Bandit:
    """One decision between A actions: a softmax over params["logits"]."""

    def evaluate(
        self, params: Params, encoding: Observation, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        del encoding
        log_prob = jax.nn.log_softmax(params["logits"])[trace]
        return log_prob, jnp.zeros_like(log_prob), jnp.zeros_like(log_prob)


@pytest.mark.parametrize("kind", ["decoupled", "truncated", "vtrace"])
def test_without_a_cap_the_mean_gradient_is_that_of_the_present_policy(kind: str) -> None:
    """Sum over all actions of b(a) times the gradient of sample a = -sum p(a) A(a) d log p(a)."""
    logits = np.array([0.3, -1.0, 0.8, 0.1])
    behavior = np.array([0.4, 0.3, 0.2, 0.1])
    present = np.exp(logits) / np.exp(logits).sum()
    advantage = np.array([1.0, -2.0, 0.5, 3.0])
    correction = CorrectionConfig(kind=kind, cap=1e6, rho_cap=1e6)
    algorithm = PPO(PPOConfig(correction=correction, value_coef=0.0))
    batch = make_batch(
        trace=jnp.arange(4),
        behavior_log_prob=jnp.log(behavior),
        proximal_log_prob=jnp.log(present),
        advantage=jnp.asarray(advantage, jnp.float32),
    )

    def loss(params: Params, n: int) -> jax.Array:
        return algorithm.loss(Bandit(), params, jax.tree.map(lambda x: x[n : n + 1], batch))[0]

    params = {"logits": jnp.asarray(logits, jnp.float32)}
    mean = sum(behavior[n] * np.asarray(jax.grad(loss)(params, n)["logits"]) for n in range(4))
    expected = -(present * advantage) @ (np.eye(4) - present)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
