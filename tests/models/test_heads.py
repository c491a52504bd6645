"""The heads of RL: bounds, initial values, masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.models import heads
from jaxvla.models.layers import init_leaves


def test_noise_starts_near_the_middle_of_its_range_and_never_leaves_it() -> None:
    tree = init_leaves(jax.random.key(0), heads.noise_leaves(48, 3))
    features = jax.random.normal(jax.random.key(1), (50, 4, 48))
    std = heads.noise_std(tree["noise_head"], features, 0.08, 0.16)
    assert std.shape == (50, 4, 3) and std.dtype == jnp.float32
    middle = math.sqrt(0.08 * 0.16)
    assert np.abs(std / middle - 1.0).max() < 0.15 and np.std(std) > 1e-4
    for scale, bound in ((-1e4, 0.08), (1e4, 0.16)):
        pushed = tree["noise_head"] | {
            "out": tree["noise_head"]["out"] | {"bias": scale * np.ones(3)}
        }
        np.testing.assert_allclose(heads.noise_std(pushed, features, 0.08, 0.16), bound, rtol=1e-5)


def test_noise_equals_float64() -> None:
    tree = init_leaves(jax.random.key(0), heads.noise_leaves(16, 3))["noise_head"]
    features = np.random.default_rng(0).normal(size=(2, 4, 16))
    x = features
    for name in ("Dense_0", "Dense_1"):
        x = np.tanh(x @ np.float64(tree[name]["kernel"]) + np.float64(tree[name]["bias"]))
    x = np.tanh(x @ np.float64(tree["out"]["kernel"]))
    log_variance = math.log(0.1**2) + (math.log(0.3**2) - math.log(0.1**2)) * (x + 1.0) / 2.0
    actual = heads.noise_std(tree, jnp.asarray(features, jnp.float32), 0.1, 0.3)
    np.testing.assert_allclose(actual, np.exp(log_variance / 2.0), rtol=1e-5)


def test_masked_mean_reads_valid_tokens_only() -> None:
    features = jnp.asarray([[[1.0, 2.0], [5.0, 4.0], [jnp.nan, jnp.inf]], [[9.0, 9.0]] * 3])
    mask = jnp.asarray([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(heads.masked_mean(features, mask), [[3.0, 3.0], [0.0, 0.0]])
