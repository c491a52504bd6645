"""What `optimizer.trainable` trains of a pi model, and what it leaves alone to the bit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.data.normalization import NormStats
from jaxvla.learning.train_state import TrainState
from jaxvla.models.pi import PiPolicy
from jaxvla.models.pi_config import tiny_config
from jaxvla.models.prompts import tokenize_prompt
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.sharding import path_name
from jaxvla.types import EnvSpec, Observation, PolicySample, SupervisedBatch, Trajectory

T, B, STATE_DIM, ACTION_DIM, HORIZON = 2, 4, 5, 3, 2

LORA = "lora_|^(value|noise)_head/"
EXPERT = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^(value|noise)_head/"
SETTINGS: dict[str, Any] = {"num_minibatches": 1, "standardize": True, "weight_decay": 0.1}

KEY_BIAS = "MultiHeadDotProductAttention_0/key/bias"
"""May move or not: it is 0, which does not decay, and its gradient is rounding, as softmax is blind
to a shift of all keys."""


@pytest.fixture(scope="module")
def policy() -> PiPolicy:
    """A very small model with adapters in both experts and both heads of RL."""
    spec = EnvSpec(
        cameras=("front",),
        image_size=16,
        state_dim=STATE_DIM,
        state_low=(-1.0,) * STATE_DIM,
        state_high=(1.0,) * STATE_DIM,
        action_dim=ACTION_DIM,
        action_names=("x", "y", "z"),
        tasks=("reach",),
        instructions=("reach",),
        max_episode_steps=(20,),
        control_hz=20.0,
    )
    config = dataclasses.replace(
        tiny_config(),
        vision_width=16,
        vision_depth=1,
        vision_mlp_width=16,
        patch_size=8,
        vlm_width=16,
        vlm_mlp_width=32,
        expert_width=16,
        expert_mlp_width=16,
        depth=1,
        head_dim=8,
        value_widths=(8,),
        action_horizon=HORIZON,
        grounding_coef=0.0,
        num_denoise_steps=2,
        exploration="noise",
        vlm_lora_rank=2,
        expert_lora_rank=2,
    ).resolve(spec, num_executed=HORIZON, tokenizer=ByteTokenizer())
    return PiPolicy(config, NormStats.from_bounds(spec.state_low, spec.state_high, ACTION_DIM))


def random_observation(policy: PiPolicy, rows: int) -> Observation:
    rng = np.random.default_rng(0)
    tokens, mask = tokenize_prompt(ByteTokenizer(), "reach", policy.config.max_tokens)
    fields: dict[str, Any] = {
        "images": rng.integers(0, 256, (rows, 1, 16, 16, 3), dtype=np.uint8),
        "image_mask": np.ones((rows, 1), bool),
        "state": rng.uniform(-1.0, 1.0, (rows, STATE_DIM)).astype(np.float32),
        "tokens": np.tile(tokens, (rows, 1)),
        "token_mask": np.tile(mask, (rows, 1)),
    }
    return Observation(**fields)


@pytest.fixture(scope="module")
def trajectory(training, policy: PiPolicy) -> Trajectory:
    """Chunks of the fresh policy with random rewards."""
    params = training(policy, **SETTINGS).fresh_state().params
    observation, keys = (
        random_observation(policy, T * B),
        jax.random.split(jax.random.key(1), T * B),
    )
    act = jax.jit(functools.partial(policy.act, explore=True))
    sample: PolicySample = jax.device_get(act(params, observation, keys))

    def in_time(tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(x).reshape(T, B, *x.shape[1:]), tree)

    zeros = np.zeros((T, B), np.float32)
    return Trajectory(
        observation=in_time(observation),
        trace=in_time(sample.trace),
        behavior_log_prob=in_time(sample.log_prob),
        value=in_time(sample.value),
        reward=np.random.default_rng(1).normal(size=(T, B)).astype(np.float32),
        terminated=zeros > 0,
        truncated=zeros > 0,
        bootstrap_value=zeros,
        valid=zeros == 0,
        policy_version=zeros.astype(np.int32),
    )


def leaves_of(state: TrainState) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    return {path_name(path): leaf for path, leaf in leaves}


def step(made: Any, trajectory: Trajectory, num_steps: int) -> tuple[TrainState, list[Any]]:
    """Optimizer steps on one batch."""
    functions, state = made.functions, made.fresh_state()
    batch = functions.prepare(state.params, [functions.place(trajectory)], jnp.int32(0))
    order, metrics = functions.draw(jax.random.key(0), batch.weight.shape), []
    for _ in range(num_steps):
        state, numbers = functions.step(state, batch, order, jnp.int32(0))
        metrics.append(jax.device_get(numbers))
    return state, metrics


def is_of_expert(path: str) -> bool:
    is_in_llm = path.startswith("PaliGemma/llm/")
    return (is_in_llm and any(part.endswith("_1") for part in path.split("/"))) or path.startswith(
        ("action_", "time_", "state_", "value_head/", "noise_head/")
    )


def is_of_adapters(path: str) -> bool:
    is_head = path.startswith(("value_head/", "noise_head/"))
    return is_head or path.endswith(("lora_a", "lora_b"))


PARTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "expert": (EXPERT, is_of_expert),
    "lora": (LORA, is_of_adapters),
    "full": (".*", lambda path: True),
}


@pytest.mark.parametrize(
    "part", [pytest.param(x, marks=() if x == "lora" else pytest.mark.slow) for x in PARTS]
)
def test_exactly_what_is_trainable_moves(
    training, policy: PiPolicy, trajectory: Trajectory, part: str
) -> None:
    """With weight decay, which would move any leaf that is not 0."""
    trainable, is_part = PARTS[part]
    made = training(policy, trainable=trainable, **SETTINGS)
    before = leaves_of(made.fresh_state())
    # Two steps: an adapter's A has no gradient until its B has left 0.
    state, metrics = step(made, trajectory, 2)
    assert metrics[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    after = leaves_of(state)
    moved = {path for path in before if (before[path] != after[path]).any()}
    expected = {path for path in before if is_part(path)}
    assert expected and (part == "full") == (expected == set(before))
    assert {path for path in moved ^ expected if not path.endswith(KEY_BIAS)} == set()
    assert part == "full" or moved <= expected


def test_adapters_alone_learn_by_reinforcement(
    training, policy: PiPolicy, trajectory: Trajectory
) -> None:
    made = training(policy, trainable=LORA, **SETTINGS)
    _, metrics = step(made, trajectory, 8)
    losses = [float(x["loss/policy"]) for x in metrics]
    assert losses[-1] < losses[0] - 0.05
    assert metrics[-1]["ratio/max"] > 1.05


@pytest.mark.slow
def test_adapters_alone_learn_to_imitate(training, policy: PiPolicy) -> None:
    made = training(policy, trainable=LORA, **SETTINGS)
    state, losses = made.fresh_state(), []
    observation = random_observation(policy, 8)
    actions: Any = np.ones((8, HORIZON, ACTION_DIM), np.float32)
    batch = SupervisedBatch(observation=observation, actions=actions, target_mask=None)
    placed = jax.device_put(batch, made.functions.rows)
    for _ in range(60):
        state, metrics = made.functions.supervised_step(state, placed, jax.random.key(0))
        losses.append(float(metrics["loss/actions"]))
    assert losses[-1] < 0.8 * losses[0]
