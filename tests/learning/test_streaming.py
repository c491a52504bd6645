"""Streamed updates: the whole batch's, with statistics that no trajectory knows by itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_policy import make_trajectory
from one_step import one_batched_step, one_streamed_step

from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig
from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.learning.train_state import TrainState
from jaxvla.types import Params, Trajectory

T, B, P = 4, 4, 3
VERSION = jnp.int32(4)
MESH = "colocated=4:data2,fsdp2"


@functools.cache  # so that a test compiles once per setting
def ppo(kind: str, *, standardize: bool = True) -> PPO:
    correction = CorrectionConfig(kind=kind, cap=1.5, rho_cap=1.2)
    return PPO(
        PPOConfig(correction=correction, standardize_advantages=standardize, entropy_coef=0.01)
    )


def log_prob_of(params: Params, record: Trajectory) -> np.ndarray:
    """Of the linear policy, in float64."""
    vision, torso = (np.asarray(params[name]["kernel"], np.float64) for name in ("vision", "torso"))
    mean = np.asarray(record.observation.state, np.float64) @ vision @ torso
    return -0.5 * np.square(np.asarray(record.trace, np.float64) - mean).sum(-1)


def make_record(
    params: Params, seed: int, *, num_invalid: int = 0, spread: float = 0.0, offset: float = 0.0
) -> Trajectory:
    """Of versions 2 to 4, if `spread` > 0, else of version 4 alone.

    Args:
      params: weights of version 4.
      seed: of everything.
      num_invalid: samples, of T B.
      spread: standard deviation, in nats, of what the log-probs of older samples are off.
      offset: what rewards are on average.
    """
    record = make_trajectory(seed, T=T, B=B, num_invalid=num_invalid)
    rng = np.random.default_rng(seed)
    version = rng.integers(2, 5, (T, B)) if spread else np.full((T, B), 4)
    noise = np.where(version < 4, rng.normal(scale=spread, size=(T, B)), 0.0)
    changes: dict[str, Any] = {
        "behavior_log_prob": (log_prob_of(params, record) + noise).astype(np.float32),
        "policy_version": version.astype(np.int32),
        "reward": record.reward + np.float32(offset),
    }
    return dataclasses.replace(record, **changes)


def first_moments(state: TrainState) -> np.ndarray:
    """All of Adam's, which after one step are the gradient up to one positive factor."""
    leaves = [
        np.asarray(leaf).ravel()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    return np.concatenate(leaves)


def assert_same_update(made: Any, records: list[Trajectory], rtol: float = 1e-5) -> dict[str, Any]:
    """Gradient, its norm, and every metric are those of the batch; returns the metrics.

    A sum of samples that cancel cannot be exact to its own size, only to that of its terms.
    """
    state, metrics = one_streamed_step(made, records, VERSION)
    expected_state, expected = one_batched_step(made, records, VERSION)
    actual, wanted = first_moments(state), first_moments(expected_state)
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())
    share = metrics.pop("deferred_fraction", None)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=rtol, atol=rtol, err_msg=name)
    # Nor does either take a step without a sample.
    has_samples = bool(np.any(wanted)) or int(expected_state.num_steps) == 1
    assert (int(state.num_steps), int(state.num_skipped)) == (int(has_samples), 0)
    return expected | {"deferred_fraction": share}


recorded = st.fixed_dictionaries(
    {
        "num_invalid": st.integers(0, T * B),
        "spread": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "offset": st.floats(-3.0, 3.0),
    }
)


@pytest.mark.parametrize("standardize", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", CORRECTIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), what=st.lists(recorded, min_size=P, max_size=P))
@example(seed=0, what=[{"num_invalid": T * B, "offset": -1.0}] * P)
@example(seed=1, what=[{"num_invalid": n, "offset": 9.0 * n} for n in (T * B, 0, 9)])
@example(seed=2, what=[{"spread": 1.0}] * P)
def test_a_streamed_update_is_that_of_the_batch(
    training, kind: str, standardize: bool, seed: int, what: list[dict[str, Any]]
) -> None:
    made = training(algorithm=ppo(kind, standardize=standardize))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed + i, **x) for i, x in enumerate(what)]
    assert_same_update(made, records)


@pytest.mark.parametrize("kind", ["none", "decoupled"])
def test_on_a_mesh(training, kind: str) -> None:
    """Of two by two devices; the first kind defers, the second does not."""
    made = training(algorithm=ppo(kind), layout=MESH)
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed, num_invalid=seed, spread=1.0) for seed in range(P)]
    share = assert_same_update(made, records)["deferred_fraction"]
    assert share == pytest.approx(2 / 3 if kind == "none" else 0.0)


def counted(made: Any, records: list[Trajectory], monkeypatch: Any) -> tuple[dict[str, int], Any]:
    """How often the functions were called for a streamed update, and its metrics."""
    calls = dict.fromkeys(("split_gradient", "join", "settle", "gradient", "apply"), 0)

    def count(name: str, function: Any, *args: Any) -> Any:
        calls[name] += 1
        return function(*args)

    for name in calls:
        function = functools.partial(count, name, getattr(made.functions, name))
        monkeypatch.setattr(made.functions, name, function)
    state, metrics = one_streamed_step(made, records, VERSION)
    assert int(state.num_steps) == 1
    return calls, metrics


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_backward_passes_are_made_as_trajectories_arrive(training, monkeypatch, kind: str) -> None:
    """Of all but the last one, whose arrival completes the statistics, unless ratios are not 1."""
    made = training(algorithm=ppo(kind))
    params = jax.device_get(made.fresh_state().params)
    is_exact = kind not in ("none", "interpolated")
    spreads = [1.0, 1.0, 1.0] if is_exact else [0.0, 0.0, 1.0]
    records = [make_record(params, seed, spread=x) for seed, x in enumerate(spreads)]
    calls, metrics = counted(made, records, monkeypatch)
    assert calls == {"split_gradient": 2, "join": 1, "settle": 1, "gradient": 1, "apply": 1}
    assert metrics["deferred_fraction"] == 0.0
    assert (metrics["clip_fraction"] == 0.0) == is_exact


@pytest.mark.parametrize("kind", ["none", "interpolated"])
def test_trajectories_with_clipped_samples_wait_for_the_sign_of_their_advantages(
    training, monkeypatch, kind: str
) -> None:
    made = training(algorithm=ppo(kind))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed, spread=x) for seed, x in enumerate((1.0, 0.0, 0.0))]
    assert_same_update(made, records)
    calls, metrics = counted(made, records, monkeypatch)
    assert calls == {"split_gradient": 2, "join": 0, "settle": 1, "gradient": 2, "apply": 1}
    assert metrics["deferred_fraction"] == pytest.approx(1 / 3)


def test_a_clipped_sample_of_weight_0_defers_nothing(training) -> None:
    made = training(algorithm=ppo("none"))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed, num_invalid=T * B, spread=1.0) for seed in range(P)]
    assert assert_same_update(made, records)["deferred_fraction"] == 0.0


def test_without_standardisation_every_gradient_is_made_at_once(training, monkeypatch) -> None:
    made = training(algorithm=ppo("none", standardize=False))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed, spread=1.0) for seed in range(P)]
    calls, metrics = counted(made, records, monkeypatch)
    assert calls == {"split_gradient": 0, "join": 0, "settle": 0, "gradient": 3, "apply": 1}
    assert "deferred_fraction" not in metrics


def test_a_lone_trajectory_is_a_batch(training, monkeypatch) -> None:
    made = training(algorithm=ppo("none"))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, 0, spread=1.0)]
    assert_same_update(made, records)
    calls, _ = counted(made, records, monkeypatch)
    assert calls == {"split_gradient": 0, "join": 0, "settle": 0, "gradient": 1, "apply": 1}


def test_equal_advantages_carry_no_preference(training) -> None:
    """Their spread is nothing but rounding, which is not to be blown up to a real gradient."""
    made = training(algorithm=ppo("none"))
    params = jax.device_get(made.fresh_state().params)
    never: Any = np.zeros((T, B), bool)
    records = []
    for seed in range(P):
        record = make_record(params, seed, num_invalid=5 * seed)
        value: Any = np.zeros((T, B), np.float32)
        reward: Any = np.full((T, B), 0.1, np.float32)
        ends = {"terminated": ~never, "truncated": never, "value": value, "reward": reward}
        records.append(dataclasses.replace(record, **ends))
    metrics = assert_same_update(made, records)
    assert metrics["loss/policy"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("position", range(P))
def test_one_bad_number_anywhere_skips_the_update(training, position: int) -> None:
    made = training(algorithm=ppo("none"))
    params = jax.device_get(made.fresh_state().params)
    records = [make_record(params, seed) for seed in range(P)]
    records[position].behavior_log_prob[1, 2] = np.nan
    state, metrics = one_streamed_step(made, records, VERSION)
    assert np.isnan(metrics["grad_norm"]) and np.isnan(metrics["loss/policy"])
    assert (int(state.num_steps), int(state.num_skipped)) == (0, 1)


def test_sums_hold_no_frozen_leaf(training) -> None:
    made = training(algorithm=ppo("none"), trainable="^(torso|value_head)/")
    functions, params = made.functions, made.fresh_state().params
    record = functions.place(make_record(jax.device_get(params), 0))
    batch, moments = functions.targets(params, record, VERSION)
    split = functions.split_gradient(params, batch, moments)
    names = {"torso/kernel", "value_head/kernel"}
    for part in (split.fixed, split.centred, split.unit):
        assert part.grads.keys() == names
    assert functions.gradient(params, batch, moments).grads.keys() == names
