"""Augmentation: nothing at zero strength, bounds, determinism, scipy and colorsys as references."""

import colorsys
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxvla.data import augmentation
from jaxvla.data.augmentation import OPENPI, Strength, augment
from jaxvla.types import Observation, SupervisedBatch

NOTHING = Strength(
    crop=1.0,
    rotation_rad=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    probability=1.0,
)
GEOMETRY = dataclasses.replace(OPENPI, probability=0.0)
COLORS = dataclasses.replace(OPENPI, crop=1.0, rotation_rad=0.0, probability=1.0)
CAMERAS = ("base", "left_wrist")
B, SIZE = 6, 24


def make_batch(seed: int = 0, *, has_mask: bool = True) -> SupervisedBatch:
    random = np.random.default_rng(seed)
    images: Any = random.integers(0, 256, (B, 2, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, :, :4, :4] = [[[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 0]]] * 4
    ones: Any = np.ones((B, 2), bool)
    mask: Any = random.uniform(size=(B, 2, SIZE, SIZE)) < 0.5
    return SupervisedBatch(
        observation=Observation(
            images=images, image_mask=ones, state=ones, tokens=ones, token_mask=ones
        ),
        actions=jnp.ones((B, 3, 2)),
        target_mask=mask if has_mask else None,
    )


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def augmented(batch: SupervisedBatch, keys: jax.Array, strength: dict[str, Any]) -> SupervisedBatch:
    """The strength is traced, so that all strengths share what is compiled."""
    return augment(batch, keys, cameras=CAMERAS, strength=Strength(**strength))


def run(strength: Strength, batch: SupervisedBatch, seed: int = 0) -> SupervisedBatch:
    keys = jax.random.split(jax.random.key(seed), B)
    return jax.device_get(augmented(batch, keys, dataclasses.asdict(strength)))


def images_of(batch: SupervisedBatch) -> np.ndarray:
    return np.asarray(batch.observation.images)


def test_zero_strength_changes_nothing() -> None:
    batch = make_batch()
    made = run(NOTHING, batch)
    jax.tree.map(np.testing.assert_array_equal, made, batch)
    assert jax.tree.map(lambda x: x.dtype, made) == jax.tree.map(lambda x: x.dtype, batch)


def test_a_view_is_a_function_of_its_own_key() -> None:
    batch = make_batch()
    first, again, other = run(OPENPI, batch), run(OPENPI, batch), run(OPENPI, batch, seed=1)
    np.testing.assert_array_equal(images_of(first), images_of(again))
    assert (images_of(first) != images_of(other)).any()
    order = np.random.default_rng(0).permutation(B)
    moved: SupervisedBatch = jax.tree.map(lambda x: x[order], batch)
    keys = jax.random.split(jax.random.key(0), B)[order]
    views = augmented(moved, keys, dataclasses.asdict(OPENPI))
    np.testing.assert_array_equal(images_of(views), images_of(first)[order])
    same = jax.tree.map(lambda x: np.repeat(x[:1], B, axis=0), batch)
    views = images_of(run(OPENPI, same))
    assert len({view.tobytes() for view in views[:, 0]}) == B


def test_wrist_cameras_are_not_moved() -> None:
    batch = make_batch()
    made = run(GEOMETRY, batch)
    np.testing.assert_array_equal(images_of(made)[:, 1], images_of(batch)[:, 1])
    assert made.target_mask is not None and batch.target_mask is not None
    np.testing.assert_array_equal(made.target_mask[:, 1], batch.target_mask[:, 1])
    assert (images_of(made)[:, 0] != images_of(batch)[:, 0]).any(axis=(1, 2, 3)).all()


def test_masks_move_with_their_images() -> None:
    """A disc: the image shows what the mask says, but for pixels at its edge."""
    batch, grid = make_batch(), np.indices((SIZE, SIZE)) - SIZE / 2
    disc: Any = np.broadcast_to(np.hypot(*grid) < 8, (B, 2, SIZE, SIZE))
    images: Any = np.where(disc[..., None], 255, 0).astype(np.uint8) * np.ones(3, np.uint8)
    batch = dataclasses.replace(
        batch, observation=dataclasses.replace(batch.observation, images=images), target_mask=disc
    )
    made = run(dataclasses.replace(GEOMETRY, crop=0.6, rotation_rad=1.0), batch)
    shown, mask = images_of(made)[:, 0, :, :, 0], np.asarray(made.target_mask)[:, 0]
    assert mask.sum(axis=(1, 2)).min() > 1.5 * disc[0, 0].sum()  # enlarged
    assert (shown[mask] >= 63).all() and (shown[~mask] <= 192).all()
    assert ((shown > 127) == mask).mean() > 0.97


def test_coordinates_of_a_crop_that_is_turned() -> None:
    """Against crop, enlarge and rotate one after another, in float64."""
    strength = dataclasses.replace(OPENPI, crop=0.8, rotation_rad=0.4)
    height, width = 6, 10
    for seed in range(20):
        key = jax.random.key(seed)
        found = np.asarray(augmentation._coordinates(key, height, width, strength))
        # The map is affine; its matrix and shift are read off, and must be of the right kind.
        matrix = np.stack([found[:, 1, 0] - found[:, 0, 0], found[:, 0, 1] - found[:, 0, 0]], 1)
        np.testing.assert_allclose(matrix @ matrix.T, 0.64 * np.eye(2), atol=1e-5)
        angle = math.atan2(matrix[0, 1], matrix[0, 0])
        assert abs(angle) <= 0.4
        middle = found.mean(axis=(1, 2)) - np.array([(height - 1) / 2, (width - 1) / 2])
        assert (np.abs(middle) <= np.array([0.1 * height, 0.1 * width]) + 1e-5).all()


def test_pixels_between_pixels_are_interpolated() -> None:
    image = np.random.default_rng(3).uniform(size=(9, 7))
    at = augmentation._coordinates(jax.random.key(4), 9, 7, dataclasses.replace(OPENPI, crop=0.9))
    for order in (0, 1):
        expected = scipy.ndimage.map_coordinates(
            image, np.asarray(at, np.float64), order=order, mode="grid-constant", cval=0.0
        )
        found = augmentation._sample(jnp.asarray(image, jnp.float32), at, order)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_colors_against_colorsys() -> None:
    """Conversions of the standard library, in float64; the circle's seam and greys included."""
    random = np.random.default_rng(0)
    pixels = np.concatenate([random.uniform(size=(50, 3)), np.eye(3), np.ones((1, 3)), [[0.5] * 3]])
    pixels = np.concatenate([pixels, np.zeros((1, 3)), [[1.0, 0.5, 1.0], [1.0, 0.0, 0.001]]])
    hue, saturation, value = augmentation._to_hsv(jnp.asarray(pixels, jnp.float32))
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels])
    turn = np.abs(np.asarray(hue) - expected[:, 0])
    assert (np.minimum(turn, 1.0 - turn) < 1e-5).all()
    np.testing.assert_allclose(saturation, expected[:, 1], atol=1e-6)
    np.testing.assert_allclose(value, expected[:, 2], atol=1e-6)
    turned = [colorsys.hsv_to_rgb((h + 0.3) % 1.0, s, v) for h, s, v in expected]
    found = augmentation._to_rgb(hue + 0.3 - 2.0, saturation, value)
    np.testing.assert_allclose(found, turned, atol=1e-5)


@pytest.mark.parametrize("amount", [-0.4, -0.1, 0.0, 0.25, 0.4])
def test_the_curves_of_brightness_and_contrast(amount: float) -> None:
    x = np.linspace(0.0, 1.0, 201)
    contrasted = np.asarray(augmentation._contrasted(jnp.asarray(x), jnp.asarray(amount)))
    slope = math.tan((1.0 + amount) * math.pi / 4)
    np.testing.assert_allclose(contrasted[[0, 100, 200]], [0.0, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(np.diff(contrasted[98:103]) * 200, slope, rtol=1e-3)
    np.testing.assert_allclose(np.diff(contrasted[:5]) * 200, 1 / slope, rtol=1e-3)
    steps = np.diff(contrasted) * 200
    assert (steps > min(slope, 1 / slope) - 1e-3).all() and (
        steps < max(slope, 1 / slope) + 1e-3
    ).all()
    np.testing.assert_allclose(contrasted + contrasted[::-1], 1.0, atol=1e-6)
    brightened = np.asarray(augmentation._brightened(jnp.asarray(x), jnp.asarray(amount)))
    ends = [amount, 1.0] if amount > 0 else [0.0, 1.0 + amount]
    np.testing.assert_allclose(brightened, np.interp(x, [0, 1], ends), atol=1e-6)


def test_colors_stay_within_bounds_and_greys_grey() -> None:
    batch = make_batch()
    grey: Any = np.repeat(images_of(batch)[..., :1], 3, axis=-1)
    observation = dataclasses.replace(batch.observation, images=grey)
    made = images_of(run(COLORS, dataclasses.replace(batch, observation=observation)))
    assert made.dtype == np.uint8 and (made == made[..., :1]).all()
    assert (made != grey).any(axis=(2, 3, 4)).all()
    shape = (-1, SIZE * SIZE)
    for image, before in zip(made[..., 0].reshape(shape), grey[..., 0].reshape(shape), strict=True):
        # Brightness and contrast are curves that rise: the order of greys stays.
        order = np.argsort(before, kind="stable")
        assert (np.diff(image[order].astype(int)) >= 0).all()


def test_about_half_of_the_images_keep_their_colors() -> None:
    strength = dataclasses.replace(COLORS, probability=0.5)
    batch, same = make_batch(), 0
    for seed in range(20):
        same += int(
            (images_of(run(strength, batch, seed)) == images_of(batch)).all((2, 3, 4)).sum()
        )
    assert 90 < same < 150  # of 240, standard deviation 7.7


def test_missing_cameras_stay_black() -> None:
    batch = make_batch()
    images, present = images_of(batch).copy(), np.ones((B, 2), bool)
    images[2, 0], present[2, 0] = 0, False
    seen = dataclasses.replace(batch.observation, images=images, image_mask=present)  # pyright: ignore
    made = run(COLORS, dataclasses.replace(batch, observation=seen))
    assert not images_of(made)[2, 0].any()


def test_every_camera_has_a_name() -> None:
    with pytest.raises(ValueError, match="1 names of cameras, the images have 2"):
        augment(make_batch(), jax.random.split(jax.random.key(0), B), cameras=("base",))


def test_samples_without_masks() -> None:
    batch, keys = make_batch(has_mask=False), jax.random.split(jax.random.key(0), B)
    made = jax.eval_shape(functools.partial(augment, cameras=CAMERAS), batch, keys)
    assert made.target_mask is None and made.observation.images.shape == (B, 2, SIZE, SIZE, 3)
