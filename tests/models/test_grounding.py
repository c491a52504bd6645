"""Grounding labels against loops over pixels, the loss by hand, and where its gradient points."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.models import grounding, siglip
from jaxvla.models.grounding import MIN_PIXELS, grounding_loss, patch_targets
from jaxvla.models.layers import init_leaves
from jaxvla.models.siglip import SiglipSize

PATCH = 4

# Without LLVM optimisation: compiles several times faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
loss_of = quick_jit(grounding_loss, static_argnums=3)
label = quick_jit(patch_targets, static_argnums=1)


def empty_mask(cameras: int = 1, height: int = 8, width: int = 12) -> np.ndarray:
    """One image of 2 x 3 patches per camera."""
    return np.zeros((1, cameras, height, width), bool)


def targets_of(mask: np.ndarray, patch: int = PATCH) -> tuple[np.ndarray, np.ndarray]:
    presence, offset = label(jnp.asarray(mask), patch)
    assert presence.dtype == offset.dtype == jnp.float32
    return np.asarray(presence), np.asarray(offset)


def test_nothing_to_see() -> None:
    presence, offset = targets_of(empty_mask(cameras=2))
    np.testing.assert_array_equal(presence, np.zeros((1, 12)))
    np.testing.assert_array_equal(offset, np.zeros((1, 12, 2)))


@pytest.mark.parametrize("camera", [0, 1])
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_full_patch_is_present_at_its_place(camera: int, row: int, column: int) -> None:
    """Tokens: cameras one after the other, each row by row."""
    mask = empty_mask(cameras=2)
    mask[0, camera, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    presence, offset = targets_of(mask)
    token = 6 * camera + 3 * row + column
    np.testing.assert_array_equal(presence[0], np.arange(12) == token)
    np.testing.assert_array_equal(offset[0, token], 0.0)


def test_tokens_are_in_the_order_of_the_vision_encoder() -> None:
    """What lights up one patch of an image changes, before any attention, that token alone."""
    size = SiglipSize(
        image_size=8, patch_size=PATCH, width=4, depth=1, mlp_width=4, num_heads=1, out_width=4
    )
    params = quick_jit(lambda: init_leaves(jax.random.key(0), siglip.leaves(size)))()
    masks = np.zeros((4, 1, 8, 8), bool)
    for index, (row, column) in enumerate(itertools.product((0, 4), (0, 4))):
        masks[index, 0, row : row + 4, column : column + 4] = True
    images = jnp.asarray(np.repeat(masks[:, 0, :, :, None], 3, -1), jnp.float32)
    embed = quick_jit(siglip._embed_patches)
    changed = jnp.abs(embed(params, images) - embed(params, 0.0 * images)).max(-1)
    presence, _ = targets_of(masks)
    np.testing.assert_array_equal(np.asarray(changed) > 1e-3, presence > 0.5)


def test_the_threshold_counts_pixels_of_a_patch() -> None:
    mask = empty_mask()
    mask[0, 0, 0, :MIN_PIXELS] = True  # patch 0: exactly enough
    mask[0, 0, 0, 4 : 4 + MIN_PIXELS - 1] = True  # patch 1: one too few
    presence, _ = targets_of(mask)
    np.testing.assert_array_equal(presence[0], [1, 0, 0, 0, 0, 0])


def test_offsets_by_hand() -> None:
    """Centres of pixels in a 4 px patch are at -3/4, -1/4, 1/4 and 3/4; x is to the right."""
    mask = empty_mask()
    mask[0, 0, 0:4, 3] = True  # patch 0: its right column
    mask[0, 0, 3, 4:8] = True  # patch 1: its bottom row
    mask[0, 0, 4:6, 0:2] = True  # patch 3: its upper left quarter
    mask[0, 0, [4, 4, 5, 7], [8, 9, 8, 11]] = True  # patch 5
    presence, offset = targets_of(mask)
    np.testing.assert_array_equal(presence[0], [1, 1, 0, 1, 0, 1])
    np.testing.assert_allclose(
        offset[0, [0, 1, 3, 5]],
        [
            [0.75, 0.0],
            [0.0, 0.75],
            [-0.5, -0.5],
            # x: -3/4, -1/4, -3/4, 3/4; y: -3/4, -3/4, -1/4, 3/4.
            [-0.25, -0.25],
        ],
        atol=1e-6,
    )


def reference(mask: np.ndarray, patch: int) -> tuple[list[float], list[list[float]]]:
    """Labels of one row of a batch, pixel by pixel in float64."""
    presence, offset = [], []
    cameras, height, width = mask.shape
    for camera, top, left in itertools.product(
        range(cameras), range(0, height, patch), range(0, width, patch)
    ):
        places = [
            (2 * (x + 0.5) / patch - 1, 2 * (y + 0.5) / patch - 1)
            for y, x in itertools.product(range(patch), range(patch))
            if mask[camera, top + y, left + x]
        ]
        presence.append(float(len(places) >= MIN_PIXELS))
        offset.append([sum(axis) / len(places) for axis in zip(*places, strict=True)] or [0.0, 0.0])
    return presence, offset


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(2, 1, 12, 8), (2, 2, 4, 12)]),
    patch=st.sampled_from([2, 4]),
    share=st.sampled_from([0.1, 0.3, 0.9]),
)
def test_labels_equal_a_loop_over_pixels(
    seed: int, shape: tuple[int, ...], patch: int, share: float
) -> None:
    mask = np.random.default_rng(seed).uniform(size=shape) < share
    presence, offset = targets_of(mask, patch)
    for row in (0, 1):
        expected = reference(mask[row], patch)
        np.testing.assert_array_equal(presence[row], expected[0])
        np.testing.assert_allclose(offset[row], expected[1], atol=1e-6)


def test_a_patch_divides_the_image() -> None:
    with pytest.raises(TypeError):
        patch_targets(jnp.zeros((1, 1, 8, 8), bool), 3)


# ------------------------------------------------------------------------------ the loss

IDENTITY = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
"""A head that predicts the features themselves: (presence logit, x, y)."""


def some_mask() -> np.ndarray:
    """Two patches of six show the object, off their centres."""
    mask = empty_mask()
    mask[0, 0, 0:4, 3] = True
    mask[0, 0, 4:6, 0:2] = True
    return mask


def features_of(logit: Any, offset: Any) -> jax.Array:
    """Features [1, S, 3] that the identity head turns into given predictions."""
    return jnp.concatenate([jnp.asarray(logit)[..., None], jnp.asarray(offset)], -1)


def test_the_loss_is_zero_at_the_labels() -> None:
    presence, offset = targets_of(some_mask())
    features = features_of(60.0 * (2.0 * presence - 1.0), offset)
    np.testing.assert_allclose(
        loss_of(IDENTITY, features, jnp.asarray(some_mask()), PATCH), [0.0], atol=1e-12
    )


def test_the_loss_by_hand() -> None:
    """Logit 0 costs log 2 a patch; a wrong offset costs where the object is, and only there."""
    mask = jnp.asarray(some_mask())
    presence, offset = targets_of(some_mask())
    features = features_of(0.0 * presence, offset)
    loss = loss_of(IDENTITY, features, mask, PATCH)
    assert loss.shape == (1,) and loss.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(math.log(2.0), rel=1e-6)
    # One of the six patches is sure of itself, and wrong: log(1 + e^3) instead of log 2.
    wrong = features.at[0, 1, 0].set(3.0)
    surprise = (math.log1p(math.exp(3.0)) - math.log(2.0)) / 6.0
    loss = loss_of(IDENTITY, wrong, mask, PATCH)
    assert float(loss[0]) == pytest.approx(math.log(2.0) + surprise, rel=1e-6)
    # Off by 0.4 in x and 0.2 in y in a patch that shows the object.
    shifted = features.at[0, 0, 1:].add(jnp.asarray([0.4, -0.2]))
    loss = loss_of(IDENTITY, shifted, mask, PATCH)
    assert float(loss[0]) == pytest.approx(math.log(2.0) + 0.25 * (0.16 + 0.04), rel=1e-6)
    elsewhere = features.at[0, 1, 1:].add(5.0)
    assert float(loss_of(IDENTITY, elsewhere, mask, PATCH)[0]) == pytest.approx(math.log(2.0))


def test_rows_are_scored_by_themselves() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(3, 8, 3)).astype(np.float32)
    mask = random.uniform(size=(3, 1, 8, 12)) < 0.3
    together = loss_of(IDENTITY, features, mask, PATCH)
    alone = [
        loss_of(IDENTITY, x[None], y[None], PATCH)[0] for x, y in zip(features, mask, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert len(np.unique(together)) == 3


def test_tokens_of_the_prompt_do_not_count() -> None:
    """The features of the prompt follow those of the images."""
    presence, offset = targets_of(some_mask())
    features = features_of(0.5 * presence, offset)
    longer = jnp.concatenate([features, jnp.full((1, 4, 3), 100.0)], 1)
    mask = jnp.asarray(some_mask())
    np.testing.assert_array_equal(
        loss_of(IDENTITY, longer, mask, PATCH), loss_of(IDENTITY, features, mask, PATCH)
    )


def test_features_of_low_precision_are_scored_in_float32() -> None:
    features = jnp.ones((1, 6, 3), jnp.bfloat16)
    mask = jnp.asarray(some_mask())
    loss = loss_of(IDENTITY, features, mask, PATCH)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, loss_of(IDENTITY, jnp.ones((1, 6, 3)), mask, PATCH))


def test_the_gradient_points_from_the_labels_away() -> None:
    """So that descent raises the logit where the object is, lowers it elsewhere, and moves the
    offset towards the object, in patches that show it only."""
    presence, offset = targets_of(some_mask())
    predicted = features_of(0.0 * presence, 0.0 * offset)

    def total(features: jax.Array) -> jax.Array:
        return grounding_loss(IDENTITY, features, jnp.asarray(some_mask()), PATCH).sum()

    gradient = np.asarray(quick_jit(jax.grad(total))(predicted))
    # d/dlogit of the mean cross-entropy at logit 0 is (1/2 - label) / 6.
    np.testing.assert_allclose(gradient[..., 0], (0.5 - presence) / 6.0, rtol=1e-6)
    # d/doffset of a quarter of the squared error at 0 is -label / 2.
    expected = -0.5 * offset * presence[..., None]
    np.testing.assert_allclose(gradient[..., 1:], expected, atol=1e-7)
    assert np.abs(expected).max() > 0.1


def test_descent_on_the_head_finds_the_object() -> None:
    """Features that show the object and its place linearly, a fresh head, plain descent."""
    random = np.random.default_rng(0)
    mask = np.zeros((16, 1, 8, 8), bool)
    for row in mask:
        y, x = random.integers(0, 6, 2)
        row[0, y : y + 3, x : x + 3] = True
    presence, offset = targets_of(mask)
    mixing = random.normal(size=(3, 5))
    shown = np.concatenate([presence[..., None] - 0.5, offset * presence[..., None]], -1)
    features = jnp.asarray(shown @ mixing, jnp.float32)
    head = quick_jit(lambda: init_leaves(jax.random.key(0), grounding.leaves(5)))()

    def mean_loss(head: Any) -> jax.Array:
        return grounding_loss(head, features, jnp.asarray(mask), PATCH).mean()

    @quick_jit
    def descend(head: Any) -> tuple[Any, jax.Array]:
        def step(head: Any, _: None) -> tuple[Any, jax.Array]:
            loss, grad = jax.value_and_grad(mean_loss)(head)
            return jax.tree.map(lambda x, g: x - 0.3 * g, head, grad), loss

        return jax.lax.scan(step, head, None, length=600)

    head, losses = descend(head["grounding_head"])
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.1 * losses[0]
    predicted = features @ head["kernel"] + head["bias"]
    np.testing.assert_array_equal(predicted[..., 0] > 0.0, presence > 0.5)


def test_the_head_has_three_outputs() -> None:
    shapes = {path: leaf.shape for path, leaf in grounding.leaves(10).items()}
    assert shapes == {"grounding_head/kernel": (10, 3), "grounding_head/bias": (3,)}
