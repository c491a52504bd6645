"""What every registered algorithm promises to the learner."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.algorithms import ALGORITHMS
from jaxvla.algorithms.policy import Evaluation
from jaxvla.config import AlgorithmConfig
from jaxvla.types import Observation, Params, TrainingBatch, Trajectory

T, B, A = 4, 3, 2
SETTINGS = {"grpo": {"group_size": B}}
"""What an algorithm cannot do with by default."""


class GaussianPolicy:
    """log_prob = -|x - w s|^2 / 2 and a value that no parameter moves."""

    def evaluate(
        self, params: Params, observation: Observation, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean = observation.state @ params["w"]
        log_prob = -0.5 * jnp.square(trace - mean).sum(-1)
        return log_prob, jnp.zeros_like(log_prob), observation.state[..., 0]


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> Any:
    """Every registered algorithm with its default settings, where it has all of them."""
    algorithm_class = ALGORITHMS.get(request.param)
    config_class = typing.get_type_hints(algorithm_class.__init__)["config"]
    assert issubclass(config_class, AlgorithmConfig)
    config = config_class(**SETTINGS.get(request.param, {}))
    assert config.name == request.param
    config.validate()
    return algorithm_class(config)


def make_trajectory(params: Params, *, num_invalid: int = 0) -> Trajectory:
    """A trajectory of `params` themselves; its invalid samples are NaN wherever they may be.

    They are the last ones, so that every env has been seen to end an episode before.
    """
    rng = np.random.default_rng(0)
    valid = np.arange(T * B).reshape(T, B) < T * B - num_invalid

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(T, B, *shape)).astype(np.float32)

    observation = Observation(
        images=np.zeros((T, B, 1, 2, 2, 3), np.uint8),
        image_mask=np.ones((T, B, 1), bool),
        state=normal(A),
        tokens=np.zeros((T, B, 2), np.int32),
        token_mask=np.ones((T, B, 2), bool),
    )
    trace = normal(A)
    log_prob, _, value = GaussianPolicy().evaluate(params, observation, trace)
    return Trajectory(
        observation=observation,
        trace=np.where(valid[..., None], trace, np.nan),
        behavior_log_prob=np.where(valid, log_prob, np.nan),
        value=np.asarray(value),
        reward=np.where(valid, normal(), np.nan),
        terminated=np.eye(T, B, dtype=bool),
        truncated=np.eye(T, B, k=1, dtype=bool),
        bootstrap_value=normal(),
        valid=valid,
        policy_version=np.zeros((T, B), np.int32),
    )


def prepare(algorithm: Any, params: Params, trajectory: Trajectory) -> TrainingBatch:
    """Targets of an update that starts from `params`, which are of version 1 by now."""
    log_prob, _, value = GaussianPolicy().evaluate(params, trajectory.observation, trajectory.trace)
    evaluation = Evaluation(log_prob=log_prob, value=value)
    given = evaluation if algorithm.needs_evaluation else None
    return algorithm.prepare(trajectory, version=jnp.int32(1), evaluation=given)


def flat(batch: TrainingBatch) -> TrainingBatch:
    """[T, B, ...] -> [T * B, ...]."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(T * B, *x.shape[2:]), batch)


def gradient(algorithm: Any, params: Params, batch: TrainingBatch) -> np.ndarray:
    def loss(params: Params) -> jax.Array:
        return algorithm.loss(GaussianPolicy(), params, batch)[0]

    return np.asarray(jax.grad(loss)(params)["w"])


@pytest.fixture
def params() -> Params:
    return {"w": jnp.asarray([[0.5, -0.2], [0.1, 0.3]])}


def test_targets_are_finite_and_weigh_the_valid_samples(algorithm: Any, params: Params) -> None:
    trajectory = make_trajectory(params, num_invalid=3)
    batch = prepare(algorithm, params, trajectory)
    for name in ("advantage", "return_", "weight"):
        leaf = getattr(batch, name)
        assert leaf.shape == (T, B) and leaf.dtype == jnp.float32, name
    np.testing.assert_array_equal(batch.weight, trajectory.valid.astype(np.float32))
    assert np.isfinite(np.asarray(batch.advantage)[trajectory.valid]).all()
    assert np.isfinite(np.asarray(batch.return_)[trajectory.valid]).all()


def test_loss_and_metrics_are_finite_scalars(algorithm: Any, params: Params) -> None:
    batch = flat(prepare(algorithm, params, make_trajectory(params, num_invalid=3)))
    loss, metrics = algorithm.loss(GaussianPolicy(), params, batch)
    assert loss.shape == () and np.isfinite(loss)
    for name, value in metrics.items():
        assert jnp.shape(value) == () and jnp.asarray(value).dtype == jnp.float32, name
        assert np.isfinite(value), name
        assert not name.startswith("learner/")


def test_without_lag_the_gradient_is_the_policy_gradient(algorithm: Any, params: Params) -> None:
    batch = flat(prepare(algorithm, params, make_trajectory(params, num_invalid=2)))
    used = np.asarray(batch.weight) > 0
    state, trace, advantage = (
        np.asarray(x, np.float64)[used]
        for x in (batch.observation.state, batch.trace, batch.advantage)
    )
    residual = trace - state @ np.asarray(params["w"], np.float64)
    # d log_prob / d w = s (x - w s)^T; the loss descends along the mean of A d log_prob.
    expected = -np.einsum("n,ni,nj->ij", advantage, state, residual) / used.sum()
    np.testing.assert_allclose(gradient(algorithm, params, batch), expected, atol=1e-5)


def test_unused_samples_do_not_matter(algorithm: Any, params: Params) -> None:
    batch = flat(prepare(algorithm, params, make_trajectory(params, num_invalid=3)))
    used = np.asarray(batch.weight) > 0
    moved = {"w": params["w"] + 0.1}
    expected = gradient(algorithm, moved, jax.tree.map(lambda x: x[used], batch))
    np.testing.assert_allclose(gradient(algorithm, moved, batch), expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_a_loss_on_standardized_advantages_is_affine_in_them(
    algorithm: Any, params: Params
) -> None:
    """Where "clip_fraction" is 0, which it is for weights that are just being updated."""
    if not algorithm.standardizes_advantages:
        pytest.skip("reads the advantages that it made")
    batch = flat(prepare(algorithm, params, make_trajectory(params, num_invalid=2)))

    def outcome(advantage: Any) -> np.ndarray:
        given = dataclasses.replace(batch, advantage=jnp.asarray(advantage, jnp.float32))
        loss, metrics = algorithm.loss(GaussianPolicy(), params, given)
        assert float(metrics["clip_fraction"]) == 0.0
        return np.concatenate([[loss], gradient(algorithm, params, given).ravel()])

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, T * B))
    apart = outcome(x) + outcome(-3.0 * y) - outcome(0.0 * x)
    np.testing.assert_allclose(outcome(x - 3.0 * y), apart, atol=1e-5)
