"""The vision encoder; its numbers are checked in test_pi_oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.models import siglip
from jaxvla.models.layers import init_leaves

SIZE = siglip.SiglipSize(
    image_size=12, patch_size=4, width=8, depth=2, mlp_width=16, num_heads=2, out_width=10
)


@pytest.fixture(scope="module")
def params(quick_jit):
    return quick_jit(lambda: init_leaves(jax.random.key(0), siglip.leaves(SIZE)))()


@pytest.fixture(scope="module")
def encode(quick_jit):
    return quick_jit(lambda p, x: siglip.encode_images(p, x, dtype=jnp.dtype("float32")))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)), jnp.float32)


def test_patches_are_the_strided_convolution(params, images) -> None:
    expected = jax.lax.conv_general_dilated(
        images,
        params["embedding"]["kernel"],
        window_strides=(4, 4),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected = expected.reshape(2, 9, 8) + params["pos_embedding"]
    np.testing.assert_allclose(siglip._embed_patches(params, images), expected, atol=1e-5)


def test_images_are_independent(params, encode, images) -> None:
    both = encode(params, images)
    assert both.shape == (2, SIZE.num_patches, 10)
    second = encode(params, images[1:])
    np.testing.assert_allclose(second[0], both[1], atol=1e-5)


def test_fresh_tokens_have_unit_scale_and_depend_on_the_image(params, encode, images) -> None:
    tokens = encode(params, images)
    assert 0.3 < float(jnp.std(tokens)) < 3.0
    assert float(jnp.abs(tokens[0] - tokens[1]).mean()) > 0.03


@pytest.mark.parametrize("shape", [(16, 16), (12, 16), (13, 13)])
def test_wrong_image_size_is_named(params, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} px.*9 patches"):
        siglip.encode_images(params, jnp.zeros((1, *shape, 3)), dtype=jnp.dtype("float32"))
