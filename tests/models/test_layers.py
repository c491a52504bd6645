"""Building blocks against float64 numpy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.models import layers
from jaxvla.models.layers import Leaf


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 2), (4, 4)])
def test_attention_matches_a_loop(num_heads: int, num_kv_heads: int) -> None:
    batch, queries, keys, width = 2, 3, 5, 6
    q = random(0, batch, queries, num_heads, width)
    k, v = (random(seed, batch, keys, num_kv_heads, width) for seed in (1, 2))
    mask = np.random.default_rng(3).random((batch, queries, keys)) < 0.6
    mask[:, :, 0] = True
    expected = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, queries, num_heads):
        own = n * num_kv_heads // num_heads  # query heads share kv heads in contiguous groups
        logits = np.asarray(k, np.float64)[b, :, own] @ np.asarray(q, np.float64)[b, t, n]
        weights = np.where(mask[b, t], np.exp(logits - logits.max()), 0.0)
        expected[b, t, n] = weights / weights.sum() @ np.asarray(v, np.float64)[b, :, own]
    actual = layers.attention(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_attention_of_a_fully_masked_query_is_the_mean() -> None:
    q, k, v = random(0, 1, 2, 2, 4), random(1, 1, 3, 1, 4), random(2, 1, 3, 1, 4)
    mask = jnp.zeros((1, 2, 3), bool).at[0, 1].set(True)
    out = layers.attention(q, k, v, mask)
    np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(axis=0), atol=1e-6)


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_attention_mask_is_the_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query_mask, key_mask = rng.random((2, 3)) < 0.7, rng.random((2, 4)) < 0.7
    query_block = np.cumsum(rng.integers(0, 2, 3))
    key_block = np.cumsum(rng.integers(0, 2, 4))
    actual = layers.attention_mask(
        *map(jnp.asarray, (query_mask, query_block, key_mask, key_block))
    )
    for b, t, s in np.ndindex(2, 3, 4):
        allowed = query_mask[b, t] and key_mask[b, s] and key_block[s] <= query_block[t]
        assert actual[b, t, s] == allowed


def test_positions_skip_padding() -> None:
    mask = jnp.array([[True, False, True, True, False], [False, True, False, False, True]])
    expected = [[0, 0, 1, 2, 2], [-1, 0, 0, 0, 1]]
    np.testing.assert_array_equal(layers.positions_of(mask), expected)


def test_rotary_rotates_pairs_of_halves() -> None:
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., 1] = 1.0  # paired with component 3, timescale 10000^(1/2) = 100
    out = layers.rotary(jnp.asarray(x), jnp.array([[50]]))
    np.testing.assert_allclose(out[0, 0, 0], [0.0, np.cos(0.5), 0.0, np.sin(0.5)], atol=1e-6)


@pytest.mark.parametrize("shift", [1, 17])
def test_rotary_scores_depend_on_distance_only(shift: int) -> None:
    q, k = random(0, 1, 1, 1, 8), random(1, 1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        turned = layers.rotary(q, jnp.array([[i]])), layers.rotary(k, jnp.array([[j]]))
        return float(jnp.vdot(*turned))

    np.testing.assert_allclose(score(5, 2), score(5 + shift, 2 + shift), rtol=1e-5)
    assert abs(score(5, 2) - score(5 + shift, 2)) > 1e-3


def test_norms_match_float64() -> None:
    x, scale, bias = 30.0 + 4.0 * random(0, 2, 3, 16), random(1, 16), random(2, 16)
    x64 = np.asarray(x, np.float64)
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    actual = layers.rms_norm({"scale": scale}, x)
    np.testing.assert_allclose(actual, rms * (1.0 + np.asarray(scale)), rtol=1e-5)
    centred = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    actual = layers.layer_norm({"scale": scale, "bias": bias}, x)
    np.testing.assert_allclose(actual, centred * scale + bias, atol=2e-5)


def test_adaptive_norm_by_hand() -> None:
    # Condition 1 through kernel 0 and biases: scale 1, shift 2, gate 3.
    bias = jnp.repeat(jnp.array([1.0, 2.0, 3.0]), 2)
    x = jnp.array([[[3.0, 4.0]]])  # rms = sqrt(12.5)
    norm = {"Dense_0": {"kernel": jnp.zeros((1, 6)), "bias": bias}}
    y, gate = layers.adaptive_rms_norm(norm, x, jnp.ones((1, 1)))
    np.testing.assert_allclose(y[0, 0], 2.0 * np.array([3.0, 4.0]) / 12.5**0.5 + 2.0, rtol=1e-5)
    np.testing.assert_array_equal(gate, jnp.full((1, 1, 2), 3.0))


@pytest.mark.parametrize("norm", [layers.rms_norm, layers.layer_norm])
def test_norm_statistics_are_float32_for_bfloat16(norm) -> None:
    # 4096 squares near 1 cannot be summed in bfloat16 (the sum stalls at 256).
    x = (1.0 + 0.25 * random(0, 1, 4096)).astype(jnp.bfloat16)
    params = {"scale": jnp.zeros(4096), "bias": jnp.zeros(4096)}
    params["scale"] += norm is layers.layer_norm
    exact = norm(params, x.astype(jnp.float32))
    assert norm(params, x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(params, x).astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


def test_time_embedding_matches_float64() -> None:
    time = jnp.array([0.0, 0.3, 1.0])
    period = 4e-3 * 1000.0 ** np.linspace(0.0, 1.0, 8)
    angle = 2.0 * np.pi * np.asarray(time, np.float64)[:, None] / period[None]
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    # float32 angles up to 1571 rad have a spacing of 1.2e-4
    np.testing.assert_allclose(layers.time_embedding(time, 16), expected, atol=4e-4)


@pytest.mark.parametrize("remat", layers.REMAT)
@pytest.mark.parametrize("max_unrolled", [1, 4])
def test_layer_stack_is_a_loop(quick_jit, max_unrolled: int, remat: str) -> None:
    loop = layers.LayerLoop(max_unrolled=max_unrolled, remat=remat)
    x, weights = random(0, 2, 3, 4), random(1, 3, 4, 4)

    def block(x, weight):
        x = jnp.tanh(layers.matmul(x, weight))
        return x, x[:, 0]

    def run(weights):
        out, outputs = layers.run_layers(block, x, weights, loop)
        return jnp.sum(out**2) + jnp.sum(outputs**3), outputs

    (_, outputs), gradient = quick_jit(jax.value_and_grad(run, has_aux=True))(weights)
    expected, x64 = [], np.asarray(x, np.float64)
    for weight in np.asarray(weights, np.float64):
        x64 = np.tanh(x64 @ weight)
        expected.append(x64[:, 0])
    np.testing.assert_allclose(outputs, np.stack(expected), atol=1e-6)
    direction = random(2, 3, 4, 4)
    step = 1e-2 * direction
    slope = (run(weights + step)[0] - run(weights - step)[0]) / 2e-2
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=2e-3)


LEAVES = {
    "a/kernel": Leaf(shape=(50, 200), axes=("embed", "mlp"), std=0.5, mean=1.0),
    "a/bias": Leaf(shape=(6,), axes=(None,), mean=np.array([0, 0, 0, 1, 1, 1])),
    "b": Leaf(shape=(50, 200), axes=("embed", "mlp"), std=0.5),
}


def test_init_draws_declared_moments() -> None:
    params = layers.init_leaves(jax.random.key(0), LEAVES)
    kernel = np.asarray(params["a"]["kernel"])
    assert kernel.dtype == np.float32 and kernel.shape == (50, 200)
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [1.0, 0.5], atol=0.02)
    np.testing.assert_array_equal(params["a"]["bias"], [0, 0, 0, 1, 1, 1])
    correlation = np.corrcoef(kernel.ravel(), np.ravel(params["b"]))[0, 1]
    assert abs(correlation) < 0.05  # two leaves of one shape are independent
    assert len(np.unique(params["b"])) > 9900  # as are the chunks of one leaf


def test_init_of_a_leaf_depends_on_its_path_only() -> None:
    everything = layers.init_leaves(jax.random.key(0), LEAVES)
    alone = layers.init_leaves(jax.random.key(0), {"b": LEAVES["b"]})
    np.testing.assert_array_equal(alone["b"], everything["b"])
    other = layers.init_leaves(jax.random.key(1), {"b": LEAVES["b"]})
    assert not np.array_equal(other["b"], alone["b"])


def test_init_of_a_large_leaf() -> None:
    large = Leaf(shape=(1024, 1024), axes=(None, None), std=2.0)
    drawn = layers.init_leaves(jax.random.key(0), {"large": large} | LEAVES)["large"]
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0.0, 2.0], atol=0.02)


def test_leaf_needs_an_axis_per_dimension() -> None:
    with pytest.raises(ValueError, match="1 axes"):
        Leaf(shape=(2, 3), axes=("embed",))
