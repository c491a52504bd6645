"""The contact budget: what C MuJoCo counts is what MJX needs, and what is missing is seen."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import mujoco
import numpy as np
import pytest

from jaxvla.envs.broad_phase import (
    active_geoms,
    contact_overflow,
    fwd_position,
    touchable_pairs,
)
from jaxvla.envs.libero_contacts import ContactCounter, candidate_pairs
from jaxvla.envs.libero_scene import set_numerics
from jaxvla.envs.quiet_mjx import mjx

NUM_BLOCKS = 5
NUM_TOUCHING = 3 + 2 + 2
"""Blocks on the plane, on another, and at the board."""


def pile_xml() -> str:
    """Stacks of two blocks and a single one. A tall board, whose sphere holds all of them, leans
    on the first stack; another stands aside."""
    blocks = "".join(
        f"""<body pos="{0.11 * column} 0 {0.049 + 0.099 * row}"><freejoint/>
        <geom type="box" size="0.05 0.05 0.05" contype="2" conaffinity="7"/></body>"""
        for column, row in (divmod(index, 2) for index in range(NUM_BLOCKS))
    )
    return f"""<mujoco><worldbody><geom type="plane" size="1 1 .1" contype="1" conaffinity="6"/>
      <geom type="box" pos="-0.059 0 0.5" size="0.01 0.5 0.5" contype="1" conaffinity="6"/>
      <geom type="box" pos="0 0.3 0.5" size="0.5 0.01 0.5" contype="1" conaffinity="6"/>
      {blocks}</worldbody></mujoco>"""


def load(budget: Mapping[str, float]) -> Any:
    return mujoco.MjModel.from_xml_string(set_numerics(pile_xml(), budget))


@functools.cache
def collide(max_geom_pairs: int, max_contact_points: int) -> tuple[mjx.Data, int]:
    """The pile in MJX, with its contacts; and the overflow."""
    budget = {"max_geom_pairs": max_geom_pairs, "max_contact_points": max_contact_points}
    model = mjx.put_model(load(budget), impl="jax")

    @jax.jit
    def compute() -> tuple[mjx.Data, jax.Array]:
        data = fwd_position(model, mjx.make_data(model))
        return data, contact_overflow(model, data)

    data, overflow = compute()
    assert overflow.dtype == np.int32 and overflow.shape == ()
    return data, int(overflow)


def num_touching(data: mjx.Data) -> int:
    return int((np.asarray(data._impl.contact.dist) < 0).sum())


def touching_pairs(data: Any) -> set[tuple[int, int]]:
    contact = data._impl.contact if isinstance(data, mjx.Data) else data.contact
    geoms = np.asarray(contact.geom)[np.asarray(contact.dist) < 0]
    return {(int(min(pair)), int(max(pair))) for pair in geoms}


@pytest.fixture(scope="module")
def counted() -> tuple[ContactCounter, Any]:
    model = load({})
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    counter = ContactCounter(model)
    counter.count(data)
    return counter, data


def test_candidates_are_the_pairs_that_mjx_ranks():
    model = load({})
    box = int(mujoco.mjtGeom.mjGEOM_BOX)
    pairs = candidate_pairs(model)
    assert set(pairs) == {(box, box)}  # the plane's are not ranked
    assert len(pairs[box, box]) == NUM_BLOCKS * (NUM_BLOCKS - 1) // 2 + 2 * NUM_BLOCKS


def test_geoms_out_of_reach_are_not_active(counted: tuple[ContactCounter, Any]):
    model, data = load({}), counted[1]
    xmat, half = data.geom_xmat.reshape(-1, 3, 3), model.geom_aabb[:, 3:]
    active = active_geoms(data.geom_xpos, xmat, half, touchable_pairs(model))
    # plane, the two boards, two stacks, the single block
    np.testing.assert_array_equal(active, [0, 1, 0, 1, 1, 1, 1, 0])


def test_turned_boxes_reach_further():
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
    half = np.array([[1.0, 0.1, 0.1], [1.0, 1.0, 1.0]])
    is_pair = np.array([[False, True], [True, False]])
    for distance, expected in ((1.67, True), (1.69, False)):  # 0.6 * 1 + 0.8 * 0.1 + 1
        xpos = np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
        active = active_geoms(xpos, np.stack([turn, np.eye(3)]), half, is_pair)
        np.testing.assert_array_equal(active, [expected, expected])


def test_the_counted_rank_is_just_enough_for_mjx(counted: tuple[ContactCounter, Any]):
    counter, data = counted
    expected = touching_pairs(data)
    assert len(expected) == NUM_TOUCHING
    # Ahead of the stacked pairs come those of the board with the four active blocks.
    assert counter.ranks == [4 + 2]
    enough, overflow = collide(counter.ranks[0], counter.contacts[0])
    assert touching_pairs(enough) == expected and overflow == 0
    less, overflow = collide(counter.ranks[0] - 1, counter.contacts[0])
    assert len(touching_pairs(less)) == len(expected) - 1 and overflow == 4


def test_the_counted_contacts_are_just_enough_for_mjx(counted: tuple[ContactCounter, Any]):
    counter = counted[0]
    assert counter.contacts == [4 * NUM_TOUCHING]
    found, overflow = collide(counter.ranks[0], counter.contacts[0])
    assert num_touching(found) == counter.contacts[0] and overflow == 0
    found, overflow = collide(counter.ranks[0], counter.contacts[0] - 5)
    assert num_touching(found) == counter.contacts[0] - 5 and overflow == 5
