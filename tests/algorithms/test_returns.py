"""Advantages against the sum that defines them, hand values and limits of lambda."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxvla.algorithms import returns

Arrays = dict[str, Any]

# The discounts are traced, so that a test compiles once per shape.
jitted = jax.jit(returns.generalized_advantages)
standardize = jax.jit(returns.standardize)


def advantages(arrays: Arrays, *, discount: float, trace_decay: float) -> np.ndarray:
    return np.asarray(jitted(**arrays, discount=discount, trace_decay=trace_decay))


def following_value(arrays: Arrays, t: int, b: int) -> float:
    """V of the observation after step t of the same episode; 0 after a true end."""
    if arrays["terminated"][t, b]:
        return 0.0
    if arrays["truncated"][t, b] or t == len(arrays["reward"]) - 1:
        return float(arrays["bootstrap_value"][t, b])
    return float(arrays["value"][t + 1, b])


def reference(arrays: Arrays, discount: float, trace_decay: float) -> np.ndarray:
    """A_t = sum_k (gamma lambda)^(k-t) delta_k over the steps k of t's episode, in float64."""
    T, B = arrays["reward"].shape
    result = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            for k in range(t, T):
                if not arrays["valid"][k, b]:
                    break
                reward, value = float(arrays["reward"][k, b]), float(arrays["value"][k, b])
                delta = reward + discount * following_value(arrays, k, b) - value
                result[t, b] += (discount * trace_decay) ** (k - t) * delta
                if arrays["terminated"][k, b] or arrays["truncated"][k, b]:
                    break
    return result


@st.composite
def trajectories(draw: Callable[..., Any], max_invalid: int = 1) -> Arrays:
    """Trajectories whose entries that must not be read are NaN."""
    shape = (draw(st.sampled_from([1, 2, 6])), 3)

    def numbers() -> np.ndarray:
        elements = st.floats(-2.0, 2.0, width=32)
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
    """A + V is the discounted reward of the rest of the episode, bootstrapped where it is cut."""
    actual = advantages(arrays, discount=discount, trace_decay=1.0) + arrays["value"]
    expected = np.zeros(actual.shape)
    for b in range(3):
        later = 0.0
        for t in reversed(range(len(actual))):
            goes_on = not (arrays["terminated"][t, b] or arrays["truncated"][t, b])
            if not goes_on or t == len(actual) - 1:
                later = following_value(arrays, t, b)
            later = expected[t, b] = float(arrays["reward"][t, b]) + discount * later
    np.testing.assert_allclose(actual, expected, atol=2e-5)


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
