"""Vectors as three arrays, one per component.

XLA makes plain loops over long arrays of them, where an axis of length three would stand in
the way of vector instructions.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

Vec = tuple[jax.Array, jax.Array, jax.Array]

_TINY = 1e-12


def vec(components: Iterable[jax.Array]) -> Vec:
    """The three components as a vector."""
    x, y, z = components
    return x, y, z


def dot(a: Vec, b: Vec) -> jax.Array:
    """a . b."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vec, b: Vec) -> Vec:
    """a x b."""
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


def minus(a: Vec, b: Vec) -> Vec:
    """a - b."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def unit(a: Vec) -> Vec:
    """a at length 1; next to nothing stays so."""
    inverse = jax.lax.rsqrt(jnp.maximum(dot(a, a), _TINY))
    return a[0] * inverse, a[1] * inverse, a[2] * inverse
