"""Triangles of MuJoCo's primitive geoms, in the geom's own frame.

Sizes follow https://mujoco.readthedocs.io/en/stable/XMLreference.html#body-geom-size. Faces
are counter-clockwise seen from outside. Round shapes are inscribed: their corners lie on the
true surface, so that a circle of 24 corners is at most 0.9 % of its radius too small.
"""

from collections.abc import Callable

import mujoco
import numpy as np

_AROUND = 24
"""Corners of a circle."""
_UNBOUNDED_M = 20.0
"""Half-size of a plane that has none."""


def box(size: np.ndarray, cells: int) -> np.ndarray:
    """Half-sizes [3]; every side is a grid of cells x cells squares."""
    sides = []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for sign in (-1.0, 1.0):
            points = np.zeros((2 * cells * cells, 3, 3))
            grid = _grid(cells) if sign > 0 else _grid(cells)[:, ::-1]
            points[..., u], points[..., v] = grid[..., 0] * size[u], grid[..., 1] * size[v]
            points[..., axis] = sign * size[axis]
            sides.append(points)
    return np.concatenate(sides)


def plane(size: np.ndarray, cells: int) -> np.ndarray:
    """Rectangle seen from above, half-sizes size[:2]; 0 means unbounded, drawn as 20 m."""
    half = np.where(size[:2] > 0, size[:2], _UNBOUNDED_M)
    points = np.zeros((2 * cells * cells, 3, 3))
    points[..., :2] = _grid(cells) * half
    return points


def ellipsoid(size: np.ndarray, cells: int) -> np.ndarray:
    """Half-axes [3]."""
    del cells
    latitude = np.linspace(-0.5 * np.pi, 0.5 * np.pi, _AROUND // 2 + 1)
    return _revolve(np.cos(latitude), np.sin(latitude)) * size


def sphere(size: np.ndarray, cells: int) -> np.ndarray:
    """Radius size[0]."""
    return ellipsoid(np.full(3, size[0]), cells)


def cylinder(size: np.ndarray, cells: int) -> np.ndarray:
    """Along z: radius size[0], half-length size[1]."""
    del cells
    radius, half = size[0], size[1]
    return _revolve(np.array([0.0, radius, radius, 0.0]), np.array([-half, -half, half, half]))


def capsule(size: np.ndarray, cells: int) -> np.ndarray:
    """Along z: radius size[0], half-length size[1] of the straight part."""
    del cells
    quarter = np.linspace(0.0, 0.5 * np.pi, _AROUND // 4 + 1)
    r, z = size[0] * np.cos(quarter), size[0] * np.sin(quarter) + size[1]
    return _revolve(np.concatenate([r[::-1], r]), np.concatenate([-z[::-1], z]))


SHAPES: dict[int, Callable[[np.ndarray, int], np.ndarray]] = {
    mujoco.mjtGeom.mjGEOM_PLANE: plane,
    mujoco.mjtGeom.mjGEOM_SPHERE: sphere,
    mujoco.mjtGeom.mjGEOM_CAPSULE: capsule,
    mujoco.mjtGeom.mjGEOM_ELLIPSOID: ellipsoid,
    mujoco.mjtGeom.mjGEOM_CYLINDER: cylinder,
    mujoco.mjtGeom.mjGEOM_BOX: box,
}
"""Geom type -> function of (sizes [3], cells per side of flat faces) to triangles [T, 3, 3]."""


def _grid(cells: int) -> np.ndarray:
    """Triangles [2 cells^2, 3, 2] of the square [-1, 1]^2, counter-clockwise."""
    place = np.linspace(-1.0, 1.0, cells + 1)
    u, v = (x.ravel() for x in np.meshgrid(place[:-1], place[:-1], indexing="ij"))
    step = 2.0 / cells
    corners = [
        np.stack([u + a * step, v + b * step], -1) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))
    ]
    first, second = np.stack(corners[:3], 1), np.stack([corners[0], *corners[2:]], 1)
    return np.concatenate([first, second])


def _revolve(radius: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Surface of revolution about z of a profile with rising z, [T, 3, 3]."""
    angle = np.linspace(0.0, 2.0 * np.pi, _AROUND + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.concatenate(
        [radius[:, None, None] * ring, np.broadcast_to(z[:, None, None], (len(z), _AROUND + 1, 1))],
        -1,
    )
    a, b = points[:-1, :-1], points[:-1, 1:]
    c, d = points[1:, 1:], points[1:, :-1]
    triangles = np.concatenate(
        [np.stack([a, b, c], -2).reshape(-1, 3, 3), np.stack([a, c, d], -2).reshape(-1, 3, 3)]
    )
    area = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=-1
    )
    return triangles[area > 1e-12]
