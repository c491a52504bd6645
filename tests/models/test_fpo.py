"""What FPO puts in the place of log-probs, against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxvla.models import flow
from jaxvla.models.fpo import MAX_LOG_RATIO, FpoExploration, FpoTrace, mean_loss

B, N, H, A = 5, 3, 4, 2
STEPS, DIMS = H - 1, A - 1


def predictor(mean: Any) -> flow.PredictFn:
    return lambda x, t: (jnp.tanh(x - mean) + t[:, None, None], None)


def make_trace(loss: Any = 0.0) -> FpoTrace:
    rng = np.random.default_rng(0)
    return FpoTrace(
        chunk=jnp.asarray(rng.normal(size=(B, H, A)), jnp.float32),
        noise=jnp.asarray(rng.normal(size=(B, N, H, A)), jnp.float32),
        time=jnp.asarray(rng.uniform(size=(B, N)), jnp.float32),
        loss=jnp.broadcast_to(jnp.asarray(loss, jnp.float32), (B,)),
    )


def reference_loss(trace: FpoTrace, mean: float) -> np.ndarray:
    """Mean of (v - (n - a))^2 over draws, and the first steps and dimensions, float64 [B]."""
    losses = []
    for row in range(B):
        of_row = []
        for draw in range(N):
            n, t = np.float64(trace.noise[row, draw]), float(trace.time[row, draw])
            a = np.float64(trace.chunk[row])
            v = np.tanh(t * n + (1.0 - t) * a - mean) + t
            of_row.append(np.mean(((v - (n - a)) ** 2)[:STEPS, :DIMS]))
        losses.append(np.mean(of_row))
    return np.array(losses)


def evaluate(trace: FpoTrace, mean: Any) -> jax.Array:
    exploration = FpoExploration(num_steps=4, num_draws=N, loss_steps=STEPS, loss_dims=DIMS)
    log_prob, entropy = exploration.evaluate(predictor(mean), trace)
    np.testing.assert_array_equal(jax.lax.stop_gradient(entropy), 0.0)
    return log_prob


def test_mean_loss_equals_float64() -> None:
    trace = make_trace()
    actual = mean_loss(predictor(0.3), trace.chunk, trace.noise, trace.time, (STEPS, DIMS))
    np.testing.assert_allclose(actual, reference_loss(trace, 0.3), rtol=1e-5)


def test_the_log_ratio_is_the_fall_of_the_loss() -> None:
    before = reference_loss(make_trace(), 0.3)
    trace = make_trace(before)
    np.testing.assert_allclose(evaluate(trace, 0.3), -before, rtol=1e-5)
    fall = before - reference_loss(trace, -0.4)
    assert np.abs(fall).min() > 1e-2
    np.testing.assert_allclose(evaluate(trace, -0.4) - evaluate(trace, 0.3), fall, atol=1e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_log_ratio_is_bounded_and_has_no_slope_outside(sign: float) -> None:
    before = reference_loss(make_trace(), 0.3) + sign * (MAX_LOG_RATIO + 0.1)
    trace = make_trace(before)
    log_ratio = evaluate(trace, 0.3) + trace.loss
    np.testing.assert_allclose(log_ratio, sign * MAX_LOG_RATIO, rtol=1e-5)
    assert jax.grad(lambda mean: evaluate(trace, mean).sum())(0.3) == 0.0
    inside = make_trace(before - sign * 0.2)
    slope = jax.grad(lambda mean: evaluate(inside, mean).sum())(0.3)
    step = 1e-4
    expected = reference_loss(trace, 0.3 - step) - reference_loss(trace, 0.3 + step)
    np.testing.assert_allclose(slope, expected.sum() / (2.0 * step), rtol=1e-4)


def test_samples_carry_their_loss_and_draws_of_their_own(quick_jit) -> None:
    exploration = FpoExploration(num_steps=4, num_draws=8, loss_steps=H, loss_dims=A)
    keys = jax.random.split(jax.random.key(0), 500)

    def run(keys: jax.Array) -> Any:
        return exploration.sample(predictor(0.3), keys, (H, A), explore=True, noise=None)

    chunk, trace, log_prob = quick_jit(run)(keys)
    assert trace.noise.shape == (500, 8, H, A) and trace.time.shape == (500, 8)
    np.testing.assert_array_equal(trace.chunk, chunk)
    np.testing.assert_array_equal(log_prob, -trace.loss)
    assert scipy.stats.kstest(np.ravel(trace.noise), "norm").pvalue > 1e-3
    times = (np.ravel(trace.time).astype(np.float64) - 0.001) / 0.999
    assert scipy.stats.kstest(times, scipy.stats.beta(1.5, 1.0).cdf).pvalue > 1e-3
    # The path begins with a draw that is none of those that it is judged by.
    start = flow.draw(jax.vmap(jax.random.split)(keys)[:, 0], (H, A), 1).initial
    correlation = np.corrcoef(np.ravel(start), np.ravel(trace.noise[:, 0]))[0, 1]
    assert abs(correlation) < 0.06
    alone = quick_jit(run)(keys[7:8])
    np.testing.assert_allclose(alone[2][0], log_prob[7], rtol=1e-5)
