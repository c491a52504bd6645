"""Rules by which a LIBERO scene becomes a physics model for MJX, on a small scene of its kind."""

import math
from typing import Any

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvla.envs.libero_scene import (
    IMPRATIO,
    Pose,
    exact_xml,
    reduce_scene,
    set_numerics,
    slice_boxes,
    with_original_friction,
)

SCENE = """
<mujoco>
  <compiler angle="radian" inertiagrouprange="0 0"/>
  <option cone="elliptic" impratio="20" density="1.2" viscosity="2e-05"/>
  <asset>
    <texture name="wood" type="2d" builtin="flat" width="4" height="4"/>
    <material name="wood" texture="wood"/>
    <mesh name="wedge" vertex="-.01 -.02 0  .01 -.02 0  -.01 .02 0  .01 .02 0
                               -.01 0 .06  .01 0 .06"/>
  </asset>
  <worldbody>
    <light pos="0 0 2"/>
    <camera name="agentview" pos="0.658613123456 0 1.61035" quat="0.638 0.305 0.305 0.638"/>
    <geom name="floor" type="plane" size="3 3 0.1" material="wood"/>
    <body name="table" pos="0.2 0 0.4" euler="0 0 0.7">
      <body name="table_col" pos="0.1 0.05 0">
        <geom name="table_box" type="box" size="0.02 0.5 0.6" euler="0 1.5707963267948966 0"
              friction="0.6 0.005 0.0001" material="wood"/>
        <geom name="leg" type="box" size="0.02 0.02 0.2" pos="0.3 0.3 -0.2"/>
      </body>
    </body>
    <body name="robot0_base" pos="-0.6 0 0.5">
      <geom name="mount_col" type="cylinder" size="0.1 0.2"/>
      <body name="robot0_link1">
        <inertial pos="0 0 0.1" mass="2" diaginertia="0.2 0.2 0.1"/>
        <joint name="robot0_joint1" axis="0 0 1" armature="1.6666666666666667"/>
        <geom name="link1_collision" type="mesh" mesh="wedge"/>
        <geom name="link1_vis" type="mesh" mesh="wedge" contype="0" conaffinity="0" group="1"/>
        <body name="gripper0_palm" pos="0.5 0 0.1">
          <inertial pos="0 0 0" mass="0.1" diaginertia="0.01 0.01 0.01"/>
          <geom name="palm_collision" type="mesh" mesh="wedge" quat="0 0 0 1"/>
        </body>
        <body name="gripper0_finger" pos="0.5 0 0.2">
          <inertial pos="0 0 0" mass="0.1" diaginertia="0.01 0.01 0.01"/>
          <joint name="gripper0_finger_joint1" type="slide" axis="0 1 0"/>
          <geom name="finger_collision" type="mesh" mesh="wedge" condim="4" contype="0"
                friction="2 0.05 0.0001" quat="0 0 0 1"/>
          <geom name="pad_collision" type="box" size="0.008 0.004 0.008"/>
        </body>
      </body>
    </body>
    <body name="mug_main" pos="0 0 0.47">
      <freejoint name="mug_joint0"/>
      <geom name="mug_g0" type="box" size="0.03 0.0033333333333 0.05" pos="0 0 0.05"
            density="100"/>
      <geom name="mug_bottom" type="cylinder" size="0.045" fromto="0 0 0 0 0 0.0052"
            density="100"/>
      <geom name="mug_twin" type="box" size="0.03 0.0033333333333 0.05" pos="0 0 0.05"
            density="100"/>
      <geom name="mug_vis" type="mesh" mesh="wedge" contype="0" conaffinity="0" group="1"
            material="wood"/>
      <site name="mug_site" pos="0 0 0.1" size="0.002"/>
    </body>
    <body name="cabinet_main" pos="0.3 0 0.45">
      <geom name="cabinet_g0" type="box" size="0.1 0.01 0.1" pos="0 0.1 0.2"/>
      <body name="cabinet_drawer">
        <joint name="cabinet_drawer" type="slide" axis="0 1 0" damping="50"/>
        <geom name="cabinet_g1" type="box" size="0.09 0.08 0.01"/>
        <geom name="cabinet_knob" type="sphere" size="0.01" pos="0 -0.1 0"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="robot0_motor" joint="robot0_joint1"/></actuator>
</mujoco>
"""
PLACED = {"mug_main", "cabinet_main"}


@pytest.fixture(scope="module")
def original() -> Any:
    return mujoco.MjModel.from_xml_string(SCENE)


@pytest.fixture(scope="module")
def reduced() -> Any:
    return mujoco.MjModel.from_xml_string(reduce_scene(SCENE, PLACED).xml)


def geom_names(model: Any) -> set[str]:
    return {model.geom(index).name for index in range(model.ngeom)}


def may_touch(model: Any, first: str, second: str) -> bool:
    one, other = model.geom(first), model.geom(second)
    return bool((one.contype[0] & other.conaffinity[0]) or (other.contype[0] & one.conaffinity[0]))


def test_states_bodies_and_actuators_are_kept(original: Any, reduced: Any):
    assert (reduced.nq, reduced.nv, reduced.nu) == (original.nq, original.nv, original.nu)
    for name in ("jnt_type", "jnt_qposadr", "jnt_pos", "jnt_axis", "jnt_range", "qpos0"):
        np.testing.assert_array_equal(getattr(original, name), getattr(reduced, name))
    for index in range(original.nbody):
        assert original.body(index).name == reduced.body(index).name
    assert reduced.actuator(0).name == "robot0_motor"
    assert reduced.site("mug_site").id >= 0


@pytest.mark.parametrize(
    "name",
    [
        "body_mass",
        "body_inertia",
        "body_ipos",
        "body_iquat",
        "body_pos",
        "body_quat",
        "dof_armature",
        "dof_damping",
        "cam_pos",
        "site_pos",
    ],
)
def test_dynamics_are_kept_to_the_last_digits(original: Any, reduced: Any, name: str):
    np.testing.assert_allclose(getattr(reduced, name), getattr(original, name), 1e-14, 1e-16)


def test_free_motion_is_that_of_the_original():
    """Without contacts nothing is left in which they could differ."""
    poses = []
    for xml in (SCENE, reduce_scene(SCENE, PLACED).xml):
        model: Any = mujoco.MjModel.from_xml_string(xml)
        model.opt.disableflags = mujoco.mjtDisableBit.mjDSBL_CONTACT
        data = mujoco.MjData(model)
        data.qvel[:] = np.linspace(-1, 1, model.nv)
        data.ctrl[:] = 2.0
        mujoco.mj_step(model, data, 100)
        poses.append(data.qpos.copy())
    np.testing.assert_allclose(poses[0], poses[1], rtol=0, atol=1e-12)


def test_solver_options_are_kept_but_for_iterations_and_cone(original: Any, reduced: Any):
    for name in ("timestep", "integrator", "density", "viscosity", "solver", "tolerance"):
        assert getattr(original.opt, name) == getattr(reduced.opt, name), name
    assert (reduced.opt.iterations, reduced.opt.ls_iterations) == (20, 6)
    assert reduced.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    assert reduced.opt.impratio == IMPRATIO


def test_c_mujoco_can_have_the_original_friction(original: Any, reduced: Any):
    before = reduced.opt.cone
    like = with_original_friction(reduced)
    for name in ("cone", "impratio", "iterations", "ls_iterations"):
        assert getattr(like.opt, name) == getattr(original.opt, name)
    assert reduced.opt.cone == before != like.opt.cone


def test_the_highest_level_face_of_the_arena_becomes_a_plane(reduced: Any):
    scene = reduce_scene(SCENE, PLACED)
    assert scene.support_height_m == pytest.approx(0.42, abs=1e-12)
    plane = reduced.geom("table_box")
    assert plane.type[0] == mujoco.mjtGeom.mjGEOM_PLANE
    assert plane.friction[0] == 0.6
    data = mujoco.MjData(reduced)
    mujoco.mj_kinematics(reduced, data)
    np.testing.assert_allclose(data.geom_xmat[plane.id].reshape(3, 3)[:, 2], [0, 0, 1], atol=1e-12)
    assert data.geom_xpos[plane.id][2] == pytest.approx(0.42, abs=1e-12)
    assert not {"floor", "leg"} & geom_names(reduced)


def test_a_scene_without_table_keeps_its_floor():
    spec = mujoco.MjSpec.from_string(SCENE)
    spec.delete(spec.body("table"))
    scene = reduce_scene(spec.to_xml(), PLACED)
    assert scene.support_height_m == 0.0
    assert "floor" in geom_names(mujoco.MjModel.from_xml_string(scene.xml))


def test_what_only_a_renderer_needs_is_dropped(reduced: Any):
    assert (reduced.nmesh, reduced.ntex, reduced.nmat, reduced.nlight) == (0, 0, 0, 0)
    assert not {"mug_vis", "link1_vis"} & geom_names(reduced)


def test_arm_and_mount_do_not_collide(reduced: Any):
    assert not {"mount_col", "link1_collision"} & geom_names(reduced)


def test_the_palm_becomes_one_box(reduced: Any):
    assert {name for name in geom_names(reduced) if "palm" in name} == {"palm_collision_0"}
    box = reduced.geom("palm_collision_0")
    np.testing.assert_allclose(box.size, [0.01, 0.01, 0.03])
    np.testing.assert_allclose(box.pos, [0, 0, 0.03], atol=1e-9)


def test_finger_meshes_become_boxes_that_touch_like_them(original: Any, reduced: Any):
    assert "finger_collision" not in geom_names(reduced)
    boxes = [reduced.geom(f"finger_collision_{index}") for index in range(3)]
    for box in boxes:
        assert box.type[0] == mujoco.mjtGeom.mjGEOM_BOX
        np.testing.assert_array_equal(box.friction, original.geom("finger_collision").friction)
    # The wedge is 0.04 wide at its foot and 0.06 high: slices of 0.02, wide 5/6, 1/2, 1/6 of it.
    np.testing.assert_allclose([box.size[1] for box in boxes], [0.02 * f / 6 for f in (5, 3, 1)])
    np.testing.assert_allclose([box.size[0] for box in boxes], 0.01)
    np.testing.assert_allclose([box.pos[2] for box in boxes], [0.01, 0.03, 0.05], atol=1e-9)


def test_a_cylinder_becomes_an_octagon(reduced: Any):
    corners = []
    for name in ("mug_bottom", "mug_bottom_across"):
        box = reduced.geom(name)
        assert box.type[0] == mujoco.mjtGeom.mjGEOM_BOX
        np.testing.assert_allclose([box.size[2], box.pos[2]], 0.0026, rtol=1e-12)
        corners += [(x * box.size[0], y * box.size[1]) for x in (-1, 1) for y in (-1, 1)]
    radii = [math.hypot(*corner) for corner in corners]
    angles = sorted(math.degrees(math.atan2(y, x)) for x, y in corners)
    np.testing.assert_allclose(radii, 0.045, rtol=1e-12)
    np.testing.assert_allclose(np.diff(angles), 45, rtol=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("mug_g0", "table_box", True),
        ("mug_g0", "cabinet_g1", True),
        ("mug_g0", "mug_bottom", True),  # of two mugs; those of one never touch
        ("pad_collision", "mug_g0", True),
        ("finger_collision_0", "mug_g0", True),
        ("pad_collision", "cabinet_g1", True),
        ("pad_collision", "table_box", True),
        ("pad_collision", "finger_collision_0", False),
        ("cabinet_g1", "cabinet_g0", False),
        ("cabinet_g1", "table_box", False),
        ("mug_twin", "table_box", False),
    ],
)
def test_who_touches_whom(reduced: Any, first: str, second: str, expected: bool):
    assert may_touch(reduced, first, second) == expected


def test_there_is_one_contact_dimension(reduced: Any):
    assert set(reduced.geom_condim) == {3}


def test_fixtures_can_be_moved():
    pose = Pose(pos=(0.1, 0.2, 0.3), quat=(0.6, 0.0, 0.0, 0.8))
    model: Any = mujoco.MjModel.from_xml_string(
        reduce_scene(SCENE, PLACED, {"cabinet_main": pose}).xml
    )
    np.testing.assert_allclose(model.body("cabinet_main").pos, pose.pos)
    np.testing.assert_allclose(model.body("cabinet_main").quat, pose.quat)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('type="box" size="0.02 0.02 0.2" pos="0.3', 'type="sphere" size="0.02" pos="0.3', "leg"),
        (
            'type="box" size="0.02 0.02 0.2"',
            'type="box" size="0.02 0.02 0.2" euler="0.1 0 0"',
            "leg",
        ),
        ('type="sphere" size="0.01"', 'type="ellipsoid" size="0.01 0.01 0.02"', "cabinet_knob"),
    ],
)
def test_what_the_rules_do_not_cover_is_refused(old: str, new: str, message: str):
    assert old in SCENE
    with pytest.raises(ValueError, match=message):
        reduce_scene(SCENE.replace(old, new), PLACED)


def test_numerics_are_what_mjx_looks_up(reduced: Any):
    xml = set_numerics(reduce_scene(SCENE, PLACED).xml, {"max_geom_pairs": 48, "other": 2.5})
    model: Any = mujoco.MjModel.from_xml_string(xml)
    assert model.numeric("max_geom_pairs").data == [48]
    assert model.numeric("other").data == [2.5]
    np.testing.assert_array_equal(model.body_inertia, reduced.body_inertia)


def test_exact_xml_restores_what_saving_rounds(original: Any):
    spec = mujoco.MjSpec.from_string(SCENE)
    spec.compile()
    rounded: Any = mujoco.MjModel.from_xml_string(spec.to_xml())
    exact: Any = mujoco.MjModel.from_xml_string(exact_xml(spec.to_xml(), original))
    assert np.abs(rounded.cam_pos - original.cam_pos).max() > 1e-7
    np.testing.assert_allclose(exact.cam_pos, original.cam_pos, rtol=1e-15)
    np.testing.assert_allclose(exact.geom_size[:3], original.geom_size[:3], rtol=1e-15)


@given(
    st.lists(
        st.tuples(*[st.floats(-1, 1, allow_subnormal=False)] * 3),
        min_size=4,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_slices_are_stacked_and_inside_the_bounds(points: list, num_slices: int):
    hull = np.array(points)
    if np.ptp(hull[:, 2]) < 1e-3:
        return
    boxes = slice_boxes(hull, num_slices)
    assert len(boxes) == num_slices
    lower = np.array([centre - half for centre, half in boxes])
    upper = np.array([centre + half for centre, half in boxes])
    assert all((half >= 0).all() for _, half in boxes)
    np.testing.assert_allclose(upper[:-1, 2], lower[1:, 2], atol=1e-12)
    np.testing.assert_allclose(lower[0, 2], hull[:, 2].min(), atol=1e-12)
    np.testing.assert_allclose(upper[-1, 2], hull[:, 2].max(), atol=1e-12)
    assert (lower >= hull.min(axis=0) - 1e-9).all() and (upper <= hull.max(axis=0) + 1e-9).all()


def test_slices_of_a_cone_have_its_width_at_half_height():
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    rim = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)
    hull = np.concatenate([rim, [[0.0, 0.0, 1.0]]])
    halves = [half for _, half in slice_boxes(hull, 4)]
    np.testing.assert_allclose([half[0] for half in halves], [7 / 8, 5 / 8, 3 / 8, 1 / 8])
