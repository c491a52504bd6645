"""Targets, and the comparison of a file with a model."""

import jax
import numpy as np
import pytest
from models.openpi_files import target_of

from jaxvla.config import UsageError
from jaxvla.models.layers import nest
from jaxvla.models.openpi_tree import OPTIONAL, flatten, require_match


def test_only_leaves_with_initial_values_are_allocated(policy) -> None:
    flat = flatten(target_of(policy))
    assert set(flat) == set(policy.leaves())
    drawn = {path for path, leaf in flat.items() if isinstance(leaf, jax.Array)}
    assert drawn == {
        path for path in flat if path.split("/")[0] in ("value_head", "grounding_head")
    }


def test_initial_values_are_those_of_a_fresh_model(policy, quick_jit) -> None:
    fresh = flatten(quick_jit(policy.init)(jax.random.key(7)))
    flat = flatten(target_of(policy, initial=""))
    for path, leaf in flat.items():
        np.testing.assert_allclose(leaf, fresh[path], rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_that_of_all_leaves(policy, dtype: str) -> None:
    assert {leaf.dtype for leaf in flatten(target_of(policy, dtype)).values()} == {np.dtype(dtype)}


def test_nest_is_the_inverse_of_flatten() -> None:
    flat = {"a/b": 1, "a/c/d": 2, "e": 3}
    assert flatten(nest(flat)) == flat


def test_long_lists_are_cut() -> None:
    wanted = {f"leaf{index}": (1,) for index in range(7)}
    with pytest.raises(UsageError, match="7 missing: leaf0, leaf1, leaf2, leaf3 and 3 more"):
        require_match("x.npz", {}, wanted)


@pytest.mark.parametrize(
    ("path", "is_optional"),
    [
        ("value_head/out/kernel", True),
        ("noise_head/out/kernel", True),
        ("grounding_head/query", True),
        ("PaliGemma/llm/layers/attn/q_einsum_1/lora_a", True),
        ("PaliGemma/llm/layers/mlp/gating_einsum_lora_b", True),
        ("PaliGemma/img/head/kernel", False),
        ("PaliGemma/llm/layers/mlp/linear", False),
        ("explora/kernel", False),
    ],
)
def test_which_leaves_a_file_may_lack(path: str, is_optional: bool) -> None:
    if is_optional:
        require_match("x.npz", {}, {path: (1,)}, optional=OPTIONAL)
    else:
        with pytest.raises(UsageError, match=f"1 missing: {path}"):
            require_match("x.npz", {}, {path: (1,)}, optional=OPTIONAL)
