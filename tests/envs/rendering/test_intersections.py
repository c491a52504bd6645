"""Ray intersections against a search along the ray in float64.

The reference knows a body only as a function that is negative inside: it looks for the first
change of sign along each ray. Rays that graze the body, which a search may miss and float32
may decide either way, are left out of the comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from jaxvla.envs.rendering import intersections

NUM_RAYS = 64
FAR = 5.0
"""Distance at which the search ends; the bodies are nearer."""
NUM_SAMPLES = 800
MARGIN = 5e-3
"""Rays that enter a body by less, or miss it by less, are left out. More than half the distance
between samples, so that the search does not miss the others."""

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(points [..., 3], sizes [3]) -> negative inside, about the distance near the surface."""


def _sphere(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.linalg.norm(p, axis=-1) - size[0]


def _ellipsoid(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    return (np.linalg.norm(p / size, axis=-1) - 1.0) * size.min()


def _box(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    return (np.abs(p) - size).max(-1)


def _cylinder(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    radial = np.hypot(p[..., 0], p[..., 1]) - size[0]
    return np.maximum(radial, np.abs(p[..., 2]) - size[1])


def _capsule(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    nearest = np.zeros_like(p)
    nearest[..., 2] = np.clip(p[..., 2], -size[1], size[1])
    return np.linalg.norm(p - nearest, axis=-1) - size[0]


BODIES: dict[str, Inside] = {
    "sphere": _sphere,
    "ellipsoid": _ellipsoid,
    "box": _box,
    "cylinder": _cylinder,
    "capsule": _capsule,
}


@dataclass(frozen=True, kw_only=True)
class Rays:
    """NUM_RAYS rays from one point."""

    origin: np.ndarray
    """[3]."""
    direction: np.ndarray
    """[NUM_RAYS, 3], not normalised."""

    def hit(self, function: Callable[..., intersections.Hit], size: np.ndarray) -> np.ndarray:
        """Parameter and normal as the code under test has them, [NUM_RAYS, 4]."""
        t, normal = function(
            tuple(jnp.asarray(self.origin, jnp.float32)),
            tuple(jnp.asarray(self.direction.T, jnp.float32)),
            jnp.asarray(size, jnp.float32),
        )
        return np.stack([t, *normal], -1)

    def points(self, t: np.ndarray) -> np.ndarray:
        """Points at parameters [..., NUM_RAYS] -> [..., NUM_RAYS, 3]."""
        return self.origin + t[..., None] * self.direction


def draw_rays(rng: np.random.Generator, distance: float) -> Rays:
    """Rays from a point at `distance` from the centre of the body, most of them towards it."""
    away = rng.normal(size=3)
    origin = distance * away / np.linalg.norm(away)
    aims = 0.4 * rng.normal(size=(NUM_RAYS, 3))
    aims[: NUM_RAYS // 8] = origin + rng.normal(size=(NUM_RAYS // 8, 3))  # anywhere
    direction = (aims - origin) * rng.uniform(0.5, 2.0, (NUM_RAYS, 1))
    # As in a camera that looks along an axis: components that are exactly zero.
    direction[-2:, rng.integers(3)] = 0.0
    return Rays(origin=origin, direction=direction.astype(np.float32).astype(np.float64))


def search(rays: Rays, inside: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First entry into a body by sampling and bisection.

    Returns:
      t [NUM_RAYS], inf where nothing is hit, and the depth to which each ray enters, negative
      where it stays outside.
    """
    grid = np.linspace(0.0, FAR, NUM_SAMPLES)[:, None] / np.linalg.norm(rays.direction, axis=1)
    values = inside(rays.points(grid))
    is_in = values < 0.0
    first = is_in.argmax(0)
    columns = np.arange(NUM_RAYS)
    low, high = grid[np.maximum(first - 1, 0), columns], grid[first, columns]
    for _ in range(30):
        middle = 0.5 * (low + high)
        entered = inside(rays.points(middle)) < 0.0
        low, high = np.where(entered, low, middle), np.where(entered, middle, high)
    return np.where(is_in.any(0), high, np.inf), -values.min(0)


def gradient(points: np.ndarray, inside: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Outward unit normals by central differences."""
    step = 1e-6
    shifts = step * np.eye(3)
    slope = np.stack([inside(points + s) - inside(points - s) for s in shifts], -1)
    return slope / np.linalg.norm(slope, axis=-1, keepdims=True)


def assert_hits_agree(rays: Rays, hits: np.ndarray, inside: Callable) -> None:
    """Compares with the search, leaving out rays that pass the surface within MARGIN."""
    t, depth = search(rays, inside)
    clear = np.abs(depth) > MARGIN
    expected, actual = t[clear], hits[clear, 0]
    # Behind the camera is as good as nowhere.
    actual = np.where(actual > 0.0, actual, np.inf)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    met = np.isfinite(expected)
    length = np.linalg.norm(rays.direction[clear][met], axis=1)
    np.testing.assert_allclose(actual[met] * length, expected[met] * length, atol=2e-4)
    points = rays.points(np.where(np.isfinite(t), t, 0.0))[clear][met]
    normals, wanted = hits[clear][met, 1:], gradient(points, inside)
    # At an edge either face will do.
    smooth = (gradient(points + 2e-4 * (wanted + 0.3), inside) * wanted).sum(-1) > 0.99
    smooth &= (gradient(points - 2e-4 * (wanted + 0.3), inside) * wanted).sum(-1) > 0.99
    np.testing.assert_allclose(normals[smooth], wanted[smooth], atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=1e-4)


@pytest.mark.parametrize("shape", BODIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_entry_from_outside(shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.1, 0.6, 3)
    rays = draw_rays(rng, distance=rng.uniform(1.4, 3.0))
    hits = rays.hit(jitted(shape), size)
    assert_hits_agree(rays, hits, lambda p: BODIES[shape](p, np.float32(size)))


@pytest.mark.parametrize("shape", BODIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_is_seen_from_inside(shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.1, 0.6, 3)
    origin = rng.uniform(-1.0, 1.0, 3) * (0.99 * size.min() / np.sqrt(3.0))
    rays = Rays(origin=origin, direction=rng.normal(size=(NUM_RAYS, 3)))
    assert BODIES[shape](origin, size) < 0.0
    hits = rays.hit(jitted(shape), size)
    assert not ((hits[:, 0] > 0.0) & np.isfinite(hits[:, 0])).any()


_JITTED: dict[str, Callable[..., intersections.Hit]] = {}


def jitted(shape: str) -> Callable[..., intersections.Hit]:
    """The function under test, compiled once and without optimisation, which takes longer."""
    options = {"xla_backend_optimization_level": 0}
    function = jax.jit(getattr(intersections, shape), compiler_options=options)
    return _JITTED.setdefault(shape, function)


def hull(rng: np.random.Generator, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangles [F, 3, 3] of a convex hull, outward, and its half-spaces [F, 4]."""
    shell = rng.normal(size=(num_points, 3))
    shell *= 0.5 / np.linalg.norm(shell, axis=1, keepdims=True)
    solid = ConvexHull(shell)
    triangles = shell[solid.simplices].astype(np.float32)
    edges = triangles[:, 1:] - triangles[:, :1]
    inward = (np.cross(edges[:, 0], edges[:, 1]) * solid.equations[:, :3]).sum(-1) < 0
    triangles[inward] = triangles[inward][:, ::-1]
    return triangles, solid.equations


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mesh_is_entered_where_its_hull_is(seed: int) -> None:
    # 20 faces: more than a block of the scan and no multiple of it.
    rng = np.random.default_rng(seed)
    triangles, planes = hull(rng, num_points=12)
    rays = draw_rays(rng, distance=rng.uniform(1.0, 3.0))
    hits = rays.hit(jitted("mesh"), triangles)
    assert_hits_agree(rays, hits, lambda p: (p @ planes[:, :3].T + planes[:, 3]).max(-1))
    # From inside, and with the faces turned round from outside, only backs are met.
    within = Rays(origin=triangles.mean((0, 1)), direction=rays.direction)
    assert np.isinf(within.hit(jitted("mesh"), triangles)[:, 0]).all()
    entered = rays.hit(jitted("mesh"), triangles)[:, 0]
    left = rays.hit(jitted("mesh"), triangles[:, ::-1])[:, 0]
    both = np.isfinite(entered) & np.isfinite(left)
    assert both.any() and (left[both] > entered[both]).all()


def test_box_of_triangles_is_a_box() -> None:
    rng = np.random.default_rng(0)
    size = np.array([0.3, 0.2, 0.4])
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size
    triangles = corners[ConvexHull(corners).simplices]
    edges = triangles[:, 1:] - triangles[:, :1]
    inward = (np.cross(edges[:, 0], edges[:, 1]) * triangles.mean(1)).sum(-1) < 0
    triangles[inward] = triangles[inward][:, ::-1]
    rays = draw_rays(rng, distance=2.0)
    np.testing.assert_allclose(
        rays.hit(jitted("mesh"), triangles)[:, 0], rays.hit(jitted("box"), size)[:, 0], rtol=1e-5
    )


def plane_hits(origin: tuple, direction: tuple, size: tuple) -> float:
    rays = Rays(origin=np.array(origin), direction=np.tile(direction, (NUM_RAYS, 1)))
    hits = rays.hit(jitted("plane"), np.array(size))
    assert (hits[:, 1:] == [0.0, 0.0, 1.0]).all()
    return float(hits[0, 0])


def test_plane_is_met_from_above_only() -> None:
    assert plane_hits((0.0, 0.0, 2.0), (0.5, 0.25, -1.0), (0.0, 0.0, 1.0)) == 2.0
    assert plane_hits((0.0, 0.0, 2.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)) == np.inf
    assert plane_hits((0.0, 0.0, 2.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)) == np.inf
    assert plane_hits((0.0, 0.0, -2.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)) == np.inf
    assert plane_hits((0.0, 0.0, -2.0), (0.0, 0.0, -1.0), (0.0, 0.0, 1.0)) <= 0.0


def test_bounded_plane_ends_at_its_half_sizes() -> None:
    size = (1.0, 0.5, 1.0)
    assert plane_hits((0.0, 0.0, 1.0), (0.99, 0.0, -1.0), size) == 1.0
    assert plane_hits((0.0, 0.0, 1.0), (1.01, 0.0, -1.0), size) == np.inf
    assert plane_hits((0.0, 0.0, 1.0), (0.0, -0.49, -1.0), size) == 1.0
    assert plane_hits((0.0, 0.0, 1.0), (0.0, -0.51, -1.0), size) == np.inf
    assert plane_hits((0.0, 0.0, 1.0), (50.0, -0.4, -1.0), (0.0, 0.5, 1.0)) == 1.0
