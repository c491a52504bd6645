"""Reference numbers of openpi's own model code at toy size, and small policies."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from jaxvla.data.normalization import FieldStats, NormStats
from jaxvla.models.layers import nest
from jaxvla.models.pi import PiPolicy
from jaxvla.models.pi_config import PiConfig, tiny_config
from jaxvla.models.prompts import tokenize_prompt
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.types import EnvSpec, Observation, Params

ORACLE_DIR = pathlib.Path(__file__).parents[1] / "data" / "oracle"


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """One reference case: a policy of its sizes, its weights, inputs and outputs."""

    policy: PiPolicy
    params: Params
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def cameras(self) -> list[str]:
        """Camera names in token order."""
        return json.loads(bytes(self.arrays["meta"]))["image_keys"]

    def prefix_inputs(self) -> tuple[np.ndarray, ...]:
        """images float32 [B, C, h, w, 3] in [-1, 1], image_mask, tokens, token_mask."""
        images = np.stack([self[f"in/images/{name}"] for name in self.cameras], axis=1)
        image_mask = np.stack([self[f"in/image_masks/{name}"] for name in self.cameras], axis=1)
        tokens = self["in/tokenized_prompt"], self["in/tokenized_prompt_mask"]
        return images.astype(np.float32), image_mask, *tokens

    @staticmethod
    def flatten(tree: Params) -> dict[str, Any]:
        """'/'-joined path -> leaf."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(key.key for key in path): leaf for path, leaf in leaves}

    def variant(self, **changes: Any) -> PiPolicy:
        """The same policy with other settings."""
        config = dataclasses.replace(self.policy.config, **changes)
        return PiPolicy(config, identity_stats(config.state_dim, config.action_dim))


def identity_stats(state_dim: int, action_dim: int) -> NormStats:
    """Statistics that change nothing but the last bits."""
    fields = [FieldStats(mean=np.zeros(n), std=np.ones(n)) for n in (state_dim, action_dim)]
    return NormStats(state=fields[0], actions=fields[1], kind="zscore")


def oracle_config(meta: dict) -> PiConfig:
    """Config of a reference case from its recorded sizes."""
    vision, vlm, expert = meta["siglip"], meta["vlm"], meta["expert"]
    return PiConfig(
        action_horizon=meta["action_horizon"],
        vision_width=vision["width"],
        vision_depth=vision["depth"],
        vision_mlp_width=vision["mlp"],
        vision_heads=vision["heads"],
        patch_size=vision["patch"],
        vlm_width=vlm["width"],
        vlm_mlp_width=vlm["mlp_dim"],
        expert_width=expert["width"],
        expert_mlp_width=expert["mlp_dim"],
        depth=vlm["depth"],
        num_heads=vlm["num_heads"],
        num_kv_heads=vlm["num_kv_heads"],
        head_dim=vlm["head_dim"],
        vocab_size=meta["vocab"],
        value_widths=(16,),
        image_size=meta["image"],
        num_cameras=len(meta["image_keys"]),
        max_tokens=meta["max_token_len"],
        state_dim=meta["action_dim"],
        action_dim=meta["action_dim"],
        time_conditioning="adarms" if meta["pi05"] else "concat",
        state_input="none" if meta["pi05"] else "token",
        log_prob_steps=meta["action_horizon"],
        log_prob_dims=meta["action_dim"],
    )


@pytest.fixture(scope="session")
def quick_jit() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` without LLVM optimisation: compiles five times faster, computes the same."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session", params=["pi0_dummy", "pi05_dummy"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """A reference case."""
    with np.load(ORACLE_DIR / f"{request.param}.npz") as file:
        arrays = dict(file)
    config = oracle_config(json.loads(bytes(arrays["meta"])))
    policy = PiPolicy(config, identity_stats(config.state_dim, config.action_dim))
    flat = {
        name.removeprefix("param/"): array.astype(np.float32)
        for name, array in arrays.items()
        if name.startswith("param/")
    }
    return Oracle(policy=policy, params=nest(flat), arrays=arrays)


@pytest.fixture(scope="session")
def spec() -> EnvSpec:
    """A small env: two 32 px cameras, 5-dim state, 3-dim actions."""
    return EnvSpec(
        cameras=("front", "wrist"),
        image_size=32,
        state_dim=5,
        state_low=(-1.0,) * 5,
        state_high=(2.0,) * 5,
        action_dim=3,
        action_names=("x", "y", "grip"),
        tasks=("reach",),
        instructions=("reach the red cube", "reach the blue ball"),
        max_episode_steps=(50,),
        control_hz=20.0,
    )


@pytest.fixture(scope="session")
def policy(spec: EnvSpec) -> PiPolicy:
    """The tiny preset for `spec`, executing 4 of 6 steps."""
    config = dataclasses.replace(tiny_config(), action_horizon=6)
    config = config.resolve(spec, num_executed=4, tokenizer=ByteTokenizer())
    stats = NormStats.from_bounds(spec.state_low, spec.state_high, spec.action_dim)
    return PiPolicy(config, stats)


@pytest.fixture(scope="session")
def params(policy: PiPolicy, quick_jit: Any) -> Params:
    """Fresh weights of `policy`."""
    return quick_jit(policy.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def observation(policy: PiPolicy, spec: EnvSpec) -> Observation:
    """Five random observations of `spec`; row 2 misses its wrist camera."""
    rng = np.random.default_rng(0)
    batch, config = 5, policy.config
    prompts = [spec.instructions[row % 2] for row in range(batch)]
    encoded = [tokenize_prompt(ByteTokenizer(), text, config.max_tokens) for text in prompts]
    image_mask = np.ones((batch, 2), bool)
    image_mask[2, 1] = False
    return Observation(
        images=jax.numpy.asarray(rng.integers(0, 256, (batch, 2, 32, 32, 3), dtype=np.uint8)),
        image_mask=jax.numpy.asarray(image_mask),
        state=jax.numpy.asarray(rng.uniform(-1.0, 2.0, (batch, 5)).astype(np.float32)),
        tokens=jax.numpy.asarray(np.stack([ids for ids, _ in encoded])),
        token_mask=jax.numpy.asarray(np.stack([mask for _, mask in encoded])),
    )
