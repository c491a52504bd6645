"""Tessellated primitives have the shapes' extents, areas and outward faces."""

import mujoco
import numpy as np
import pytest

from jaxvla.envs.rendering.tessellation import SHAPES

_GEOM = mujoco.mjtGeom
_SIZE = np.array([0.3, 0.2, 0.1])
_VOLUMES = {
    _GEOM.mjGEOM_BOX: 8 * 0.3 * 0.2 * 0.1,
    _GEOM.mjGEOM_SPHERE: 4 / 3 * np.pi * 0.3**3,
    _GEOM.mjGEOM_ELLIPSOID: 4 / 3 * np.pi * 0.3 * 0.2 * 0.1,
    _GEOM.mjGEOM_CYLINDER: np.pi * 0.3**2 * 0.4,
    _GEOM.mjGEOM_CAPSULE: np.pi * 0.3**2 * 0.4 + 4 / 3 * np.pi * 0.3**3,
}
_HALF_EXTENTS = {
    _GEOM.mjGEOM_BOX: (0.3, 0.2, 0.1),
    _GEOM.mjGEOM_SPHERE: (0.3, 0.3, 0.3),
    _GEOM.mjGEOM_ELLIPSOID: (0.3, 0.2, 0.1),
    _GEOM.mjGEOM_CYLINDER: (0.3, 0.3, 0.2),
    _GEOM.mjGEOM_CAPSULE: (0.3, 0.3, 0.5),
}


@pytest.mark.parametrize("shape", _VOLUMES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("cells", [1, 3])
def test_volumes_and_extents(shape: mujoco.mjtGeom, cells: int):
    triangles = SHAPES[shape](_SIZE, cells)
    a, b, c = np.moveaxis(triangles, 1, 0)
    volume = (a * np.cross(b, c)).sum() / 6
    assert 0.96 * _VOLUMES[shape] <= volume <= 1.0001 * _VOLUMES[shape]
    high, low = triangles.reshape(-1, 3).max(0), triangles.reshape(-1, 3).min(0)
    np.testing.assert_allclose(high, _HALF_EXTENTS[shape], atol=1e-9)
    np.testing.assert_allclose(low, -np.array(_HALF_EXTENTS[shape]), atol=1e-9)
    outward = (np.cross(b - a, c - a) * (a + b + c)).sum(-1)
    assert (outward > 0).all()


def test_cells_split_flat_faces():
    assert len(SHAPES[_GEOM.mjGEOM_BOX](_SIZE, 1)) == 12
    assert len(SHAPES[_GEOM.mjGEOM_BOX](_SIZE, 4)) == 12 * 16


@pytest.mark.parametrize(("half", "reach"), [(0.3, 0.3), (0.0, 20.0)])
def test_planes_face_up(half: float, reach: float):
    triangles = SHAPES[_GEOM.mjGEOM_PLANE](np.array([half, half, 0.1]), 2)
    a, b, c = np.moveaxis(triangles, 1, 0)
    normals = np.cross(b - a, c - a)
    assert (normals[:, 2] > 0).all()
    np.testing.assert_allclose(normals[:, 2].sum() / 2, (2 * reach) ** 2)
    np.testing.assert_allclose(np.abs(triangles).max((0, 1)), [reach, reach, 0.0])
