"""The layout language."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.layout import AXES, ROLES, LayoutError, parse_layout


def _axes(text: str) -> dict[str, dict[str, int]]:
    return {role: where.axes for role, where in parse_layout(text).roles.items()}


def test_colocated_roles_share_devices():
    layout = parse_layout("colocated=8:data2,fsdp2,tensor2")
    assert layout.placement == "colocated" and layout.num_devices == 8
    assert {(x.first, x.num_devices) for x in layout.roles.values()} == {(0, 8)}
    assert {role: where.axes for role, where in layout.roles.items()} == {
        "simulation": {"data": 8},
        "serving": {"data": 4, "tensor": 2},
        "learning": {"data": 2, "fsdp": 2, "tensor": 2},
    }


def test_parts_take_devices_in_order():
    layout = parse_layout("simulation=2 serving=2 learning=4:data2,fsdp2")
    assert layout.placement == "disaggregated" and layout.num_devices == 8
    assert {role: where.first for role, where in layout.roles.items()} == {
        "simulation": 0,
        "serving": 2,
        "learning": 4,
    }
    assert str(layout.roles["learning"]) == "devices 4-7, data2,fsdp2,tensor1"
    assert str(parse_layout("colocated=1").roles["simulation"]) == "devices 0, data1"


def test_two_roles_may_share():
    layout = parse_layout("learning=4:fsdp4 simulation+serving=4:tensor2")
    assert layout.placement == "hybrid"
    assert layout.roles["simulation"].axes == {"data": 4}
    assert layout.roles["serving"].axes == {"data": 2, "tensor": 2}
    assert layout.roles["serving"].first == 4


def test_data_takes_what_is_left():
    assert _axes("colocated=8:fsdp4")["learning"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert _axes("colocated=6")["learning"] == {"data": 6, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no devices for simulation, serving, learning"),
        ("simulation=1 serving=1", "no devices for learning"),
        ("colocated=0", "is not ROLE"),
        ("colocated=-1", "is not ROLE"),
        ("colocated", "is not ROLE"),
        ("colocated=8:", "is not ROLE"),
        ("colocated=1.5", "is not ROLE"),
        ("trainer=1 simulation=1 serving=1 learning=1", "'trainer' is no role"),
        ("colocated=1 learning=1", "'learning' is given twice"),
        ("simulation+simulation=1 serving=1 learning=1", "'simulation' is given twice"),
        ("colocated=8:pipe2", "no axis 'pipe'"),
        ("simulation=2:tensor2 serving=1 learning=1", "simulation has no axis 'tensor'"),
        ("colocated=8:fsdp2,fsdp2", "axis 'fsdp' is given twice"),
        ("colocated=8:fsdp", "'fsdp' is not AXISn"),
        ("colocated=8:fsdp0", "'fsdp0' is not AXISn"),
        ("colocated=8:fsdp2,", "is not AXISn"),
        ("colocated=8@", "is not ROLE"),
        ("colocated=8@-1", "is not ROLE"),
        ("colocated=8:data8@1", "is not ROLE"),
        ("colocated=8:fsdp3", "8 devices do not divide by 3"),
        ("colocated=8:data2,fsdp2", "do not multiply to 8"),
    ],
)
def test_malformed_layouts_are_refused(text: str, complaint: str):
    with pytest.raises(LayoutError, match=complaint):
        parse_layout(text)


@given(st.text(alphabet="colatedsimuwrngfp+=:@,0123456789 ²١", max_size=40))
def test_any_text_gives_a_layout_or_a_layout_error(text: str):
    try:
        layout = parse_layout(text)
    except LayoutError:
        return
    assert set(layout.roles) == set(ROLES)


@given(
    st.permutations(ROLES),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_axes_multiply_to_devices_and_parts_do_not_overlap(
    roles: list[str], data: list[int], others: list[int]
):
    sizes = {"simulation": 1, "serving": others[0], "learning": others[1] * others[2]}
    named = {
        "simulation": "",
        "serving": f":tensor{others[0]}",
        "learning": f":fsdp{others[1]},tensor{others[2]}",
    }
    counts = {role: sizes[role] * n for role, n in zip(roles, data, strict=True)}
    layout = parse_layout(" ".join(f"{role}={counts[role]}{named[role]}" for role in roles))
    taken: list[int] = []
    for role, where in layout.roles.items():
        assert tuple(where.axes) == AXES[role]
        assert math.prod(where.axes.values()) == where.num_devices == counts[role]
        taken += range(where.first, where.first + where.num_devices)
    assert sorted(taken) == list(range(layout.num_devices))


def test_any_overlap_can_be_said():
    layout = parse_layout("simulation=1@3 serving=4@0 learning=4:fsdp2")
    assert {role: list(where.devices) for role, where in layout.roles.items()} == {
        "simulation": [3],
        "serving": [0, 1, 2, 3],
        "learning": [4, 5, 6, 7],  # after the part before it, not after the last device
    }
    assert layout.num_devices == 8 and layout.placement == "hybrid"
    assert layout.occupants() == [
        (range(0, 3), ("serving",)),
        (range(3, 4), ("simulation", "serving")),
        (range(4, 8), ("learning",)),
    ]


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        ("simulation=2@1 serving=2@1 learning=2@1", "colocated"),
        ("learning=2@4 serving=2@2 simulation=2@0", "disaggregated"),
        ("simulation=2@0 serving=2@1 learning=2@4", "hybrid"),  # all unlike, but two overlap
        ("simulation=1@0 serving=1@0 learning=2@0", "hybrid"),
    ],
)
def test_placement_is_what_shares_devices(text: str, placement: str):
    assert parse_layout(text).placement == placement


def test_devices_of_no_role_are_left_out():
    layout = parse_layout("simulation+serving=1@2 learning=1@5")
    assert layout.num_devices == 6
    assert layout.occupants() == [
        (range(2, 3), ("simulation", "serving")),
        (range(5, 6), ("learning",)),
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=3, max_size=3))
def test_occupants_are_the_devices_by_role(spans: list[tuple[int, int]]):
    parts = [f"{role}={n}@{first}" for role, (n, first) in zip(ROLES, spans, strict=True)]
    layout = parse_layout(" ".join(parts))
    found = {d: roles for devices, roles in layout.occupants() for d in devices}
    expected = {
        device: tuple(
            role
            for role, (n, first) in zip(ROLES, spans, strict=True)
            if first <= device < first + n
        )
        for device in range(layout.num_devices)
    }
    assert found == {device: roles for device, roles in expected.items() if roles}
    together = {len(roles) for roles in found.values()}
    assert (layout.placement == "disaggregated") == (together == {1})
    assert (layout.placement == "colocated") == (together == {3})


def test_equal_parts_of_a_role():
    role = parse_layout("simulation=2 serving=8:tensor2 learning=1").roles["serving"]
    assert [str(part) for part in role.split(2)] == [
        "devices 2-5, data2,tensor2",
        "devices 6-9, data2,tensor2",
    ]
    assert role.split(1) == (role,)
    assert [list(part.devices) for part in role.split(4)] == [[2, 3], [4, 5], [6, 7], [8, 9]]
    for count in (3, 8):  # 8 devices, of which tensor needs pairs
        with pytest.raises(LayoutError, match=f"of 4 does not divide into {count} parts"):
            role.split(count)
