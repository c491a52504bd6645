"""Goal terms on a small scene: hand-made states, and contacts against C MuJoCo.

Against LIBERO's own verdicts: test_libero_goals.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from scipy.spatial.transform import Rotation

from jaxvla.envs import predicates as p

_XML = """
<mujoco>
  <worldbody>
    <body name="shelf" pos="0.5 0 0.2" euler="0 0 90">
      <geom name="shelf" type="box" size="0.1 0.05 0.01"/>
      <body name="drawer"><joint name="slide" type="slide" axis="0 1 0"/>
        <geom type="box" size="0.02 0.02 0.02"/></body>
      <body name="knob"><joint name="turn"/><geom name="knob" size="0.01" mass="0.1"/></body>
    </body>
    <body name="cup"><freejoint name="cup"/>
      <geom name="cup_left" type="box" size="0.01 0.03 0.03" pos="-0.03 0 0.03"/>
      <geom name="cup_right" type="box" size="0.01 0.03 0.03" pos="0.03 0 0.03"/></body>
    <body name="plate"><freejoint name="plate"/>
      <geom name="plate" type="box" size="0.06 0.06 0.005"/>
      <geom name="rim" type="box" size="0.01 0.01 0.01" margin="0.01"/></body>
  </worldbody>
</mujoco>"""

CONTACT = p.Contact(geoms=("cup_left", "cup_right"), other_geoms=("plate",))
ON_PLATE = p.OnObject(object="cup", support="plate", contact=CONTACT)
SHELF_TOP = p.Region(
    body="shelf", pos=(0.0, 0.0, 0.02), quat=(1.0, 0.0, 0.0, 0.0), half_size=(0.1, 0.05, 0.002)
)
ON_SHELF = p.OnRegion(
    object="cup",
    region=SHELF_TOP,
    contact=p.Contact(geoms=("cup_left", "cup_right"), other_geoms=("shelf",)),
)
OPEN = p.JointsAt(joints=("slide", "turn"), comparison=">", threshold=0.1, needs_all=False)
LEVEL = dataclasses.replace(SHELF_TOP, pos=(0.0, 0.0, 0.01))
"""Centred on the shelf's upper face, so that an object in it can touch the shelf."""
ALL_KINDS: tuple[p.GoalTerm, ...] = (
    ON_PLATE,
    dataclasses.replace(ON_SHELF, region=LEVEL),
    dataclasses.replace(ON_SHELF, contact=None),
    p.InRegion(object="plate", region=SHELF_TOP),
    OPEN,
    p.Up(object="cup", height_m=1.0),
)


@functools.cache
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(_XML)


def verdict(term: p.GoalTerm, **places: object) -> bool:
    """Judges one state of C MuJoCo. A free body's place is its position or whole pose."""
    data = mujoco.MjData(model())
    for name, place in places.items():
        values = np.atleast_1d(np.asarray(place, np.float64))
        data.joint(name).qpos[: len(values)] = values
    mujoco.mj_kinematics(model(), data)
    return bool(p.bind([term], model()).is_reached(data))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0.0, 0.0, 0.0045), True),  # the cup's floor 0.5 mm deep in the plate
        ((0.0, 0.0, 0.0055), False),  # 0.5 mm above it
        ((0.029, 0.0, 0.0045), True),
        ((0.031, 0.0, 0.0045), False),
        ((0.02, 0.02, 0.0045), True),  # 28 mm
        ((0.022, 0.022, 0.0045), False),  # 31 mm: a circle, not a square
        ((0.0, 0.0, -0.001), False),  # touches, but is lower
    ],
)
def test_on_object(offset: tuple[float, ...], expected: bool) -> None:
    plate = np.array([0.2, -0.1, 0.4])
    assert verdict(ON_PLATE, plate=plate, cup=plate + offset) is expected


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0.0, 0.0, 0.0), False),  # in the air: the shelf's face is at -0.01
        ((0.0, 0.0, -0.0025), False),  # within the lower limit, not touching
    ],
)
def test_on_region_needs_contact(offset: tuple[float, ...], expected: bool) -> None:
    assert verdict(ON_SHELF, cup=np.array([0.5, 0.0, 0.22]) + offset) is expected


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0.0, 0.0, -0.0025), True),  # half size 0.002, up to 0.005 lower
        ((0.0, 0.0, -0.0035), False),
        ((0.0, 0.0, 0.1015), True),  # up to 0.1 higher
        ((0.0, 0.0, 0.1025), False),
        ((0.049, 0.099, 0.05), True),  # the shelf is turned: x and y change places
        ((0.051, 0.0, 0.05), False),
        ((0.0, 0.101, 0.05), False),
    ],
)
def test_on_region_without_contact(offset: tuple[float, ...], expected: bool) -> None:
    term = dataclasses.replace(ON_SHELF, contact=None)
    assert verdict(term, cup=np.array([0.5, 0.0, 0.22]) + offset) is expected


def test_on_region_holds_when_all_conditions_do() -> None:
    term = dataclasses.replace(ON_SHELF, region=LEVEL)
    assert verdict(term, cup=(0.5, 0.0, 0.2095))
    assert not verdict(term, cup=(0.5, 0.0, 0.2105))


def test_on_region_rotates_the_offset_as_libero_does() -> None:
    """Rotation times offset, not its inverse: 30 degrees tell them apart, 90 do not."""
    turned = dataclasses.replace(
        SHELF_TOP, body="world", quat=(np.cos(np.pi / 12), 0.0, 0.0, np.sin(np.pi / 12))
    )
    term = p.OnRegion(object="cup", region=turned, contact=None)
    rotation = Rotation.from_euler("z", 30, degrees=True).as_matrix()
    centre = np.array([0.0, 0.0, 0.02])
    assert verdict(term, cup=centre + rotation.T @ [0.09, 0.0, 0.05])
    assert not verdict(term, cup=centre + rotation @ [0.09, 0.0, 0.05])


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0.0, 0.0, 0.0), True),
        ((0.049, -0.099, 0.0), True),  # turned by a quarter
        ((0.051, 0.0, 0.0), False),
        ((0.0, 0.0, -0.0115), True),  # 0.002 and 0.01 of slack
        ((0.0, 0.0, -0.0125), False),
        ((0.0, 0.0, 0.0025), False),  # no slack above
    ],
)
def test_in_region(offset: tuple[float, ...], expected: bool) -> None:
    term = p.InRegion(object="plate", region=SHELF_TOP)
    assert verdict(term, plate=np.array([0.5, 0.0, 0.22]) + offset) is expected


def test_in_region_spans_the_rotated_diagonal_as_libero_does() -> None:
    """At 45 degrees (0.1, 0.05) becomes |(0.035, 0.106)|: narrow in x, whatever the region."""
    turned = dataclasses.replace(
        SHELF_TOP, body="world", quat=(np.cos(np.pi / 8), 0.0, 0.0, np.sin(np.pi / 8))
    )
    term = p.InRegion(object="plate", region=turned)
    assert verdict(term, plate=(0.034, 0.105, 0.02))
    assert not verdict(term, plate=(0.037, 0.0, 0.02))


def test_regions_move_with_their_body() -> None:
    region = p.Region(
        body="drawer", pos=(0.0, 0.0, 0.0), quat=(1.0, 0.0, 0.0, 0.0), half_size=(0.01, 0.01, 0.01)
    )
    term = p.InRegion(object="plate", region=region)
    assert not verdict(term, plate=(0.2, 0.0, 0.2))
    assert verdict(term, plate=(0.2, 0.0, 0.2), slide=0.3)  # along the turned y axis


@pytest.mark.parametrize(
    ("comparison", "at", "below"),
    [("<", False, True), ("<=", True, True), (">", False, False), (">=", True, False)],
)
def test_comparisons(comparison: str, at: bool, below: bool) -> None:
    term = p.JointsAt(joints=("slide",), comparison=comparison, threshold=0.5, needs_all=True)
    assert verdict(term, slide=0.5) is at
    assert verdict(term, slide=0.4999) is below
    assert verdict(term, slide=0.5001) is not below


@pytest.mark.parametrize(("needs_all", "expected"), [(False, True), (True, False)])
def test_any_or_all_joints(needs_all: bool, expected: bool) -> None:
    term = dataclasses.replace(OPEN, needs_all=needs_all)
    assert verdict(term, slide=0.2, turn=0.0) is expected
    assert verdict(term, slide=0.2, turn=0.2)
    assert not verdict(term, slide=0.0, turn=0.0)
    assert verdict(dataclasses.replace(term, joints=())) is needs_all


def test_up() -> None:
    term = p.Up(object="cup", height_m=1.0)
    assert verdict(term, cup=(0.0, 0.0, 1.0))
    assert not verdict(term, cup=(0.0, 0.0, 0.999))


def test_goals_are_conjunctions_and_batches_equal_single_worlds() -> None:
    """On mjx.Data, jitted and vmapped, against eager calls on MjData."""
    goal = p.bind(ALL_KINDS[:5], model())
    mjx_model = mjx.put_model(model(), impl="jax")
    rng = np.random.default_rng(0)
    qpos = np.tile(model().qpos0, (64, 1))
    qpos[:, :2] = rng.uniform(0.0, 0.2, (64, 2))
    qpos[:, 9:12] = [0.5, 0.0, 0.22] + rng.uniform(-1, 1, (64, 3)) * [0.03, 0.06, 0.005]
    qpos[:, 2:5] = qpos[:, 9:12] + rng.uniform(-1, 1, (64, 3)) * [0.03, 0.03, 0.01]

    @jax.jit
    @jax.vmap
    def judge(qpos):
        data = mjx.kinematics(mjx_model, mjx.make_data(mjx_model).replace(qpos=qpos))
        return goal.terms(data), goal.is_reached(data)

    terms, reached = judge(jnp.asarray(qpos, jnp.float32))
    expected = []
    for row in qpos:
        data = mujoco.MjData(model())
        data.qpos[:] = row
        mujoco.mj_kinematics(model(), data)
        expected.append(np.asarray(goal.terms(data)))
    np.testing.assert_array_equal(terms, expected)
    np.testing.assert_array_equal(reached, np.all(expected, -1))
    share = np.mean(expected, 0)
    assert share.min() > 0 and share.max() < 1


def test_boxes_overlap_exactly_when_mujoco_finds_a_contact() -> None:
    """300 random pairs of all shapes, most of them 10 or 100 micrometres from first contact."""
    rng = np.random.default_rng(0)
    half = np.exp(rng.uniform(-4, -1, (300, 2, 3)))
    turns = Rotation.random(600, rng=rng).as_matrix().reshape(300, 2, 3, 3)
    turns[::3, 1] = turns[::3, 0]  # parallel edges, where their products vanish
    direction = rng.normal(size=(300, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    centre = np.zeros((300, 2, 3))
    expected = np.empty(300, bool)
    for k in range(300):
        touching = functools.partial(_mujoco_touches, half[k], turns[k], direction[k])
        distance = _last_true(touching) + rng.choice([-1e-2, -1e-4, -1e-5, 1e-5, 1e-4, 1e-2])
        centre[k, 1] = distance * direction[k]
        expected[k] = touching(distance)
    first, second = (
        p.Boxes(
            centre=jnp.asarray(centre[:, [i]], jnp.float32),
            rotation=jnp.asarray(turns[:, [i]], jnp.float32),
            half_size=jnp.asarray(half[:, [i]], jnp.float32),
        )
        for i in (0, 1)
    )
    actual = jax.jit(jax.vmap(p.boxes_overlap))(first, second)
    np.testing.assert_array_equal(actual[:, 0, 0], expected)


def test_every_pair_of_boxes_is_tested() -> None:
    """A row of three unit cubes against two: which is with which."""
    first = p.Boxes(
        centre=jnp.asarray([[0.0, 0, 0], [3, 0, 0], [6, 0, 0]]),
        rotation=jnp.tile(jnp.eye(3), (3, 1, 1)),
        half_size=jnp.full((3, 3), 0.5),
    )
    second = p.Boxes(
        centre=jnp.asarray([[6.5, 0.5, 0], [1.5, 0, 0]]),
        rotation=jnp.tile(jnp.eye(3), (2, 1, 1)),
        half_size=jnp.asarray([[0.5, 0.5, 0.5], [1.1, 0.1, 0.1]]),
    )
    expected = [[False, True], [False, True], [True, False]]
    np.testing.assert_array_equal(p.boxes_overlap(first, second), expected)


def _last_true(touching: functools.partial) -> float:
    """Greatest distance at which boxes touch, by bisection."""
    low, high = 0.0, 4.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if touching(middle) else (low, middle)
    return low


def _mujoco_touches(
    half: np.ndarray, turns: np.ndarray, direction: np.ndarray, distance: float
) -> bool:
    """Whether `mj_collision` finds a contact between two boxes."""
    model, data = _two_boxes()
    model.geom_size[:] = half
    model.geom_rbound[:] = np.linalg.norm(half, axis=-1)
    data.qpos[:3], data.qpos[7:10] = 0.0, distance * direction
    for index, turn in enumerate(turns):
        x, y, z, w = Rotation.from_matrix(turn).as_quat()
        data.qpos[7 * index + 3 : 7 * index + 7] = w, x, y, z
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_collision(model, data)
    return data.ncon > 0


@functools.cache
def _two_boxes() -> tuple[mujoco.MjModel, mujoco.MjData]:
    body = '<body><freejoint/><geom type="box" size="1 1 1"/></body>'
    # The mid phase would keep bounds of the sizes that the model was compiled with.
    xml = f"""<mujoco><option><flag midphase="disable"/></option>
        <worldbody>{body * 2}</worldbody></mujoco>"""
    model = mujoco.MjModel.from_xml_string(xml)
    return model, mujoco.MjData(model)


@pytest.mark.parametrize("term", ALL_KINDS, ids=lambda term: type(term).__name__)
def test_terms_survive_json(term: p.GoalTerm) -> None:
    assert p.term_from_dict(json.loads(json.dumps(p.term_to_dict(term)))) == term


def test_damaged_terms_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds are"):
        p.term_from_dict({"kind": "near"})
    data = p.term_to_dict(ON_PLATE)
    with pytest.raises(ValueError, match="OnObject"):
        p.term_from_dict({**data, "colour": 1})
    with pytest.raises(ValueError, match="Contact"):
        p.term_from_dict({**data, "contact": {"geoms": []}})


def test_terms_that_do_not_fit_the_model_are_refused() -> None:
    def contact(name: str) -> p.OnObject:
        return dataclasses.replace(
            ON_PLATE, contact=dataclasses.replace(CONTACT, other_geoms=(name,))
        )

    with pytest.raises(ValueError, match="at least one"):
        p.bind([], model())
    with pytest.raises(KeyError, match="saucer"):
        p.bind([dataclasses.replace(ON_PLATE, support="saucer")], model())
    with pytest.raises(KeyError, match="base"):
        p.bind([contact("base")], model())
    with pytest.raises(ValueError, match="'knob'"):  # a sphere
        p.bind([contact("knob")], model())
    with pytest.raises(ValueError, match="'rim'"):  # a margin
        p.bind([contact("rim")], model())
    with pytest.raises(ValueError, match="slide or hinge"):
        p.bind([dataclasses.replace(OPEN, joints=("cup",))], model())
    with pytest.raises(ValueError, match="'='"):
        p.bind([dataclasses.replace(OPEN, comparison="=")], model())
