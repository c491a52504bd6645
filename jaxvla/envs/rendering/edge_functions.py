"""Triangles as linear functions of a pixel's ray.

A triangle (a, b, c) in camera coordinates and a pixel's ray d = (x, y, -1) meet at planar
depth t with 1 / t = d.n / a.n, n = (b - a) x (c - a), inside the triangle where d.(a x b),
d.(b x c) and d.(c x a) have the sign of a.n: the homogeneous edge functions of Olano and
Greer, "Triangle Scan Conversion using 2D Homogeneous Coordinates" (Graphics Hardware 1997,
https://doi.org/10.1145/258694.258723). They hold for triangles that reach behind the camera,
so nothing is clipped: pixels nearer than the near plane are left out one by one.
"""

import jax
import jax.numpy as jnp

from jaxvla.envs.rendering.vectors import Vec, cross, dot, minus

_MIN_VOLUME = 1e-20
"""m^3: six times the volume between a triangle and the camera, for triangles seen edge-on."""


def edge_functions(corners: list[Vec], slack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Functions [T, 12] of a pixel's ray, and which triangles face the camera [T].

    For edges (0, 1), (1, 2), (2, 0) and for 1/t: factors of x, y and 1, scaled such that an
    edge function is not negative inside, and that the three add up to 1/t. Edges are moved
    out by `slack` (at depth 1), so that rounding opens no gap between neighbours.
    """
    normal = cross(minus(corners[1], corners[0]), minus(corners[2], corners[0]))
    volume = dot(corners[0], normal)  # negative if the camera is on the outer side
    scale = 1.0 / jnp.minimum(volume, -_MIN_VOLUME)
    columns = []
    for k in range(3):
        first, second = corners[k], corners[(k + 1) % 3]
        # Not first x second: the difference keeps float32 exact enough for small triangles.
        x, y, z = (part * scale for part in cross(first, minus(second, first)))
        columns += [x, y, slack * (jnp.abs(x) + jnp.abs(y)) - z]
    x, y, z = normal
    columns += [x * scale, y * scale, -z * scale]
    return jnp.stack(columns, -1), volume < -_MIN_VOLUME


def evaluate(functions: jax.Array, k: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Function k of functions [..., 12] at a ray (x, y, -1)."""
    factors = [functions[..., 3 * k + i] for i in range(3)]
    return factors[0] * x + factors[1] * y + factors[2]
