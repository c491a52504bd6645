"""The supervised start on a regression whose solution is known."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from linear_policy import ACTION_DIM, STATE_DIM, LinearPolicy

from jaxvla import rng
from jaxvla.learning.warm_start import fit
from jaxvla.types import Observation, Params, SupervisedBatch

KEY = jax.random.key(9)
SOLUTION = np.random.default_rng(1).normal(size=(STATE_DIM, ACTION_DIM)).astype(np.float32)


class NoisyPolicy(LinearPolicy):
    """Disturbs the labels, like flow matching does: the key must matter."""

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        assert batch.actions is not None
        noise = 0.1 * jax.random.normal(key, batch.actions.shape)
        return super().supervised_loss(
            params, dataclasses.replace(batch, actions=batch.actions + noise), key
        )


LINEAR, NOISY = LinearPolicy(), NoisyPolicy()


def make_batch(seed: int, *, B: int = 8, H: int = 3) -> SupervisedBatch:
    """States with the actions that the solution gives, the same ones at all H steps."""
    state: Any = np.random.default_rng(seed).normal(size=(B, STATE_DIM)).astype(np.float32)
    images: Any = np.zeros((B, 1, 2, 2, 3), np.uint8)
    ones: Any = np.ones((B, 1), bool)
    tokens: Any = np.zeros((B, 1), np.int32)
    actions: Any = np.repeat((state @ SOLUTION)[:, None], H, axis=1)
    observation = Observation(
        images=images, image_mask=ones, state=state, tokens=tokens, token_mask=ones
    )
    return SupervisedBatch(observation=observation, actions=actions, target_mask=None)


def batches(count: int) -> Iterator[SupervisedBatch]:
    return (make_batch(seed) for seed in range(count))


def run(made: Any, count: int, *, key: jax.Array = KEY) -> tuple[Any, Any]:
    """Trains to the end."""
    result = fit(
        made.functions, made.fresh_state(), batches(count), key=key, should_stop=lambda: False
    )
    assert result is not None
    return result


def error(params: Params) -> float:
    """Mean squared error on states that were not trained on."""
    loss = LINEAR.supervised_loss(params, make_batch(10_000, B=64), KEY)["actions"]
    return float(np.mean(loss))


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_the_solution_is_found(training) -> None:
    made = training(LINEAR)
    before = error(made.fresh_state().params)
    state, metrics = run(made, 200)
    assert error(state.params) < 0.02 * before
    assert metrics["loss/actions"] < 0.05 * before
    assert set(metrics) == {"loss/actions", "grad_norm"}


def test_one_step_per_batch(training) -> None:
    """The same steps by hand, on keys that depend on the number of the step."""
    made = training(NOISY)
    state, metrics = run(made, 5)
    expected = made.fresh_state()
    losses = []
    for step, batch in enumerate(batches(5)):
        placed = jax.device_put(batch, made.functions.rows)
        key = rng.stream(KEY, "flow", step)
        expected, last = made.functions.supervised_step(expected, placed, key)
        losses.append(float(last["loss/actions"]))
    assert same(state, expected)
    assert int(state.num_steps) == 5 and int(state.num_skipped) == 0
    assert metrics["loss/actions"] == losses[-1] and len(set(losses)) == 5
    assert not any(isinstance(value, jax.Array) for value in metrics.values())


def test_a_start_is_a_function_of_its_key(training) -> None:
    made = training(NOISY)
    first, _ = run(made, 6)
    again, _ = run(made, 6)
    other, _ = run(made, 6, key=jax.random.key(10))
    assert same(first, again)
    assert not same(first.params["torso"], other.params["torso"])


def test_noise_is_drawn_afresh_at_every_step(training) -> None:
    """The same batch over and over: else the noise would be learned like a label."""
    made = training(NOISY)
    losses = []
    for count in (1, 2):
        repeated = (make_batch(0) for _ in range(count))
        result = fit(
            made.functions, made.fresh_state(), repeated, key=KEY, should_stop=lambda: False
        )
        assert result is not None
        losses.append(result[1]["loss/actions"])
    state = made.fresh_state()
    placed = jax.device_put(make_batch(0), made.functions.rows)
    state, _ = made.functions.supervised_step(state, placed, rng.stream(KEY, "flow", 0))
    _, stale = made.functions.supervised_step(state, placed, rng.stream(KEY, "flow", 0))
    assert losses[1] != float(stale["loss/actions"])


def test_frozen_leaves_are_not_touched(training) -> None:
    made = training(LINEAR, trainable="torso")
    start = jax.device_get(made.fresh_state().params)
    state, _ = run(made, 20)
    for name in ("vision", "value_head"):
        assert same(state.params[name], start[name]), name
    assert not np.any(np.asarray(state.params["torso"]["kernel"]) == start["torso"]["kernel"])
    assert error(state.params) < error(start)


def test_what_has_no_part_in_the_loss_stays(training) -> None:
    """Trainable, but the gradient of the critic is zero."""
    made = training(LINEAR)
    start = jax.device_get(made.fresh_state().params)
    state, _ = run(made, 3)
    assert same(state.params["value_head"], start["value_head"])
    assert not same(state.params["vision"], start["vision"])


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_request_to_stop_is_honoured_between_steps(training, num_steps: int) -> None:
    made = training(LINEAR)
    taken = []

    def count(state: Any, batch: Any, key: Any) -> Any:
        taken.append(int(state.num_steps))
        return step(state, batch, key)

    step = made.functions.supervised_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.functions, "supervised_step", count)
        result = fit(
            made.functions,
            made.fresh_state(),
            batches(10),
            key=KEY,
            should_stop=lambda: len(taken) >= num_steps,
        )
    assert result is None
    assert taken == list(range(num_steps))


def test_without_batches_nothing_changes(training) -> None:
    made = training(LINEAR)
    state, metrics = run(made, 0)
    assert same(state, made.fresh_state()) and metrics == {}


def test_four_devices_learn_the_same(training) -> None:
    """Batches come from the host; every device works on two of the eight rows."""
    one, _ = run(training(NOISY), 5)
    four, metrics = run(training(NOISY, layout="colocated=4:data2,fsdp2"), 5)
    for x, y in zip(jax.tree.leaves(four.params), jax.tree.leaves(one.params), strict=True):
        # Float32 sums over 8 rows in another order, through 5 steps of Adam.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert np.isfinite(metrics["grad_norm"])
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(four.params)} == {4}
