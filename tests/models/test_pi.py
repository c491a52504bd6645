"""The policy's contract: ratio 1, independent rows, masks, units, gradients, declarations."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.config import ConfigError
from jaxvla.data.normalization import FieldStats, NormStats
from jaxvla.models.base import Prefix
from jaxvla.models.pi import PiConfig, PiPolicy
from jaxvla.models.pi_config import pi0_config, pi05_config, tiny_config
from jaxvla.models.pi_network import embed_suffix, run_suffix
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.types import SupervisedBatch

LOGICAL_AXES = {"layers", "vocab", "embed", "heads", "kv", "head_dim", "mlp", "patch", None}


def variant(policy: PiPolicy, **changes) -> PiPolicy:
    return PiPolicy(dataclasses.replace(policy.config, **changes), policy._normalizer)


def keys_of(batch: int, seed: int = 1) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


@pytest.fixture(scope="module")
def act(policy, quick_jit):
    return quick_jit(functools.partial(policy.act, explore=True))


@pytest.fixture(scope="module")
def evaluate(policy, quick_jit):
    return quick_jit(evaluation(policy))


@pytest.fixture(scope="module")
def sample(act, params, observation):
    return act(params, observation, keys_of(5))


def assert_close(actual, expected, atol: float = 2e-5) -> None:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5), actual, expected
    )


def evaluation(policy):
    """log_prob, entropy and value from observations."""
    return lambda params, observation, trace: policy.evaluate(
        params, policy.encode(params, observation), trace
    )


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_sample_shapes_and_dtypes(sample) -> None:
    assert sample.actions.shape == (5, 6, 3) and sample.actions.dtype == jnp.float32
    assert sample.trace.states.shape == (5, 2, 6, 3) and sample.trace.states.dtype == jnp.float32
    for array in (sample.log_prob, sample.value):
        assert array.shape == (5,) and array.dtype == jnp.float32
        assert np.isfinite(array).all()
    assert sample.trace.step.shape == (5,) and sample.trace.step.dtype == jnp.int32


@pytest.mark.parametrize(("exploration", "dtype"), [("sde", "float32"), ("cps", "bfloat16")])
def test_sampled_log_prob_equals_evaluated(
    policy, params, observation, quick_jit, exploration: str, dtype: str
) -> None:
    policy = variant(policy, dtype=dtype, exploration=exploration, ignore_last_step=True)
    keys = keys_of(5)
    sample = quick_jit(functools.partial(policy.act, explore=True))(params, observation, keys)
    log_prob, entropy, value = quick_jit(evaluation(policy))(params, observation, sample.trace)
    assert set(np.asarray(sample.trace.step)) <= {0, 1, 2}
    assert np.abs(sample.log_prob).min() > 0.1  # not all zero
    assert_close(log_prob, sample.log_prob, atol=1e-4)
    assert_close(value, sample.value)
    np.testing.assert_array_equal(entropy, 0.0)


def test_log_prob_changes_with_the_weights(params, observation, sample, evaluate) -> None:
    moved = jax.tree.map(lambda leaf: leaf * 1.05, params)
    log_prob, _, _ = evaluate(moved, observation, sample.trace)
    assert np.abs(np.asarray(log_prob) - sample.log_prob).min() > 1e-3


def test_rows_are_independent(params, observation, act, sample) -> None:
    order = np.array([3, 0, 4, 2, 1])
    permuted = act(params, rows(observation, order), keys_of(5)[order])
    assert_close(permuted, rows(sample, order))
    # Padding a batch of two to five by repetition changes nothing either.
    padding = np.array([1, 2, 1, 1, 1])
    padded = act(params, rows(observation, padding), keys_of(5)[padding])
    assert_close(rows(padded, np.arange(2)), rows(sample, np.arange(1, 3)))


def test_keys_make_the_noise(params, observation, act, sample) -> None:
    other = act(params, observation, keys_of(5, seed=2))
    assert np.abs(np.asarray(other.actions) - sample.actions).max() > 0.1
    assert_close(other.value, sample.value)


def test_without_exploration_the_path_is_the_ode(policy, params, observation, quick_jit) -> None:
    act = quick_jit(functools.partial(policy.act, explore=False))
    result = act(params, observation, keys_of(5))
    np.testing.assert_array_equal(result.log_prob, 0.0)

    def last_transition(params, observation, trace):
        prefix, state = policy.prefix(params, observation), policy._model_state(observation)
        time = 1.0 - trace.step / policy.config.num_denoise_steps
        velocity = policy.velocity(params, prefix, state, trace.states[:, 0], time)
        return trace.states[:, 0] - velocity / policy.config.num_denoise_steps

    expected = quick_jit(last_transition)(params, observation, result.trace)
    assert_close(result.trace.states[:, 1], expected)


def test_masked_inputs_do_not_matter(params, observation, act, sample) -> None:
    hidden = observation.replace(
        images=observation.images.at[2, 1].set(255),
        tokens=jnp.where(observation.token_mask, observation.tokens, 77),
    )
    assert_close(act(params, hidden, keys_of(5)), sample)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("images", lambda x: x[:, ::-1]),  # camera order
        ("state", lambda x: x + 0.5),
        ("tokens", lambda x: x.at[:, 3].set(90)),
        ("image_mask", lambda x: x.at[:, 0].set(False)),
    ],
)
def test_every_input_matters(params, observation, act, sample, field: str, change) -> None:
    changed = observation.replace(**{field: change(getattr(observation, field))})
    result = act(params, changed, keys_of(5))
    assert np.abs(np.asarray(result.actions) - sample.actions).max(axis=(1, 2)).min() > 1e-4


def test_value_path_alone(policy, params, observation, sample, quick_jit) -> None:
    assert_close(quick_jit(policy.values)(params, observation), sample.value)


def test_observation_spec_is_what_the_policy_reads(policy, observation) -> None:
    spec = policy.observation_spec(5)
    assert jax.tree.structure(spec) == jax.tree.structure(observation)
    for ours, theirs in zip(jax.tree.leaves(spec), jax.tree.leaves(observation), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_units_are_the_envs(policy, params, observation, sample, quick_jit) -> None:
    # States twice as large with statistics twice as wide, and actions four times as wide.
    actions = FieldStats.from_bounds([-4.0] * 3, [4.0] * 3)
    stats = NormStats(state=FieldStats.from_bounds([-2.0] * 5, [4.0] * 5), actions=actions)
    act = quick_jit(functools.partial(PiPolicy(policy.config, stats).act, explore=True))
    bigger = observation.replace(state=2.0 * observation.state)
    result = act(params, bigger, keys_of(5))
    assert_close(result, sample.replace(actions=4.0 * sample.actions), atol=5e-5)


def test_delta_actions_are_relative_to_the_state(
    policy, params, observation, sample, quick_jit
) -> None:
    relative = variant(policy, delta_dims=2)
    acted = quick_jit(functools.partial(relative.act, explore=True))(
        params, observation, keys_of(5)
    )
    shift = np.zeros((5, 1, policy._normalizer.action_dim), np.float32)
    shift[:, 0, :2] = observation.state[:, :2]
    assert_close(acted.actions, sample.actions + shift)
    assert_close(acted.log_prob, sample.log_prob)
    # What it would have to predict is what a policy of absolute actions has to, less the state.
    absolute = SupervisedBatch(observation=observation, actions=sample.actions, target_mask=None)
    moved = dataclasses.replace(absolute, actions=sample.actions + shift)
    loss = quick_jit(policy.supervised_loss)(params, absolute, jax.random.key(3))
    loss_of_moved = quick_jit(relative.supervised_loss)(params, moved, jax.random.key(3))
    assert_close(loss_of_moved["actions"], loss["actions"], atol=1e-4)


def test_padded_dimensions_stay_inside(spec, observation, quick_jit) -> None:
    config = dataclasses.replace(tiny_config(), state_dim=8, action_dim=7, action_horizon=6)
    policy = make_policy(config, spec)
    params = quick_jit(policy.init)(jax.random.key(0))
    sample = quick_jit(functools.partial(policy.act, explore=True))(params, observation, keys_of(5))
    assert sample.actions.shape == (5, 6, 3) and sample.trace.states.shape == (5, 2, 6, 7)
    # Only the 4 executed steps of the 3 env dimensions are scored.
    states = sample.trace.states.at[:, 1, 4:].add(9.0).at[:, 1, :, 3:].add(9.0)
    unscored = sample.trace.replace(states=states)
    log_prob, _, _ = quick_jit(evaluation(policy))(params, observation, unscored)
    assert_close(log_prob, sample.log_prob, atol=1e-4)


def make_policy(config: PiConfig, spec) -> PiPolicy:
    config = config.resolve(spec, num_executed=4, tokenizer=ByteTokenizer())
    return PiPolicy(config, NormStats.from_bounds(spec.state_low, spec.state_high, 3))


def gradient_norms(policy, params, observation, trace, quick_jit) -> dict[str, float]:
    """Norm per leaf of the gradient of imitation loss + log-prob + value."""

    def total(params):
        log_prob, _, value = evaluation(policy)(params, observation, trace)
        mask = jnp.zeros(observation.images.shape[:-1], bool).at[..., :4, :7].set(True)
        batch = SupervisedBatch(
            observation=observation, actions=jnp.ones((5, 6, 3)), target_mask=mask
        )
        terms = policy.supervised_loss(params, batch, jax.random.key(0))
        return sum(x.sum() for x in terms.values()) + log_prob.sum() + value.sum()

    gradient = quick_jit(jax.grad(total))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return {"/".join(k.key for k in path): float(jnp.linalg.norm(leaf)) for path, leaf in leaves}


def test_a_frozen_policy_is_a_function_of_observation_and_noise(
    policy, params, observation, quick_jit
) -> None:
    """What a method that chooses the noise relies on."""

    @quick_jit
    def chunk(keys, noise):
        prefix, state = policy.prefix(params, observation), policy._model_state(observation)
        return policy.sample(params, prefix, state, keys, False, noise=noise)[0]

    noise = jax.random.normal(jax.random.key(3), (5, 6, 3))
    first, again = chunk(keys_of(5), noise), chunk(keys_of(5, seed=2), noise)
    np.testing.assert_array_equal(first, again)
    other = chunk(keys_of(5), noise.at[1].add(0.5))
    differs = np.abs(np.asarray(other) - first).max((1, 2))
    assert differs[1] > 0.1 and not differs[[0, 2, 3, 4]].any()


@pytest.fixture(scope="module")
def noisy(spec):
    """Learned noise, and a critic on the suffix."""
    changes = {"exploration": "noise", "value_input": "suffix", "grounding_coef": 0.0, "depth": 1}
    return make_policy(
        dataclasses.replace(tiny_config(), action_horizon=6, vision_depth=1, **changes), spec
    )


@pytest.mark.slow
def test_learned_noise_and_suffix_critic_learn_from_a_fresh_start(
    noisy, observation, quick_jit
) -> None:
    params = quick_jit(noisy.init)(jax.random.key(0))
    act = quick_jit(functools.partial(noisy.act, explore=True))
    sample = act(params, observation, keys_of(5))
    assert sample.trace.states.shape == (5, 5, 6, 3)

    def gradients(params):
        def total(params):
            log_prob, entropy, value = evaluation(noisy)(params, observation, sample.trace)
            return log_prob.sum(), entropy.sum(), value.sum()

        outputs, pull_back = jax.vjp(total, params)
        chosen = [[jnp.float32(i == index) for i in range(3)] for index in range(3)]
        return outputs, [pull_back(tuple(one))[0] for one in chosen]

    (_, _, value), (of_log_prob, of_entropy, of_value) = quick_jit(gradients)(params)
    assert_close(value, sample.value.sum())

    def is_moved(gradient, *path):
        for name in path:
            gradient = gradient[name]
        return any(float(jnp.abs(x).max()) > 1e-7 for x in jax.tree.leaves(gradient))

    expert = ("PaliGemma", "llm", "layers", "mlp_1")
    for gradient, heads in (
        (of_log_prob, {"noise_head": True, "value_head": False, "action_out_proj": True}),
        (of_entropy, {"noise_head": True, "value_head": False, "action_out_proj": False}),
        (of_value, {"noise_head": False, "value_head": True, "action_out_proj": False}),
    ):
        assert {name: is_moved(gradient, name) for name in heads} == heads
        assert is_moved(gradient, *expert)
    # Nothing but the prefix's keys and values reaches the suffix.
    assert not is_moved(of_value, "PaliGemma", "llm", "final_norm")
    assert is_moved(of_value, "PaliGemma", "img")


def test_the_suffix_critic_reads_the_scored_steps_at_the_mean_of_the_noise(
    noisy, observation, quick_jit
) -> None:
    params = quick_jit(noisy.init)(jax.random.key(0))
    assert params["value_head"]["Dense_0"]["kernel"].shape[0] == noisy.config.expert_width

    @quick_jit
    def expected(params, observation):
        prefix, state = noisy.prefix(params, observation), noisy._model_state(observation)
        suffix = embed_suffix(params, noisy.config, state, jnp.zeros((5, 6, 3)), jnp.ones(5))
        features = run_suffix(params, prefix, suffix)
        x = features[:, 1:5].mean(axis=1)  # token 0 is the state, 4 of 6 steps are executed
        for index in range(2):
            layer = params["value_head"][f"Dense_{index}"]
            x = jnp.maximum(x @ layer["kernel"] + layer["bias"], 0.0)
        return (x @ params["value_head"]["out"]["kernel"])[:, 0]

    values = quick_jit(noisy.values)(params, observation)
    assert_close(values, expected(params, observation))
    detached = variant(noisy, detach_value=True)
    gradient = quick_jit(jax.grad(lambda p: detached.values(p, observation).sum()))(params)
    moved = {name for name, x in gradient.items() if any(map(np.any, jax.tree.leaves(x)))}
    assert moved == {"value_head"}


def test_every_leaf_learns_from_a_fresh_start(policy, params, observation, sample, quick_jit):
    norms = gradient_norms(policy, params, observation, sample.trace, quick_jit)
    dead = {path for path, norm in norms.items() if not norm > 1e-6}
    # Softmax is blind to a shift of all keys: this bias never matters.
    assert dead <= {
        "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
    }


@pytest.mark.parametrize("is_detached", [False, True])
def test_detached_value_has_no_gradient_to_the_prefix(
    policy, params, quick_jit, is_detached: bool
) -> None:
    cache, mask = jnp.zeros((3, 2, 4, 1, 16)), jnp.ones((2, 4), bool)
    prefix = Prefix(keys=cache, values=cache, mask=mask, features=jnp.ones((2, 4, 96)))
    policy, state = variant(policy, detach_value=is_detached), jnp.ones((2, 5))

    def total(head, features) -> jax.Array:
        return policy.value({"value_head": head}, prefix.replace(features=features), state).sum()

    gradient = quick_jit(jax.grad(total, argnums=(0, 1)))
    to_head, to_features = gradient(params["value_head"], prefix.features)
    assert float(jnp.abs(to_head["out"]["kernel"]).max()) > 0.0
    assert (float(jnp.abs(to_features).max()) == 0.0) == is_detached


def test_value_is_a_masked_mean(policy, params) -> None:
    features = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 96)), jnp.float32)
    cache, mask = jnp.zeros((3, 1, 4, 1, 16)), jnp.array([[True, False, True, False]])
    prefix = Prefix(keys=cache, values=cache, mask=mask, features=features)
    mean = jnp.broadcast_to((features[:, :1] + features[:, 2:3]) / 2.0, features.shape)
    state = jnp.ones((1, 5))
    value = policy.value(params, prefix, state)
    assert_close(value, policy.value(params, prefix.replace(features=mean), state))
    masked = prefix.replace(features=features.at[0, 1].set(9.0))
    assert_close(value, policy.value(params, masked, state))


def test_value_reads_the_state_only_where_the_prefix_lacks_it(spec) -> None:
    for state_input, does_read in (("token", True), ("none", False)):
        policy = make_policy(dataclasses.replace(tiny_config(), state_input=state_input), spec)
        params, cache = policy.init(jax.random.key(0)), jnp.zeros((3, 1, 4, 1, 16))
        prefix = Prefix(
            keys=cache, values=cache, mask=jnp.ones((1, 4), bool), features=jnp.ones((1, 4, 96))
        )
        low, high = (policy.value(params, prefix, x * jnp.ones((1, 5))) for x in (-1.0, 1.0))
        assert (float(jnp.abs(low - high).max()) > 0.0) == does_read


def test_state_is_a_token_only_if_asked_for(spec) -> None:
    for state_input, num_tokens in (("token", 9), ("none", 8)):
        policy = make_policy(dataclasses.replace(tiny_config(), state_input=state_input), spec)
        params = jax.eval_shape(policy.init, jax.random.key(0))
        assert ("state_proj" in params) == (state_input == "token")
        embed = functools.partial(embed_suffix, config=policy.config)
        arrays = {"state": jnp.zeros((2, 5)), "x_t": jnp.zeros((2, 8, 3)), "time": jnp.zeros(2)}
        suffix = jax.eval_shape(lambda p, e=embed, a=arrays: e(p, **a), params)
        assert suffix.tokens.shape == (2, num_tokens, 64)


def test_rules_match_each_leaf_once_with_its_rank(policy) -> None:
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(key.key for key in path)
        for spelled in (name, f"mu/{name}"):  # also inside an optimizer state
            matches = [axes for pattern, axes in policy.rules() if re.search(pattern, spelled)]
            assert len(matches) == 1, f"{spelled}: {matches}"
            assert len(matches[0]) == leaf.ndim
            assert set(matches[0]) <= LOGICAL_AXES
            named = [axis for axis in matches[0] if axis is not None]
            assert len(set(named)) == len(named)  # an axis name is used once per leaf


@pytest.mark.parametrize(
    ("config", "num_millions", "num_leaves"),
    [(pi0_config(), 3238, 50), (pi05_config(), 3353, 51)],
    ids=["pi0", "pi05"],
)
def test_openpi_sizes(spec, config: PiConfig, num_millions: int, num_leaves: int) -> None:
    policy = make_policy(config, dataclasses.replace(spec, image_size=224))
    leaves = {k: leaf for k, leaf in policy.leaves().items() if not k.startswith("value_head")}
    assert len(leaves) == num_leaves
    assert round(sum(leaf.size for leaf in leaves.values()) / 1e6) == num_millions
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    assert shapes["PaliGemma/llm/layers/attn/kv_einsum/w"] == (18, 2, 1, 2048, 256)
    assert shapes["PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"] == (18, 8, 256, 1024)
    assert shapes["PaliGemma/img/pos_embedding"] == (1, 256, 1152)


def test_tiny_preset_is_tiny(policy, params) -> None:
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert num_params == sum(leaf.size for leaf in policy.leaves().values())
    assert 0.5e6 < num_params < 0.9e6


def test_statistics_must_fit_the_config(policy) -> None:
    for stats in (
        NormStats.from_bounds([-1.0] * 5, [1.0] * 5, action_dim=4),
        NormStats.from_bounds([-1.0] * 5, [1.0] * 5, action_dim=2),
        NormStats.from_bounds([-1.0] * 6, [1.0] * 6, action_dim=3),
    ):
        with pytest.raises(ConfigError, match="the statistics have"):
            PiPolicy(policy.config, stats)


def test_unresolved_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="resolve"):
        PiPolicy(tiny_config(), NormStats.from_bounds([-1.0], [1.0], 1))
