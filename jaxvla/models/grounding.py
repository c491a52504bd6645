"""Grounding: which image tokens show the object that the instruction names, and where in them.

An auxiliary loss on the prefix features. Imitation and RL alone bind words to objects only
after very many samples in a model that starts from scratch; a mask of the named object, which
a simulator gives for free, teaches it in a few hundred steps. It stands in for the vision-
language pretraining that a full-size model comes with.
"""

import jax
import jax.numpy as jnp
import optax

from jaxvla.models.layers import Leaf, dense, dense_leaves
from jaxvla.types import Params

MIN_PIXELS = 4
"""A patch that shows fewer pixels of the object counts as not showing it."""


def leaves(width: int) -> dict[str, Leaf]:
    """The head: features of width D -> presence logit, x and y offset."""
    return dense_leaves("grounding_head", width, 3, gain=0.1)


def grounding_loss(
    head: Params, features: jax.Array, target_mask: jax.Array, patch_size: int
) -> jax.Array:
    """Mean over patches of the presence cross-entropy plus the offset error where present.

    Args:
      head: parameters of the head.
      features: [B, S, D], prefix features; the first tokens are the patches of all cameras.
      target_mask: bool [B, C, h, w].
      patch_size: pixels of a square patch.

    Returns:
      float32 [B].
    """
    presence, offset = patch_targets(target_mask, patch_size)
    predicted = dense(head, features[:, : presence.shape[1]].astype(jnp.float32))
    cross_entropy = optax.sigmoid_binary_cross_entropy(predicted[..., 0], presence)
    error = jnp.square(predicted[..., 1:] - offset).sum(-1) * presence
    return cross_entropy.mean(axis=1) + 0.25 * error.sum(axis=1)


def patch_targets(target_mask: jax.Array, patch_size: int) -> tuple[jax.Array, jax.Array]:
    """Labels of every image token.

    Args:
      target_mask: bool [B, C, h, w].
      patch_size: pixels of a square patch, divides h and w.

    Returns:
      presence float32 [B, C h w / patch_size^2] in {0, 1}, and offset float32 [..., 2]: the
      mean x and y of the object's pixels in the patch, -1 and 1 at its borders.
    """
    batch, cameras, height, width = target_mask.shape
    rows, columns = height // patch_size, width // patch_size
    pixels = target_mask.reshape(batch, cameras, rows, patch_size, columns, patch_size)
    pixels = pixels.swapaxes(3, 4).reshape(batch, -1, patch_size, patch_size).astype(jnp.float32)
    count = pixels.sum((-1, -2))
    place = (2.0 * jnp.arange(patch_size) + 1.0) / patch_size - 1.0
    total = jnp.stack([(pixels * place).sum((-1, -2)), (pixels * place[:, None]).sum((-1, -2))], -1)
    offset = total / jnp.maximum(count, 1.0)[..., None]
    return (count >= MIN_PIXELS).astype(jnp.float32), offset
