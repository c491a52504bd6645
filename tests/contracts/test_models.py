"""What every registered model promises to policy server and learner."""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.config import ModelConfig
from jaxvla.data.normalization import NormStats
from jaxvla.models import MODELS
from jaxvla.models.base import Policy
from jaxvla.models.pi_config import tiny_config
from jaxvla.models.prompts import tokenize_prompt
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.types import EnvSpec, Observation, Params, PolicySample, SupervisedBatch

B = 4
NUM_EXECUTED = 2

SMALL: dict[str, Callable[[], ModelConfig]] = {
    "pi": lambda: dataclasses.replace(
        tiny_config(), depth=1, vision_depth=1, action_horizon=3, value_widths=(8,)
    ),
}
"""Model -> unresolved config that compiles in seconds. Every registered model has an entry."""

LEARNED_NOISE = {"exploration": "noise", "value_input": "suffix"}

EXPLORATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "pi-cps": ("pi", {"exploration": "cps", "ignore_last_step": True}),
    "pi-sde_chain": ("pi", {"exploration": "sde_chain"}),
    "pi-noise": ("pi", LEARNED_NOISE),
    "pi-reinflow": ("pi", LEARNED_NOISE | {"exploration": "reinflow"}),
    "pi-fpo": ("pi", {"exploration": "fpo", "fpo_draws": 3}),
}
"""(model, changes of its small config) that sample otherwise than by default."""

COVERED = ("pi-cps", "pi-sde_chain", "pi-reinflow")
"""These share their code with others, and are left to CI."""

SPEC = EnvSpec(
    cameras=("front", "wrist"),
    image_size=32,
    state_dim=5,
    state_low=(-1.0,) * 5,
    state_high=(2.0,) * 5,
    action_dim=3,
    action_names=("x", "y", "grip"),
    tasks=("reach",),
    instructions=("reach the red cube", "go to the ball"),
    max_episode_steps=(50,),
    control_hz=20.0,
)


def test_every_model_has_a_small_config() -> None:
    assert set(SMALL) == set(MODELS)


# Compiles several times faster; computes the same but for the order of sums.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclass(frozen=True, kw_only=True)
class Model:
    """A policy with weights, inputs and compiled functions."""

    policy: Policy
    horizon: int
    params: Params
    observation: Observation
    explore: Callable[[Params, Observation, jax.Array], PolicySample]
    evaluate: Callable[[Params, Observation, Any], tuple[jax.Array, jax.Array, jax.Array]]

    def sample(self, seed: int = 1) -> PolicySample:
        """Explored chunks for the observation."""
        return self.explore(self.params, self.observation, keys_of(seed))


def keys_of(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), B)


def make_observation(max_tokens: int) -> Observation:
    """Random inputs; the second row misses a camera."""
    rng = np.random.default_rng(0)
    prompts = [SPEC.instructions[row % 2] for row in range(B)]
    encoded = [tokenize_prompt(ByteTokenizer(), text, max_tokens) for text in prompts]
    image_mask = np.ones((B, 2), bool)
    image_mask[1, 1] = False
    return Observation(
        images=jnp.asarray(rng.integers(0, 256, (B, 2, 32, 32, 3), dtype=np.uint8)),
        image_mask=jnp.asarray(image_mask),
        state=jnp.asarray(rng.uniform(-1.0, 2.0, (B, 5)), jnp.float32),
        tokens=jnp.asarray(np.stack([ids for ids, _ in encoded])),
        token_mask=jnp.asarray(np.stack([mask for _, mask in encoded])),
    )


@functools.cache
def make_model(label: str) -> Model:
    """Of a name in MODELS or EXPLORATIONS."""
    name, changes = EXPLORATIONS.get(label, (label, {}))
    config = dataclasses.replace(SMALL[name](), **changes)
    assert config.name == name
    tokenizer = ByteTokenizer()
    config = config.resolve(SPEC, num_executed=NUM_EXECUTED, tokenizer=tokenizer)
    stats = NormStats.from_bounds(SPEC.state_low, SPEC.state_high, SPEC.action_dim)
    policy = MODELS.get(name)(config, stats)
    return Model(
        policy=policy,
        horizon=config.action_horizon,
        params=quick_jit(policy.init)(jax.random.key(0)),
        observation=make_observation(policy.observation_spec(1).tokens.shape[1]),
        explore=quick_jit(functools.partial(policy.act, explore=True)),
        evaluate=quick_jit(
            lambda params, observation, trace: policy.evaluate(
                params, policy.encode(params, observation), trace
            )
        ),
    )


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    """Every registered model, small."""
    return make_model(request.param)


_EXPLORERS = [
    pytest.param(name, marks=pytest.mark.slow if name in COVERED else ())
    for name in (*MODELS, *EXPLORATIONS)
]


@pytest.fixture(scope="module", params=_EXPLORERS)
def explorer(request: pytest.FixtureRequest) -> Model:
    """Every registered model, small, with every kind of exploration."""
    return make_model(request.param)


def rows(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(actual: Any, expected: Any, atol: float = 2e-5) -> None:
    compare = functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5)
    jax.tree.map(compare, actual, expected)


def test_parameters_are_float32(model: Model) -> None:
    shapes = jax.eval_shape(model.policy.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_parameters_are_a_function_of_the_key(model: Model) -> None:
    again, other = (quick_jit(model.policy.init)(jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, model.params)
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), other, model.params)
    assert any(jax.tree.leaves(differs))


def test_rules_cover_every_parameter_exactly_once(model: Model) -> None:
    shapes = jax.eval_shape(model.policy.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(str(key.key) for key in path)
        matches = [axes for pattern, axes in model.policy.rules() if re.search(pattern, name)]
        assert len(matches) == 1, f"{name}: {matches}"
        assert len(matches[0]) == leaf.ndim, name


def test_observation_spec_is_what_the_policy_reads(model: Model) -> None:
    spec = model.policy.observation_spec(B)
    assert jax.tree.structure(spec) == jax.tree.structure(model.observation)
    for ours, given in zip(jax.tree.leaves(spec), jax.tree.leaves(model.observation), strict=True):
        assert (ours.shape, ours.dtype) == (given.shape, given.dtype)
    params = jax.eval_shape(model.policy.init, jax.random.key(0))
    act = functools.partial(model.policy.act, explore=True)
    jax.eval_shape(act, params, spec, keys_of(0))


def test_samples_have_the_shapes_of_the_contract(explorer: Model) -> None:
    sample = explorer.sample()
    assert sample.actions.shape == (B, explorer.horizon, SPEC.action_dim)
    assert sample.log_prob.shape == sample.value.shape == (B,)
    for leaf in (sample.actions, sample.log_prob, sample.value):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(sample.trace))


def test_sampled_log_prob_is_the_evaluated_one(explorer: Model) -> None:
    sample = explorer.sample()
    log_prob, entropy, value = explorer.evaluate(
        explorer.params, explorer.observation, sample.trace
    )
    assert_close(log_prob, sample.log_prob, atol=1e-4)
    assert_close(value, sample.value)
    assert entropy.shape == (B,) and np.isfinite(entropy).all()
    assert np.abs(sample.log_prob).min() > 1e-3  # no constant


def test_encodings_have_rows_first_and_depend_on_the_encoder_alone(model: Model) -> None:
    encode = quick_jit(model.policy.encode)
    encoding = encode(model.params, model.observation)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(encoding))

    def move(is_encoder: bool) -> Params:
        def moved(path: Any, leaf: jax.Array) -> jax.Array:
            name = "/".join(str(key.key) for key in path)
            matches = re.search(model.policy.encoder, name) is not None
            return 1.1 * leaf if matches == is_encoder else leaf

        return jax.tree_util.tree_map_with_path(moved, model.params)

    same = encode(move(is_encoder=False), model.observation)
    jax.tree.map(np.testing.assert_array_equal, same, encoding)
    pairs = zip(
        jax.tree.leaves(encode(move(is_encoder=True), model.observation)),
        jax.tree.leaves(encoding),
        strict=True,
    )
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_log_prob_follows_the_weights(explorer: Model) -> None:
    sample = explorer.sample()
    moved = jax.tree.map(lambda leaf: 1.05 * leaf, explorer.params)
    log_prob, _, _ = explorer.evaluate(moved, explorer.observation, sample.trace)
    assert np.abs(np.asarray(log_prob) - np.asarray(sample.log_prob)).min() > 1e-3


def test_log_prob_has_a_gradient(explorer: Model) -> None:
    trace = explorer.sample().trace

    def total(params: Params) -> jax.Array:
        encoding = explorer.policy.encode(params, explorer.observation)
        return explorer.policy.evaluate(params, encoding, trace)[0].sum()

    leaves = jax.tree.leaves(quick_jit(jax.grad(total))(explorer.params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e-3


def test_rows_do_not_depend_on_batching(explorer: Model) -> None:
    sample, keys = explorer.sample(), keys_of(1)
    order = np.array([2, 0, 3, 1])
    permuted = explorer.explore(explorer.params, rows(explorer.observation, order), keys[order])
    assert_close(permuted, rows(sample, order))
    # A batch of two, padded to the compiled size by repetition.
    padding = np.array([1, 3, 1, 1])
    padded = explorer.explore(explorer.params, rows(explorer.observation, padding), keys[padding])
    assert_close(rows(padded, np.arange(2)), rows(sample, padding[:2]))


def test_one_row_alone_gives_the_same(explorer: Model) -> None:
    alone = explorer.explore(
        explorer.params, rows(explorer.observation, np.array([2])), keys_of(1)[2:3]
    )
    assert_close(alone, rows(explorer.sample(), np.array([2])))


def test_sampling_is_a_function_of_the_keys(explorer: Model) -> None:
    first, again, other = explorer.sample(), explorer.sample(), explorer.sample(seed=2)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert np.abs(np.asarray(other.actions) - np.asarray(first.actions)).max() > 0.01
    assert_close(other.value, first.value)  # the critic does not look at the noise


def test_without_exploration_log_prob_is_zero(explorer: Model) -> None:
    act = quick_jit(functools.partial(explorer.policy.act, explore=False))
    sample = act(explorer.params, explorer.observation, keys_of(1))
    np.testing.assert_array_equal(sample.log_prob, 0.0)
    assert sample.actions.shape == (B, explorer.horizon, SPEC.action_dim)
    assert_close(sample.value, explorer.sample().value)
    again = act(explorer.params, explorer.observation, keys_of(1))
    np.testing.assert_array_equal(again.actions, sample.actions)


def test_values_alone_are_the_same(explorer: Model) -> None:
    values = quick_jit(explorer.policy.values)(explorer.params, explorer.observation)
    assert_close(values, explorer.sample().value)


def test_imitation_loss_is_one_number_per_row(model: Model) -> None:
    shape = (B, model.horizon, SPEC.action_dim)
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32)
    batch = SupervisedBatch(observation=model.observation, actions=actions, target_mask=None)
    terms = quick_jit(model.policy.supervised_loss)(model.params, batch, jax.random.key(0))
    assert set(terms) == {"actions"}
    loss = np.asarray(terms["actions"])
    assert loss.shape == (B,) and loss.dtype == np.float32
    assert np.isfinite(loss).all() and (loss > 0.0).all()
    farther = batch.replace(actions=actions + 5.0)
    terms = quick_jit(model.policy.supervised_loss)(model.params, farther, jax.random.key(0))
    assert (np.asarray(terms["actions"]) > loss).all()
