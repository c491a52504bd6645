"""Textures: looked up as OpenGL does, and carried over to texels of triangles."""

import mujoco
import numpy as np
import pytest

from jaxvla.envs.rendering import texturing

_SCENE = """
<mujoco>
  <asset>
    <texture name="board" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 0 1"
             width="64" height="64" colorspace="linear"/>
    <texture name="encoded" type="2d" builtin="flat" rgb1="0.5 0.5 0.5" width="8" height="8"
             colorspace="sRGB"/>
    <material name="uniform" texture="board" texrepeat="2 4" texuniform="true"/>
    <material name="stretched" texture="board" texrepeat="2 4" specular="0.25" shininess="0.75"
              emission="0.5" rgba="0.2 0.4 0.6 1"/>
    <mesh name="leaf" vertex="0 0 0  2 0 0  2 1 0  0 1 0  1 0.5 -1"
          face="0 1 2  0 2 3  1 0 4  2 1 4  3 2 4  0 3 4"
          texcoord="0 0  1 0  1 1  0 1  0.5 0.5"/>
  </asset>
  <worldbody>
    <geom name="uniform" type="plane" size="2 3 0.1" material="uniform"/>
    <geom name="stretched" type="plane" size="2 3 0.1" material="stretched"/>
    <geom name="leaf" type="mesh" mesh="leaf" material="uniform"/>
    <geom name="plain" type="sphere" size="1" rgba="0.1 0.2 0.3 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(_SCENE)


def _board(st: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether a checkerboard of two by two fields that repeats is red at coordinates [P, 2],
    and whether that is clear: away from the fields' borders."""
    field = np.floor(2.0 * st).astype(int)
    inside = np.abs(2.0 * st - field - 0.5).max(1) < 0.3
    return field.sum(1) % 2 == 0, inside


def _texel_points(texels: texturing.Texels, triangles: np.ndarray) -> np.ndarray:
    """Place of each texel, by the definition."""
    points = [
        (i * corners[0] + j * corners[1] + (r - i - j) * corners[2]) / r
        for corners, r in zip(triangles, texels.cells, strict=True)
        for j in range(r + 1)
        for i in range(r + 1 - j)
    ]
    return np.array(points)


@pytest.mark.parametrize(("name", "per_m"), [("uniform", [1, 2]), ("stretched", [0.5, 4 / 6])])
def test_a_plane_is_mapped_as_opengl_maps_it(model: mujoco.MjModel, name: str, per_m: list):
    triangles = np.array(
        [[[-2, -3, 0], [2, -3, 0], [2, 3, 0]], [[-2, -3, 0], [2, 3, 0], [-2, 3, 0]]]
    )
    g = model.geom(name).id
    texels = texturing.bake(model, g, 1.0 * triangles, None)
    assert texels is not None
    points = _texel_points(texels, triangles)
    assert len(points) == len(texels.colors)
    # settexture in MuJoCo's renderer: s = x / 2, t = -y / 2 in units of repeats, from -1/2.
    st = points[:, :2] * per_m * np.array([1.0, -1.0]) - 0.5
    is_red, is_clear = _board(st)
    assert is_clear.mean() > 0.2
    expected = np.where(is_red[:, None], [255, 0, 0], [0, 0, 255])
    np.testing.assert_array_equal(texels.colors[is_clear], expected[is_clear])


def test_a_mesh_keeps_its_texture_coordinates(model: mujoco.MjModel):
    g = model.geom("leaf").id
    mesh = int(model.geom_dataid[g])
    source = texturing.SourceMesh(model, mesh)
    top = int(np.argmax((source.corners[..., 2] > source.corners[..., 2].max() - 1e-6).sum(1)))
    triangles = source.corners[top][None]
    texels = texturing.bake(model, g, triangles, source)
    assert texels is not None
    assert source.coordinates is not None
    r = int(texels.cells[0])
    weights = texturing.barycentric_grid(r)
    is_red, is_clear = _board(weights @ source.coordinates[top])
    expected = np.where(is_red[:, None], [255, 0, 0], [0, 0, 255])
    np.testing.assert_array_equal(texels.colors[is_clear], expected[is_clear])


def test_the_side_that_is_looked_at_answers(model: mujoco.MjModel):
    """Of two faces at the same place the one that looks the same way."""
    source = texturing.SourceMesh(model, int(model.geom_dataid[model.geom("leaf").id]))
    normals = np.cross(
        source.corners[:, 1] - source.corners[:, 0], source.corners[:, 2] - source.corners[:, 0]
    )
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    rim = 0.5 * (source.corners[:, 0] + source.corners[:, 1])
    face, weights = source.closest(rim, normals)
    np.testing.assert_allclose(normals[face], normals, atol=1e-9)
    found = np.einsum("pk,pkx->px", weights, source.corners[face])
    np.testing.assert_allclose(found, rim, atol=1e-9)


def test_colours_that_are_linear_need_three_texels(model: mujoco.MjModel):
    triangle = np.array([[[0.1, 0.1, 0.0], [0.3, 0.1, 0.0], [0.1, 0.2, 0.0]]])
    texels = texturing.bake(model, model.geom("uniform").id, triangle, None)
    assert texels is not None
    assert texels.cells.tolist() == [1]
    assert len(texels.colors) == 3


def test_lookup_is_linear_between_pixel_centres_and_repeats():
    pixels = np.arange(12.0).reshape(2, 2, 3)
    st = np.array([[0.25, 0.25], [0.75, 0.25], [0.5, 0.25], [0.5, 0.5], [1.25, -0.75], [0.0, 0.25]])
    a, b, c, d = pixels.reshape(4, 3)
    expected = [a, b, (a + b) / 2, (a + b + c + d) / 4, a, (a + b) / 2]
    np.testing.assert_allclose(texturing.lookup(pixels, st), expected)


def test_cube_sides_follow_opengl():
    colors = np.arange(6)[:, None] * np.ones(3)
    pixels = np.repeat(colors, 4, axis=0)[:, None] * np.ones((1, 4, 1))
    axes = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    seen = texturing.cube_lookup(pixels, axes + 0.1 * np.roll(axes, 1, axis=1))
    np.testing.assert_allclose(seen, colors)
    # On +z, s runs along x and t against y; row 0 is t = 0.
    image = np.zeros((2, 2, 3))
    image[0, 1] = 1.0
    corner = texturing.cube_lookup(image, np.array([[0.9, 0.9, 1.0], [0.9, -0.9, 1.0]]))
    np.testing.assert_allclose(corner[:, 0], [1.0, 0.0])


def test_encoded_textures_are_decoded(model: mujoco.MjModel):
    board, encoded = model.texture("board").id, model.texture("encoded").id
    np.testing.assert_allclose(texturing.intensities(model, board)[[0, 51, 255]], [0, 0.2, 1])
    # IEC 61966-2-1: half intensity is stored as 188.
    np.testing.assert_allclose(
        texturing.intensities(model, encoded)[[0, 188, 255]], [0, 0.5, 1], atol=0.004
    )


def test_shrinking_averages_squares():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:2, :2, 0] = [[0, 100], [200, 100]]
    intensity = (np.arange(256) / 255.0).astype(np.float32)
    small = texturing.shrink(pixels, 3.9, intensity)
    assert small.shape == (2, 4, 3)
    np.testing.assert_allclose(small[0, 0, 0], 100 / 255, rtol=1e-6)
    assert small[1].max() == 0


def test_materials(model: mujoco.MjModel):
    finish = texturing.finish(model, model.geom("stretched").id)
    np.testing.assert_allclose(finish.rgb, [0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(
        [finish.specular, finish.shininess, finish.emission], [0.25, 96.0, 0.5], rtol=1e-6
    )
    plain = texturing.finish(model, model.geom("plain").id)
    np.testing.assert_allclose(plain.rgb, [0.1, 0.2, 0.3], rtol=1e-6)
    assert plain.emission == 0
