"""MuJoCo Warp's ray tracer against the rasterizer. Warp runs on CPUs too, slowly."""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from small_surfaces import NEAR_M, lights, surfaces

from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer
from jaxvla.envs.rendering.surfaces import Surfaces, corner_normals
from jaxvla.envs.rendering.tessellation import SHAPES
from jaxvla.envs.rendering.warp_renderer import (
    WarpRenderer,
    decoded,
    numbered_model,
)

_SIZE = 64
_LEAST_IOU = 0.97
_MOST_COLOR_ERROR = 1.0
"""Mean absolute difference of an image, of 255."""

_needs_warp = pytest.mark.skipif(
    importlib.util.find_spec("warp") is None,
    reason="warp is not installed (pip install 'jaxvla[warp]')",
)


def _scene() -> Surfaces:
    """A floor, and a box, a ball and a wall of two faces that share their place, on bodies of
    their own; texels of many colours, lights, highlights and a sky."""
    kinds = mujoco.mjtGeom
    floor = SHAPES[kinds.mjGEOM_BOX](np.array([2.0, 2.0, 0.1]), 1) - [0.0, 0.0, 0.1]
    box = SHAPES[kinds.mjGEOM_BOX](np.array([0.3, 0.2, 0.25]), 1)
    ball = SHAPES[kinds.mjGEOM_SPHERE](np.array([0.3, 0.0, 0.0]), 1)
    wall = 0.4 * np.array(
        [[[-1, 0, -1], [1, 0, -1], [1, 0, 1]], [[-1, 0, -1], [1, 0, 1], [-1, 0, 1]]]
    )
    shapes = [floor, box, ball, np.concatenate([wall, wall[:, ::-1]])]
    counts = [len(shape) for shape in shapes]
    rng = np.random.default_rng(0)
    light = lights(
        ambient=np.full(3, 0.2, np.float32),
        headlight=np.full(3, 0.3, np.float32),
        diffuse=np.full((1, 3), 0.6, np.float32),
        position=np.zeros((1, 3), np.float32),
        direction=np.float32([[0.0, 0.6, -0.8]]),
        is_directional=np.ones(1, bool),
        cutoff_cos=np.zeros(1, np.float32),
        exponent=np.zeros(1, np.float32),
        sky=rng.uniform(0.0, 1.0, (8, 3)).astype(np.float32),
    )
    bare = surfaces(
        np.concatenate(shapes), colors=rng.uniform(0.3, 1.0, (sum(counts), 3, 3)), light=light
    )
    return dataclasses.replace(
        bare,
        normals=np.concatenate([corner_normals(shape) for shape in shapes]).astype(np.float32),
        geom=np.repeat(np.arange(4, dtype=np.int32), counts),
        geom_body=np.arange(4, dtype=np.int32),
        geom_rgb=rng.uniform(0.5, 1.0, (4, 3)).astype(np.float32),
        geom_specular=np.full(4, 0.5, np.float32),
        geom_shininess=np.full(4, 30.0, np.float32),
        geom_emission=np.float32([0.0, 0.1, 0.0, 0.0]),
        geom_names=("floor", "box", "ball", "wall"),
        body_names=("floor", "box", "ball", "wall"),
    )


def _rotation(rng: np.random.Generator) -> np.ndarray:
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def _poses(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The floor stays where it is; the others turn, the wall about the vertical only."""
    xpos = np.array([[0, 0, 0], [-0.6, 0.1, 0.5], [0.2, -0.3, 0.6], [0.7, 0.5, 0.5]])
    xpos[1:, :2] += rng.uniform(-0.1, 0.1, (3, 2))
    angle = rng.uniform(-0.6, 0.6)
    cosine, sine = np.cos(angle), np.sin(angle)
    upright = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return xpos, np.stack([np.eye(3), _rotation(rng), _rotation(rng), upright])


def _looking(place: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Axes of a camera at a place that looks at a point, y up, as columns."""
    back = (place - at) / np.linalg.norm(place - at)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back], -1)


def _worlds(count: int, seed: int = 0) -> tuple[BodyPoses, Camera]:
    """Poses and cameras that differ between worlds, opening angles too; in turn from the front
    and from the back."""
    rng = np.random.default_rng(seed)
    poses = [_poses(rng) for _ in range(count)]
    places = rng.uniform([-0.5, -2.8, 1.2], [0.5, -2.2, 1.8], (count, 3))
    places[1::2, 1] *= -1.0
    axes = [_looking(place, np.array([0.1, 0.1, 0.4])) for place in places]
    camera = Camera(
        xpos=jnp.float32(places),
        xmat=jnp.float32(np.stack(axes)),
        fovy_rad=jnp.float32(np.linspace(0.8, 1.0, count)),
    )
    xpos, xmat = (np.stack(arrays) for arrays in zip(*poses, strict=True))
    return BodyPoses(xpos=jnp.float32(xpos), xmat=jnp.float32(xmat)), camera


def _render(renderer: WarpRenderer | Rasterizer, worlds: tuple[BodyPoses, Camera]) -> Frame:
    return jax.tree.map(np.asarray, jax.jit(renderer.render_batch)(*worlds))


def _assert_alike(actual: Frame, expected: Frame, num_geoms: int) -> None:
    assert (expected.num_dropped_pairs == 0).all()
    for world in range(len(expected.geom)):
        for geom in range(-1, num_geoms):
            one, other = actual.geom[world] == geom, expected.geom[world] == geom
            assert other.sum() > 20, (world, geom)
            assert (one & other).sum() / (one | other).sum() >= _LEAST_IOU, (world, geom)
        difference = actual.rgb[world].astype(int) - expected.rgb[world]
        assert np.abs(difference).mean() <= _MOST_COLOR_ERROR
    same = (actual.geom == expected.geom) & (expected.geom >= 0)
    error = np.abs(actual.depth[same] / expected.depth[same] - 1.0)
    assert np.quantile(error, 0.99) < 1e-4
    assert np.isinf(actual.depth[actual.geom < 0]).all()


def test_without_warp_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(ValueError, match=r"jaxvla\[warp\]"):
        WarpRenderer(_scene(), body_ids=[0, 1, 2, 3], size=_SIZE)


def test_triangles_are_looked_up_at_their_numbers() -> None:
    rng = np.random.default_rng(0)
    count = 40_000  # three channels
    scene = surfaces(rng.uniform(-1.0, 1.0, (count, 3, 3)))
    scene = dataclasses.replace(scene, geom=np.arange(count, dtype=np.int32) % 3)
    model, geoms = numbered_model(scene)
    height, width = model.tex_height[0], model.tex_width[0]
    texture = model.tex_data.reshape(height, width, 3).astype(np.uint32)
    places = (model.mesh_texcoord.reshape(-1, 2) * [width, height]).astype(int)
    texels = texture[places[:, 1], places[:, 0]]
    code = texels[:, 0] << 16 | texels[:, 1] << 8 | texels[:, 2]
    triangle = np.asarray(decoded(jnp.asarray(code)))
    assert sorted(triangle) == sorted(np.repeat(np.arange(count), 3))
    for mesh, geom in enumerate(geoms):
        first = model.mesh_texcoordadr[mesh]
        here = triangle[first : first + model.mesh_texcoordnum[mesh]]
        assert (scene.geom[here] == geom).all()
        assert (here[::3] == here[2::3]).all()
    np.testing.assert_array_equal(decoded(jnp.uint32([0xFF000000, 0xFF010101])), [-1, 0])


@pytest.mark.slow  # Warp compiles
@pytest.mark.timeout(900)
@_needs_warp
def test_images_are_those_of_the_rasterizer() -> None:
    scene, ids = _scene(), [0, 1, 2, 3]
    renderer = WarpRenderer(scene, body_ids=ids, size=_SIZE)
    rasterizer = Rasterizer(scene, body_ids=ids, size=_SIZE)
    for count in (2, 3, 2):  # of two batch sizes, one comes again, with other poses
        worlds = _worlds(count, seed=count)
        _assert_alike(_render(renderer, worlds), _render(rasterizer, worlds), 4)


@pytest.mark.slow  # Warp compiles
@pytest.mark.timeout(900)
@_needs_warp
def test_nothing_is_seen_before_the_near_plane() -> None:
    screen = np.array([[-9.0, -9.0, 0.0], [9.0, -9.0, 0.0], [0.0, 9.0, 0.0]])
    scene = surfaces(np.stack([screen, screen]), bodies=np.arange(2))
    near = np.array([0.9, 1.1]) * NEAR_M
    xpos = np.zeros((2, 2, 3))
    xpos[:, 0, 2], xpos[:, 1, 2] = -near, -2.0
    worlds = (
        BodyPoses(xpos=jnp.float32(xpos), xmat=jnp.broadcast_to(jnp.eye(3), (2, 2, 3, 3))),
        Camera(
            xpos=jnp.zeros((2, 3)),
            xmat=jnp.broadcast_to(jnp.eye(3), (2, 3, 3)),
            fovy_rad=jnp.full(2, 1.2),  # slanted rays meet it at more than near_m
        ),
    )
    frame = _render(WarpRenderer(scene, body_ids=[0, 1], size=_SIZE), worlds)
    assert (frame.geom == np.array([1, 0])[:, None, None]).all()
    np.testing.assert_allclose(frame.depth[0], 2.0, rtol=1e-5)
    np.testing.assert_allclose(frame.depth[1], near[1], rtol=1e-5)
