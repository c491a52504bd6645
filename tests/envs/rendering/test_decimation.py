"""Simplified meshes stay close to the original, closed and the right way round."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from jaxvla.envs.rendering import tessellation
from jaxvla.envs.rendering.decimation import Simplifier


def _sphere(rings: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit sphere as vertices and faces, poles along z."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings + 1)
    angle = np.linspace(0, 2 * np.pi, 2 * rings, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    z = np.broadcast_to(np.sin(latitude)[:, None, None], (rings + 1, 2 * rings, 1))
    vertices = np.concatenate([np.cos(latitude)[:, None, None] * ring, z], -1).reshape(-1, 3)
    faces = []
    for i in range(rings):
        for j in range(2 * rings):
            a, b = i * 2 * rings + j, i * 2 * rings + (j + 1) % (2 * rings)
            faces += [[a, b, b + 2 * rings], [a, b + 2 * rings, a + 2 * rings]]
    return vertices, np.array(faces)


def _soup(triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3)


def _volume(mesh: Simplifier) -> float:
    """Enclosed volume by the divergence theorem; positive if faces point outward."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float((a * np.cross(b, c)).sum() / 6)


def _is_closed(mesh: Simplifier) -> bool:
    """Every directed edge is met by its reverse."""
    edges = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    directed = {tuple(edge) for edge in edges.tolist()}
    return all((b, a) in directed for a, b in directed)


def _surface_points(mesh: Simplifier, count: int = 20_000) -> np.ndarray:
    corners = mesh.vertices[mesh.faces]
    area = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1
    )
    rng = np.random.default_rng(0)
    face = rng.choice(len(corners), count, p=area / area.sum())
    return np.einsum("sk,skx->sx", rng.dirichlet(np.ones(3), count), corners[face])


@pytest.mark.parametrize(("tolerance", "most_faces"), [(1e-3, 7000), (1e-2, 800)])
def test_a_sphere_keeps_its_shape(tolerance: float, most_faces: int):
    mesh = Simplifier(*_sphere(60))
    mesh.collapse(tolerance)
    assert 8 <= len(mesh.faces) < most_faces
    assert _is_closed(mesh)
    radius = np.linalg.norm(_surface_points(mesh), axis=-1)
    # Planes are touched by the original's inscribed faces; between them lies the tolerance.
    assert np.sqrt(np.mean((radius - 1.0) ** 2)) < 3 * tolerance
    np.testing.assert_allclose(_volume(mesh), 4 / 3 * np.pi, rtol=6 * tolerance)


def test_flat_faces_cost_nothing_and_edges_stay_sharp():
    mesh = Simplifier(*_soup(tessellation.box(np.array([0.3, 0.2, 0.1]), 12)))
    assert len(mesh.vertices) == 6 * 12**2 + 2
    mesh.collapse(1e-4)
    assert 12 <= len(mesh.faces) <= 60
    np.testing.assert_allclose(_volume(mesh), 8 * 0.3 * 0.2 * 0.1, rtol=1e-3)
    corners = np.array([[x, y, z] for x in (-0.3, 0.3) for y in (-0.2, 0.2) for z in (-0.1, 0.1)])
    distance, _ = cKDTree(mesh.vertices).query(corners)
    assert distance.max() < 5e-4


def test_open_borders_stay():
    mesh = Simplifier(*_soup(tessellation.plane(np.array([0.5, 0.25, 0.0]), 16)))
    mesh.collapse(1e-3)
    assert 2 <= len(mesh.faces) <= 24
    np.testing.assert_allclose(np.abs(mesh.vertices).max(0), [0.5, 0.25, 0.0], atol=2e-3)
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    normals = np.cross(b - a, c - a)
    assert (normals[:, 2] > 0).all()
    np.testing.assert_allclose(normals[:, 2].sum() / 2, 0.5, rtol=0.01)


def test_coarser_and_coarser():
    mesh = Simplifier(*_sphere(40))
    counts = [len(mesh.faces)]
    for tolerance in (1e-4, 1e-3, 1e-2):
        mesh.collapse(tolerance)
        counts.append(len(mesh.faces))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 10


def test_specks_go_and_large_parts_stay():
    big_vertices, big_faces = _sphere(10)
    small_vertices, small_faces = _sphere(10)
    mesh = Simplifier(
        np.concatenate([big_vertices, 1e-3 * small_vertices + [3.0, 0.0, 0.0]]),
        np.concatenate([big_faces, small_faces + len(big_vertices)]),
    )
    mesh.collapse(2e-3)
    assert mesh.vertices[:, 0].max() < 1.1
    assert len(mesh.faces) > 100
    assert mesh.faces.max() == len(mesh.vertices) - 1


def test_doubled_vertices_are_joined():
    vertices, faces = _sphere(8)
    mesh = Simplifier(*_soup(vertices[faces]))
    assert _is_closed(mesh)
    assert len(mesh.vertices) == 7 * 16 + 2
