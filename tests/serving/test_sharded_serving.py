"""What devices send each other while a sharded policy serves: sums of activations, no weights."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxvla.data.normalization import NormStats
from jaxvla.layout import parse_layout
from jaxvla.models.pi import PiPolicy
from jaxvla.models.pi_config import tiny_config
from jaxvla.serving.sampling import Sampler
from jaxvla.sharding import make_mesh, params_shardings

_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def _policy(**settings: Any) -> PiPolicy:
    config = dataclasses.replace(
        tiny_config(),
        image_size=32,
        num_cameras=2,
        max_tokens=16,
        depth=2,
        vision_depth=1,
        state_dim=8,
        action_dim=8,
        log_prob_steps=4,
        log_prob_dims=7,
        **settings,
    )
    return PiPolicy(config, NormStats.from_bounds(-np.ones(8), np.ones(8), 7))


@pytest.mark.parametrize(
    "settings",
    [
        {"time_conditioning": "adarms", "state_input": "none"},
        {"time_conditioning": "concat", "state_input": "token"},
    ],
    ids=["pi05", "pi0"],
)
def test_only_activations_are_summed_and_nothing_is_gathered(settings: dict[str, str]) -> None:
    policy, bucket, tensor = _policy(**settings), 8, 4
    mesh = make_mesh(parse_layout(f"colocated=8:data2,tensor{tensor}").roles["serving"])
    params = jax.eval_shape(policy.init, jax.random.key(0))
    placed = params_shardings(params, policy.rules(), mesh, "serving")
    sampler = Sampler(
        policy, mesh=mesh, params_shardings=placed, buckets=(bucket,), kinds=("explore",)
    )
    sampler.compile(params, policy.observation_spec(bucket))
    tokens = 2 * (32 // 16) ** 2 + 16  # of the longest sequence
    widest = max(policy.config.vision_width, policy.config.vlm_width)
    text = sampler._compiled["explore", bucket].as_text()
    found = re.findall(rf"= (\S+) ({_COLLECTIVES})(?:-start)?\(", text)
    assert found  # the tensor axis is in use
    for shape, name in found:
        assert name == "all-reduce", (name, shape)
        (sizes,) = re.findall(r"\[([\d,]+)\]", shape)
        size = math.prod(int(x) for x in sizes.split(","))
        assert size <= bucket // 2 * tokens * widest, shape
