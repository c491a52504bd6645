"""Supervised fine-tuning: a batch in parts is the batch; the moving average; what is skipped."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learning.conftest import initial_params, learning_mesh, quick_jit
from linear_policy import ACTION_DIM, STATE_DIM, LinearPolicy

from jaxvla import rng
from jaxvla.config import OptimizerConfig
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.learning.supervised import SupervisedFunctions, supervised_steps
from jaxvla.learning.train_state import TrainState, init_state, state_shardings
from jaxvla.types import Observation, Params, SupervisedBatch

KEY = jax.random.key(3)
B, H = 8, 3


class NoisyPolicy(LinearPolicy):
    """Disturbs the labels, like flow matching does."""

    def supervised_loss(
        self, params: Params, batch: SupervisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        assert batch.actions is not None
        noise = 0.3 * jax.random.normal(key, batch.actions.shape)
        noisy = dataclasses.replace(batch, actions=batch.actions + noise)
        terms = super().supervised_loss(params, noisy, key)
        return terms | {"size": 0.1 * jnp.square(batch.observation.state).sum(-1)}


def add_noise(batch: SupervisedBatch, keys: jax.Array) -> SupervisedBatch:
    """Stands for augmentation."""
    state = batch.observation.state
    noise = jax.vmap(lambda k: jax.random.normal(k, state.shape[1:]))(keys)
    observation = dataclasses.replace(batch.observation, state=state + noise)
    return dataclasses.replace(batch, observation=observation)


LINEAR, NOISY = LinearPolicy(), NoisyPolicy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    functions: SupervisedFunctions
    optimizer: Any
    placed: TrainState
    policy: Any
    ema_decay: float

    def fresh_state(self) -> TrainState:
        params = initial_params(self.policy)
        state = init_state(params, self.optimizer)
        if self.ema_decay:
            state = dataclasses.replace(state, ema=jax.tree.map(np.copy, params))
        return jax.device_put(state, self.placed, may_alias=False)


@functools.cache
def make(
    policy: Any = NOISY,
    *,
    layout: str = "colocated=1",
    trainable: str = ".*",
    ema_decay: float = 0.0,
    augment: Any = None,
    plain: bool = False,
) -> Made:
    """With `plain` the optimizer is gradient descent: a step shows the gradient itself."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    config = OptimizerConfig(learning_rate=1e-2, trainable=trainable)
    optimizer = optax.sgd(1.0) if plain else make_optimizer(config, params)
    struct = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    if ema_decay:
        struct = dataclasses.replace(struct, ema=params)
    mesh = learning_mesh(layout)
    placed = state_shardings(struct, policy.rules(), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        functions = SupervisedFunctions(
            policy=policy,
            optimizer=optimizer,
            trainable=trainable,
            mesh=mesh,
            shardings=placed,
            ema_decay=ema_decay,
            augment=augment,
        )
    return Made(
        functions=functions,
        optimizer=optimizer,
        placed=placed,
        policy=policy,
        ema_decay=ema_decay,
    )


def make_batch(seed: int, num_parts: int = 1) -> Any:
    """The same samples whatever the number of parts, [A, B/A, ...]."""
    random = np.random.default_rng(seed)
    state: Any = random.normal(size=(B, STATE_DIM)).astype(np.float32)
    ones: Any = np.ones((B, 1), bool)
    batch = SupervisedBatch(
        observation=Observation(
            images=np.zeros((B, 1, 2, 2, 3), np.uint8),  # pyright: ignore
            image_mask=ones,
            state=state,
            tokens=ones,
            token_mask=ones,
        ),
        actions=random.normal(size=(B, H, ACTION_DIM)).astype(np.float32),  # pyright: ignore
        target_mask=None,
    )
    return jax.tree.map(lambda x: x.reshape(num_parts, B // num_parts, *x.shape[1:]), batch)


def run(made: Made, num_steps: int = 3, num_parts: int = 1) -> tuple[TrainState, list[Any]]:
    """(last state, metrics of every step), on the host."""
    steps = supervised_steps(
        made.functions.step,
        made.fresh_state(),
        (make_batch(seed, num_parts) for seed in range(num_steps)),
        placement=made.functions.columns,
        key=KEY,
    )
    state, metrics = made.fresh_state(), []
    for number, trained, values in steps:
        assert number == len(metrics)
        state = trained
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


def assert_close(actual: Any, expected: Any, **tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("augment", [None, add_noise])
@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_a_batch_in_parts_is_the_batch(num_parts: int, augment: Any) -> None:
    made = make(augment=augment)
    whole, whole_metrics = run(made)
    parts, parts_metrics = run(made, num_parts=num_parts)
    # Float32 sums of 8 gradients in another order, through 3 steps of Adam.
    assert_close(parts, whole, rtol=2e-5, atol=2e-6)
    assert_close(parts_metrics, whole_metrics, rtol=1e-5)
    assert set(whole_metrics[0]) == {"loss/actions", "loss/size", "loss/total", "grad_norm"}


def test_the_gradient_is_that_of_the_mean_loss_of_the_batch() -> None:
    """Against one backward pass through all samples at once, each with its own noise."""
    made = make(plain=True)
    params = initial_params(NOISY)
    batch = jax.tree.map(lambda x: x[0], make_batch(0))
    step_key = rng.stream(KEY, "flow", 0)

    def loss(params: Params) -> jax.Array:
        total = jnp.zeros(())
        for row in range(B):
            sample = jax.tree.map(lambda x, r=row: x[r : r + 1], batch)
            key = jax.random.fold_in(step_key, row)
            total += sum(x[0] for x in NOISY.supervised_loss(params, sample, key).values())
        return total / B

    value, grads = quick_jit(jax.value_and_grad(loss))(params)
    for num_parts in (1, 4):
        state, (metrics,) = run(made, 1, num_parts)
        moved = jax.tree.map(np.subtract, params, state.params)
        assert_close(moved, grads, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss/total"], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_without_noise_it_is_the_warm_starts_step(training) -> None:
    """Of the same optimizer on the same samples; that step has the whole batch in one pass."""
    warm = training(LINEAR)
    state = warm.fresh_state()
    for seed in range(3):
        batch = jax.device_put(jax.tree.map(lambda x: x[0], make_batch(seed)), warm.functions.rows)
        state, _ = warm.functions.supervised_step(state, batch, KEY)
    for num_parts in (1, 2):
        own, _ = run(make(LINEAR), num_parts=num_parts)
        assert_close(own.params, state.params, rtol=2e-5, atol=2e-6)


def test_on_a_mesh_it_is_the_same() -> None:
    one, one_metrics = run(make(ema_decay=0.9), num_parts=2)
    four, metrics = run(make(ema_decay=0.9, layout="colocated=4:data2,fsdp2"), num_parts=2)
    assert_close(four, one, rtol=2e-5, atol=2e-6)
    assert_close(metrics, one_metrics, rtol=1e-5)
    made = make(ema_decay=0.9, layout="colocated=4:data2,fsdp2")
    placed = jax.device_put(make_batch(0, 2), made.functions.columns)
    assert placed.observation.state.sharding.shard_shape((2, 4, STATE_DIM)) == (2, 1, STATE_DIM)


def test_the_moving_average() -> None:
    made, decay = make(ema_decay=0.75), 0.75
    expected: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), initial_params(NOISY))
    for num_steps in (1, 2, 3, 4):
        state, _ = run(made, num_steps)
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, state.params)
        assert_close(state.ema, expected, rtol=1e-5, atol=1e-7)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {np.dtype(np.float32)}
    plain, _ = run(make(), 4)
    assert_close(state.params, plain.params, rtol=0, atol=0)
    assert plain.ema is None


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    made = make(ema_decay=0.5)
    before = jax.device_get(made.fresh_state())
    batch = make_batch(0)
    batch.actions[0, 3] = np.nan
    placed = jax.device_put(batch, made.functions.columns)
    state, metrics = made.functions.step(made.fresh_state(), placed, KEY)
    assert not np.isfinite(metrics["grad_norm"])
    assert int(state.num_skipped) == 1 and int(state.num_steps) == 0
    for name in ("params", "opt_state", "ema"):
        assert_close(getattr(state, name), getattr(before, name), rtol=0, atol=0)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_frozen_leaves_are_not_touched(num_parts: int) -> None:
    state, _ = run(make(trainable="torso"), num_parts=num_parts)
    start = initial_params(NOISY)
    for name in ("vision", "value_head"):
        assert_close(state.params[name], start[name], rtol=0, atol=0)
    assert (state.params["torso"]["kernel"] != start["torso"]["kernel"]).all()


def test_samples_are_augmented_anew_at_every_step() -> None:
    """The loss of a batch that comes again and again, at weights that do not move."""
    made = make(LINEAR, augment=add_noise, trainable="value_head")
    step = made.functions.step
    losses = []
    for number in (0, 0, 1, 2):
        placed = jax.device_put(make_batch(0), made.functions.columns)
        _, metrics = step(made.fresh_state(), placed, rng.stream(KEY, "flow", number))
        losses.append(float(metrics["loss/actions"]))
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_a_run_can_go_on_at_any_step() -> None:
    made = make(ema_decay=0.9)
    whole, _ = run(made, 5)
    first, _ = run(made, 2)
    rest = supervised_steps(
        made.functions.step,
        jax.device_put(first, made.placed, may_alias=False),
        (make_batch(seed) for seed in range(2, 5)),
        placement=made.functions.columns,
        key=KEY,
        first_step=2,
    )
    numbers, states, _ = zip(*rest, strict=True)
    assert numbers == (2, 3, 4)
    assert_close(states[-1], whole, rtol=0, atol=0)


def test_shapes_are_enough_to_compile() -> None:
    made = make(ema_decay=0.9)
    struct: Any = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(made.fresh_state),
        made.placed,
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0, 2))
    made.functions.compile(struct, batch, jax.eval_shape(lambda: KEY))
