"""Where the gripper takes hold of bodies made of boxes."""

import mujoco
import numpy as np
import pytest

from jaxvla.envs.libero_grasps import UPS, BodyBoxes, Grasps, collision_boxes, find_grasps

UP = int(np.argmax(UPS @ [0.0, 0.0, 1.0]))


def boxes(*items: tuple[tuple[float, float, float], tuple[float, float, float]]) -> BodyBoxes:
    """Upright boxes, each of a centre and half the lengths of its edges."""
    centres, halves = (np.array(column) for column in zip(*items, strict=True))
    return BodyBoxes(
        body=np.zeros(len(items), int),
        centre=centres,
        rotation=np.tile(np.eye(3), (len(items), 1, 1)),
        half_size=halves,
    )


def upright(grasps: Grasps) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Point, axis and width of the grasps of an upright body, best first."""
    is_valid = np.isfinite(grasps.cost[UP])
    columns = (grasps.point[UP], grasps.axis[UP], grasps.width[UP])
    return [
        entry for entry, valid in zip(zip(*columns, strict=True), is_valid, strict=True) if valid
    ]


def test_a_box_is_held_across_its_narrowest_side() -> None:
    best = upright(find_grasps(boxes(((0, 0, 0), (0.03, 0.02, 0.05))), np.zeros(3)))[0]
    point, axis, width = best
    np.testing.assert_allclose(np.abs(axis), [0, 1, 0], atol=1e-6)
    assert width == pytest.approx(0.04, abs=1e-6)
    np.testing.assert_allclose(point[:2], 0, atol=1e-6)
    # The palm is 3.1 cm above the site and must stay above the top.
    assert 0.05 - 0.029 < point[2] < 0.05


def test_a_flat_box_is_held_with_the_tips_above_the_table() -> None:
    point, _, _ = upright(find_grasps(boxes(((0, 0, 0), (0.04, 0.02, 0.009))), np.zeros(3)))[0]
    # The tips reach 1 cm below the site.
    assert point[2] - 0.01 > -0.009


def test_what_is_wider_than_the_hand_is_not_held() -> None:
    grasps = find_grasps(boxes(((0, 0, 0), (0.05, 0.05, 0.03))), np.zeros(3))
    assert not upright(grasps)


def ring(radius: float, num: int = 24) -> BodyBoxes:
    """A bowl: a floor, and a wall of thin upright boxes."""
    yaw = 2 * np.pi * np.arange(num) / num
    zero, one = np.zeros(num), np.ones(num)
    columns = [
        [np.cos(yaw), np.sin(yaw), zero],
        [-np.sin(yaw), np.cos(yaw), zero],
        [zero, zero, one],
    ]
    rotation = np.transpose(np.array(columns), (2, 1, 0))
    centre = np.stack([radius * np.cos(yaw), radius * np.sin(yaw), 0.03 * one], -1)
    half = np.tile([0.002, radius * np.tan(np.pi / num), 0.03], (num, 1))
    return BodyBoxes(
        body=np.zeros(num + 1, int),
        centre=np.vstack([centre, [0.0, 0.0, 0.002]]),
        rotation=np.concatenate([rotation, np.eye(3)[None]]),
        half_size=np.vstack([half, [0.6 * radius, 0.6 * radius, 0.002]]),
    )


def test_a_bowl_is_held_at_its_rim() -> None:
    radius = 0.055
    found = upright(find_grasps(ring(radius), np.array([0.0, 0.0, 0.02])))
    assert len(found) > 12
    for point, axis, width in found:
        assert width < 0.012
        assert np.hypot(point[0], point[1]) == pytest.approx(radius, abs=0.006)
        # It closes across the wall, one finger inside.
        outward = point[:2] / np.linalg.norm(point[:2])
        assert abs(axis[:2] @ outward) > 0.85
    angles = np.arctan2([p[1] for p, _, _ in found], [p[0] for p, _, _ in found])
    assert angles.max() > 1.5 and angles.min() < -1.5, "all around"


def test_grasps_keep_open_fingers_and_palm_free() -> None:
    # A block with a wall 2 cm beside it along x, where an open finger would go, but room along y.
    wall = ((0.045, 0, 0.02), (0.005, 0.03, 0.06))
    found = upright(find_grasps(boxes(((0, 0, 0), (0.02, 0.02, 0.04)), wall), np.zeros(3)))
    on_block = [axis for point, axis, _ in found if abs(point[0]) < 0.015]
    assert on_block
    for axis in on_block:
        assert abs(axis[0]) < 0.6


def test_a_fallen_body_is_held_as_it_lies() -> None:
    # A bottle 5 cm thick and 20 cm long, on its side: held across, never along.
    grasps = find_grasps(boxes(((0, 0, 0), (0.025, 0.025, 0.1))), np.zeros(3))
    lying = int(np.argmax(UPS @ [1.0, 0.0, 0.0]))
    best = int(np.argmin(grasps.cost[lying]))
    np.testing.assert_allclose(np.abs(grasps.axis[lying, best]), [0, 1, 0], atol=1e-6)
    assert grasps.width[lying, best] == pytest.approx(0.05, abs=1e-6)


def test_collision_boxes_are_those_that_collide() -> None:
    model = mujoco.MjModel.from_xml_string("""
    <mujoco><worldbody>
      <geom type="plane" size="1 1 1"/>
      <body name="thing">
        <geom type="box" size="0.01 0.02 0.03" pos="1 2 3" euler="0 0 90"/>
        <geom type="cylinder" size="0.02 0.05"/>
        <geom type="capsule" size="0.02 0.05"/>
        <geom type="box" size="1 1 1" contype="0" conaffinity="0"/>
      </body>
    </worldbody></mujoco>""")
    found = collision_boxes(model, np.array([0, model.body("thing").id]))
    np.testing.assert_allclose(
        found.half_size, [[0.01, 0.02, 0.03], [0.02, 0.02, 0.05], [0.02, 0.02, 0.07]]
    )
    np.testing.assert_allclose(found.centre[0], [1, 2, 3])
    np.testing.assert_allclose(found.rotation[0] @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    assert (found.body == model.body("thing").id).all()


def test_other_shapes_are_refused() -> None:
    model = mujoco.MjModel.from_xml_string("""
    <mujoco><worldbody><body name="egg"><geom name="egg" type="ellipsoid" size="1 2 3"/></body>
    </worldbody></mujoco>""")
    with pytest.raises(ValueError, match="geom 'egg'"):
        collision_boxes(model, np.array([1]))
