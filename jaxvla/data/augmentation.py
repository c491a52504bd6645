"""Random views of training images, on devices: what openpi does to the images of a batch.

Cameras that do not sit on a wrist are cropped to a part of 95 %, enlarged again and turned by up
to 5 degrees; the colours of all cameras are jittered in half of the images
(https://github.com/Physical-Intelligence/openpi/blob/main/src/openpi/models/model.py,
`preprocess_observation`). The three motions are one affine map here, so that pixels are
interpolated once. Colours change in the HSV cone (https://en.wikipedia.org/wiki/HSL_and_HSV):
hue by a part of the circle, saturation by a factor, value towards black or white and through a
contrast curve. Strengths are openpi's; its library's own saturation step has no effect, here it
has one.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxvla.types import SupervisedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Strength:
    """How much images change, by default as in openpi's training."""

    crop: float = 0.95
    """Part of height and width that is kept, in (0, 1]."""
    rotation_rad: float = math.radians(5.0)
    """Greatest angle, to either side."""
    brightness: float = 0.3
    """Greatest part of the way to black or white, in [0, 1)."""
    contrast: float = 0.4
    """The slope in the middle is tan((1 + c) pi / 4) with |c| up to this, in [0, 1)."""
    saturation: float = 0.5
    """Saturation is multiplied by 1 + s with |s| up to this, at most to 1."""
    hue: float = 0.1
    """Greatest turn of the hue, as a part of the circle."""
    probability: float = 0.5
    """Share of images whose colours are jittered."""


OPENPI = Strength()


def augment(
    batch: SupervisedBatch, keys: jax.Array, *, cameras: Sequence[str], strength: Strength = OPENPI
) -> SupervisedBatch:
    """Changes the images of a batch, and the masks of named objects with them. Can be jitted.

    Args:
      batch: leading axis B.
      keys: typed keys [B]; a row's images depend on its own key only.
      cameras: names in the order of the C axis; "wrist" in a name keeps its geometry.
      strength: how much.

    Returns:
      The same shapes and dtypes: pixels are rounded to uint8. Missing cameras stay as they are.

    Raises:
      ValueError: there are not as many names as cameras.
    """
    seen = batch.observation
    num_cameras = seen.images.shape[1]
    if len(cameras) != num_cameras:
        raise ValueError(f"{len(cameras)} names of cameras, the images have {num_cameras}")
    images, masks = [], []
    for index, name in enumerate(cameras):
        own = jax.vmap(functools.partial(jax.random.fold_in, data=index))(keys)
        mask = None if batch.target_mask is None else batch.target_mask[:, index]
        view = functools.partial(_view, strength=strength, is_wrist="wrist" in name)
        image, mask = jax.vmap(view)(own, seen.images[:, index], mask)
        present = seen.image_mask[:, index, None, None, None]
        images.append(jnp.where(present, image, seen.images[:, index]))
        masks.append(mask)
    target_mask = None if batch.target_mask is None else jnp.stack(masks, axis=1)
    observation = dataclasses.replace(seen, images=jnp.stack(images, axis=1))
    return dataclasses.replace(batch, observation=observation, target_mask=target_mask)


def _view(
    key: jax.Array, image: jax.Array, mask: jax.Array | None, strength: Strength, is_wrist: bool
) -> tuple[jax.Array, jax.Array | None]:
    """One image, uint8 [h, w, 3], and its mask, bool [h, w]."""
    geometry_key, color_key = jax.random.split(key)
    pixels = image.astype(jnp.float32) / 255.0
    if not is_wrist:
        coordinates = _coordinates(geometry_key, image.shape[0], image.shape[1], strength)
        pixels = jax.vmap(lambda x: _sample(x, coordinates, 1), in_axes=2, out_axes=2)(pixels)
        if mask is not None:
            mask = _sample(mask.astype(jnp.float32), coordinates, 0) > 0.5
    pixels = _jitter(color_key, pixels, strength)
    return jnp.round(jnp.clip(pixels, 0.0, 1.0) * 255.0).astype(jnp.uint8), mask


def _coordinates(key: jax.Array, height: int, width: int, strength: Strength) -> jax.Array:
    """Where each pixel of the view lies in the image: float32 [2, height, width], in pixels."""
    shift_key, angle_key = jax.random.split(key)
    size = jnp.asarray([height, width], jnp.float32)
    limit = (1.0 - strength.crop) / 2.0
    shift = size * jax.random.uniform(shift_key, (2,), minval=-limit, maxval=limit)
    most = strength.rotation_rad
    angle = jax.random.uniform(angle_key, minval=-most, maxval=most)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    centre = (size - 1.0) / 2.0
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - centre[0], jnp.arange(width) - centre[1], indexing="ij"
    )
    turned = jnp.stack([cosine * rows + sine * columns, cosine * columns - sine * rows])
    return strength.crop * turned + (shift + centre)[:, None, None]


def _sample(values: jax.Array, coordinates: jax.Array, order: int) -> jax.Array:
    """[h, w] read at coordinates, 0 outside; order 1: linearly, 0: the nearest."""
    return map_coordinates(values, list(coordinates), order=order, mode="constant", cval=0.0)


def _jitter(key: jax.Array, pixels: jax.Array, strength: Strength) -> jax.Array:
    """Colours of an image [h, w, 3] in [0, 1]."""
    keys = jax.random.split(key, 5)

    def draw(index: int, most: float) -> jax.Array:
        return jax.random.uniform(keys[index], minval=-most, maxval=most)

    hue, saturation, value = _to_hsv(pixels)
    hue = hue + draw(0, strength.hue)
    saturation = jnp.clip(saturation * (1.0 + draw(1, strength.saturation)), 0.0, 1.0)
    value = _contrasted(
        _brightened(value, draw(2, strength.brightness)), draw(3, strength.contrast)
    )
    is_chosen = jax.random.bernoulli(keys[4], strength.probability)
    return jnp.where(is_chosen, _to_rgb(hue, saturation, value), pixels)


def _brightened(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Moves values a part of the way to white (amount > 0) or to black (amount < 0)."""
    return value + jnp.where(amount < 0.0, amount * value, amount * (1.0 - value))


def _contrasted(value: jax.Array, amount: jax.Array) -> jax.Array:
    """A curve from (0, 0) over (1/2, 1/2) to (1, 1): slope s in the middle, 1/s at the ends.

    The pieces x/s and s (x - 1/2) + 1/2 meet at x = s / (2 (1 + s)).
    """
    slope = jnp.tan((1.0 + amount) * (math.pi / 4.0))
    bend = 0.5 * slope / (1.0 + slope)
    middle = slope * (value - 0.5) + 0.5
    low, high = value / slope, 1.0 - (1.0 - value) / slope
    return jnp.where(value < bend, low, jnp.where(value > 1.0 - bend, high, middle))


def _to_hsv(pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hue in [0, 1), saturation and value of [..., 3] in [0, 1]; the hue of greys is 0."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = pixels.max(axis=-1)
    chroma = value - pixels.min(axis=-1)
    width = jnp.where(chroma > 0.0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / width,
        jnp.where(value == green, 2.0 + (blue - red) / width, 4.0 + (red - green) / width),
    )
    hue = jnp.where(chroma > 0.0, sixth / 6.0 % 1.0, 0.0)
    return hue, jnp.where(value > 0.0, chroma / jnp.where(value > 0.0, value, 1.0), 0.0), value


def _to_rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """The inverse of `_to_hsv`, for hues of any turn."""

    def channel(offset: float) -> jax.Array:
        place = (offset + 6.0 * hue) % 6.0
        return value * (1.0 - saturation * jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0))

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)
