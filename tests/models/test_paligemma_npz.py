"""PaliGemma's weights into the language and vision half."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from models.openpi_files import target_of

from jaxvla.config import UsageError
from jaxvla.models.openpi_tree import flatten
from jaxvla.models.paligemma_npz import INITIAL, load_paligemma
from jaxvla.types import Params


def halves(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """PaliGemma's leaves, and the rest; by enumeration, not by the module's expression."""
    paligemma, rest = {}, {}
    for path, leaf in flat.items():
        is_expert = any(part.endswith("_1") for part in path.split("/")) and "/llm/" in path
        is_paligemma = path.startswith("PaliGemma/") and not is_expert
        (paligemma if is_paligemma else rest)[path] = leaf
    return paligemma, rest


@pytest.fixture(scope="module")
def arrays(oracle) -> dict[str, np.ndarray]:
    """Of the file, by its names."""
    paligemma, _ = halves(flatten(oracle.params))
    return {path.replace("PaliGemma", "params", 1): leaf for path, leaf in paligemma.items()}


def write(path: pathlib.Path, arrays: dict[str, Any]) -> pathlib.Path:
    np.savez(path / "pt.npz", **arrays)
    return path / "pt.npz"


def target(oracle, dtype: str = "float32") -> Params:
    return target_of(oracle.policy, dtype, initial=INITIAL)


def test_loads_one_half_and_keeps_the_other(oracle, arrays, tmp_path) -> None:
    wanted = target(oracle)
    loaded = flatten(load_paligemma(write(tmp_path, arrays), wanted))
    expected, rest = halves(flatten(wanted))
    assert len(expected) == len(arrays) and rest
    for path in expected:
        assert loaded[path].sharding == expected[path].sharding
        np.testing.assert_array_equal(
            loaded[path], arrays[path.replace("PaliGemma", "params", 1)], err_msg=path
        )
    for path, leaf in rest.items():
        assert loaded[path] is leaf, path


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files(oracle, arrays, tmp_path, dtype: Any) -> None:
    # np.savez stores bfloat16 as raw pairs of bytes, as big_vision's files have it.
    path = write(tmp_path, {name: array.astype(dtype) for name, array in arrays.items()})
    loaded = flatten(load_paligemma(path, target(oracle)))
    name = "llm/layers/mlp/linear"
    expected = arrays[f"params/{name}"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(loaded[f"PaliGemma/{name}"], expected)


def test_differences_are_listed(oracle, arrays, tmp_path) -> None:
    changed = dict(arrays)
    changed["opt/count"] = changed.pop("params/img/head/bias")
    changed["params/llm/final_norm/scale"] = np.zeros(5, np.float32)
    with pytest.raises(UsageError) as error:
        load_paligemma(write(tmp_path, changed), target(oracle))
    message = str(error.value)
    assert "1 missing: PaliGemma/img/head/bias" in message
    assert "1 unexpected: opt/count" in message
    assert "PaliGemma/llm/final_norm/scale [5] instead of [64]" in message


def test_pickles_are_not_opened(oracle, arrays, tmp_path) -> None:
    changed = dict(arrays)
    name = "params/llm/final_norm/scale"
    changed[name] = np.empty(arrays[name].shape, object)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_paligemma(write(tmp_path, changed), target(oracle))


def test_other_files_are_refused(oracle, tmp_path) -> None:
    (tmp_path / "text.npz").write_text("no weights")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, message in (("text.npz", "no readable"), ("single.npy", "single array")):
        with pytest.raises(UsageError, match=message):
            load_paligemma(tmp_path / name, target(oracle))
    with pytest.raises(UsageError, match="no readable"):
        load_paligemma(tmp_path / "absent.npz", target(oracle))
