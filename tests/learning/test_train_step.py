"""The learner's functions: minibatches, accumulation, donation, compilation."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import ACTION_DIM, STATE_DIM, LinearPolicy, make_trajectory
from one_step import one_batched_step, one_streamed_step

from jaxvla.learning.streaming import GradientStream
from jaxvla.learning.train_state import TrainState
from jaxvla.types import SupervisedBatch, TrainingBatch, Trajectory

T, B = 4, 4
VERSION = jnp.int32(0)
"""Of the weights that begin the update, and of all samples where nothing else is said."""

LAYOUTS = ["colocated=1", "colocated=4:data2,fsdp2"]


class Spy:
    """An algorithm that labels samples and shows the labels of a minibatch as metrics."""

    needs_evaluation = False
    standardizes_advantages = False

    def prepare(
        self, trajectory: Trajectory, *, version: jax.Array, evaluation: None
    ) -> TrainingBatch:
        """Sample t of env b is labelled 100 b + t."""
        T, B = trajectory.reward.shape
        label = 100.0 * jnp.arange(B) + jnp.arange(T)[:, None]
        return TrainingBatch(
            observation=trajectory.observation,
            trace=label[..., None] * jnp.ones(ACTION_DIM),
            behavior_log_prob=label,
            proximal_log_prob=label,
            proximal_value=label,
            staleness=version - trajectory.policy_version,
            advantage=label,
            return_=label,
            weight=jnp.ones((T, B)),
        )

    def loss(self, policy: Any, params: Any, batch: TrainingBatch) -> tuple[jax.Array, Any]:
        del policy
        zero = 0.0 * jnp.stack([leaf.sum() for leaf in jax.tree.leaves(params)]).sum()
        return zero, {"labels": batch.advantage, "trace": batch.trace[:, 0]}


def take(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), actual, expected
    )


def differs(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


@pytest.mark.parametrize("num_minibatches", [1, 2, 4])
def test_minibatches_of_an_epoch_partition_the_batch_in_every_column(
    training, num_minibatches: int
) -> None:
    made = training(algorithm=Spy(), num_minibatches=num_minibatches)
    functions, state = made.functions, made.fresh_state()
    batch = functions.prepare(state.params, [make_trajectory(0, T=T, B=B)], VERSION)
    order = functions.draw(jax.random.key(0), (T, B))
    seen: list[float] = []
    for index in range(num_minibatches):
        state, metrics = functions.step(state, batch, order, jnp.int32(index))
        labels = np.asarray(metrics["labels"])
        np.testing.assert_array_equal(labels, metrics["trace"])  # leaves stay together
        columns = collections.Counter(labels.astype(int) // 100)
        assert columns == dict.fromkeys(range(B), T // num_minibatches)
        seen += labels.tolist()
    assert sorted(seen) == sorted(100.0 * b + t for b in range(B) for t in range(T))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatches_make_the_step_of_the_whole_minibatch(training, layout: str) -> None:
    trajectory = make_trajectory(5, T=8, B=B)
    # Parts of unequal weight: their gradients are no plain average.
    valid = np.ones((8, B), bool)
    valid[:3], valid[4, 1] = False, False
    trajectory = dataclasses.replace(trajectory, valid=jnp.asarray(valid))

    def stepped(num_microbatches: int) -> tuple[TrainState, Any]:
        made = training(
            layout=layout, num_minibatches=2, num_microbatches=num_microbatches, standardize=True
        )
        state = made.fresh_state()
        batch = made.functions.prepare(state.params, [made.functions.place(trajectory)], VERSION)
        order = made.functions.draw(jax.random.key(0), (8, B))
        return made.functions.step(state, batch, order, jnp.int32(1))

    state, metrics = stepped(1)
    for count in (2, 4):
        in_parts, metrics_in_parts = stepped(count)
        assert_close(in_parts.params, state.params)
        assert_close(metrics_in_parts, metrics)


def test_trajectories_are_joined_along_their_envs(training) -> None:
    functions, params = training().functions, training().fresh_state().params
    parts = [make_trajectory(seed, T=T, B=2) for seed in (1, 2)]
    joined = functions.prepare(params, parts, VERSION)
    for start, part in zip((0, 2), parts, strict=True):
        alone = functions.prepare(params, [part], VERSION)
        assert_close(take(joined, (slice(None), slice(start, start + 2))), alone)
    assert joined.advantage.shape == (T, 4)


def test_advantages_are_standardized_over_the_joined_batch(training) -> None:
    made = training(standardize=True)
    parts = [make_trajectory(seed) for seed in (1, 2)]
    batch = made.functions.prepare(made.fresh_state().params, parts, VERSION)
    advantage = np.asarray(batch.advantage)
    assert abs(advantage.mean()) < 1e-6 and abs(advantage.std() - 1.0) < 1e-5
    assert abs(advantage[:, :B].mean()) > 1e-3  # not each trajectory by itself


def test_the_order_is_drawn_per_env_column(training) -> None:
    draw = training().functions.draw
    order = np.asarray(draw(jax.random.key(3), (8, 64)))
    np.testing.assert_array_equal(np.sort(order, axis=0), np.arange(8)[:, None] + 0 * order)
    assert len({tuple(column) for column in order.T}) > 32
    assert differs(order, draw(jax.random.key(4), (8, 64)))


def test_the_order_does_not_depend_on_the_mesh(training) -> None:
    orders = [
        np.asarray(training(layout=layout).functions.draw(jax.random.key(3), (8, 8)))
        for layout in (*LAYOUTS, "colocated=8:fsdp8")
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


def streamed(training, trajectories: list[Trajectory]) -> tuple[TrainState, float]:
    state, metrics = one_streamed_step(training, trajectories, VERSION)
    return state, metrics["grad_norm"]


def batched(training, trajectories: list[Trajectory]) -> tuple[TrainState, float]:
    state, metrics = one_batched_step(training, trajectories, VERSION)
    return state, metrics["grad_norm"]


@pytest.mark.parametrize("num_invalid", [0, 11])
def test_accumulated_gradients_equal_the_joint_batch(training, num_invalid: int) -> None:
    """Also when the trajectories hold unequally many samples that count."""
    made = training(eps=1e-3)
    trajectories = [make_trajectory(1), make_trajectory(2, num_invalid=num_invalid)]
    (actual, norm), (expected, expected_norm) = (f(made, trajectories) for f in (streamed, batched))
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert_close(actual, expected)
    assert differs(actual.params, made.fresh_state().params)


def test_trajectories_without_a_valid_sample_change_no_parameter(training) -> None:
    made = training(eps=1e-3)
    state, norm = streamed(made, [make_trajectory(s, num_invalid=T * B) for s in (1, 2)])
    assert norm == 0.0 and int(state.num_skipped) == 0
    assert not differs(state.params, made.fresh_state().params)


def test_invalid_samples_do_not_reach_the_parameters(training) -> None:
    """Nothing of them is read but the critic's value, which closes the step before."""
    made = training(eps=1e-3)
    spoiled = make_trajectory(1, num_invalid=5)
    clean = jax.tree.map(lambda x: np.nan_to_num(x, nan=7.0), spoiled)
    states = [batched(made, [x])[0] for x in (spoiled, clean)]
    assert not differs(*states) and int(states[0].num_steps) == 1


@pytest.mark.fault(8)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_skipped(training, layout: str) -> None:
    made = training(layout=layout)
    bad = make_trajectory(1)
    bad.behavior_log_prob[0, 0] = np.nan
    state, norm = batched(made, [bad])
    assert np.isnan(norm)
    assert (int(state.num_steps), int(state.num_skipped)) == (0, 1)
    assert not differs(state.params, made.fresh_state().params)


def test_frozen_leaves_stay_and_are_not_in_the_norm(training) -> None:
    made, whole = training(trainable="^(torso|value_head)/"), training()
    state, norm = batched(made, [make_trajectory(1)])
    fresh = made.fresh_state()
    assert not differs(state.params["vision"], fresh.params["vision"])
    assert differs(state.params["torso"], fresh.params["torso"])
    assert norm < batched(whole, [make_trajectory(1)])[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_and_sums_are_donated_and_parameters_of_a_gradient_are_not(
    training, layout: str
) -> None:
    made = training(layout=layout)
    functions, state = made.functions, made.fresh_state()
    trajectory = functions.place(make_trajectory(1))
    samples = functions.targets(state.params, trajectory, VERSION)
    first, second = (functions.gradient(state.params, *samples) for _ in range(2))
    total = functions.accumulate(first, second)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.grads))
    kept = second, state, trajectory, samples
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    applied, _ = functions.apply(state, total)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    batch = functions.prepare(applied.params, [trajectory], VERSION)
    order = functions.draw(jax.random.key(0), (T, B))
    functions.step(applied, batch, order, jnp.int32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(applied))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, order)))


def test_supervised_steps_lower_the_error(training) -> None:
    made = training()
    rng = np.random.default_rng(0)
    observation = take(make_trajectory(0, T=1, B=32).observation, 0)
    truth = rng.normal(size=(STATE_DIM, ACTION_DIM)).astype(np.float32)
    actions = (observation.state @ truth)[:, None]
    batch = SupervisedBatch(observation=observation, actions=actions, target_mask=None)
    state, errors = made.fresh_state(), []
    for step in range(300):
        key = jax.random.fold_in(jax.random.key(0), step)
        state, metrics = made.functions.supervised_step(state, batch, key)
        errors.append(float(metrics["loss/actions"]))
    first = make_error(made.fresh_state(), batch)
    assert errors[0] == pytest.approx(first, rel=1e-5)
    assert errors[-1] < 0.05 * errors[0]
    assert int(state.num_steps) == 300


def make_error(state: TrainState, batch: SupervisedBatch) -> float:
    """Mean square error of the linear policy, in float64."""
    vision, torso = (
        np.asarray(state.params[name]["kernel"], np.float64) for name in ("vision", "torso")
    )
    mean = np.asarray(batch.observation.state, np.float64) @ vision @ torso
    return np.square(np.asarray(batch.actions, np.float64) - mean[:, None]).mean()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the compiler's events since the test cleared the list."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_compiled_after_the_first_update(
    training, compilations: list[str], layout: str, standardize: bool
) -> None:
    settings = {"layout": layout, "num_minibatches": 2, "standardize": standardize}
    made = training(LinearPolicy(), **settings)  # of this test's own
    functions, state = made.functions, made.fresh_state()

    def update(state: TrainState, seed: int) -> TrainState:
        parts = [functions.place(make_trajectory(seed + part)) for part in (0, 1)]
        batch = functions.prepare(state.params, parts, jnp.int32(seed))
        for epoch in (0, 1):
            order = functions.draw(jax.random.key(epoch), batch.weight.shape)
            for index in (0, 1):
                state, _ = functions.step(state, batch, order, jnp.int32(index))
        stream = GradientStream(
            functions, params=state.params, version=jnp.int32(seed), num_trajectories=4
        )
        for part in (*parts, *parts):
            stream.add(part)
        return stream.finish(state)[0]

    state = update(state, 0)
    assert compilations  # the counter counts
    compilations.clear()
    for seed in (2, 4):
        state = update(state, seed)
    assert not compilations
    assert int(state.num_steps) == 15
