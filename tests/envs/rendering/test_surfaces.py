"""What is extracted from a model: which geoms, where, how many triangles."""

import io

import mujoco
import numpy as np
import pytest

from jaxvla.envs.rendering.surfaces import Surfaces, extract_surfaces

_SCENE = """
<mujoco>
  <asset><mesh name="ball" builtin="sphere" params="4"/></asset>
  <worldbody>
    <light pos="0 0 3" dir="0 0 -1" diffuse="0.5 0.4 0.3" cutoff="60" exponent="5"/>
    <geom name="floor" type="plane" size="1 2 0.1" group="1" rgba="0.3 0.3 0.3 1"/>
    <geom name="shape" type="box" size="9 9 9" group="0"/>
    <geom name="ghost" type="box" size="9 9 9" group="1" rgba="1 1 1 0"/>
    <body name="thing" pos="1 0 0.5" euler="0 0 90">
      <geom type="box" size="0.1 0.2 0.3" pos="0.5 0 0" euler="90 0 0" group="1"
            rgba="1 0 0 1" mass="1"/>
      <geom name="ball" type="mesh" mesh="ball" pos="0 0 2" group="2"/>
    </body>
    <body name="bare"><geom type="sphere" size="0.1" group="3"/></body>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(_SCENE)


@pytest.fixture(scope="module")
def scene(model: mujoco.MjModel) -> Surfaces:
    return extract_surfaces(model, max_triangles=400)


def _corners(scene: Surfaces, name: str) -> np.ndarray:
    return scene.triangles[scene.geom == scene.geom_names.index(name)].reshape(-1, 3)


def test_geoms_that_cameras_see(scene: Surfaces):
    assert scene.geom_names == ("floor", "thing/0", "ball")
    assert scene.body_names == ("world", "thing")
    assert scene.geom_body.tolist() == [0, 1, 1]
    np.testing.assert_allclose(scene.geom_rgb[1], [1, 0, 0])


def test_triangles_are_in_the_frame_of_their_body(scene: Surfaces):
    box = _corners(scene, "thing/0")
    np.testing.assert_allclose(box.min(0), [0.4, -0.3, -0.2], atol=1e-6)
    np.testing.assert_allclose(box.max(0), [0.6, 0.3, 0.2], atol=1e-6)
    distance = np.linalg.norm(_corners(scene, "ball") - [0, 0, 2], axis=-1)
    assert abs(distance - 1.0).max() < 3 * scene.tolerance_m


def test_normals_look_outward(scene: Surfaces):
    triangles = scene.triangles
    face = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    assert ((face[:, None] * scene.normals).sum(-1) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1.0, atol=1e-5)
    is_ball = scene.geom == scene.geom_names.index("ball")
    outward = triangles[is_ball] - [0, 0, 2]
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    assert (outward * scene.normals[is_ball]).sum(-1).min() > 0.95


def test_the_budget_is_kept_and_used(scene: Surfaces):
    assert 380 <= len(scene.triangles) <= 400
    assert scene.num_source_triangles > 1000
    assert scene.tolerance_m > 0


def test_without_need_nothing_is_simplified(model: mujoco.MjModel, scene: Surfaces):
    whole = extract_surfaces(model, max_triangles=100_000)
    assert whole.tolerance_m == 0
    assert len(whole.triangles) == scene.num_source_triangles


def test_a_budget_too_small_is_refused(model: mujoco.MjModel):
    with pytest.raises(ValueError, match="max_triangles"):
        extract_surfaces(model, max_triangles=10)


def test_lights(scene: Surfaces):
    np.testing.assert_allclose(scene.lights.position, [[0, 0, 3]])
    np.testing.assert_allclose(scene.lights.direction, [[0, 0, -1]], atol=1e-6)
    np.testing.assert_allclose(scene.lights.cutoff_cos, [0.5], atol=1e-6)


def test_lights_that_fade_are_refused():
    xml = _SCENE.replace("<light ", '<light attenuation="1 0.1 0" ')
    with pytest.raises(ValueError, match="attenuation"):
        extract_surfaces(mujoco.MjModel.from_xml_string(xml))


def test_arrays_go_to_a_file_and_back(scene: Surfaces):
    file = io.BytesIO()
    np.savez(file, **scene.to_arrays())
    file.seek(0)
    with np.load(file) as arrays:
        again = Surfaces.from_arrays(dict(arrays))
    assert again.geom_names == scene.geom_names
    assert again.near_m == scene.near_m
    for name, array in scene.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array)


def test_bodies_are_found_by_name(scene: Surfaces, model: mujoco.MjModel):
    assert scene.body_ids(model) == [0, model.body("thing").id]
    other = mujoco.MjModel.from_xml_string("<mujoco><worldbody/></mujoco>")
    with pytest.raises(ValueError, match="thing"):
        scene.body_ids(other)
