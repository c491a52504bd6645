"""Advantages against the sum that defines them, hand values and limits of lambda."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from returns_reference import Arrays, following_value, reference, vtrace_reference

from jaxvla.algorithms import returns

# The discounts are traced, so that a test compiles once per shape.
jitted = jax.jit(returns.generalized_advantages)
jitted_vtrace = jax.jit(returns.vtrace)


jitted_moments = jax.jit(returns.moments)
jitted_merge = jax.jit(returns.merge)


@jax.jit
def standardize(x: jax.Array, weight: jax.Array) -> jax.Array:
    """By the moments of x itself."""
    return returns.standardize(x, weight, returns.moments(x, weight))


def advantages(arrays: Arrays, *, discount: float, trace_decay: float) -> np.ndarray:
    return np.asarray(jitted(**arrays, discount=discount, trace_decay=trace_decay))


@st.composite
def trajectories(draw: Callable[..., Any], max_invalid: int = 1) -> Arrays:
    """Trajectories whose entries that must not be read are NaN."""
    shape = (draw(st.sampled_from([1, 2, 6])), 3)

    def numbers() -> np.ndarray:
        elements = st.floats(-2.0, 2.0, width=32, allow_subnormal=False)  # XLA makes them 0
        return draw(hnp.arrays(np.float32, shape, elements=elements))

    ending = draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([0, 0, 1, 2])))
    invalid = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, max_invalid))) == 1
    arrays = {
        "reward": numbers(),
        "value": numbers(),
        "bootstrap_value": numbers(),
        "terminated": ending == 1,
        "truncated": ending == 2,
        "valid": ~invalid,
    }
    is_read = arrays["truncated"].copy()
    is_read[-1] = ~arrays["terminated"][-1]
    arrays["bootstrap_value"][~is_read | invalid] = np.nan
    arrays["reward"][invalid] = np.nan
    return arrays


def four_cases() -> Arrays:
    """Three chunks; columns: goes on, terminated, truncated, invalid at t = 1."""
    column = np.ones((1, 4), np.float32)
    never = np.zeros((3, 4), bool)
    terminated, truncated, valid = never.copy(), never.copy(), ~never
    terminated[1, 1] = truncated[1, 2] = True
    valid[1, 3] = False
    return {
        "reward": np.array([[1], [2], [4]], np.float32) * column,
        "value": np.array([[10], [20], [30]], np.float32) * column,
        "bootstrap_value": np.array([[-7], [100], [40]], np.float32) * column,
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
    }


def test_hand_values() -> None:
    actual = advantages(four_cases(), discount=0.5, trace_decay=0.5)
    # delta without an end: 1 + 10 - 10 = 1, 2 + 15 - 20 = -3, 4 + 20 - 30 = -6; at t = 1
    # terminated: 2 - 20 = -18, truncated: 2 + 50 - 20 = 32. The trace decays by 1/4 a chunk.
    expected = [
        [1 - 4.5 / 4, 1 - 18 / 4, 1 + 32 / 4, 1],
        [-3 - 6 / 4, -18, 32, 0],
        [-6, -6, -6, -6],
    ]
    np.testing.assert_array_equal(actual, expected)


def test_next_values_hand_values() -> None:
    arrays = four_cases()
    actual = returns.next_values(arrays["value"], arrays["bootstrap_value"], arrays["truncated"])
    np.testing.assert_array_equal(np.asarray(actual)[:, 0], [20, 30, 40])
    np.testing.assert_array_equal(np.asarray(actual)[:, 2], [20, 100, 40])


@settings(max_examples=60, deadline=None)
@given(arrays=trajectories(), discount=st.floats(0.0, 1.0), trace_decay=st.floats(0.0, 1.0))
def test_advantages_equal_their_defining_sum(
    arrays: Arrays, discount: float, trace_decay: float
) -> None:
    actual = advantages(arrays, discount=discount, trace_decay=trace_decay)
    # Sums of up to 6 float32 terms of size 6.
    expected = reference(arrays, discount, trace_decay)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(arrays=trajectories(max_invalid=0), discount=st.floats(0.0, 1.0))
def test_lambda_0_is_the_one_step_error(arrays: Arrays, discount: float) -> None:
    actual = advantages(arrays, discount=discount, trace_decay=0.0)
    following = [[following_value(arrays, t, b) for b in range(3)] for t in range(len(actual))]
    expected = arrays["reward"] + discount * np.array(following, np.float64) - arrays["value"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(arrays=trajectories(max_invalid=0), discount=st.floats(0.0, 1.0))
def test_lambda_1_is_monte_carlo(arrays: Arrays, discount: float) -> None:
    actual = advantages(arrays, discount=discount, trace_decay=1.0) + arrays["value"]
    np.testing.assert_allclose(actual, monte_carlo(arrays, discount), atol=2e-5)


def monte_carlo(arrays: Arrays, discount: float) -> np.ndarray:
    """Discounted rewards of the rest of the episode, bootstrapped where it is cut, in float64."""
    T, B = arrays["reward"].shape
    result = np.zeros((T, B))
    for b in range(B):
        later = 0.0
        for t in reversed(range(T)):
            goes_on = not (arrays["terminated"][t, b] or arrays["truncated"][t, b])
            if not goes_on or t == T - 1:
                later = following_value(arrays, t, b)
            later = result[t, b] = float(arrays["reward"][t, b]) + discount * later
    return result


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_nothing_of_the_next_episode_is_read(ending: str) -> None:
    rng = np.random.default_rng(0)
    arrays = four_cases() | {name: np.zeros((3, 4), bool) for name in ("terminated", "truncated")}
    arrays["valid"] = np.ones((3, 4), bool)
    arrays[ending][1] = True
    changed = dict(arrays)
    for name in ("reward", "value"):
        changed[name] = arrays[name].copy()
        changed[name][2] = rng.normal(size=4)
    before, after = (advantages(x, discount=0.9, trace_decay=0.9) for x in (arrays, changed))
    np.testing.assert_array_equal(before[:2], after[:2])
    assert (before[2] != after[2]).all()


def vtrace(
    arrays: Arrays,
    *,
    discount: float,
    trace_decay: float,
    rho_cap: float = 1.0,
    trace_cap: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    advantage, v = jitted_vtrace(
        **arrays,
        discount=discount,
        trace_decay=trace_decay,
        rho_cap=rho_cap,
        trace_cap=trace_cap,
    )
    return np.asarray(advantage), np.asarray(v)


def with_log_ratio(arrays: Arrays, log_ratio: Any) -> Arrays:
    """NaN at the invalid steps, where it must not be read."""
    full = np.broadcast_to(np.asarray(log_ratio, np.float32), arrays["reward"].shape)
    return arrays | {"log_ratio": np.where(arrays["valid"], full, np.float32(np.nan))}


@st.composite
def off_policy(draw: Callable[..., Any], low: float = -3.0) -> Arrays:
    """Trajectories of a policy whose ratio to the other is between exp(low) and exp(3)."""
    arrays = draw(trajectories())
    elements = st.floats(low, 3.0, width=32, allow_subnormal=False)
    return with_log_ratio(
        arrays, draw(hnp.arrays(np.float32, arrays["reward"].shape, elements=elements))
    )


def test_vtrace_hand_values() -> None:
    """As above, with p / b = 4 at t = 0 and 1 / 2 at the other steps; gamma = lambda = 1 / 2."""
    log_ratio = np.log([[4.0], [0.5], [0.5]])
    arrays = with_log_ratio(four_cases(), log_ratio)
    advantage, v = vtrace(arrays, discount=0.5, trace_decay=0.5, rho_cap=3.0, trace_cap=2.0)
    # rho = 3, 1/2, 1/2 and gamma c = 1/2, 1/8, 1/8 where the episode goes on.
    later = -6 * 0.5  # rho delta at t = 2
    middle = -3 * 0.5 + later / 8
    expected_v = [
        [10 + 3 + middle / 2, 10 + 3 - 9 / 2, 10 + 3 + 16 / 2, 10 + 3],
        [20 + middle, 20 - 9, 20 + 16, 20],
        [30 + later] * 4,
    ]
    np.testing.assert_allclose(v, expected_v, rtol=1e-6)
    # The advantage passes all of what v_{t+1} differs from V_{t+1} by, times gamma lambda = 1/4.
    expected = [
        [1 + middle / 4, 1 - 9 / 4, 1 + 16 / 4, 1],
        [-3 + later / 4, -18, 32, 0],
        [-6] * 4,
    ]
    np.testing.assert_allclose(advantage, expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    arrays=off_policy(),
    discount=st.floats(0.0, 1.0),
    trace_decay=st.floats(0.0, 1.0),
    rho_cap=st.floats(1.0, 4.0),
    trace_cap=st.floats(1.0, 4.0),
)
def test_vtrace_equals_its_defining_sum(
    arrays: Arrays, discount: float, trace_decay: float, rho_cap: float, trace_cap: float
) -> None:
    settings: dict[str, Any] = {"discount": discount, "trace_decay": trace_decay}
    settings |= {"rho_cap": rho_cap, "trace_cap": trace_cap}
    actual = vtrace(arrays, **settings)
    # Sums of up to 6 float32 terms, which caps of 4 make up to 4^6 times as large.
    for x, expected in zip(actual, vtrace_reference(arrays, **settings), strict=True):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5 * scale)
        assert x.dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(arrays=trajectories(), discount=st.floats(0.0, 1.0), trace_decay=st.floats(0.0, 1.0))
def test_vtrace_of_the_policy_that_acted_is_gae_to_the_bit(
    arrays: Arrays, discount: float, trace_decay: float
) -> None:
    factors: dict[str, float] = {"discount": discount, "trace_decay": trace_decay}
    advantage, v = vtrace(with_log_ratio(arrays, 0.0), **factors)
    expected = advantages(arrays, **factors)
    np.testing.assert_array_equal(advantage, expected)
    np.testing.assert_array_equal(v, expected + arrays["value"])


@settings(max_examples=30, deadline=None)
@given(arrays=trajectories(max_invalid=0), discount=st.floats(0.0, 1.0))
def test_vtrace_on_policy_with_lambda_1_is_the_n_step_return(
    arrays: Arrays, discount: float
) -> None:
    advantage, v = vtrace(with_log_ratio(arrays, 0.0), discount=discount, trace_decay=1.0)
    expected = monte_carlo(arrays, discount)
    np.testing.assert_allclose(v, expected, atol=2e-5)
    np.testing.assert_allclose(advantage, expected - arrays["value"], atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(arrays=off_policy(low=0.0), discount=st.floats(0.0, 1.0), trace_decay=st.floats(0.0, 1.0))
def test_caps_of_1_make_likelier_actions_on_policy(
    arrays: Arrays, discount: float, trace_decay: float
) -> None:
    factors: dict[str, float] = {"discount": discount, "trace_decay": trace_decay}
    actual = vtrace(arrays, **factors)
    expected = vtrace(with_log_ratio(arrays, 0.0), **factors)
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=30, deadline=None)
@given(arrays=trajectories(max_invalid=0), discount=st.floats(0.0, 1.0))
def test_impossible_actions_teach_the_critic_nothing(arrays: Arrays, discount: float) -> None:
    advantage, v = vtrace(with_log_ratio(arrays, -200.0), discount=discount, trace_decay=1.0)
    np.testing.assert_array_equal(v, arrays["value"])
    one_step = advantages(arrays, discount=discount, trace_decay=0.0)
    np.testing.assert_array_equal(advantage, one_step)


def test_an_infinite_ratio_is_capped() -> None:
    arrays = with_log_ratio(four_cases(), 1e4)
    for actual, expected in zip(
        vtrace(arrays, discount=0.5, trace_decay=0.5),
        vtrace(with_log_ratio(four_cases(), 0.0), discount=0.5, trace_decay=0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


def test_without_caps_the_mean_over_what_was_done_is_the_value_of_the_other_policy() -> None:
    """All 8 sequences of 3 binary actions; rewards, values and both policies depend on them."""
    rng, discount, t = np.random.default_rng(0), 0.9, np.arange(3)[:, None]
    action = np.arange(8) >> t & 1
    history = np.cumsum(action << t, axis=0)
    before = history - (action << t)
    first, second = rng.uniform(0.1, 0.9, (2, 3, 8))  # probabilities of action 1
    b, p = (np.where(action == 1, q, 1 - q) for q in (first[t, before], second[t, before]))
    never: Any = np.zeros((3, 8), bool)
    arrays = {
        "reward": rng.normal(size=(3, 8))[t, history].astype(np.float32),
        "value": rng.normal(size=(3, 8))[t, before].astype(np.float32),
        "bootstrap_value": rng.normal(size=(3, 8)).astype(np.float32),
        "terminated": never,
        "truncated": never,
        "valid": ~never,
        "log_ratio": np.log(p / b).astype(np.float32),
    }
    advantage, v = vtrace(arrays, discount=discount, trace_decay=1.0, rho_cap=1e6, trace_cap=1e6)
    expected = (p.prod(0) * monte_carlo(arrays, discount)[0]).sum()
    np.testing.assert_allclose((b.prod(0) * v[0]).sum(), expected, rtol=1e-5)
    weighted = (b.prod(0) * (p / b)[0] * advantage[0]).sum()
    np.testing.assert_allclose(weighted, expected - arrays["value"][0, 0], rtol=1e-5)


finite = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, (4, 3), elements=finite),
    is_used=hnp.arrays(np.bool_, (4, 3)),
)
def test_standardize_equals_float64(x: np.ndarray, is_used: np.ndarray) -> None:
    x[~is_used] = np.nan
    actual = np.asarray(standardize(x, is_used.astype(np.float32)))
    used = x[is_used].astype(np.float64)
    np.testing.assert_array_equal(actual[~is_used], 0.0)
    if used.size:
        # Entries up to 1e3 carry a rounding error of 1e-4, relative to their spread.
        spread = np.sqrt(used.var() + 1e-8)
        expected = (used - used.mean()) / spread
        np.testing.assert_allclose(actual[is_used], expected, atol=1e-5 + 2e-4 / spread)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e4, 123456.7])
def test_standardize_makes_a_constant_batch_0(constant: float) -> None:
    x = np.full((7, 13), constant, np.float32)
    actual = standardize(x, np.ones_like(x))
    np.testing.assert_allclose(actual, 0.0, atol=1e-3)


def test_standardize_of_many() -> None:
    x = np.random.default_rng(0).normal(5.0, 3.0, (64, 32)).astype(np.float32)
    actual = np.asarray(standardize(x, np.ones_like(x)), np.float64)
    assert abs(actual.mean()) < 1e-6 and abs(actual.std() - 1.0) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 4), elements=finite),
    is_used=hnp.arrays(np.bool_, (3, 4)),
    shift=st.sampled_from([0.0, 1e4]),
)
def test_merged_moments_are_those_of_all_entries(
    x: np.ndarray, is_used: np.ndarray, shift: float
) -> None:
    """In float64; also of parts without an entry, and of numbers far from 0."""
    x = (x + np.float32(shift)).astype(np.float32)
    parts = [
        jitted_moments(row, used.astype(np.float32)) for row, used in zip(x, is_used, strict=True)
    ]
    made = jitted_merge(jitted_merge(parts[0], parts[1]), parts[2])
    used = x[is_used].astype(np.float64)
    assert float(made.count) == used.size
    mean = used.mean() if used.size else 0.0
    np.testing.assert_allclose(made.mean, mean, rtol=1e-6, atol=1e-3)
    squares = np.square(used - mean).sum()
    np.testing.assert_allclose(made.squares, squares, rtol=1e-4, atol=1e-3 + 1e-3 * squares**0.5)
