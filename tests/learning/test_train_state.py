"""Optimizer steps and skipped ones; where a train state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from linear_policy import LinearPolicy

from jaxvla.config import OptimizerConfig
from jaxvla.learning.optimizer import make_optimizer, trained_norm
from jaxvla.learning.train_state import TrainState, apply_gradients, init_state
from jaxvla.types import Params


def fresh() -> tuple[TrainState, optax.GradientTransformation]:
    params = LinearPolicy().init(jax.random.key(0))
    # Trained bits are compared, so some that arithmetic loses: a negative zero.
    params["torso"]["kernel"] = params["torso"]["kernel"].at[0, 0].set(-0.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1), params)
    return init_state(params, optimizer), optimizer


def gradients(seed: int) -> Params:
    return LinearPolicy().init(jax.random.key(seed))


def step(state: TrainState, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return apply_gradients(state, grads, trained_norm(grads, ".*"), optimizer)


def assert_same_bits(actual, expected) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)
        ),
        actual,
        expected,
    )


def test_a_step_changes_every_parameter_and_counts() -> None:
    state, optimizer = fresh()
    after = step(state, gradients(1), optimizer)
    jax.tree.map(lambda x, y: np.testing.assert_(np.any(x != y)), after.params, state.params)
    assert (int(after.num_steps), int(after.num_skipped)) == (1, 0)


def test_a_gradient_of_no_sample_moves_nothing() -> None:
    state, optimizer = fresh()
    state = step(state, gradients(1), optimizer)  # moments, and a weight decay, that would
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    norm = trained_norm(nothing, ".*")
    after = apply_gradients(state, nothing, norm, optimizer, weight=jnp.zeros(()))
    assert_same_bits(after, state)
    moved = apply_gradients(state, nothing, norm, optimizer, weight=jnp.ones(()))
    assert int(moved.num_steps) == 2


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("leaf", ["torso", "value_head"])
def test_a_gradient_that_is_not_finite_is_skipped(bad: float, leaf: str) -> None:
    state, optimizer = fresh()
    state = step(state, gradients(1), optimizer)  # moments that are not 0
    grads = gradients(2)
    grads[leaf]["kernel"] = grads[leaf]["kernel"].at[1, 0].set(bad)
    after = step(state, grads, optimizer)
    assert_same_bits(after.params, state.params)
    assert_same_bits(after.opt_state, state.opt_state)
    assert (int(after.num_steps), int(after.num_skipped)) == (1, 1)


def test_training_goes_on_as_if_the_skipped_gradient_had_not_been() -> None:
    state, optimizer = fresh()
    bad = jax.tree.map(lambda x: x * jnp.nan, gradients(2))
    straight = step(step(state, gradients(1), optimizer), gradients(3), optimizer)
    detour = state
    for grads in (gradients(1), bad, gradients(3)):
        detour = step(detour, grads, optimizer)
    assert_same_bits(detour.params, straight.params)
    assert_same_bits(detour.opt_state, straight.opt_state)


def test_counters_can_be_donated() -> None:
    """Two donated arguments may not share a buffer."""
    state, _ = fresh()
    donated = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    assert int(donated(state).num_skipped) == 1


def test_moments_lie_like_their_parameters(training) -> None:
    shardings = training(layout="colocated=4:data2,fsdp2").shardings
    split = PartitionSpec("fsdp", None)
    kernels = [s.spec for s in jax.tree.leaves(shardings.params)]
    assert kernels == [split] * 3
    specs = [s.spec for s in jax.tree.leaves(shardings.opt_state)]
    assert specs.count(split) == 2 * 3  # mean and mean square of each
    assert set(specs) == {split, PartitionSpec()}
    assert shardings.num_steps.spec == PartitionSpec()
