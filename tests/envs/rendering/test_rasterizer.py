"""The rasterizer against a float64 reference, hand-made scenes and its own equivalences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_surfaces import NEAR_M, Reference, draw, lights, surfaces

from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer
from jaxvla.envs.rendering.surfaces import Surfaces

_SIZE = 48
_FOVY_RAD = 1.0
_FACING = np.array([[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
"""Seen from +z, counter-clockwise."""


def _at(x: float, y: float, z: float, scale: float = 1.0) -> np.ndarray:
    """The triangle that faces the camera, somewhere else."""
    return scale * _FACING + np.array([x, y, z])


def _camera(xpos: np.ndarray | None = None, xmat: np.ndarray | None = None) -> Camera:
    return Camera(
        xpos=jnp.asarray(np.zeros(3) if xpos is None else xpos, jnp.float32),
        xmat=jnp.asarray(np.eye(3) if xmat is None else xmat, jnp.float32),
        fovy_rad=jnp.float32(_FOVY_RAD),
    )


def _poses(xpos: np.ndarray, xmat: np.ndarray | None = None) -> BodyPoses:
    xmat = np.broadcast_to(np.eye(3), (len(xpos), 3, 3)) if xmat is None else xmat
    return BodyPoses(xpos=jnp.asarray(xpos, jnp.float32), xmat=jnp.asarray(xmat, jnp.float32))


def _rasterizer(scene: Surfaces, *, size: int = _SIZE, max_pairs: int = 2048) -> Rasterizer:
    ids = range(len(scene.body_names))
    return Rasterizer(scene, body_ids=list(ids), size=size, max_pairs=max_pairs)


def _render(scene: Surfaces, poses: BodyPoses, camera: Camera | None = None) -> Frame:
    frame = jax.jit(_rasterizer(scene).render)(poses, _camera() if camera is None else camera)
    return jax.tree.map(np.asarray, frame)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def _random_scene(seed: int, count: int = 60) -> tuple[Surfaces, BodyPoses]:
    """Triangles of very different sizes on three bodies, some of them around and behind the
    camera."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform([-1.5, -1.5, -3.0], [1.5, 1.5, 0.5], (count, 3))
    extent = 10 ** rng.uniform(-2.0, 0.5, (count, 1, 1))
    scene = surfaces(
        centers[:, None] + extent * rng.normal(size=(count, 3, 3)),
        bodies=rng.integers(0, 3, count),
        colors=rng.uniform(0.0, 1.0, (count, 3, 3)),
    )
    turns = np.stack([np.eye(3)] + [_small_turn(rng) for _ in range(2)])
    return scene, _poses(rng.uniform(-0.3, 0.3, (3, 3)), turns)


def _small_turn(rng: np.random.Generator) -> np.ndarray:
    x, y, z = rng.uniform(-0.3, 0.3, 3)
    matrix, _ = np.linalg.qr(np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
    return matrix * np.sign(np.diag(matrix))


def _assert_agrees(frame: Frame, expected: Reference) -> None:
    clear = expected.is_clear
    assert clear.mean() > 0.7
    np.testing.assert_array_equal(frame.geom[clear], expected.geom[clear])
    hit = clear & (expected.geom >= 0)
    np.testing.assert_allclose(frame.depth[hit], expected.depth[hit], rtol=1e-4)
    assert np.isinf(frame.depth[clear & (expected.geom < 0)]).all()
    difference = frame.rgb[hit] - 255.0 * np.clip(expected.colors[hit], 0.0, 1.0)
    assert np.abs(difference).max() <= 1.0


def test_random_triangles_look_as_in_the_reference():
    scene, _ = _random_scene(0)
    render = jax.jit(_rasterizer(scene).render)
    rng = np.random.default_rng(1)
    for _ in range(6):
        xmat = np.stack([_small_turn(rng) for _ in range(3)])
        poses = _poses(rng.uniform(-0.5, 0.5, (3, 3)), xmat)
        expected = draw(scene, np.asarray(poses.xpos), np.asarray(poses.xmat), _SIZE, _FOVY_RAD)
        _assert_agrees(jax.tree.map(np.asarray, render(poses, _camera())), expected)


def test_moving_camera_and_bodies_together_changes_nothing():
    scene, poses = _random_scene(7)
    rng = np.random.default_rng(8)
    turn, shift = _rotation(rng), rng.normal(size=3)
    moved = _poses(np.asarray(poses.xpos) @ turn.T + shift, turn @ np.asarray(poses.xmat))
    render = jax.jit(_rasterizer(scene).render)
    before = jax.tree.map(np.asarray, render(poses, _camera()))
    after = jax.tree.map(np.asarray, render(moved, _camera(shift, turn)))
    same = before.geom == after.geom
    assert same.mean() > 0.999
    hit = same & (before.geom >= 0)
    np.testing.assert_allclose(after.depth[hit], before.depth[hit], rtol=1e-4)


def test_the_image_is_upright_and_not_mirrored():
    right = _at(0.5, 0.0, -2.0, 0.2)
    above = _at(0.0, 0.5, -2.0, 0.2)
    frame = _render(surfaces(np.stack([right, above])), _poses(np.zeros((1, 3))))
    rows, columns = np.nonzero(frame.geom == 0)
    assert columns.min() > _SIZE / 2
    assert abs(rows.mean() - _SIZE / 2) < 4
    assert np.nonzero(frame.geom == 1)[0].max() < _SIZE / 2


def test_the_nearer_surface_hides_the_other_in_either_order():
    triangles = np.stack([_at(0, 0, 0), _at(0, 0, 0)])
    render = jax.jit(_rasterizer(surfaces(triangles, bodies=np.arange(2))).render)
    for near in (0, 1):
        places = np.array([[0.5, 0.0, -3.0], [0.5, 0.0, -3.0]])
        places[near] = [0.0, 0.0, -2.0]
        frame = render(_poses(places), _camera())
        assert frame.geom[_SIZE // 2, _SIZE // 2] == near
        np.testing.assert_allclose(frame.depth[_SIZE // 2, _SIZE // 2], 2.0, rtol=1e-5)
        np.testing.assert_allclose(frame.depth[frame.geom == 1 - near], 3.0, rtol=1e-5)
        assert (frame.geom == 1 - near).any()


def test_back_faces_are_not_seen():
    frame = _render(surfaces(_at(0, 0, -2)[None, ::-1]), _poses(np.zeros((1, 3))))
    assert (frame.geom == -1).all()
    assert (frame.rgb == 0).all()


def test_a_floor_that_reaches_behind_the_camera_is_cut_at_the_near_plane():
    floor = np.array([[-50.0, -0.02, 50.0], [50.0, -0.02, 50.0], [0.0, -0.02, -100.0]])
    frame = _render(surfaces(floor[None]), _poses(np.zeros((1, 3))))
    slope = (np.arange(_SIZE) + 0.5 - _SIZE / 2) / (0.5 * _SIZE / np.tan(0.5 * _FOVY_RAD))
    expected = 0.02 / np.maximum(slope, 1e-9)
    seen = (expected > NEAR_M) & (expected < 40.0)
    assert 0 < seen.sum() < _SIZE / 2
    column = frame.depth[:, _SIZE // 2]
    np.testing.assert_allclose(column[seen], expected[seen], rtol=1e-4)
    assert np.isinf(column[(expected <= NEAR_M) | (slope < 0)]).all()


def test_neighbours_share_every_pixel_between_them():
    """A square of two triangles with corners on pixel centres leaves no gap along the diagonal."""
    a, b, c, d = (
        np.array([x, y, -1.0]) for x, y in ((-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (-0.3, 0.3))
    )
    frame = _render(surfaces(np.stack([[a, b, c], [a, c, d]])), _poses(np.zeros((1, 3))))
    rows, columns = np.nonzero(frame.geom >= 0)
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert len(rows) == area


def test_drawing_in_two_parts_is_drawing_at_once():
    scene, poses = _random_scene(9)
    still = scene.geom_body[scene.geom] == 0
    rasterizer = _rasterizer(scene)

    def in_parts(poses: BodyPoses, camera: Camera) -> Frame:
        behind = rasterizer.only(still).visible(poses, camera)
        return rasterizer.only(~still).render(poses, camera, behind=behind)

    parts = jax.jit(in_parts)(poses, _camera())
    jax.tree.map(np.testing.assert_array_equal, parts, _render(scene, poses))
    assert np.unique(parts.geom).size > 10


def test_a_batch_is_made_of_single_images():
    scene, _ = _random_scene(10)
    rng = np.random.default_rng(11)
    poses = [_poses(rng.uniform(-0.3, 0.3, (3, 3))) for _ in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *poses)
    cameras = jax.tree.map(
        lambda *x: jnp.stack(x), *[_camera(0.1 * rng.normal(size=3)) for _ in poses]
    )
    rasterizer = _rasterizer(scene)
    frames = jax.jit(rasterizer.render_batch)(batch, cameras)
    vmapped = jax.jit(jax.vmap(rasterizer.render))(batch, cameras)
    one_by_one = jax.jit(rasterizer.render)
    for i, one in enumerate(poses):
        single = one_by_one(one, jax.tree.map(lambda x, i=i: x[i], cameras))
        for many in (frames, vmapped):
            np.testing.assert_array_equal(many.geom[i], single.geom)
            np.testing.assert_allclose(many.depth[i], single.depth, rtol=1e-5)


def test_pairs_that_do_not_fit_are_counted():
    scene = surfaces(np.stack([_at(0, 0, -3, 9)] * 5))
    num_tiles = (_SIZE // 16) ** 2
    render = jax.jit(_rasterizer(scene, max_pairs=2 * num_tiles).render)
    frame = render(_poses(np.zeros((1, 3))), _camera())
    assert frame.num_dropped_pairs == 3 * num_tiles
    assert (frame.geom == 0).all()
    assert _render(scene, _poses(np.zeros((1, 3)))).num_dropped_pairs == 0


def test_light_strengths_by_hand():
    tilted = np.array([[-9.0, -9.0, -3.0], [9.0, -9.0, -3.0], [0.0, 9.0, -21.0]])
    cosine = 1 / np.sqrt(2)  # the face looks up and towards the camera
    light = lights(
        ambient=np.array([0.1, 0.2, 0.0], np.float32),
        headlight=np.array([0.2, 0.0, 0.0], np.float32),
        diffuse=np.array([[0.0, 0.5, 0.0], [0.0, 0.0, 0.6]], np.float32),
        direction=np.array([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]], np.float32),
        position=np.zeros((2, 3), np.float32),
        is_directional=np.array([True, True]),
        cutoff_cos=np.zeros(2, np.float32),
        exponent=np.zeros(2, np.float32),
    )
    scene = surfaces(tilted[None], colors=np.full((1, 3, 3), 0.5), light=light)
    frame = _render(scene, _poses(np.zeros((1, 3))))
    strength = np.array([0.1 + 0.2 * cosine, 0.2 + 0.5 * cosine, 0.0])
    expected = np.round(255 * 0.5 * strength)
    np.testing.assert_allclose(frame.rgb[_SIZE // 2, _SIZE // 2], expected, atol=1)


def test_a_spotlight_reaches_what_its_cone_holds():
    """Three small faces at depth 2; the light is at the camera, turned 30 degrees to the right."""
    centers = np.array([[np.tan(a) * 2.0, 0.0, -2.0] for a in np.deg2rad([30.0, 10.0, -20.0])])
    light = lights(
        ambient=np.zeros(3, np.float32),
        diffuse=np.ones((1, 3), np.float32),
        direction=np.array([[0.5, 0.0, -np.sqrt(0.75)]], np.float32),
        position=np.zeros((1, 3), np.float32),
        is_directional=np.array([False]),
        cutoff_cos=np.cos(np.deg2rad([45.0])).astype(np.float32),
        exponent=np.array([10.0], np.float32),
    )
    scene = surfaces(0.12 * _FACING + centers[:, None], light=light)
    camera = _camera().replace(fovy_rad=jnp.float32(1.6))
    frame = jax.jit(_rasterizer(scene, size=144).render)(_poses(np.zeros((1, 3))), camera)
    angles = np.deg2rad([0.0, 20.0, 50.0])
    incidence = np.cos(np.deg2rad([30.0, 10.0, -20.0]))
    expected = 255 * np.where(angles < np.pi / 4, np.cos(angles) ** 10, 0.0) * incidence
    for k in range(3):
        pixels = np.asarray(frame.rgb)[np.asarray(frame.geom) == k, 0].astype(float)
        assert len(pixels) > 9
        assert abs(pixels.mean() - expected[k]) < 12, k


def test_sizes_that_do_not_fit_are_refused():
    scene = surfaces(_at(0, 0, -2)[None])
    for size in (0, 100, 16 * 91):
        with pytest.raises(ValueError, match="multiple of 16"):
            _rasterizer(scene, size=size)
