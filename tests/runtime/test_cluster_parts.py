"""What the processes of a run tell each other."""

import dataclasses
import math

import numpy as np
import pytest

from jaxvla.layout import parse_layout
from jaxvla.runtime.directory import Directory
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.runtime.welcome import WelcomeCodec
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.transport.frames import Frame, FrameError

SPEC = ReplicaSpec(
    kind="server",
    index=1,
    launch=2,
    control=("127.0.0.1", 4),
    token="ab" * 32,
    host="127.0.0.1",
    workdir="/w",
    command="python",
    config={"name": "x"},
)


def test_a_spec_comes_back_the_same():
    assert ReplicaSpec.from_json(SPEC.to_json()) == SPEC
    assert SPEC.name == "server_1"
    assert "\n" not in SPEC.to_json()


@pytest.mark.parametrize("text", ["[]", "{}", "nothing", SPEC.to_json().replace("server", "boss")])
def test_what_is_no_spec_is_refused(text: str):
    with pytest.raises(ValueError):
        ReplicaSpec.from_json(text)


def test_a_directory_comes_back_the_same():
    known = Directory(
        session="s",
        learner=("h", 1),
        gang=("h", 9),
        servers={0: ("h", 2), 3: ("h", 5)},
        given_up=frozenset({1}),
    )
    assert Directory.from_fields(known.fields()) == known
    assert Directory.from_fields(Directory().fields()) == Directory()


def test_in_processes_of_their_own_all_roles_begin_at_device_0():
    layout = parse_layout("simulation=1 serving=2 learning=4:data2,fsdp2").in_own_processes()
    assert [role.first for role in layout.roles.values()] == [0, 0, 0]
    assert layout.roles["learning"].axes == {"data": 2, "fsdp": 2, "tensor": 1}
    assert layout.num_devices == 4


class _Groups:
    """Two groups, whose states differ in shape."""

    def targets(self, names: tuple[str, ...]):
        sizes = {"group_0": 2, "group_1": 3}
        return {name: {"x": np.zeros(sizes[name], np.float32)} for name in names}


@pytest.fixture
def codec() -> WelcomeCodec:
    return WelcomeCodec(_Groups(), ("group_0", "group_1"))  # pyright: ignore


def _snapshot(*values: float, segment: int = 7) -> GroupSnapshot:
    return GroupSnapshot(next_segment=segment, end_state={"x": np.asarray(values, np.float32)})


@pytest.mark.parametrize("names", [(), ("group_0",), ("group_1",), ("group_0", "group_1")])
def test_a_welcome_comes_back_the_same(codec: WelcomeCodec, names: tuple[str, ...]):
    states = {"group_0": _snapshot(1, math.nan), "group_1": _snapshot(3, 4, 5, segment=0)}
    given = {name: states[name] for name in names}
    found = codec.decode(codec.encode(given))
    assert found.keys() == given.keys()
    for name, snapshot in found.items():
        assert snapshot.next_segment == given[name].next_segment
        np.testing.assert_array_equal(snapshot.end_state["x"], given[name].end_state["x"])


def test_what_is_no_welcome_is_refused(codec: WelcomeCodec):
    frame = codec.encode({"group_1": _snapshot(1, 2, 3)})
    for wrong in (
        Frame(kind="hello", fields=frame.fields, arrays=frame.arrays),
        Frame(kind="welcome", fields={}, arrays=()),
        Frame(kind="welcome", fields={"segments": {"group_0": 1}}, arrays=frame.arrays),
        Frame(kind="welcome", fields={"segments": {"group_1": -1}}, arrays=frame.arrays),
        Frame(kind="welcome", fields={"segments": {"other": 1}}, arrays=frame.arrays),
        Frame(kind="welcome", fields=frame.fields, arrays=[*frame.arrays, *frame.arrays]),
    ):
        with pytest.raises(FrameError):
            codec.decode(wrong)


def test_a_welcome_of_another_shape_is_not_sent(codec: WelcomeCodec):
    with pytest.raises(FrameError, match="group_0"):
        codec.encode({"group_0": dataclasses.replace(_snapshot(1, 2, 3))})
