"""From parameter paths to placements, for small trees and for the shipped model sizes."""

import functools
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxvla.data.normalization import NormStats
from jaxvla.layout import parse_layout
from jaxvla.learning.train_state import init_state, state_shardings
from jaxvla.models import pi_config
from jaxvla.models.pi import PiPolicy
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.sharding import batch_sharding, make_mesh, params_shardings, path_name, replicated
from jaxvla.types import EnvSpec

_RULES = (
    (r"(^|/)mlp/kernel$", ("embed", "mlp")),
    (r"(^|/)square$", ("mlp", "heads")),
    (r"(^|/)kv$", ("kv", "embed")),
)


@functools.cache
def _mesh(role: str, layout: str = "colocated=8:data2,fsdp2,tensor2") -> Mesh:
    return make_mesh(parse_layout(layout).roles[role])


def _place(tree: Any, role: str = "learning", layout: str = "colocated=8:data2,fsdp2,tensor2"):
    """PartitionSpec of every leaf, without trailing Nones."""
    placed = params_shardings(tree, _RULES, _mesh(role, layout), role)
    return jax.tree.map(lambda x: _trimmed(x.spec), placed)


def _trimmed(spec: PartitionSpec) -> tuple[Any, ...]:
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return tuple(axes)


def _struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_rules_give_mesh_axes_by_role():
    tree = {"mlp": {"kernel": _struct(8, 4)}, "kv": _struct(2, 8)}
    assert _place(tree) == {"mlp": {"kernel": ("fsdp", "tensor")}, "kv": (None, "fsdp")}
    # No fsdp in serving: every server holds whole rows.
    assert _place(tree, "serving") == {"mlp": {"kernel": (None, "tensor")}, "kv": ()}


def test_a_leaf_that_no_rule_names_is_replicated():
    tree = {"count": _struct(), "other": {"kernel": _struct(8, 8)}, "xmlp": {"kernel": _struct(8)}}
    placed = _place(tree)
    assert set(jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, tuple))) == {()}


def test_what_does_not_divide_is_replicated_with_one_log_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="jaxvla.sharding"):
        placed = _place({"mlp": {"kernel": _struct(8, 7)}})
    assert placed == {"mlp": {"kernel": ("fsdp",)}}
    lines = [x.getMessage() for x in caplog.records]
    assert lines == ["mlp/kernel: dim 1 of (8, 7) is not split 2 ways"]


def test_an_axis_of_size_one_splits_nothing(caplog: pytest.LogCaptureFixture):
    tree = {"mlp": {"kernel": _struct(7, 7)}}
    with caplog.at_level(logging.INFO, logger="jaxvla.sharding"):
        assert _place(tree, layout="colocated=8") == {"mlp": {"kernel": ()}}
    assert not caplog.records


def test_a_mesh_axis_splits_one_dimension_only():
    # Both logical axes mean the tensor axis; the first dimension that divides takes it.
    assert _place({"square": _struct(4, 4)}) == {"square": ("tensor",)}
    assert _place({"square": _struct(3, 4)}) == {"square": (None, "tensor")}


def test_moments_lie_like_their_parameters_and_counters_are_replicated():
    params = {"mlp": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform({"a": optax.adamw(1e-3)}, {"mlp": {"kernel": "a", "bias": "a"}}),
    )
    struct = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    placed = state_shardings(struct, _RULES, _mesh("learning"))
    by_path = {
        path_name(path): (_trimmed(x.spec), leaf.shape)
        for (path, x), leaf in zip(
            jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(struct), strict=True
        )
    }
    kernels = {path for path in by_path if path.endswith("mlp/kernel")}
    assert len(kernels) == 3  # the parameter and two moments
    assert any("/mu/" in path for path in kernels) and any("/nu/" in path for path in kernels)
    for path, (spec, _) in by_path.items():
        assert spec == (("fsdp", "tensor") if path in kernels else ()), path
    assert "num_steps" in by_path


def test_path_names_of_all_kinds_of_nodes():
    tree = {"a": [optax.EmptyState(), (jnp.zeros(1), optax.ScaleByScheduleState(jnp.zeros(2)))]}
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["a/1/0", "a/1/1/count"]


# ------------------------------------------------------------------------------ meshes


def test_meshes_take_their_devices_in_order():
    layout = parse_layout("simulation=2 serving=2:tensor2 learning=4:fsdp4")
    meshes = {role: make_mesh(where) for role, where in layout.roles.items()}
    devices = {role: [x.id for x in mesh.devices.flat] for role, mesh in meshes.items()}
    assert devices == {"simulation": [0, 1], "serving": [2, 3], "learning": [4, 5, 6, 7]}
    assert dict(meshes["learning"].shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    assert dict(meshes["serving"].shape) == {"data": 1, "tensor": 2}


def test_a_mesh_on_devices_that_are_not_there_is_refused():
    layout = parse_layout("simulation=4 serving=4 learning=4")
    with pytest.raises(ValueError, match="needs devices 0 to 11, there are 8"):
        make_mesh(layout.roles["learning"])
    with pytest.raises(ValueError, match="there are 2"):
        make_mesh(layout.roles["simulation"], jax.devices()[:2])


def test_batches_are_split_over_data_and_fsdp():
    mesh = _mesh("learning")
    batch = jax.device_put(np.zeros((3, 8, 2)), batch_sharding(mesh, axis=1))
    assert {x.data.shape for x in batch.addressable_shards} == {(3, 2, 2)}
    rows = jax.device_put(np.zeros((8, 2)), batch_sharding(_mesh("serving")))
    assert {x.data.shape for x in rows.addressable_shards} == {(2, 2)}
    whole = jax.device_put(np.zeros((3, 2)), replicated(mesh))
    assert {x.data.shape for x in whole.addressable_shards} == {(3, 2)}


# ----------------------------------------------------------------- the models that ship


@functools.cache
def _policy(preset: str) -> PiPolicy:
    spec = EnvSpec(
        cameras=("base", "wrist"),
        image_size=64 if preset == "tiny_config" else 224,
        state_dim=5,
        state_low=(-1.0,) * 5,
        state_high=(1.0,) * 5,
        action_dim=7,
        action_names=tuple("abcdefg"),
        tasks=("reach",),
        instructions=("reach the red block",),
        max_episode_steps=(50,),
        control_hz=20.0,
    )
    config = getattr(pi_config, preset)()
    config = config.resolve(spec, num_executed=4, tokenizer=ByteTokenizer())
    return PiPolicy(config, NormStats.from_bounds(spec.state_low, spec.state_high, 7))


@pytest.mark.parametrize("role", ["learning", "serving"])
@pytest.mark.parametrize("preset", ["tiny_config", "pi0_config", "pi05_config"])
def test_every_parameter_of_the_shipped_models_has_a_place(preset: str, role: str):
    policy, mesh = _policy(preset), _mesh(role)
    params = jax.eval_shape(policy.init, jax.random.key(0))  # allocates nothing
    placed = params_shardings(params, policy.rules(), mesh, role)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True
    ):
        name = path_name(path)
        matching = [axes for pattern, axes in policy.rules() if re.search(pattern, name)]
        assert len(matching) == 1 and len(matching[0]) == leaf.ndim, name
        used = [axis for axis in sharding.spec if axis is not None]
        assert len(used) == len(set(used)), name
        assert "data" not in used, name  # parameters are the same for all samples
        # Raises when a dimension does not divide.
        split = math.prod(leaf.shape) // math.prod(sharding.shard_shape(leaf.shape))
        assert split == math.prod(mesh.shape[axis] for axis in used), name


@pytest.mark.parametrize("preset", ["pi0_config", "pi05_config"])
def test_big_parameters_are_split_and_single_kv_heads_are_not(preset: str):
    policy, mesh = _policy(preset), _mesh("learning")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    placed = params_shardings(params, policy.rules(), mesh, "learning")
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    specs = {path_name(p): x.spec for p, x in jax.tree_util.tree_leaves_with_path(placed)}
    for name, leaf in leaves.items():
        if leaf.size >= 2**20:
            assert "fsdp" in specs[name], name
    assert specs["PaliGemma/llm/embedder/input_embedding"] == PartitionSpec("tensor", "fsdp")
    for name in ("kv_einsum", "kv_einsum_1"):
        spec = specs[f"PaliGemma/llm/layers/attn/{name}/w"]
        assert _trimmed(spec) == (None, None, None, "fsdp")
    # fsdp 2 x tensor 2: what remains on a device is close to a quarter of the whole.
    held = sum(
        math.prod(x.shard_shape(leaf.shape))
        for x, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True)
    )
    assert held / sum(x.size for x in leaves.values()) < 0.27
