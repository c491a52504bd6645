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


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_adapters_act_like_changed_weights(quick_jit, x, num_kv_heads) -> None:
    size = dataclasses.replace(SIZE, num_kv_heads=num_kv_heads, lora_rank=3)
    plain, adapted = make(dataclasses.replace(size, lora_rank=0)), make(size)
    positions, mask = jnp.broadcast_to(jnp.arange(5)[None], (2, 5)), jnp.ones((2, 5, 5), bool)

    @quick_jit
    def run(params):
        return gemma.forward(params, gemma.LANGUAGE, x, positions, mask, lora_scale=2.0)[0]

    np.testing.assert_array_equal(run(adapted), run(plain))  # B starts at zero
    random = np.random.default_rng(0)
    attn, mlp = adapted["layers"]["attn"], adapted["layers"]["mlp"]
    for node in (*attn.values(), mlp):
        for name in [name for name in node if name.endswith("lora_b")]:
            node[name] = jnp.asarray(random.normal(size=node[name].shape), jnp.float32)
    merged = plain | {"layers": plain["layers"] | {"attn": {}, "mlp": {}}}
    for name, node in attn.items():
        a, b = (np.asarray(node[part], np.float64) for part in ("lora_a", "lora_b"))
        if name == "attn_vec_einsum":  # all heads share the sum of their factors B
            b = np.broadcast_to(b.sum(axis=1, keepdims=True), b.shape)
        merged["layers"]["attn"][name] = {"w": jnp.asarray(node["w"] + 2.0 * a @ b, jnp.float32)}
    for name in ("gating_einsum", "linear"):
        a, b = (np.asarray(mlp[f"{name}_{part}"], np.float64) for part in ("lora_a", "lora_b"))
        merged["layers"]["mlp"][name] = jnp.asarray(mlp[name] + a @ b, jnp.float32)
    changed = run(adapted)
    assert float(jnp.abs(changed - run(plain)).max()) > 0.5
    np.testing.assert_allclose(changed, run(merged), atol=2e-5)


def test_adapters_have_the_shapes_of_openpi() -> None:
    declared = gemma.leaves(dataclasses.replace(SIZE, lora_rank=3), gemma.ACTION, adaptive=True)
    shapes = {
        path.removeprefix("layers/"): leaf.shape
        for path, leaf in declared.items()
        if "lora" in path
    }
    assert shapes == {
        "attn/q_einsum_1/lora_a": (2, 4, 12, 3),
        "attn/q_einsum_1/lora_b": (2, 4, 3, 6),
        "attn/kv_einsum_1/lora_a": (2, 2, 2, 12, 3),
        "attn/kv_einsum_1/lora_b": (2, 2, 2, 3, 6),
        "attn/attn_vec_einsum_1/lora_a": (2, 4, 6, 3),
        "attn/attn_vec_einsum_1/lora_b": (2, 4, 3, 12),
        "mlp_1/gating_einsum_lora_a": (2, 2, 12, 3),
        "mlp_1/gating_einsum_lora_b": (2, 2, 3, 20),
        "mlp_1/linear_lora_a": (2, 20, 3),
        "mlp_1/linear_lora_b": (2, 3, 12),
    }
