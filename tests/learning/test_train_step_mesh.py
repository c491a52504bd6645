"""A pi model trained on one device and on meshes: same numbers, declared placement."""

import dataclasses
import functools
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
from jaxvla.types import EnvSpec, Observation, PolicySample, Trajectory

T, B, STATE_DIM, ACTION_DIM, NUM_STEPS = 2, 8, 5, 3, 4

# Adam divides a gradient by its size, so that near-zero ones of other sign (rounding of sums
# in another order) would move parameters by a whole learning rate; a large eps takes that away.
SETTINGS = {"num_minibatches": 2, "standardize": True, "eps": 1e-2}
EXPERT_AND_CRITIC = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^(value|noise)_head/"


@pytest.fixture(scope="module")
def policy() -> PiPolicy:
    """The tiny preset, smaller still."""
    spec = EnvSpec(
        cameras=("front",),
        image_size=32,
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
        vision_width=32,
        vision_depth=1,
        vision_mlp_width=32,
        vlm_width=32,
        vlm_mlp_width=64,
        expert_width=32,
        expert_mlp_width=32,
        depth=1,
        value_widths=(16,),
        action_horizon=4,
        grounding_coef=0.0,
    ).resolve(spec, num_executed=4, tokenizer=ByteTokenizer())
    return PiPolicy(config, NormStats.from_bounds(spec.state_low, spec.state_high, ACTION_DIM))


def random_observation(policy: PiPolicy) -> Observation:
    rng = np.random.default_rng(0)
    tokens, mask = tokenize_prompt(ByteTokenizer(), "reach", policy.config.max_tokens)
    fields: dict[str, Any] = {
        "images": rng.integers(0, 256, (T * B, 1, 32, 32, 3), dtype=np.uint8),
        "image_mask": np.ones((T * B, 1), bool),
        "state": rng.uniform(-1.0, 1.0, (T * B, STATE_DIM)).astype(np.float32),
        "tokens": np.tile(tokens, (T * B, 1)),
        "token_mask": np.tile(mask, (T * B, 1)),
    }
    return Observation(**fields)


@pytest.fixture(scope="module")
def trajectory(training, policy: PiPolicy) -> Trajectory:
    """See `make_trajectory`."""
    return make_trajectory(training, policy)


def make_trajectory(training: Any, policy: PiPolicy) -> Trajectory:
    """Sampled actions with random rewards. Two samples are invalid and full of NaN."""
    observation = random_observation(policy)
    params = training(policy, **SETTINGS).fresh_state().params
    act = jax.jit(functools.partial(policy.act, explore=True))
    keys = jax.random.split(jax.random.key(1), T * B)
    sample: PolicySample = jax.device_get(act(params, observation, keys))
    valid = np.ones(T * B, bool)
    valid[[3, 12]] = False

    def spoil(x: Any) -> Any:
        x = np.array(x)
        if x.dtype == np.float32:
            x[~valid] = np.nan
        return x

    def time_major(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(T, B, *x.shape[1:]), tree)

    rng = np.random.default_rng(1)
    never: Any = np.zeros((T, B), bool)
    zeros: Any = np.zeros((T, B), np.float32)
    version: Any = np.zeros((T, B), np.int32)
    return Trajectory(
        observation=time_major(jax.tree.map(spoil, observation)),
        trace=time_major(jax.tree.map(spoil, sample.trace)),
        behavior_log_prob=time_major(spoil(sample.log_prob)),
        value=time_major(sample.value),
        reward=time_major(spoil(rng.normal(size=T * B).astype(np.float32))),
        terminated=never,
        truncated=never,
        bootstrap_value=zeros,
        valid=time_major(valid),
        policy_version=version,
    )


def train(training: Any, trajectory: Trajectory) -> tuple[TrainState, list[dict[str, float]]]:
    functions, state = training.functions, training.fresh_state()
    batch = functions.prepare(state.params, [functions.place(trajectory)], jnp.int32(0))
    metrics = []
    for step in range(NUM_STEPS):
        order = functions.draw(jax.random.key(step // 2), batch.weight.shape)
        state, numbers = functions.step(state, batch, order, jnp.int32(step % 2))
        metrics.append(jax.device_get(numbers))
    return state, metrics


@pytest.fixture(scope="module")
def on_one_device(training, policy: PiPolicy, trajectory: Trajectory) -> tuple[TrainState, Any]:
    state, metrics = train(training(policy, **SETTINGS), trajectory)
    return jax.device_get(state), metrics


@pytest.mark.parametrize("layout", ["colocated=1", "colocated=4:data2,fsdp2"])
def test_encoding_once_changes_nothing_while_the_encoder_is_frozen(
    training, policy: PiPolicy, trajectory: Trajectory, layout: str
) -> None:
    settings = SETTINGS | {"trainable": EXPERT_AND_CRITIC, "layout": layout}
    anew, once = (
        train(training(policy, **settings, encode_once=encode_once), trajectory)
        for encode_once in (False, True)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.0, atol=1e-5),
        jax.device_get(once[0].params),
        jax.device_get(anew[0].params),
    )
    losses = [[float(metrics["loss/total"]) for metrics in run] for _, run in (once, anew)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3  # something was learned meanwhile


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"exploration": "noise", "value_input": "suffix"}, {"exploration": "fpo", "fpo_draws": 3}],
    ids=["noise", "fpo"],
)
def test_other_kinds_of_exploration_train_on_a_mesh(
    training, policy: PiPolicy, changes: dict[str, Any]
) -> None:
    policy = PiPolicy(dataclasses.replace(policy.config, **changes), policy._normalizer)
    trajectory = make_trajectory(training, policy)
    (state, metrics), (expected, _) = (
        train(training(policy, layout=layout, **SETTINGS), trajectory)
        for layout in ("colocated=4:data2,fsdp2", "colocated=1")
    )
    assert metrics[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.0, atol=1e-5),
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )


def test_training_moves_the_parameters(training, policy: PiPolicy, on_one_device) -> None:
    state, metrics = on_one_device
    assert (int(state.num_steps), int(state.num_skipped)) == (NUM_STEPS, 0)
    assert metrics[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    fresh = training(policy, **SETTINGS).fresh_state()
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), state.params, jax.device_get(fresh).params
    )
    assert np.median(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("layout", ["colocated=4:data2,fsdp2", "colocated=4:fsdp2,tensor2"])
def test_a_mesh_gives_the_numbers_of_one_device(
    training, policy: PiPolicy, trajectory: Trajectory, on_one_device, layout: str
) -> None:
    made = training(policy, layout=layout, **SETTINGS)
    state, metrics = train(made, trajectory)
    expected, expected_metrics = on_one_device
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.0, atol=1e-5),
        jax.device_get(state.params),
        expected.params,
    )
    for actual, wanted in zip(metrics, expected_metrics, strict=True):
        for name, value in wanted.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    placed = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, made.shardings
    )
    assert all(jax.tree.leaves(placed))
    is_split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params)]
    assert sum(is_split) > 20
