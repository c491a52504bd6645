"""Stale samples in the learner's functions: who evaluates them, at which weights, and when."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import LinearPolicy, make_trajectory
from one_step import one_batched_step, one_streamed_step
from test_learner import KEY, Run, same

from jaxvla import rng
from jaxvla.algorithms.corrections import CorrectionConfig
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.learning.train_state import TrainState
from jaxvla.types import Params, Trajectory

T, B = 4, 4
VERSION = jnp.int32(4)
FROZEN_ENCODER = "^(torso|value_head)/"
LAYOUTS = ["colocated=1", "colocated=4:data2,fsdp2"]


def algorithm(kind: str, *, recompute_value: bool = False) -> PPO:
    correction = CorrectionConfig(kind=kind, cap=1.5, rho_cap=1.2)
    return PPO(
        PPOConfig(
            correction=correction, recompute_value=recompute_value, standardize_advantages=False
        )
    )


ALGORITHMS = {kind: algorithm(kind) for kind in ("none", "decoupled", "interpolated", "vtrace")} | {
    "values": algorithm("none", recompute_value=True)
}


def stale_trajectory(seed: int, *, num_invalid: int = 3) -> Trajectory:
    """Of versions 2 to 4; its log-probs are near those of the initial weights."""
    record = make_trajectory(seed, T=T, B=B, num_invalid=num_invalid)
    version: Any = np.random.default_rng(seed).integers(2, 5, (T, B), np.int32)
    return dataclasses.replace(record, policy_version=version)


def evaluate_reference(params: Params, record: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """(log-prob, value) of the linear policy, in float64."""
    vision, torso, head = (
        np.asarray(params[name]["kernel"], np.float64) for name in ("vision", "torso", "value_head")
    )
    state = np.asarray(record.observation.state, np.float64)
    error = np.asarray(record.trace, np.float64) - state @ vision @ torso
    return -0.5 * np.square(error).sum(-1), (state @ head)[..., 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encode_once", [False, True])
def test_prepare_scores_stale_samples_at_the_weights_it_is_given(
    training, encode_once: bool, layout: str
) -> None:
    made = training(
        algorithm=ALGORITHMS["vtrace"],
        trainable=FROZEN_ENCODER,
        encode_once=encode_once,
        layout=layout,
    )
    params, records = made.fresh_state().params, [stale_trajectory(seed) for seed in (1, 2)]
    batch = made.functions.prepare(params, [made.functions.place(x) for x in records], VERSION)
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *records)
    log_prob, value = evaluate_reference(jax.device_get(params), joined)
    is_stale = joined.valid & (joined.policy_version < 4)
    is_fresh = joined.valid & (joined.policy_version == 4)
    for actual, present, acting in (
        (batch.proximal_log_prob, log_prob, joined.behavior_log_prob),
        (batch.proximal_value, value, joined.value),
    ):
        np.testing.assert_allclose(np.asarray(actual)[is_stale], present[is_stale], rtol=1e-5)
        np.testing.assert_array_equal(np.asarray(actual)[is_fresh], acting[is_fresh])
    np.testing.assert_array_equal(batch.staleness, 4 - joined.policy_version)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(batch))
    assert "hidden" in batch.observation if encode_once else batch.observation.images.ndim == 6


class MutePolicy(LinearPolicy):
    """Scores nothing."""

    def evaluate(self, params: Params, encoding: Any, trace: Any) -> Any:
        raise AssertionError("nobody asked for an evaluation")


@pytest.mark.parametrize("kind", ["none", "interpolated"])
def test_kinds_that_need_no_evaluation_get_none(training, kind: str) -> None:
    made = training(MutePolicy(), algorithm=ALGORITHMS[kind])
    batch = made.functions.prepare(made.fresh_state().params, [stale_trajectory(1)], VERSION)
    np.testing.assert_array_equal(batch.proximal_log_prob, batch.behavior_log_prob)
    made = training(MutePolicy(), algorithm=ALGORITHMS["decoupled"])
    with pytest.raises(AssertionError, match="nobody asked"):
        made.functions.prepare(made.fresh_state().params, [stale_trajectory(1)], VERSION)


@pytest.mark.parametrize("encode_once", [False, True])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_streamed_gradients_equal_the_joint_batch(training, kind: str, encode_once: bool) -> None:
    made = training(
        algorithm=ALGORITHMS[kind], trainable=FROZEN_ENCODER, encode_once=encode_once, eps=1e-3
    )
    records = [stale_trajectory(1), stale_trajectory(2, num_invalid=9)]
    streamed, batched = (
        step(made, records, VERSION)[0] for step in (one_streamed_step, one_batched_step)
    )
    for actual, expected in zip(jax.tree.leaves(streamed), jax.tree.leaves(batched), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    plain = training(trainable=FROZEN_ENCODER, eps=1e-3)
    assert kind == "none" or not same(
        batched.params, one_batched_step(plain, records, VERSION)[0].params
    )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_learner_tells_its_version(training, is_streamed: bool) -> None:
    """The same step by hand, at version 4 and not at 3, where fewer samples are stale."""
    made = training(algorithm=ALGORITHMS["decoupled"])
    records = [stale_trajectory(seed) for seed in range(2)]
    schedule = {"stream_microbatches": is_streamed}
    run = Run(made, records, learning={"num_updates": 5}, schedule=schedule)
    run.learner.progress.version = 4
    run.run()

    def by_hand(version: int) -> TrainState:
        functions, state = made.functions, made.fresh_state()
        if is_streamed:
            return one_streamed_step(made, records, jnp.int32(version))[0]
        batch = functions.prepare(state.params, records, jnp.int32(version))
        order = functions.draw(rng.stream(KEY, "order", 4, 0), batch.weight.shape)
        return functions.step(state, batch, order, jnp.int32(0))[0]

    assert same(run.learner.state, by_hand(4)) and not same(run.learner.state, by_hand(3))
    record = run.record()
    assert record["learner/behavior_approx_kl"] > 0.0
    weight, square = (record[f"learner/behavior_weight/{x}"] for x in ("mean", "mean_square"))
    assert 0.0 < weight**2 < square
