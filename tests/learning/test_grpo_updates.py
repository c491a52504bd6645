"""GRPO in the learner: streamed, in minibatches and on a mesh, against gradients by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import make_trajectory
from one_step import one_batched_step, one_streamed_step
from test_streaming import assert_same_update, first_moments, log_prob_of

from jaxvla.algorithms.corrections import CorrectionConfig
from jaxvla.algorithms.grpo import GRPO, GRPOConfig
from jaxvla.types import Params, Trajectory

T, B, G, P = 4, 4, 2, 3
VERSION = jnp.int32(4)


@functools.cache  # so that a test compiles once per setting
def grpo(kind: str = "none", **config: Any) -> GRPO:
    correction = CorrectionConfig(kind=kind, cap=1.5)
    return GRPO(GRPOConfig(group_size=G, correction=correction, entropy_coef=0.01, **config))


def make_record(params: Params, seed: int, *, spread: float = 0.0) -> Any:
    """Whole episodes: of random lengths, sparse rewards, one in eight fails.

    Args:
      params: weights that made it, but for `spread`.
      seed: of everything.
      spread: standard deviation, in nats, of what log-probs of versions 2 and 3 are off.
    """
    record = make_trajectory(seed, T=T, B=B)
    rng = np.random.default_rng(seed)
    step, lengths = np.arange(T)[:, None], rng.integers(1, T + 1, B)
    failed = rng.random(B) < 1 / 8
    is_last = step == lengths - 1
    version = rng.integers(2, 5, (T, B)) if spread else np.full((T, B), 4)
    noise = np.where(version < 4, rng.normal(scale=spread, size=(T, B)), 0.0)
    reward = is_last * rng.integers(0, 3, B)
    valid = (step < lengths) & ~(is_last & failed)
    changes: dict[str, Any] = {
        "behavior_log_prob": (log_prob_of(params, record) + noise).astype(np.float32),
        "policy_version": version.astype(np.int32),
        "reward": np.where(valid, reward, np.nan).astype(np.float32),
        "terminated": is_last & ~failed,
        "truncated": is_last & failed,
        "valid": valid,
    }
    return dataclasses.replace(record, **changes)


def start(made: Any) -> Params:
    return jax.device_get(made.fresh_state().params)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"filter_uniform": True, "aggregation": "episode"},
        {"kind": "decoupled", "normalize_std": False},
        {"kind": "interpolated", "aggregation": "episode"},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_streamed_update_is_that_of_the_batch(training, config: Any, spread: float) -> None:
    made = training(algorithm=grpo(**config))
    for seed in range(0, 12, P):
        records = [make_record(start(made), seed + i, spread=spread) for i in range(P)]
        metrics = assert_same_update(made, records)
        assert metrics["deferred_fraction"] is None  # nothing waits for the others


def test_on_a_mesh_that_splits_groups(training) -> None:
    """Four devices with three columns each: groups of two lie across them."""
    single, spread = (
        training(algorithm=grpo(aggregation="episode"), layout=layout)
        for layout in ("colocated=1", "colocated=4:data2,fsdp2")
    )
    records = [make_record(start(single), seed) for seed in range(P)]
    expected, actual = (
        first_moments(one_batched_step(x, records, VERSION)[0]) for x in (single, spread)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert_same_update(spread, records)


def hand_gradient(params: Params, records: list[Trajectory], *, by_episode: bool) -> np.ndarray:
    """Of the mean of A log pi with respect to torso, in float64: no entropy in this policy."""
    vision, torso = (np.asarray(params[name]["kernel"], np.float64) for name in ("vision", "torso"))
    total, weight = np.zeros_like(torso), 0.0
    for record in records:
        has_end = (record.valid & (record.terminated | record.truncated)).any(axis=0)
        gain = np.where(record.valid, record.reward, 0.0).astype(np.float64).sum(axis=0)
        for b in np.flatnonzero(has_end):
            group = [x for x in range(b // G * G, b // G * G + G) if has_end[x]]
            advantage = (gain[b] - gain[group].mean()) / (gain[group].std() + 1e-6)
            chunks = np.flatnonzero(record.valid[:, b])
            share = 1.0 / len(chunks) if by_episode else 1.0
            for t in chunks:
                hidden = np.asarray(record.observation.state[t, b], np.float64) @ vision
                residual = np.asarray(record.trace[t, b], np.float64) - hidden @ torso
                total -= share * advantage * np.outer(hidden, residual)
                weight += share
    return total / weight


@pytest.mark.parametrize("aggregation", ["sample", "episode"])
def test_the_gradient_is_that_of_a_loop_over_groups(training, aggregation: str) -> None:
    made = training(algorithm=grpo(aggregation=aggregation))
    params = start(made)
    records = [make_record(params, seed) for seed in (3, 5, 7)]
    expected = hand_gradient(params, records, by_episode=aggregation == "episode")
    state, _ = one_streamed_step(made, records, VERSION)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    (torso,) = (x for name, x in moments.items() if ".mu" in name and "torso" in name)
    scale = np.abs(torso).max() / np.abs(expected).max()  # Adam's and the clip's, positive
    np.testing.assert_allclose(torso, scale * expected, rtol=1e-4, atol=1e-4 * np.abs(torso).max())
    critic = [x for name, x in moments.items() if ".mu" in name and "value_head" in name]
    assert critic and not any(x.any() for x in critic)


def test_minibatches_part_the_samples_and_not_the_groups(training) -> None:
    """Advantages are made before: the minibatches of an epoch have the batch's, each once."""
    made = training(algorithm=grpo(), num_minibatches=2)
    functions, state = made.functions, made.fresh_state()
    records = [functions.place(make_record(start(made), seed)) for seed in range(P)]
    batch = functions.prepare(state.params, records, VERSION)
    order = functions.draw(jax.random.key(0), batch.weight.shape)
    parts = [functions._microbatch(batch, order, jnp.int32(index)) for index in range(2)]
    joined = np.sort(np.concatenate([np.asarray(x.advantage) for x in parts]))
    np.testing.assert_array_equal(joined, np.sort(np.asarray(batch.advantage).ravel()))
