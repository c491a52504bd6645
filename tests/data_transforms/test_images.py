"""Both resizers against openpi's, recorded, and what they do at the borders."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.data.images import resize_with_pad_on_device, resize_with_pad_on_host


def test_host_resizer_gives_the_recorded_bytes(cases) -> None:
    image = cases["in/image"]
    resized = resize_with_pad_on_host(image, 28, 28)
    np.testing.assert_array_equal(resized, cases["resize_client"])


def test_device_resizer_gives_the_recorded_bytes(cases) -> None:
    resized = resize_with_pad_on_device(jnp.asarray(cases["in/image"]), 28, 28)
    assert resized.dtype == jnp.uint8
    np.testing.assert_array_equal(resized, cases["resize_jax_u8"])


def test_device_resizer_of_floats_matches_recorded(cases) -> None:
    image = jnp.asarray(cases["in/image"], jnp.float32) / 255.0 * 2.0 - 1.0
    resized = jax.jit(resize_with_pad_on_device, static_argnums=(1, 2))(image, 28, 28)
    assert resized.dtype == jnp.float32
    # Sums of about 20 float32 products of order 1.
    np.testing.assert_allclose(resized, cases["resize_jax_f32"], atol=2e-6, rtol=0)


def test_the_two_resizers_differ(cases) -> None:
    assert (cases["resize_client"] != cases["resize_jax_u8"]).any()


@hypothesis.given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_white_fills_a_centred_box_that_touches_the_frame(rows, columns, height, width) -> None:
    white = np.full((rows, columns, 3), 255, np.uint8)
    resized = resize_with_pad_on_host(white, height, width)
    assert resized.shape == (height, width, 3) and set(np.unique(resized)) <= {0, 255}
    inside = resized[..., 0] == 255
    across, down = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    assert inside.sum() == len(across) * len(down)
    # In proportion, to the pixel: exactly one side may be shorter than the frame.
    scale = min(height / rows, width / columns)
    assert abs(len(down) - max(rows * scale, 1)) < 1 + 1e-9
    assert abs(len(across) - max(columns * scale, 1)) < 1 + 1e-9
    for kept, size in ((across, width), (down, height)):
        before, after = kept[0], size - 1 - kept[-1]
        assert 0 <= after - before <= 1


@pytest.mark.parametrize(("shape", "size"), [((10, 7, 3), (4, 9)), ((7, 10, 3), (9, 4))])
def test_both_pad_the_same_pixels(shape, size) -> None:
    white = np.full(shape, 255, np.uint8)
    host = resize_with_pad_on_host(white, *size)
    np.testing.assert_array_equal(host, resize_with_pad_on_device(jnp.asarray(white), *size))
    floats = resize_with_pad_on_device(jnp.ones(shape), *size)
    # The float32 weights of a pixel add up to 1 only to rounding.
    np.testing.assert_allclose(floats, np.where(host == 255, 1.0, -1.0), rtol=0, atol=3e-7)


@pytest.mark.parametrize("resize", [resize_with_pad_on_host, resize_with_pad_on_device])
def test_leading_axes_are_images(cases, resize) -> None:
    image = cases["in/image"]
    batch = np.stack([[image, image[::-1]], [image[:, ::-1], 255 - image]])
    resized = np.asarray(resize(batch, 28, 20))
    assert resized.shape == (2, 2, 28, 20, 3)
    for index in np.ndindex(2, 2):
        np.testing.assert_array_equal(resized[index], resize(batch[index], 28, 20))
    np.testing.assert_array_equal(resize(image, 40, 64), image)


def test_floats_are_clipped_to_their_range() -> None:
    image = jnp.full((4, 4, 3), 1.5).at[0].set(-3.0)
    resized = resize_with_pad_on_device(image, 8, 8)
    assert resized.min() == -1.0 and resized.max() == 1.0


def test_bad_images_are_refused() -> None:
    for resize in (resize_with_pad_on_host, resize_with_pad_on_device):
        with pytest.raises(ValueError, match=r"shape \(3, 4, 4\): pass \[\.\.\., h, w, 3\]"):
            resize(np.zeros((3, 4, 4), np.uint8), 2, 2)
        with pytest.raises(ValueError, match="height, width = 0, 2"):
            resize(np.zeros((4, 4, 3), np.uint8), 0, 2)
        with pytest.raises(ValueError, match="images are float64"):
            resize(np.zeros((4, 4, 3)), 2, 2)
