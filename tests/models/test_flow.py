"""Flow transitions against recorded float64 cases, closed forms and numpy loops."""

import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from jaxvla.models import flow

CASES_PATH = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "flow_rl_cases.npz"
NUM_STEPS = (1, 3, 4, 5, 10)
NOISE_LEVEL = 0.5  # of the recorded cases


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    with np.load(CASES_PATH) as file:
        return dict(file)


def transitions(kind: str, num_steps: int) -> flow.Transitions:
    if kind == "sde":
        return flow.sde_transitions(num_steps, NOISE_LEVEL)
    if kind == "cps":
        return flow.cps_transitions(num_steps, NOISE_LEVEL)
    return flow.ode_transitions(num_steps)  # Flow-Noise: ODE mean, std from the noise head


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("kind", ["ode", "sde", "cps", "noise"])
def test_transitions_match_recorded_cases(cases, kind: str, num_steps: int) -> None:
    for index in range(num_steps):
        case = {
            name: cases[f"{kind}/{num_steps}/{index}/{name}"]
            for name in ("x", "v", "e", "mean", "std", "next", "logp")
        }
        step = jnp.full(len(case["x"]), index, jnp.int32)
        table = transitions(kind, num_steps)
        mean, std = flow.transition(table, jnp.asarray(case["x"]), jnp.asarray(case["v"]), step)
        std = jnp.asarray(case["std"]) if kind == "noise" else jnp.broadcast_to(std, mean.shape)
        np.testing.assert_allclose(mean, case["mean"], atol=2e-6, rtol=0)
        np.testing.assert_allclose(std, case["std"], atol=1e-7, rtol=0)
        np.testing.assert_allclose(mean + std * case["e"], case["next"], atol=2e-6, rtol=0)
        # The recorded x_next is float32, which a small std magnifies.
        log_prob = flow.normal_log_prob(jnp.asarray(case["next"]), mean, std)
        np.testing.assert_allclose(log_prob, case["logp"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_time_grid_is_the_rounded_exact_table(cases, num_steps: int) -> None:
    np.testing.assert_array_equal(
        flow.time_grid(num_steps), cases[f"grid/{num_steps}"].astype(np.float32)
    )


def test_sde_std_by_hand() -> None:
    # a = 0.5, K = 4: 0.5 sqrt(t / (1 - t) / 4) at t = .75, .5, .25, and 0.5 at the first step.
    expected = [0.5, 0.5 * np.sqrt(3.0) / 2.0, 0.25, 0.5 * np.sqrt(1.0 / 3.0) / 2.0]
    np.testing.assert_allclose(flow.sde_transitions(4, 0.5).std, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [flow.sde_transitions, flow.cps_transitions])
def test_no_noise_is_the_ode(make) -> None:
    quiet, ode = make(5, 1e-9), flow.ode_transitions(5)
    np.testing.assert_allclose(quiet.x, ode.x, atol=1e-7)
    np.testing.assert_allclose(quiet.velocity, ode.velocity, atol=1e-7)
    np.testing.assert_allclose(quiet.std, 0.0, atol=1e-7)


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_all_noisy_path_keeps_the_data_distribution(kind: str) -> None:
    # Data N(m, s^2): the exact velocity E[n - a | x_t] is affine in x_t, so mean and variance
    # of the path can be carried through the transitions without sampling.
    m, s, num_steps = 0.7, 0.4, 2000
    table, grid = transitions(kind, num_steps), 1.0 - np.arange(num_steps + 1) / num_steps
    mean, variance = 0.0, 1.0
    for index, t in enumerate(grid[:-1]):
        slope = (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2)
        offset = -m - slope * (1 - t) * m
        c_x, c_v = float(table.x[index]), float(table.velocity[index])
        gain = c_x + c_v * slope
        mean = gain * mean + c_v * offset
        variance = gain**2 * variance + float(table.std[index]) ** 2
    np.testing.assert_allclose([mean, np.sqrt(variance)], [m, s], atol=4e-3)


def test_cps_keeps_the_amount_of_action_and_noise() -> None:
    # Pure action (x_t = (1-t) a, v = -a) and pure noise (x_t = t n, v = n) at every step.
    table, grid = flow.cps_transitions(5, 0.3), 1.0 - np.arange(6) / 5.0
    t, t_next = grid[:-1], grid[1:]
    np.testing.assert_allclose(table.x * (1 - t) - table.velocity, 1 - t_next, atol=1e-6)
    amount = np.hypot(table.x * t + table.velocity, table.std)
    np.testing.assert_allclose(amount, t_next, atol=1e-6)
    assert table.std[-1] == 0.0


def test_noise_head_std(cases) -> None:
    std = flow.noise_head_std(jnp.asarray(cases["noise_head/raw"], jnp.float32), 0.08, 0.16)
    np.testing.assert_allclose(std, cases["noise_head/std"], rtol=1e-5)


def test_zero_std_scores_zero_with_zero_gradient() -> None:
    def total(x, std):
        return flow.normal_log_prob(x, jnp.ones_like(x), std).sum()

    x, std = jnp.array([3.0, -2.0]), jnp.zeros(2)
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(x, std)
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@hypothesis.given(num_steps=st.integers(1, 4), num_dims=st.integers(1, 3), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=20, deadline=None)
def test_chunk_log_prob_sums_the_executed_part(num_steps: int, num_dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, mean = rng.normal(size=(2, 2, 4, 3)).astype(np.float32)
    std = rng.uniform(0.1, 1.0, (2, 1, 1)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(x.astype(np.float64), mean, std)
    actual = flow.chunk_log_prob(x, mean, std, num_steps=num_steps, num_dims=num_dims)
    expected = expected[:, :num_steps, :num_dims].sum(axis=(1, 2))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-4)


@pytest.fixture(scope="module")
def draw(quick_jit):
    return quick_jit(lambda keys: flow.draw(keys, (2, 3), 3))


@pytest.fixture(scope="module")
def draws(draw) -> flow.Draws:
    return draw(jax.random.split(jax.random.key(3), 4000))


def test_draws_are_standard_and_uniform(draws) -> None:
    for normal in (draws.initial, draws.exploration):
        assert scipy.stats.kstest(np.asarray(normal).ravel(), "norm").pvalue > 1e-3
    assert draws.exploration.shape == (4000, 1, 2, 3)
    assert abs(np.corrcoef(np.ravel(draws.initial), np.ravel(draws.exploration))[0, 1]) < 0.03
    counts = np.bincount(draws.step)
    assert len(counts) == 3  # never an index >= num_choices
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_draws_of_a_row_depend_on_its_key_alone(draw, draws) -> None:
    keys = jax.random.split(jax.random.key(3), 4000)
    alone = draw(keys[7:8])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[7]), alone, draws)


@pytest.mark.parametrize("kind", ["ode", "sde", "cps"])
def test_denoise_takes_one_noisy_step_per_row(quick_jit, kind: str) -> None:
    num_steps = 4
    draws = quick_jit(lambda keys: flow.draw(keys, (3, 2), num_steps))(
        jax.random.split(jax.random.key(0), 16)
    )
    assert set(np.asarray(draws.step)) == set(range(num_steps))

    def predict(x, t):
        return jnp.sin(3.0 * x) + t[:, None, None], None

    table = transitions(kind, num_steps)
    x, trace, (mean, std) = quick_jit(lambda d: flow.denoise(predict, d, table))(draws)
    for row in range(16):
        expected = _denoise_row(kind, draws, row)
        actual = [x[row], *trace.states[row], mean[row, 0], std[row, 0, 0, 0]]
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_array_equal(trace.step, draws.step)


def _denoise_row(kind: str, draws: flow.Draws, row: int) -> list[np.ndarray]:
    """One row in float64: final x, and x_t, x_next, mean, std of its noisy step."""
    table, num_steps = transitions(kind, 4), 4
    x = np.asarray(draws.initial[row], np.float64)
    kept: list[np.ndarray] = []
    for index in range(num_steps):
        v = np.sin(3.0 * x) + 1.0 - index / num_steps
        x_t, x = x, x - v / num_steps
        if index == draws.step[row]:
            mean, std = table.x[index] * x_t + table.velocity[index] * v, table.std[index]
            x = mean + std * np.asarray(draws.exploration[row, 0], np.float64)
            kept = [x_t, x, mean, std]
    return [x, *kept]


def test_training_times_are_beta_distributed() -> None:
    time = np.asarray(flow.draw_time(jax.random.key(1), 4000), np.float64)
    assert time.min() > 0.001 and time.max() <= 1.0
    beta = scipy.stats.beta(1.5, 1.0)
    assert scipy.stats.kstest((time - 0.001) / 0.999, beta.cdf).pvalue > 1e-3


def test_interpolation_ends_and_target() -> None:
    actions, noise = jnp.full((3, 1, 1), 2.0), jnp.full((3, 1, 1), -1.0)
    x_t, target = flow.interpolate(actions, noise, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(x_t.ravel(), [2.0, 1.25, -1.0])
    np.testing.assert_allclose(target, -3.0)


def test_a_flow_needs_a_step() -> None:
    with pytest.raises(ValueError, match="num_steps = 0"):
        flow.ode_transitions(0)
