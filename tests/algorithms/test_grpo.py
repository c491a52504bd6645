"""GRPO: advantages, weights and loss against float64 loops over episodes, and what cancels out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scaled_policy import PARAMS, N, ScaledPolicy, loss_and_grad, make_batch, observation

from jaxvla.algorithms import ALGORITHMS, returns
from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig
from jaxvla.algorithms.grpo import GRPO, GRPOConfig
from jaxvla.algorithms.policy import Evaluation
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.config import ConfigError
from jaxvla.types import TrainingBatch, Trajectory

T, G, NUM_GROUPS = 5, 4, 3
B = G * NUM_GROUPS

jitted = jax.jit(returns.group_advantages, static_argnames=("group_size", "epsilon"))


def grpo(**config: Any) -> GRPO:
    return GRPO(GRPOConfig(**{"group_size": G, **config}))


# --- whole episodes ---------------------------------------------------------------------------


@st.composite
def episodes(draw: st.DrawFn) -> Trajectory:
    """Of NUM_GROUPS groups: lengths, rewards, ends, and some that failed; NaN where unknown."""
    lengths = draw(hnp.arrays(np.int32, B, elements=st.integers(1, T)))
    failed = draw(hnp.arrays(np.int8, B, elements=st.integers(0, 4))) == 0
    is_limit = draw(hnp.arrays(np.int8, B, elements=st.integers(0, 1))) == 1
    reward = draw(hnp.arrays(np.int8, (T, B), elements=st.integers(-2, 3))).astype(np.float32)
    return make_record(lengths, failed, is_limit, reward)


def make_record(lengths: Any, failed: Any, is_limit: Any, reward: Any) -> Any:
    """Column b has `lengths[b]` chunks, the last of which ends or loses its episode."""
    step = np.arange(T)[:, None]
    is_last = step == lengths - 1
    valid: Any = (step < lengths) & ~(is_last & failed)
    rng = np.random.default_rng(0)

    def numbers() -> Any:
        drawn = rng.normal(size=(T, B)).astype(np.float32)
        return np.where(valid, drawn, np.nan)

    version: Any = np.zeros((T, B), np.int32)
    return Trajectory(
        observation=observation(T, B),
        trace=numbers(),
        behavior_log_prob=numbers(),
        value=numbers(),
        reward=np.where(valid, reward, np.nan),
        terminated=is_last & ~failed & ~is_limit,
        # As the assembler has it: a failure cuts the trace like a time limit.
        truncated=is_last & (failed | is_limit),
        bootstrap_value=numbers(),
        valid=valid,
        policy_version=version,
    )


def plain_record() -> Any:
    """Three groups: mixed, all alike, mixed with a failure."""
    lengths = np.array([1, 2, 3, 5, 2, 2, 4, 5, 3, 5, 1, 2])
    failed = np.arange(B) == 9
    reward = np.zeros((T, B), np.float32)
    for column, total in enumerate([1, 0, 1, 0, 1, 1, 1, 1, 0, 9, 3, 0]):
        reward[lengths[column] - 1, column] = total
    reward[0, 3] = 2.0  # not only the last chunk counts
    return make_record(lengths, failed, np.zeros(B, bool), reward)


def prepare(algorithm: GRPO, record: Trajectory) -> Any:
    made = algorithm.prepare(record, version=jnp.int32(0), evaluation=None)
    return jax.tree.map(np.asarray, made)


def expected_targets(config: GRPOConfig, record: Any) -> tuple[np.ndarray, np.ndarray]:
    """(advantage, weight) [T, B] in float64: a loop over groups, episodes and chunks."""
    advantage, weight = np.zeros((T, B)), np.zeros((T, B))
    for first in range(0, B, config.group_size):
        known: dict[int, float] = {}
        for b in range(first, first + config.group_size):
            total, has_end = 0.0, False
            for t in range(T):
                if record.valid[t, b]:
                    total += float(record.reward[t, b])
                    has_end |= bool(record.terminated[t, b] or record.truncated[t, b])
            if has_end:
                known[b] = total
        if not known or (config.filter_uniform and len(set(known.values())) == 1):
            continue
        mean = sum(known.values()) / len(known)
        spread = (sum((x - mean) ** 2 for x in known.values()) / len(known)) ** 0.5
        for b, total in known.items():
            chunks = [t for t in range(T) if record.valid[t, b]]
            for t in chunks:
                scale = spread + config.epsilon if config.normalize_std else 1.0
                advantage[t, b] = (total - mean) / scale
                weight[t, b] = 1.0 / len(chunks) if config.aggregation == "episode" else 1.0
    return advantage, weight


CONFIGS = [
    {},
    {"normalize_std": False},
    {"filter_uniform": True},
    {"aggregation": "episode"},
    {"aggregation": "episode", "filter_uniform": True, "normalize_std": False},
    {"group_size": 2},
    {"group_size": B, "filter_uniform": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(max_examples=15, deadline=None)
@given(record=episodes())
def test_targets_are_those_of_a_loop_over_episodes(config: Any, record: Any) -> None:
    algorithm = grpo(**config)
    made = prepare(algorithm, record)
    advantage, weight = expected_targets(algorithm.config, record)
    np.testing.assert_allclose(made.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(made.advantage, advantage, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(made))


def test_hand_values() -> None:
    made = prepare(grpo(filter_uniform=True), plain_record())
    # Returns 1, 0, 1, 2: mean 1, standard deviation sqrt(1/2).
    np.testing.assert_allclose(made.advantage[0, :4], [0, -(2**0.5), 0, 2**0.5], rtol=1e-5)
    np.testing.assert_array_equal(made.weight[:, 4:8], 0.0)  # all succeeded
    # Returns 0, 3, 0 beside the one that failed: mean 1, standard deviation sqrt(2).
    expected = [-(2**-0.5), 0, 2**0.5, -(2**-0.5)]
    np.testing.assert_allclose(made.advantage[0, 8:], expected, rtol=1e-5)
    np.testing.assert_array_equal(made.weight.sum(axis=0), [1, 2, 3, 5, 0, 0, 0, 0, 3, 0, 1, 2])
    np.testing.assert_array_equal(made.return_[0, :4], [1, 0, 1, 2])


def test_uniform_groups_count_in_the_mean_unless_filtered() -> None:
    kept, left_out = (prepare(grpo(filter_uniform=x), plain_record()) for x in (False, True))
    np.testing.assert_array_equal(kept.weight[:, 4:8].sum(axis=0), [2, 2, 4, 5])
    np.testing.assert_array_equal(kept.advantage[:, 4:8], 0.0)
    assert left_out.weight[:, 4:8].sum() == 0.0
    np.testing.assert_array_equal(np.delete(kept.weight, np.s_[4:8], 1).sum(), 17.0)


def test_every_episode_weighs_the_same_or_every_chunk() -> None:
    record = plain_record()
    has_return = np.arange(B) != 9
    by_episode = prepare(grpo(aggregation="episode"), record).weight
    np.testing.assert_allclose(by_episode.sum(axis=0), has_return, rtol=1e-6)
    by_chunk = prepare(grpo(), record).weight
    np.testing.assert_array_equal(by_chunk, record.valid & has_return)


# --- what cancels out -------------------------------------------------------------------------

RETURNS = hnp.arrays(np.float32, B, elements=st.integers(-40, 40).map(lambda x: x / 8))


def compare(return_: Any, *, epsilon: float | None = 1e-6, known: Any = None) -> np.ndarray:
    known = np.ones(len(return_), bool) if known is None else known
    return np.asarray(jitted(return_, known, group_size=G, epsilon=epsilon)[0])


@settings(max_examples=30, deadline=None)
@given(RETURNS, st.permutations(range(NUM_GROUPS)), st.permutations(range(G)))
def test_advantages_move_with_their_episodes(
    return_: np.ndarray, groups: list[int], members: list[int]
) -> None:
    order = np.concatenate([G * group + np.asarray(members) for group in groups])
    np.testing.assert_allclose(compare(return_[order]), compare(return_)[order], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    RETURNS,
    st.sampled_from([None, 1e-6]),
    hnp.arrays(np.int32, NUM_GROUPS, elements=st.integers(-9999, 9999)),
)
def test_a_constant_per_group_changes_nothing(
    return_: np.ndarray, epsilon: float | None, constant: np.ndarray
) -> None:
    moved = return_ + np.repeat(constant, G).astype(np.float32)
    expected = compare(return_, epsilon=epsilon)
    # Eighths up to 10,000 are exact in float32.
    np.testing.assert_allclose(compare(moved, epsilon=epsilon), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    RETURNS, st.lists(st.sampled_from([0.25, 1.0, 8.0]), min_size=NUM_GROUPS, max_size=NUM_GROUPS)
)
def test_the_scale_of_a_group_matters_without_normalisation_alone(
    return_: np.ndarray, scales: list[float]
) -> None:
    factor = np.repeat(scales, G).astype(np.float32)
    np.testing.assert_allclose(compare(factor * return_), compare(return_), atol=1e-4)
    plain = compare(return_, epsilon=None)
    np.testing.assert_allclose(compare(factor * return_, epsilon=None), factor * plain, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(RETURNS, hnp.arrays(bool, B))
def test_groups_are_apart(return_: np.ndarray, known: np.ndarray) -> None:
    """Each is what it is alone, and its unknown members are not read."""
    spoiled = np.where(known, return_, np.nan)
    whole = compare(spoiled, known=known)
    for first in range(0, B, G):
        rows = slice(first, first + G)
        np.testing.assert_array_equal(whole[rows], compare(return_[rows], known=known[rows]))
        np.testing.assert_allclose(whole[rows][known[rows]].sum(), 0.0, atol=1e-4)
    np.testing.assert_array_equal(whole[~known], 0.0)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e6])
def test_equal_returns_give_no_advantage_at_all(value: float) -> None:
    advantage, is_uniform = jitted(
        np.full(B, value, np.float32), np.ones(B, bool), group_size=G, epsilon=1e-12
    )
    assert not np.any(advantage) and np.all(is_uniform)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(TypeError):
        returns.group_advantages(jnp.zeros(5), jnp.ones(5, bool), group_size=2, epsilon=None)


# --- the loss ---------------------------------------------------------------------------------


def test_loss_and_metrics_equal_float64() -> None:
    """With weights that are neither 0 nor 1."""
    weight = np.array([1, 0.25, 0, 0.5] * 3, np.float64)
    samples = make_batch(weight=jnp.asarray(weight, jnp.float32))
    algorithm: Any = grpo(clip_low=0.1, clip_high=0.3, entropy_coef=0.05)
    (total, metrics), grads = loss_and_grad(algorithm, samples)
    x, old, advantage = (
        np.asarray(v, np.float64)
        for v in (samples.trace, samples.behavior_log_prob, samples.advantage)
    )
    ratio = np.exp(0.7 * x - old)

    def mean(values: np.ndarray) -> float:
        return (values * weight).sum() / weight.sum()

    is_clipped = (ratio < 0.9) | (ratio > 1.3)
    expected = {
        "loss/policy": mean(np.maximum(-ratio * advantage, -np.clip(ratio, 0.9, 1.3) * advantage)),
        "loss/entropy": mean(0.3 * x),
        "ratio/mean": mean(ratio),
        "ratio/max": ratio[weight > 0].max(),
        "clip_fraction": mean(is_clipped),
        "approx_kl": mean(ratio - 1 - np.log(ratio)),
    }
    expected["loss/total"] = expected["loss/policy"] - 0.05 * expected["loss/entropy"]
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert float(total) == float(metrics["loss/total"])
    # d(-r A) = -r A x where the clip does not hold.
    pulls = (ratio * advantage <= np.clip(ratio, 0.9, 1.3) * advantage) | ~is_clipped
    slope = mean(np.where(pulls, -ratio * advantage * x, 0.0))
    np.testing.assert_allclose(grads["log_prob"], slope, rtol=2e-5)
    assert grads["value"] == 0.0


def test_the_critic_gets_no_gradient_and_is_not_read() -> None:
    samples = make_batch()
    spoiled = dataclasses.replace(
        samples, proximal_value=jnp.full(N, jnp.nan), return_=jnp.full(N, jnp.nan)
    )
    algorithm: Any = grpo(entropy_coef=0.1)
    (loss, _), grads = loss_and_grad(algorithm, spoiled)
    assert np.isfinite(loss) and grads["value"] == 0.0
    assert grads["log_prob"] != 0.0 and grads["entropy"] != 0.0


@pytest.mark.parametrize("kind", [x for x in CORRECTIONS if x != "vtrace"])
def test_the_policy_loss_is_that_of_ppo(kind: str) -> None:
    """On the same samples, stale ones among them, whatever the correction."""
    rng = np.random.default_rng(1)
    log_prob = jnp.asarray(rng.normal(size=N), jnp.float32)
    staleness = jnp.asarray(rng.integers(0, 3, N), jnp.int32)
    samples = make_batch(proximal_log_prob=log_prob, staleness=staleness)
    correction = CorrectionConfig(kind=kind, cap=1.5)
    both: Any = (
        grpo(correction=correction, entropy_coef=0.1),
        PPO(PPOConfig(correction=correction, entropy_coef=0.1, value_coef=0.0)),
    )
    ((loss, metrics), grads), ((expected, theirs), expected_grads) = (
        loss_and_grad(x, samples) for x in both
    )
    assert loss == expected and grads == expected_grads
    assert metrics == {name: x for name, x in theirs.items() if name != "loss/value"}


def test_a_correction_reads_the_evaluation_of_stale_samples() -> None:
    record = plain_record()
    evaluation = Evaluation(log_prob=jnp.full((T, B), -3.0), value=jnp.zeros((T, B)))
    stale = dataclasses.replace(record, policy_version=np.eye(T, B, dtype=np.int32))
    algorithm = grpo(correction=CorrectionConfig(kind="decoupled"))
    assert algorithm.needs_evaluation and not grpo().needs_evaluation
    made = algorithm.prepare(stale, version=jnp.int32(1), evaluation=evaluation)
    is_stale = np.eye(T, B) == 0
    counts = np.asarray(made.weight) > 0
    expected = np.where(is_stale, -3.0, record.behavior_log_prob)
    np.testing.assert_array_equal(made.proximal_log_prob[counts], expected[counts])
    np.testing.assert_array_equal(made.staleness, is_stale)


def test_samples_of_weight_0_change_nothing_not_even_as_nan() -> None:
    batch = prepare(grpo(filter_uniform=True), plain_record())

    def outcome(batch: TrainingBatch) -> Any:
        def loss(params: Any) -> Any:
            return grpo(entropy_coef=0.1).loss(ScaledPolicy(), params, batch)[0]

        return jax.value_and_grad(loss)(PARAMS)

    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(T * B, *x.shape[2:]), batch)
    used = np.asarray(flat.weight) > 0
    assert 0 < used.sum() < plain_record().valid.sum()
    actual, expected = outcome(flat), outcome(jax.tree.map(lambda x: x[used], flat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


# --- settings ---------------------------------------------------------------------------------


def test_registry_names_grpo() -> None:
    config = GRPOConfig()
    assert ALGORITHMS.get("grpo") is GRPO and config.name == "grpo"
    config.validate()
    assert config.compares_episodes() and not config.reads_final_values()
    assert not GRPO.standardizes_advantages


def test_the_group_size_is_that_of_the_simulation() -> None:
    assert GRPOConfig().resolve(group_size=8).group_size == 8
    assert GRPOConfig(group_size=8).resolve(group_size=8).group_size == 8
    with pytest.raises(ConfigError, match=r"algorithm\.group_size = 4: .* = 8\. Fix: .*=-1"):
        GRPOConfig(group_size=4).resolve(group_size=8)
    with pytest.raises(ValueError, match=r"group_size = -1: resolve"):
        GRPO(GRPOConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 0),
        ("group_size", 1),
        ("clip_low", 0.0),
        ("clip_high", -0.2),
        ("epsilon", 0.0),
        ("aggregation", "token"),
        ("entropy_coef", -0.01),
        ("correction.kind", "vtrace"),
        ("correction.cap", 0.5),
    ],
)
def test_bad_settings_are_named(name: str, value: Any) -> None:
    config: Any = GRPOConfig()
    section, _, last = name.rpartition(".")
    setattr(getattr(config, section) if section else config, last, value)
    with pytest.raises(ConfigError, match=rf"algorithm\.{name} = '?{value}.*Fix: --config"):
        config.validate()
