"""Heads beside openpi's tree that RL needs: the critic, and the noise of Flow-Noise.

Both compute in float32.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxvla.models import flow
from jaxvla.models.layers import Leaf, dense, dense_leaves
from jaxvla.types import Params

NOISE_WIDTHS = (128, 64)
"""Hidden widths of the noise head in piRL (arXiv:2510.25889)."""


def value_leaves(width: int, hidden_widths: tuple[int, ...]) -> dict[str, Leaf]:
    """The value head: He init for the ReLU layers, small output as in piRL's critic."""
    table, widths = {}, (width, *hidden_widths)
    for index, (size_in, size_out) in enumerate(itertools.pairwise(widths)):
        table |= dense_leaves(f"value_head/Dense_{index}", size_in, size_out, gain=2.0**0.5)
    return table | dense_leaves("value_head/out", widths[-1], 1, gain=0.02 * widths[-1] ** 0.5)


def value(head: Params, x: jax.Array) -> jax.Array:
    """x float32 [B, D] -> value float32 [B], an MLP with ReLU."""
    for index in range(len(head) - 1):
        x = jax.nn.relu(dense(head[f"Dense_{index}"], x))
    return dense(head["out"], x)[:, 0]


def noise_leaves(width: int, action_dim: int) -> dict[str, Leaf]:
    """The noise head. Its small output starts every deviation near the middle of its range."""
    table, widths = {}, (width, *NOISE_WIDTHS)
    for index, (size_in, size_out) in enumerate(itertools.pairwise(widths)):
        table |= dense_leaves(f"noise_head/Dense_{index}", size_in, size_out)
    return table | dense_leaves("noise_head/out", widths[-1], action_dim, gain=0.1)


def noise_std(head: Params, features: jax.Array, low: float, high: float) -> jax.Array:
    """Learned standard deviations, an MLP with tanh and `flow.noise_head_std` at its end.

    Args:
      head: parameters.
      features: float32 [B, H, D], of the action tokens after the action expert.
      low: smallest standard deviation.
      high: largest one.

    Returns:
      float32 [B, H, A].
    """
    for index in range(len(NOISE_WIDTHS)):
        features = jnp.tanh(dense(head[f"Dense_{index}"], features))
    return flow.noise_head_std(dense(head["out"], features), low, high)


def masked_mean(features: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over valid tokens: [B, S, D] and bool [B, S] -> float32 [B, D], 0 where none is."""
    mask = mask[:, :, None]
    total = jnp.sum(jnp.where(mask, features.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)
