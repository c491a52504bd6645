"""Colours of pixels against the same equations in float64, pixel by pixel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from small_surfaces import lights, surfaces

from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer
from jaxvla.envs.rendering.surfaces import Surfaces

_SIZE = 32
_FOVY_RAD = 1.0
_WALL = np.array([[-9.0, -9.0, -3.0], [9.0, -9.0, -4.0], [0.0, 12.0, -3.5]])
"""Fills the view."""


def _render(scene: Surfaces, xmat: np.ndarray | None = None) -> Frame:
    rasterizer = Rasterizer(scene, body_ids=[0], size=_SIZE)
    camera = Camera(
        xpos=jnp.zeros(3),
        xmat=jnp.asarray(np.eye(3) if xmat is None else xmat, jnp.float32),
        fovy_rad=jnp.float32(_FOVY_RAD),
    )
    poses = BodyPoses(xpos=jnp.zeros((1, 3)), xmat=jnp.eye(3)[None])
    return jax.tree.map(np.asarray, jax.jit(rasterizer.render)(poses, camera))


def _rays() -> np.ndarray:
    focal = 0.5 * _SIZE / np.tan(0.5 * _FOVY_RAD)
    u = (np.arange(_SIZE) + 0.5 - 0.5 * _SIZE) / focal
    return np.stack([*np.meshgrid(u, -u), -np.ones((_SIZE, _SIZE))], -1)


def _weights() -> np.ndarray:
    """Barycentric weights [h, w, 3] of the wall's points."""
    weights = np.linalg.solve(_WALL.T, _rays().reshape(-1, 3).T).T.reshape(_SIZE, _SIZE, 3)
    return weights / weights.sum(-1, keepdims=True)


def _unit(a: np.ndarray) -> np.ndarray:
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def test_texels_are_tents_at_their_places():
    """Linear between texels, and 1 at (i / R, j / R): checked with one bright texel after the
    other, in three channels at a time."""
    cells = 3
    places = [(i, j) for j in range(cells + 1) for i in range(cells + 1 - j)]
    weights = _weights()
    grid = np.stack([weights[..., 0], weights[..., 1]], -1) * cells
    for first in range(0, len(places) - 2, 3):
        texels = np.zeros((len(places), 3), np.uint8)
        texels[range(first, first + 3), range(3)] = 255
        scene = dataclasses.replace(
            surfaces(_WALL[None]),
            texels=texels,
            texel_start=np.zeros(1, np.int32),
            texel_cells=np.full(1, cells, np.int32),
        )
        rgb = _render(scene).rgb
        for channel, place in enumerate(places[first : first + 3]):
            du, dv = np.moveaxis(grid - place, -1, 0)
            # The tent over the six triangles around a point of the grid.
            tent = np.clip(1.0 - np.max(np.abs([du, dv, du + dv]), axis=0), 0.0, None)
            np.testing.assert_allclose(rgb[..., channel], 255.0 * tent, atol=1.0)


def test_light_and_highlights_follow_opengl():
    """OpenGL 2.1, section 2.14.1: local viewer, half vectors, spotlights."""
    normals = _unit(np.array([[-0.4, -0.3, 1.0], [0.5, -0.2, 1.0], [0.0, 0.6, 1.0]]))
    light = lights(
        ambient=np.float32([0.05, 0.1, 0.0]),
        headlight=np.float32([0.2, 0.2, 0.3]),
        headlight_specular=np.float32([0.5, 0.4, 0.3]),
        diffuse=np.float32([[0.5, 0.4, 0.3], [0.3, 0.4, 0.5]]),
        position=np.float32([[0.0, 0.0, 0.0], [0.5, 1.0, 0.0]]),
        direction=_unit(np.float32([[-0.3, 0.2, -1.0], [-0.2, -0.3, -1.0]])).astype(np.float32),
        is_directional=np.array([True, False]),
        cutoff_cos=np.float32([0.0, np.cos(0.5)]),
        exponent=np.float32([0.0, 7.5]),
    )
    light = dataclasses.replace(light, specular=np.float32([[0.9, 0.0, 0.1], [0.2, 0.9, 0.0]]))
    color, specular, shininess, emission = np.array([0.5, 0.6, 0.7]), 0.6, 20.0, 0.1
    texture = np.array([1.0, 0.8, 0.6])
    scene = dataclasses.replace(
        surfaces(_WALL[None], colors=np.broadcast_to(texture, (1, 3, 3)), light=light),
        normals=normals[None].astype(np.float32),
        geom_rgb=color[None].astype(np.float32),
        geom_specular=np.float32([specular]),
        geom_shininess=np.float32([shininess]),
        geom_emission=np.float32([emission]),
    )
    points = _weights() @ _WALL
    normal, eye = _unit(_weights() @ normals), _unit(-points)
    spot = _unit(light.position[1].astype(float) - points)
    along = -(spot @ light.direction[1].astype(float))
    cone = np.where(along >= light.cutoff_cos[1], np.maximum(along, 0.0) ** 7.5, 0.0)
    assert 0.1 < (cone > 0).mean() < 0.9
    total = color * (light.ambient + emission)
    for way, reach, diffuse, shine in (
        (np.array([0.0, 0.0, 1.0]), 1.0, light.headlight, light.headlight_specular),
        (-light.direction[0].astype(float), 1.0, light.diffuse[0], light.specular[0]),
        (spot, cone, light.diffuse[1], light.specular[1]),
    ):
        cosine = (normal * way).sum(-1)
        gleam = np.maximum((normal * _unit(way + eye)).sum(-1), 0.0) ** shininess
        lit = np.maximum(cosine, 0.0)[..., None] * diffuse * color
        lit = lit + np.where(cosine > 0, gleam, 0.0)[..., None] * specular * shine
        total = total + np.broadcast_to(reach, cosine.shape)[..., None] * lit
    expected = 255.0 * np.clip(total, 0.0, 1.0) * texture
    on_edge = np.abs(along - np.cos(0.5)) < 1e-5
    np.testing.assert_allclose(_render(scene).rgb[~on_edge], expected[~on_edge], atol=1.01)
    assert expected.max() > 200


def test_the_sky_follows_the_elevation():
    steps = 101
    ramp = np.linspace(0.0, 1.0, steps)[:, None] * np.ones(3)
    scene = surfaces(_WALL[None, ::-1], light=lights(sky=ramp.astype(np.float32)))
    pitch = 0.4
    # Looks along +x with z up, then raised by the pitch.
    level = np.array([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    c, s = np.cos(pitch), np.sin(pitch)
    xmat = level @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    frame = _render(scene, xmat)
    assert (frame.geom == -1).all()
    sine = _unit(_rays() @ xmat.T)[..., 2]
    np.testing.assert_allclose(frame.rgb[..., 0], 255 * 0.5 * (sine + 1.0), atol=255 / steps)
    assert frame.rgb[0].mean() > frame.rgb[-1].mean() + 50
