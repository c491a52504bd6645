"""Loss terms and their gradients against closed forms in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxvla.algorithms import losses

LOW, HIGH, VALUE_CLIP = 0.2, 0.3, 0.5


def array(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def surrogate(ratio: Any, advantage: Any) -> jax.Array:
    return losses.clipped_surrogate(ratio, advantage, clip_low=LOW, clip_high=HIGH)


def value_error(value: Any, behavior_value: Any, return_: Any) -> jax.Array:
    return losses.clipped_value_error(value, behavior_value, return_, clip=VALUE_CLIP)


def slopes(function: Callable[..., jax.Array], *args: Any) -> np.ndarray:
    """d function / d first argument, elementwise."""
    return np.asarray(jax.grad(lambda x: function(x, *args[1:]).sum())(jnp.asarray(args[0])))


# (ratio, advantage, loss, d loss / d ratio)
SURROGATE_CASES = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.25, 2.0, -2.5, -2.0),  # inside, up to 1 + clip_high
    (1.5, 2.0, -2.6, 0.0),  # improved enough: no pull
    (1.5, -2.0, 3.0, 2.0),  # made worse: full pull back
    (0.7, 2.0, -1.4, -2.0),  # made worse: full pull back
    (0.7, -2.0, 1.6, 0.0),  # improved enough: no pull
    (0.85, -2.0, 1.7, 2.0),  # inside, down to 1 - clip_low
    (5.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), SURROGATE_CASES)
def test_clipped_surrogate_hand_values(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    r, a = array(ratio), array(advantage)
    np.testing.assert_allclose(surrogate(r, a), [loss], rtol=1e-6)
    np.testing.assert_allclose(slopes(surrogate, r, a), [slope], rtol=1e-6)


def test_clipped_surrogate_equals_float64() -> None:
    rng = np.random.default_rng(0)
    ratio = np.exp(rng.normal(size=4000)).astype(np.float32)
    advantage = rng.normal(size=4000).astype(np.float32)
    r, a = ratio.astype(np.float64), advantage.astype(np.float64)
    expected = np.where(a > 0, -np.minimum(r, 1 + HIGH) * a, -np.maximum(r, 1 - LOW) * a)
    np.testing.assert_allclose(surrogate(ratio, advantage), expected, rtol=1e-6, atol=1e-7)
    is_active = np.where(a > 0, r < 1 + HIGH, r > 1 - LOW)
    np.testing.assert_array_equal(
        slopes(surrogate, ratio, advantage), np.where(is_active, -advantage, 0)
    )


# (ratio, advantage, loss, d loss / d ratio) with a dual clip at 3
DUAL_CASES = [
    (2.5, -2.0, 5.0, 2.0),  # below: as without
    (4.0, -2.0, 6.0, 0.0),  # bad and 4 times as likely: bounded, no pull
    (4.0, 2.0, -2.6, 0.0),  # good actions are not its business
    (0.7, -2.0, 1.6, 0.0),
    (9.0, 0.0, 0.0, 0.0),
]


def dual_surrogate(ratio: Any, advantage: Any) -> jax.Array:
    return losses.clipped_surrogate(ratio, advantage, clip_low=LOW, clip_high=HIGH, dual_clip=3.0)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), DUAL_CASES)
def test_dual_clip_hand_values(ratio: float, advantage: float, loss: float, slope: float) -> None:
    r, a = array(ratio), array(advantage)
    np.testing.assert_allclose(dual_surrogate(r, a), [loss], rtol=1e-6)
    np.testing.assert_allclose(slopes(dual_surrogate, r, a), [slope], rtol=1e-6)


def test_dual_clip_equals_float64() -> None:
    rng = np.random.default_rng(2)
    ratio = np.exp(1.5 * rng.normal(size=4000)).astype(np.float32)
    advantage = rng.normal(size=4000).astype(np.float32)
    r, a = ratio.astype(np.float64), advantage.astype(np.float64)
    kept = np.minimum(r * a, np.clip(r, 1 - LOW, 1 + HIGH) * a)
    expected = -np.where(a < 0, np.maximum(kept, 3.0 * a), kept)
    np.testing.assert_allclose(dual_surrogate(ratio, advantage), expected, rtol=1e-6, atol=1e-7)
    is_cut = (r > 3.0) & (a < 0)
    assert is_cut.sum() > 100
    plain = slopes(surrogate, ratio, advantage)
    np.testing.assert_array_equal(
        slopes(dual_surrogate, ratio, advantage), np.where(is_cut, 0.0, plain)
    )


# (value, behavior value, return, loss, d loss / d value)
VALUE_CASES = [
    (1.0, 1.0, 3.0, 2.0, -2.0),
    (1.25, 1.0, 3.0, 1.53125, -1.75),  # within the trust region
    (2.0, 1.0, 3.0, 1.125, 0.0),  # moved enough towards the target: counted from 1.5
    (0.0, 1.0, 3.0, 4.5, -3.0),  # moved away: the full error
    (4.0, 1.0, 3.0, 1.125, 0.0),  # beyond the target, but less wrong than 1.5
    (5.0, 1.0, 3.0, 2.0, 2.0),  # beyond the target and more wrong than 1.5
    (-2.0, 1.0, -3.0, 6.125, 0.0),  # the same downwards: counted from 0.5
]


@pytest.mark.parametrize(("value", "behavior_value", "return_", "loss", "slope"), VALUE_CASES)
def test_clipped_value_error_hand_values(
    value: float, behavior_value: float, return_: float, loss: float, slope: float
) -> None:
    args = [array(x) for x in (value, behavior_value, return_)]
    np.testing.assert_allclose(value_error(*args), [loss], rtol=1e-6)
    np.testing.assert_allclose(slopes(value_error, *args), [slope], rtol=1e-6)


def test_clipped_value_error_equals_float64() -> None:
    v, old, target = np.random.default_rng(1).normal(size=(3, 4000)).astype(np.float32)
    far = v.astype(np.float64) - target
    near = old.astype(np.float64) + np.clip(v - old.astype(np.float64), -VALUE_CLIP, VALUE_CLIP)
    near = near - target
    np.testing.assert_allclose(
        value_error(v, old, target), 0.5 * np.maximum(far**2, near**2), rtol=1e-5, atol=1e-7
    )
    is_active = (np.abs(v - old) < VALUE_CLIP) | (np.abs(far) > np.abs(near))
    np.testing.assert_allclose(
        slopes(value_error, v, old, target), np.where(is_active, far, 0), rtol=1e-5, atol=1e-6
    )


def huber_error(value: Any, behavior_value: Any, return_: Any) -> jax.Array:
    return losses.clipped_value_error(value, behavior_value, return_, clip=VALUE_CLIP, huber=0.8)


def test_huber_value_error_equals_float64() -> None:
    v, old, target = np.random.default_rng(3).normal(size=(3, 4000)).astype(np.float32)
    far = v.astype(np.float64) - target
    near = old.astype(np.float64) + np.clip(v - old.astype(np.float64), -VALUE_CLIP, VALUE_CLIP)
    near = near - target

    def huber(error: np.ndarray) -> np.ndarray:
        size = np.abs(error)
        return np.where(size <= 0.8, 0.5 * size**2, 0.8 * (size - 0.4))

    expected = np.maximum(huber(far), huber(near))
    np.testing.assert_allclose(huber_error(v, old, target), expected, rtol=1e-5, atol=1e-7)
    is_active = (np.abs(v - old) < VALUE_CLIP) | (np.abs(far) > np.abs(near))
    slope = np.where(is_active, np.clip(far, -0.8, 0.8), 0)
    np.testing.assert_allclose(slopes(huber_error, v, old, target), slope, rtol=1e-5, atol=1e-6)


def test_huber_without_an_error_has_no_slope() -> None:
    ones = array(1.0)
    assert float(huber_error(ones, ones, ones)[0]) == 0.0
    np.testing.assert_array_equal(slopes(huber_error, ones, ones, ones), [0.0])


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, 6, elements=st.floats(-100.0, 100.0, width=32)),
    is_used=hnp.arrays(np.bool_, 6),
)
def test_weighted_mean_reads_used_entries_only(x: Any, is_used: np.ndarray) -> None:
    x[~is_used] = np.nan
    weight: Any = is_used.astype(np.float32)
    expected = x[is_used].astype(np.float64).mean() if is_used.any() else 0.0
    np.testing.assert_allclose(losses.weighted_mean(x, weight), expected, rtol=1e-5, atol=1e-5)
    slope = slopes(losses.weighted_mean, x, weight)
    np.testing.assert_allclose(slope, weight / max(is_used.sum(), 1), rtol=1e-6)


def test_weighted_mean_with_unequal_weights() -> None:
    actual = losses.weighted_mean(jnp.asarray([1.0, 2.0, 5.0]), jnp.asarray([0.5, 0.0, 1.5]))
    assert float(actual) == 4.0


def test_blank_unused() -> None:
    tree = {
        "floats": jnp.asarray([[1.0, jnp.nan], [jnp.nan, jnp.inf]]),
        "half": jnp.asarray([jnp.nan, 2.0], jnp.bfloat16),
        "ints": jnp.asarray([7, 8]),
        "mask": jnp.asarray([True, True]),
    }
    blanked = losses.blank_unused(tree, jnp.asarray([1.0, 0.0]))
    np.testing.assert_array_equal(blanked["floats"], [[1.0, np.nan], [0.0, 0.0]])
    assert blanked["half"].dtype == jnp.bfloat16 and float(blanked["half"][1]) == 0.0
    assert np.isnan(blanked["half"][0])  # what is used stays, so that a fault shows
    np.testing.assert_array_equal(blanked["ints"], [7, 8])
    np.testing.assert_array_equal(blanked["mask"], [True, True])


def test_nan_of_an_unused_sample_reaches_no_gradient() -> None:
    x = jnp.asarray([1.0, jnp.nan])
    weight = jnp.asarray([1.0, 0.0])

    def loss(scale: jax.Array) -> jax.Array:
        return losses.weighted_mean(scale * losses.blank_unused(x, weight), weight)

    assert float(jax.grad(loss)(jnp.float32(3.0))) == 1.0
