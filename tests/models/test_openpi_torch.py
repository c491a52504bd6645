"""Weights of openpi's PyTorch port, written by hand from the meaning of each layer."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.openpi_files import target_of, torch_tensors, velocity

from jaxvla.config import UsageError
from jaxvla.models.openpi_format import load_params
from jaxvla.models.openpi_tree import flatten

pytest.importorskip("safetensors", reason="needs the extra openpi")
from safetensors.numpy import save_file

PALIGEMMA = "paligemma_with_expert.paligemma."
TOKENS = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
TIED = f"{PALIGEMMA}lm_head.weight"


@pytest.fixture(scope="module")
def tensors(oracle) -> dict[str, np.ndarray]:
    return torch_tensors(flatten(oracle.params))


def write(path: pathlib.Path, tensors: dict[str, Any]) -> pathlib.Path:
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(whole, path / "model.safetensors")
    return path


def assert_loads(oracle, path: pathlib.Path) -> None:
    loaded = flatten(load_params(path, target_of(oracle.policy)))
    for name, array in flatten(oracle.params).items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_every_leaf_is_imported(oracle, tensors, tmp_path, name: str) -> None:
    assert_loads(oracle, write(tmp_path, tensors) / name)


def test_gives_openpis_velocity(oracle, tensors, tmp_path, quick_jit) -> None:
    params = jax.device_get(load_params(write(tmp_path, tensors), target_of(oracle.policy)))
    with jax.default_matmul_precision("highest"):
        result = quick_jit(lambda params: velocity(oracle.policy, params, oracle))(params)
    np.testing.assert_allclose(result, oracle["out/velocity"], atol=1e-4, rtol=0)


def test_projections_compute_the_same(oracle, tensors) -> None:
    # The definition that both sides must agree with: heads are a reshape of the output.
    flat, layer = flatten(oracle.params), 1
    module = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn"
    kernel = flat["PaliGemma/llm/layers/attn/q_einsum_1/w"][layer]
    out = flat["PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"][layer]
    heads, width, head_dim = kernel.shape
    x = np.random.default_rng(0).normal(size=(5, width))
    queries = (x @ tensors[f"{module}.q_proj.weight"].T).reshape(5, heads, head_dim)
    np.testing.assert_allclose(queries, np.einsum("td,ndh->tnh", x, kernel), rtol=1e-6)
    y = queries.reshape(5, heads * head_dim) @ tensors[f"{module}.o_proj.weight"].T
    np.testing.assert_allclose(y, np.einsum("tnh,nhd->td", queries, out), rtol=1e-6, atol=1e-9)


def test_published_files_share_the_token_table_with_a_language_head(
    oracle, tensors, tmp_path
) -> None:
    shared = {TIED if name == TOKENS else name: array for name, array in tensors.items()}
    shared["paligemma_with_expert.gemma_expert.lm_head.weight"] = np.zeros((512, 64), np.float32)
    assert_loads(oracle, write(tmp_path, shared))


def test_the_token_table_wins_over_a_language_head(oracle, tensors, tmp_path) -> None:
    assert_loads(oracle, write(tmp_path, tensors | {TIED: tensors[TOKENS] + 1.0}))


def test_lerobots_prefix(oracle, tensors, tmp_path) -> None:
    assert_loads(oracle, write(tmp_path, {f"model.{name}": x for name, x in tensors.items()}))


def test_heads_of_other_trainers_are_not_read(oracle, tensors, tmp_path) -> None:
    extra = {"value_head.mlp.0.weight": np.ones((2, 3), np.float32)}
    assert_loads(oracle, write(tmp_path, tensors | extra))


def test_half_precision_with_float32_norms(oracle, tensors, tmp_path) -> None:
    stored = {
        name: array if "norm" in name else array.astype(jnp.bfloat16)
        for name, array in tensors.items()
    }
    target = flatten(target_of(oracle.policy, "bfloat16"))
    loaded = flatten(load_params(write(tmp_path, stored), target_of(oracle.policy, "bfloat16")))
    for name, array in flatten(oracle.params).items():
        assert loaded[name].dtype == jnp.bfloat16
        assert loaded[name].sharding == target[name].sharding
        np.testing.assert_array_equal(loaded[name], array.astype(jnp.bfloat16), err_msg=name)


def test_own_heads_keep_their_initial_values(oracle, tensors, tmp_path) -> None:
    target = flatten(target_of(oracle.policy))
    loaded = flatten(load_params(write(tmp_path, tensors), target_of(oracle.policy)))
    name = "value_head/out/kernel"
    np.testing.assert_array_equal(loaded[name], target[name])


def test_differences_are_listed_under_the_files_names(oracle, tensors, tmp_path) -> None:
    changed = dict(tensors)
    changed["mystery.weight"] = changed.pop("action_out_proj.weight")
    changed["action_in_proj.bias"] = np.zeros(3, np.float32)
    layer = f"{PALIGEMMA}model.language_model.layers.3.mlp.up_proj.weight"
    del changed[layer]
    with pytest.raises(UsageError) as error:
        load_params(write(tmp_path, changed), target_of(oracle.policy))
    message = str(error.value)
    assert "2 missing: " in message and layer in message and "action_out_proj.weight" in message
    assert "1 unexpected: mystery.weight" in message
    assert "1 of another shape: action_in_proj.bias [3] instead of [64]" in message


def test_leaves_that_no_pi_model_has_are_refused(oracle, tensors, tmp_path) -> None:
    target = target_of(oracle.policy)
    target["torso"] = target["action_in_proj"]
    with pytest.raises(UsageError, match="cannot hold torso/"):
        load_params(write(tmp_path, tensors), target)


def test_unreadable_files_are_refused(oracle, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="no readable safetensors file"):
        load_params(tmp_path, target_of(oracle.policy))


def test_one_kv_head_per_query_head(tmp_path) -> None:
    # No published model: the leaf `qkv_einsum` that stands for three tensors then.
    from jaxvla.models.openpi_torch import load_safetensors

    weights = {
        f"paligemma_with_expert.gemma_expert.model.layers.0.self_attn.{name}_proj.weight": np.full(
            (4, 3), index, np.float32
        )
        for index, name in enumerate("qkv")
    }
    leaf = jax.ShapeDtypeStruct(
        (1, 3, 2, 3, 2), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    target = {"PaliGemma": {"llm": {"layers": {"attn": {"qkv_einsum_1": {"w": leaf}}}}}}
    path = write(tmp_path, weights) / "model.safetensors"
    (loaded,) = jax.tree.leaves(load_safetensors(path, target))
    np.testing.assert_array_equal(loaded[0, :, 0, 0, 0], [0.0, 1.0, 2.0])
