"""Nearest front-face intersection of camera rays with one geom, in the geom's own frame.

Every function takes the ray origin `o` (three scalars), ray directions `d` (three
arrays [P], not normalised) and the geom's MuJoCo sizes, and returns `(t, normal)`:
`t` [P] is the ray parameter, inf where the ray misses. It is inf or negative where the
geom lies behind the origin or around it: nothing is seen from inside, as a rasteriser
culls back faces. `normal` is three arrays [P], outward, unit length, arbitrary where t is
not positive and finite.

Components are separate arrays rather than a trailing axis of 3: XLA then fuses a whole
geom into one vectorised loop over pixels.

The quadrics and slabs are the textbook forms; sizes follow MuJoCo's conventions
(https://mujoco.readthedocs.io/en/stable/XMLreference.html#body-geom-size).
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

Vec = tuple[jax.Array, jax.Array, jax.Array]
Hit = tuple[jax.Array, Vec]

_EPS = 1e-12
_TRIANGLES_PER_BLOCK = 16


def _each(function: Callable[..., jax.Array], *vectors: Iterable[jax.Array]) -> Vec:
    """Applies a function component by component."""
    x, y, z = (function(*components) for components in zip(*vectors, strict=True))
    return x, y, z


def _dot(a: Vec, b: Vec) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Vec, b: Vec) -> Vec:
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


def _entry(a: jax.Array, half_b: jax.Array, c: jax.Array) -> jax.Array:
    """Smaller root of a t^2 + 2 half_b t + c = 0, inf when there is none."""
    discriminant = half_b * half_b - a * c
    root = (-half_b - jnp.sqrt(jnp.maximum(discriminant, 0.0))) / jnp.maximum(a, _EPS)
    return jnp.where((discriminant > 0) & (a > _EPS), root, jnp.inf)


def plane(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """z = 0 seen from above; half-sizes of 0 mean unbounded."""
    t = jnp.where(d[2] < -_EPS, -o[2] / jnp.minimum(d[2], -_EPS), jnp.inf)
    inside_x = (size[0] <= 0) | (jnp.abs(o[0] + t * d[0]) <= size[0])
    inside_y = (size[1] <= 0) | (jnp.abs(o[1] + t * d[1]) <= size[1])
    zero, one = jnp.zeros_like(t), jnp.ones_like(t)
    return jnp.where(inside_x & inside_y, t, jnp.inf), (zero, zero, one)


def sphere(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """Sphere of radius size[0]."""
    t = _entry(_dot(d, d), _dot(o, d), _dot(o, o) - size[0] ** 2)
    scale = 1.0 / size[0]
    safe = jnp.where(jnp.isfinite(t), t, 0.0)
    return t, _each(lambda a, b: (a + safe * b) * scale, o, d)


def ellipsoid(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """Ellipsoid with half-axes `size`: a unit sphere in scaled coordinates."""
    oo, dd = _each(jnp.divide, o, size), _each(jnp.divide, d, size)
    t = _entry(_dot(dd, dd), _dot(oo, dd), _dot(oo, oo) - 1.0)
    safe = jnp.where(jnp.isfinite(t), t, 0.0)
    n = _each(lambda a, b, s: (a + safe * b) / s, oo, dd, size)
    inverse = jax.lax.rsqrt(jnp.maximum(_dot(n, n), _EPS))
    return t, (n[0] * inverse, n[1] * inverse, n[2] * inverse)


def box(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """Box with half-sizes `size`, by slabs."""
    near, far = [], []
    for i in range(3):
        inverse = 1.0 / jnp.where(jnp.abs(d[i]) < _EPS, _EPS, d[i])
        a, b = (-size[i] - o[i]) * inverse, (size[i] - o[i]) * inverse
        near.append(jnp.minimum(a, b))
        far.append(jnp.maximum(a, b))
    t = jnp.maximum(jnp.maximum(near[0], near[1]), near[2])
    leave = jnp.minimum(jnp.minimum(far[0], far[1]), far[2])
    normal = _each(lambda enter, c: jnp.where(enter == t, -jnp.sign(c), 0.0), near, d)
    return jnp.where((t < leave) & (t > 0), t, jnp.inf), normal


def _tube(o: Vec, d: Vec, radius: jax.Array, half_length: jax.Array) -> Hit:
    """The side of a cylinder along z."""
    t = _entry(
        d[0] * d[0] + d[1] * d[1],
        o[0] * d[0] + o[1] * d[1],
        o[0] * o[0] + o[1] * o[1] - radius**2,
    )
    safe = jnp.where(jnp.isfinite(t), t, 0.0)
    on_side = jnp.abs(o[2] + safe * d[2]) <= half_length
    normal = ((o[0] + safe * d[0]) / radius, (o[1] + safe * d[1]) / radius, jnp.zeros_like(t))
    return jnp.where(on_side, t, jnp.inf), normal


def _nearest(first: Hit, second: Hit) -> Hit:
    closer = second[0] < first[0]
    normal = _each(lambda a, b: jnp.where(closer, b, a), first[1], second[1])
    return jnp.where(closer, second[0], first[0]), normal


def cylinder(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """Cylinder along z: radius size[0], half-length size[1]."""
    hit = _tube(o, d, size[0], size[1])
    # Only the cap that faces the camera can be seen.
    side = jnp.where(o[2] >= 0, 1.0, -1.0)
    towards = d[2] * side < -_EPS
    t = jnp.where(towards, (side * size[1] - o[2]) / jnp.where(towards, d[2], 1.0), jnp.inf)
    safe = jnp.where(jnp.isfinite(t), t, 0.0)
    x, y = o[0] + safe * d[0], o[1] + safe * d[1]
    t = jnp.where((x * x + y * y <= size[0] ** 2) & (t > 0), t, jnp.inf)
    zero = jnp.zeros_like(t)
    return _nearest(hit, (t, (zero, zero, zero + side)))


def capsule(o: Vec, d: Vec, size: jax.Array) -> Hit:
    """Capsule along z: radius size[0], half-length size[1] of the straight part."""
    hit = _tube(o, d, size[0], size[1])
    for side in (-1.0, 1.0):
        hit = _nearest(hit, sphere((o[0], o[1], o[2] - side * size[1]), d, size))
    return hit


def mesh(o: Vec, d: Vec, triangles: jax.Array) -> Hit:
    """Triangles [F, 3, 3] (face, corner, xyz), counter-clockwise seen from outside.

    Moeller and Trumbore, "Fast, minimum storage ray/triangle intersection" (1997),
    culling variant, for every ray and triangle: the cost is P x F, so keep F in the
    hundreds. Blocks of triangles are scanned to bound memory.
    """
    num_faces = triangles.shape[0]
    padding = -num_faces % _TRIANGLES_PER_BLOCK
    # Padding triangles have no area: their determinant is 0, which counts as a miss.
    triangles = jnp.pad(triangles, ((0, padding), (0, 0), (0, 0)))
    blocks = triangles.reshape(-1, _TRIANGLES_PER_BLOCK, 3, 3)

    def block_hit(hit: Hit, block: jax.Array) -> tuple[Hit, None]:
        for k in range(_TRIANGLES_PER_BLOCK):
            hit = _nearest(hit, _triangle(o, d, block[k]))
        return hit, None

    nothing = jnp.full_like(d[0], jnp.inf)
    zero = jnp.zeros_like(d[0])
    return jax.lax.scan(block_hit, (nothing, (zero, zero, zero)), blocks)[0]


def _triangle(o: Vec, d: Vec, corners: jax.Array) -> Hit:
    a = tuple(corners[0])
    edge1 = tuple(corners[1] - corners[0])
    edge2 = tuple(corners[2] - corners[0])
    p = _cross(d, edge2)
    determinant = _dot(edge1, p)
    facing = determinant > _EPS
    inverse = 1.0 / jnp.where(facing, determinant, 1.0)
    s = (o[0] - a[0], o[1] - a[1], o[2] - a[2])
    u = _dot(s, p) * inverse
    q = _cross(s, edge1)
    v = _dot(d, q) * inverse
    t = _dot(edge2, q) * inverse
    inside = facing & (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
    n = _cross(edge1, edge2)
    length = jax.lax.rsqrt(jnp.maximum(_dot(n, n), 1e-30))
    normal = _each(lambda component: jnp.broadcast_to(component * length, t.shape), n)
    return jnp.where(inside, t, jnp.inf), normal
