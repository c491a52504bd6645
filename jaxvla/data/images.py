"""Camera images fitted into a model's input: resized in proportion, the rest padded.

There are two resizers because openpi has two, whose results differ: its clients and its data
loading resize on the host with Pillow, its model resizes what still has another size on the
device. A policy reproduces recorded actions only with the one that was used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

_BLACK = {np.dtype(np.uint8): 0.0, np.dtype(np.float32): -1.0}
"""Value of padding by dtype: uint8 in [0, 255], float32 in [-1, 1]."""


class _Fit(NamedTuple):
    """Size in pixels of an image within a frame, and what is padded before it."""

    height: int
    width: int
    top: int
    left: int


def resize_with_pad_on_host(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with Pillow's bilinear filter (antialiased), black around.

    Args:
      images: uint8 [..., h, w, 3].
      height: pixels of the result.
      width: pixels of the result.

    Returns:
      uint8 [..., height, width, 3]; `images` itself where it has that size already.

    Raises:
      ValueError: the images have another dtype or shape, or the size is not positive.
    """
    _require_images(images, height, width)
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}: Pillow resizes uint8 in [0, 255]")
    rows, columns = images.shape[-3:-1]
    if (rows, columns) == (height, width):
        return images
    fit = _fit(rows, columns, height, width)
    padded = np.zeros((*images.shape[:-3], height, width, 3), np.uint8)
    inner = padded[..., fit.top : fit.top + fit.height, fit.left : fit.left + fit.width, :]
    for index in np.ndindex(*images.shape[:-3]):
        picture = Image.fromarray(images[index])
        resized = picture.resize((fit.width, fit.height), Image.Resampling.BILINEAR)
        inner[index] = np.asarray(resized)
    return padded


def resize_with_pad_on_device(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes linearly (antialiased) with `jax.image.resize`, black around. Can be jitted.

    Args:
      images: [..., h, w, 3], uint8 or float32 in [-1, 1].
      height: pixels of the result.
      width: pixels of the result.

    Returns:
      [..., height, width, 3] in the same dtype; uint8 is rounded, float32 clipped to [-1, 1].

    Raises:
      ValueError: the images have another dtype or shape, or the size is not positive.
    """
    _require_images(images, height, width)
    if images.dtype not in _BLACK:
        raise ValueError(f"images are {images.dtype}: pass uint8, or float32 in [-1, 1]")
    *lead, rows, columns, channels = images.shape
    if (rows, columns) == (height, width):
        return images
    fit = _fit(rows, columns, height, width)
    resized = jax.image.resize(images, (*lead, fit.height, fit.width, channels), "linear")
    if images.dtype == jnp.uint8:
        resized = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    else:
        resized = jnp.clip(resized, -1.0, 1.0)
    bottom, right = height - fit.height - fit.top, width - fit.width - fit.left
    padding = [(0, 0)] * len(lead) + [(fit.top, bottom), (fit.left, right), (0, 0)]
    return jnp.pad(resized, padding, constant_values=_BLACK[images.dtype])


def _fit(rows: int, columns: int, height: int, width: int) -> _Fit:
    """The largest image of the same proportions that the frame holds, in its middle."""
    # In floating point like openpi: exact arithmetic differs by a pixel for some sizes.
    ratio = max(columns / width, rows / height)
    inner_height, inner_width = max(int(rows / ratio), 1), max(int(columns / ratio), 1)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return _Fit(inner_height, inner_width, top, left)


def _require_images(images: np.ndarray | jax.Array, height: int, width: int) -> None:
    if images.ndim < 3 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}: pass [..., h, w, 3]")
    if height < 1 or width < 1:
        raise ValueError(f"height, width = {height}, {width}: both must be >= 1")
