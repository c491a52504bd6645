"""The transformer's layouts; its numbers are checked in test_pi_oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.models import gemma
from jaxvla.models.layers import init_leaves

SIZE = gemma.ExpertSize(width=12, depth=2, mlp_width=20, num_heads=4, num_kv_heads=2, head_dim=6)


def make(size: gemma.ExpertSize):
    return init_leaves(jax.random.key(0), gemma.leaves(size, gemma.LANGUAGE, adaptive=False))


@pytest.fixture(scope="module")
def params(quick_jit):
    return quick_jit(lambda: make(SIZE))()


@pytest.fixture(scope="module")
def run(quick_jit):
    """(params, x, cache) -> output and cache; tokens follow the cached ones and see all."""

    @quick_jit
    def forward(params, x, cache=None):
        batch, tokens = x.shape[:2]
        num_cached = 0 if cache is None else cache[0].shape[2]
        positions = jnp.broadcast_to(num_cached + jnp.arange(tokens)[None], (batch, tokens))
        mask = jnp.ones((batch, tokens, num_cached + tokens), bool)
        return gemma.forward(params, gemma.LANGUAGE, x, positions, mask, cache=cache)

    return forward


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)


def test_one_kv_head_per_query_head_uses_the_fused_leaf(params, run, x) -> None:
    attn = params["layers"]["attn"]
    kv = jnp.repeat(attn["kv_einsum"]["w"], 2, axis=2)  # [L, 2, heads, D, head_dim]
    qkv = jnp.concatenate([attn["q_einsum"]["w"][:, None], kv], axis=1)
    declared = jax.eval_shape(lambda: make(dataclasses.replace(SIZE, num_kv_heads=4)))["layers"][
        "attn"
    ]
    assert set(declared) == {"qkv_einsum", "attn_vec_einsum"}
    assert declared["qkv_einsum"]["w"].shape == qkv.shape
    attn = {"qkv_einsum": {"w": qkv}, "attn_vec_einsum": attn["attn_vec_einsum"]}
    fused = params | {"layers": params["layers"] | {"attn": attn}}
    np.testing.assert_allclose(run(fused, x)[0], run(params, x)[0], atol=2e-5)


def test_cache_of_the_same_expert_is_the_causal_continuation(params, run, quick_jit, x) -> None:
    # Tokens 3 and 4 on the cache of 0..2 equal one pass in which 0..2 do not see 3 and 4.
    _, cache = run(params, x[:, :3])
    continued, none = run(params, x[:, 3:], cache)
    assert none is None
    mask = jnp.ones((2, 5, 5), bool).at[:, :3, 3:].set(False)
    positions = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    whole = quick_jit(lambda p: gemma.forward(p, gemma.LANGUAGE, x, positions, mask)[0])(params)
    np.testing.assert_allclose(continued, whole[:, 3:], atol=2e-5)


def test_fresh_expert_listens_to_its_condition(quick_jit, x) -> None:
    params = quick_jit(
        lambda: init_leaves(jax.random.key(0), gemma.leaves(SIZE, gemma.ACTION, adaptive=True))
    )()
    positions, mask = jnp.broadcast_to(jnp.arange(5)[None], (2, 5)), jnp.ones((2, 5, 5), bool)
    run = quick_jit(
        lambda c: gemma.forward(params, gemma.ACTION, x, positions, mask, condition=c)[0]
    )
    low, high = run(jnp.zeros((2, 12))), run(jnp.ones((2, 12)))
    assert float(jnp.abs(low - high).mean()) > 0.01


def test_token_vectors_are_scaled_rows() -> None:
    table = jnp.arange(12.0).reshape(3, 4)
    out = gemma.embed_tokens(
        {"embedder": {"input_embedding": table}}, jnp.array([[2, 0]]), jnp.bfloat16
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0], 2.0 * table[jnp.array([2, 0])])
