"""openpi's checkpoint directories: finding, reading and writing them."""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.openpi_files import target_of, velocity, write_params

from jaxvla.config import UsageError
from jaxvla.data.normalization import FieldStats, NormStats
from jaxvla.models.layers import nest
from jaxvla.models.openpi_format import (
    load_params,
    load_stats,
    local_checkpoint,
    save_checkpoint,
)
from jaxvla.models.openpi_tree import flatten

ASSET = "physical-intelligence/libero"


@pytest.fixture(scope="module")
def stats() -> NormStats:
    random = np.random.default_rng(0)
    fields = [FieldStats.from_array(random.normal(size=(50, size))) for size in (8, 7)]
    return NormStats(state=fields[0], actions=fields[1])


@pytest.fixture(scope="module")
def checkpoint(oracle, tmp_path_factory) -> pathlib.Path:
    """As openpi's training leaves one, with statistics of two data sets."""
    path = tmp_path_factory.mktemp("openpi") / "10000"
    write_params(path / "params", oracle.params, suffix=True)
    field = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None}
    for asset in (ASSET, "droid"):
        (path / "assets" / asset).mkdir(parents=True)
        text = json.dumps({"norm_stats": {"state": field, "actions": field}})
        (path / "assets" / asset / "norm_stats.json").write_text(text)
    return path


def assert_equal_bits(actual: Any, expected: dict[str, Any]) -> None:
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        np.testing.assert_array_equal(
            np.asarray(actual[path]).reshape(-1).view(np.uint8),
            np.asarray(array).reshape(-1).view(np.uint8),
            err_msg=path,
        )


# ------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize("below", ["", "params"])
def test_reads_what_openpi_writes(oracle, tmp_path, suffix: bool, below: str) -> None:
    write_params(tmp_path / "params", oracle.params, suffix=suffix)
    loaded = flatten(load_params(tmp_path / below, target_of(oracle.policy)))
    assert_equal_bits(loaded, flatten(oracle.params))


def test_gives_openpis_velocity(oracle, checkpoint, quick_jit) -> None:
    params = jax.device_get(load_params(checkpoint, target_of(oracle.policy)))
    with jax.default_matmul_precision("highest"):
        result = quick_jit(lambda params: velocity(oracle.policy, params, oracle))(params)
    np.testing.assert_allclose(result, oracle["out/velocity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_have_the_targets_sharding_and_dtype(oracle, checkpoint, dtype: str) -> None:
    target = target_of(oracle.policy, dtype)
    loaded, wanted = flatten(load_params(checkpoint, target)), flatten(target)
    assert set(loaded) == set(wanted)
    for path, leaf in loaded.items():
        assert leaf.sharding == wanted[path].sharding, path
        assert leaf.dtype == np.dtype(dtype), path
    split = [leaf for leaf in loaded.values() if not leaf.sharding.is_fully_replicated]
    assert len(split) > 15
    shards = loaded["PaliGemma/llm/layers/mlp/linear"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(4, 64, 32)}  # 128 / 2, 64 / 2
    cast = {path: leaf.astype(dtype) for path, leaf in flatten(oracle.params).items()}
    assert_equal_bits(loaded, cast)


def test_dtypes_may_differ_from_leaf_to_leaf(oracle, checkpoint) -> None:
    wide, narrow = flatten(target_of(oracle.policy)), target_of(oracle.policy, "bfloat16")
    mixed = flatten(narrow) | {path: leaf for path, leaf in wide.items() if "norm" in path}
    loaded = flatten(load_params(checkpoint, nest(mixed)))
    assert {path for path, leaf in loaded.items() if leaf.dtype == np.float32} == {
        path for path in loaded if "norm" in path
    }


def test_own_heads_keep_their_initial_values(oracle, checkpoint, quick_jit) -> None:
    loaded = flatten(load_params(checkpoint, target_of(oracle.policy)))
    heads = [path for path in loaded if path not in flatten(oracle.params)]
    assert heads and all(path.startswith("value_head/") for path in heads)
    fresh = flatten(quick_jit(oracle.policy.init)(jax.random.key(7)))
    for path in heads:
        np.testing.assert_allclose(loaded[path], fresh[path], rtol=1e-6, atol=0, err_msg=path)


def test_adapters_may_be_missing(oracle, checkpoint) -> None:
    target = flatten(target_of(oracle.policy))
    path = "PaliGemma/llm/layers/attn/q_einsum/lora_a"
    target[path] = jax.device_put(np.ones((4, 2)), target["action_in_proj/bias"].sharding)
    assert flatten(load_params(checkpoint, nest(target)))[path] is target[path]


def test_a_missing_head_needs_an_initial_value(oracle, checkpoint) -> None:
    target = target_of(oracle.policy, initial="no such path")
    with pytest.raises(UsageError, match=r"lacks value_head/.* no initial value"):
        load_params(checkpoint, target)


def test_a_target_without_sharding_is_refused(oracle, checkpoint) -> None:
    shapes = jax.eval_shape(oracle.policy.init, jax.random.key(0))
    with pytest.raises(UsageError, match="has no sharding"):
        load_params(checkpoint, shapes)


def test_differences_are_listed(oracle, tmp_path) -> None:
    flat = flatten(oracle.params)
    flat["action_in_proj/kernel"] = np.zeros((3, 2), np.float32)
    flat["mystery/kernel"] = flat.pop("action_out_proj/kernel")
    write_params(tmp_path / "params", nest(flat), suffix=False)
    with pytest.raises(UsageError) as error:
        load_params(tmp_path, target_of(oracle.policy))
    message = str(error.value)
    assert "1 missing: action_out_proj/kernel" in message
    assert "1 unexpected: mystery/kernel" in message
    assert "1 of another shape: action_in_proj/kernel [3, 2] instead of [8, 64]" in message
    assert str(tmp_path) in message and "\n" not in message


def test_a_pi0_checkpoint_is_no_pi05_model(oracle, checkpoint) -> None:
    is_pi05 = oracle.policy.config.time_conditioning == "adarms"
    other = {"time_conditioning": "concat", "state_input": "token"}
    if not is_pi05:
        other = {"time_conditioning": "adarms", "state_input": "none"}
    with pytest.raises(UsageError, match=r"missing.*; \d+ unexpected.*pi0, pi0\.5"):
        load_params(checkpoint, target_of(oracle.variant(**other)))


def test_directories_without_weights_are_refused(oracle, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"neither params/_METADATA nor model\.safetensors"):
        load_params(tmp_path, target_of(oracle.policy))


def test_safetensors_need_the_extra(oracle, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"pip install 'jaxvla\[openpi\]'"):
        load_params(tmp_path, target_of(oracle.policy))


# ------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(oracle, stats, tmp_path, dtype: str) -> None:
    target = flatten(target_of(oracle.policy, dtype))
    given = {  # times 1.1: the case's weights are exact in float16
        path: jnp.asarray(leaf * np.float32(1.1), dtype)
        for path, leaf in flatten(oracle.params).items()
    }
    # Few leaves lie on several devices: for each of them orbax compiles its slices.
    for path in ("action_in_proj/kernel", "PaliGemma/llm/layers/mlp/linear"):
        given[path] = jax.device_put(given[path], target[path].sharding)
    params = nest(target | given)  # with the initial value head
    save_checkpoint(tmp_path / "a" / "export", params, stats=stats, asset_id=ASSET)
    loaded = flatten(load_params(tmp_path / "a" / "export", target_of(oracle.policy, dtype)))
    assert_equal_bits(loaded, given)
    written = json.loads((tmp_path / "a/export/params/_METADATA").read_text())["tree_metadata"]
    assert len(written) == len(given)
    again = load_stats(tmp_path / "a" / "export", ASSET, "quantile")
    np.testing.assert_array_equal(again.state.q99, stats.state.q99)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["export"]


def test_files_are_of_the_kind_that_openpis_orbax_reads(oracle, stats, tmp_path) -> None:
    save_checkpoint(tmp_path / "export", oracle.params, stats=stats, asset_id=ASSET)
    metadata = json.loads((tmp_path / "export/params/_METADATA").read_text())
    assert metadata["use_zarr3"] is False and metadata["use_ocdbt"] is True
    assert (tmp_path / "export/params/manifest.ocdbt").is_file()
    keys = [leaf["key_metadata"] for leaf in metadata["tree_metadata"].values()]
    leaves = {"/".join(part["key"] for part in path) for path in keys}
    assert leaves == {f"params/{path}" for path in flatten(oracle.params)}


def test_nothing_is_overwritten(oracle, stats, tmp_path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        save_checkpoint(tmp_path / "export", oracle.params, stats=stats, asset_id=ASSET)


def test_a_failed_write_leaves_nothing(oracle, stats, tmp_path, monkeypatch) -> None:
    def fail(self: pathlib.Path, target: pathlib.Path) -> None:
        assert (self / "params/_METADATA").is_file()
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.PosixPath, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path / "export", oracle.params, stats=stats, asset_id=ASSET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asset_id", ["", "/tmp/x", "../x"])
def test_asset_ids_stay_inside(oracle, stats, tmp_path, asset_id: str) -> None:
    with pytest.raises(UsageError, match="asset_id"):
        save_checkpoint(tmp_path / "export", oracle.params, stats=stats, asset_id=asset_id)


def test_other_models_are_refused(stats, tmp_path) -> None:
    with pytest.raises(UsageError, match="no PaliGemma, only torso"):
        save_checkpoint(tmp_path / "export", {"torso": {}}, stats=stats, asset_id=ASSET)


# ---------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("below", ["", "params"])
def test_statistics_of_an_asset(checkpoint, below: str) -> None:
    stats = load_stats(checkpoint / below, ASSET, "zscore")
    np.testing.assert_array_equal(stats.actions.std, [1.0, 2.0])


def test_unknown_assets_are_listed(checkpoint, tmp_path) -> None:
    with pytest.raises(UsageError, match=rf"'libero'.*there: droid, {ASSET}"):
        load_stats(checkpoint, "libero", "zscore")
    with pytest.raises(UsageError, match="there: none"):
        load_stats(tmp_path, "libero", "zscore")


# --------------------------------------------------------------------------------- cache

ADDRESS = "gs://openpi-assets/checkpoints/pi05_libero"


def test_addresses_are_looked_up_in_openpis_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    path = tmp_path / "openpi-assets" / "checkpoints" / "pi05_libero"
    with pytest.raises(UsageError, match=rf"cp -r '{ADDRESS}' '{path.parent}'"):
        local_checkpoint(ADDRESS)
    assert list(tmp_path.iterdir()) == []
    path.mkdir(parents=True)
    assert local_checkpoint(ADDRESS) == path
    assert local_checkpoint(ADDRESS + "/") == path


def test_the_cache_is_in_the_home_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OPENPI_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache/openpi/openpi-assets/checkpoints/pi05_libero"
    path.mkdir(parents=True)
    assert local_checkpoint(ADDRESS) == path


def test_local_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert local_checkpoint("~/mine") == tmp_path / "mine"
    with pytest.raises(UsageError, match="no checkpoint at"):
        local_checkpoint(str(tmp_path / "yours"))


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://bucket", "gs://bucket/../../etc"])
def test_bad_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="must be gs://BUCKET/PATH"):
        local_checkpoint(address)
