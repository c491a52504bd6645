"""AdamW per parameter group against float64, schedules by hand, frozen leaves."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvla.config import ConfigError, OptimizerConfig
from jaxvla.learning.optimizer import make_optimizer, schedule, trained_norm
from jaxvla.types import Params

FROZEN_SHAPE = (7, 11)
NOT_VISION = r"^(?!vision/)"


def random_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "vision": {"kernel": normal(*FROZEN_SHAPE)},
        "torso": {"kernel": normal(3, 4), "bias": normal(4)},
        "value_head": {"kernel": normal(4, 1)},
    }


def train(config: OptimizerConfig, gradients: list[Params]) -> Params:
    params: Any = random_params(0)
    optimizer = make_optimizer(config, params)
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw(config: OptimizerConfig, gradients: list[Params], rate: float, path: tuple[str, str]):
    """Loshchilov & Hutter 2019, algorithm 2, after clipping, in float64, for one leaf."""
    leaf = np.float64(random_params(0)[path[0]][path[1]])
    m, v = np.zeros_like(leaf), np.zeros_like(leaf)
    for step, grads in enumerate(gradients):
        trained = [np.float64(x) for name in grads for x in grads[name].values()]
        if config.trainable == NOT_VISION:
            trained = trained[1:]
        norm = np.sqrt(sum(np.square(x).sum() for x in trained))
        g = np.float64(grads[path[0]][path[1]]) * min(1.0, config.clip_norm / norm)
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = (
            x / (1 - beta ** (step + 1)) for x, beta in ((m, config.beta1), (v, config.beta2))
        )
        warm = min(1.0, step / config.warmup_steps)
        direction = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * leaf
        leaf = leaf - rate * warm * direction
    return leaf


@pytest.mark.parametrize("trainable", [".*", NOT_VISION])
@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_steps_equal_adamw(trainable: str, clip_norm: float) -> None:
    config = OptimizerConfig(
        learning_rate=0.01,
        value_learning_rate=0.1,
        warmup_steps=3,
        eps=1e-3,
        weight_decay=0.1,
        clip_norm=clip_norm,
        trainable=trainable,
    )
    gradients = [random_params(seed) for seed in range(1, 7)]
    trained = train(config, gradients)
    for path, rate in (
        (("torso", "kernel"), 0.01),
        (("torso", "bias"), 0.01),
        (("value_head", "kernel"), 0.1),
    ):
        actual = trained[path[0]][path[1]]
        np.testing.assert_allclose(actual, adamw(config, gradients, rate, path), rtol=1e-5)


def test_frozen_leaves_do_not_move() -> None:
    config = OptimizerConfig(weight_decay=0.5, learning_rate=0.1, trainable=NOT_VISION)
    before, after = random_params(0), train(config, [random_params(1), random_params(2)])
    np.testing.assert_array_equal(after["vision"]["kernel"], before["vision"]["kernel"])
    for name in ("torso", "value_head"):
        assert (after[name]["kernel"] != before[name]["kernel"]).all()


def test_frozen_gradients_are_not_read() -> None:
    """Neither by the clipping nor by the norm, not even when they are NaN."""
    config = OptimizerConfig(clip_norm=0.5, trainable=NOT_VISION)
    grads = random_params(1)
    spoiled = grads | {"vision": {"kernel": jnp.full(FROZEN_SHAPE, jnp.nan)}}
    jax.tree.map(np.testing.assert_array_equal, train(config, [spoiled]), train(config, [grads]))
    assert trained_norm(spoiled, NOT_VISION) == trained_norm(grads, NOT_VISION)


def test_frozen_leaves_have_no_moments() -> None:
    params = random_params(0)

    def shapes(trainable: str) -> list[tuple[int, ...]]:
        state = make_optimizer(OptimizerConfig(trainable=trainable), params).init(params)
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    assert shapes(".*").count(FROZEN_SHAPE) == 2
    assert FROZEN_SHAPE not in shapes(NOT_VISION)
    assert shapes("torso").count((4, 1)) == 0


def test_trained_norm_equals_numpy() -> None:
    grads = random_params(3)
    leaves = [*grads["torso"].values(), grads["value_head"]["kernel"]]
    expected = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
    np.testing.assert_allclose(trained_norm(grads, NOT_VISION), expected, rtol=1e-6)


@pytest.mark.parametrize("section", ["optimizer", "warm_start.optimizer"])
def test_nothing_trainable_is_an_error(section: str) -> None:
    expected = f"config.{section}.trainable = 'actor': matches no parameter. Fix: "
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make_optimizer(OptimizerConfig(trainable="actor"), random_params(0), section=section)


def test_optimizer_is_made_from_shapes_alone() -> None:
    config, params = OptimizerConfig(trainable=NOT_VISION), random_params(0)
    structs = jax.eval_shape(lambda: params)
    optimizer = make_optimizer(config, structs)
    assert jax.eval_shape(optimizer.init, structs) == jax.eval_shape(
        make_optimizer(config, params).init, structs
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 2.0, 1: 2.0, 1000: 2.0}),
        ({"warmup_steps": 4}, {0: 0.0, 1: 0.5, 3: 1.5, 4: 2.0, 5: 2.0, 1000: 2.0}),
        # Half a cosine from 2 to 0.2: half-way the mean, at a quarter 0.2 + 0.9 (1 + cos 45 deg).
        (
            {"warmup_steps": 2, "decay_steps": 8},
            {0: 0.0, 1: 1.0, 2: 2.0, 4: 1.7363961, 6: 1.1, 10: 0.2, 50: 0.2},
        ),
        ({"decay_steps": 10, "final_fraction": 0.0}, {0: 2.0, 5: 1.0, 10: 0.0, 11: 0.0}),
    ],
)
def test_schedule_hand_values(settings: dict[str, Any], expected: dict[int, float]) -> None:
    rate = schedule(OptimizerConfig(**settings), peak=2.0)
    actual = {step: np.asarray(rate(jnp.int32(step))).item() for step in expected}
    assert actual == pytest.approx(expected, abs=1e-6)
