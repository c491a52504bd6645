"""What a simulator makes, over the wire and back: bitwise the same, or refused by name."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from scripted_group import GOES_ON, INVALID, TERMINATED, TRUNCATED, ScriptedGroup
from simulator_run import FakeQueue, make

from jaxvla.simulation.assembler import SegmentInfo
from jaxvla.simulation.segment_codec import SegmentCodec
from jaxvla.transport.base import QueueItem
from jaxvla.transport.frames import FrameError

SCRIPT = np.asarray([[GOES_ON, TERMINATED], [TRUNCATED, INVALID], [TERMINATED, TRUNCATED]])


@pytest.fixture(scope="module")
def item() -> QueueItem:
    """A trajectory in which episodes end in every way."""
    queue = FakeQueue(1)
    make([ScriptedGroup("group_0", SCRIPT)], queue).run()
    return queue.items[0]


@pytest.fixture
def codec(item: QueueItem) -> SegmentCodec:
    return SegmentCodec(item.payload, {"group_0": jax.tree.map(np.asarray, item.info.end_state)})


def assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def test_everything_comes_back_as_it_was(item: QueueItem, codec: SegmentCodec) -> None:
    payload, info = codec.decode("group_0", *codec.encode(item.payload, item.info))
    assert_same(payload, item.payload)
    for field in dataclasses.fields(SegmentInfo):
        got, wanted = getattr(info, field.name), getattr(item.info, field.name)
        if field.name == "episodes":
            got, wanted = dataclasses.asdict(got), dataclasses.asdict(wanted)
            assert len(wanted["task"]) == 4
        if field.name in ("episodes", "end_state", "is_uniform"):
            assert_same(got, wanted)
        else:
            assert type(got) is type(wanted) and got == wanted


def test_every_array_is_checked(item: QueueItem, codec: SegmentCodec) -> None:
    fields, arrays = codec.encode(item.payload, item.info)
    for index, array in enumerate(arrays):
        for wrong in (array.astype(np.uint16), array[None], array[..., None]):
            changed = [*arrays[:index], wrong, *arrays[index + 1 :]]
            with pytest.raises(FrameError, match=r"^(trajectory/|end_state|episodes/|is_uniform)"):
                codec.decode("group_0", fields, changed)
    for changed in (arrays[:-1], [*arrays, arrays[-1]], []):
        with pytest.raises(FrameError, match="arrays, must have"):
            codec.decode("group_0", fields, changed)


def test_episodes_have_one_length(item: QueueItem, codec: SegmentCodec) -> None:
    fields, arrays = codec.encode(item.payload, item.info)
    arrays[-2] = arrays[-2][:-1]
    with pytest.raises(FrameError, match=r"episodes have \[4, 4, 4, 3\] entries"):
        codec.decode("group_0", fields, arrays)


def test_every_count_is_checked(item: QueueItem, codec: SegmentCodec) -> None:
    fields, arrays = codec.encode(item.payload, item.info)
    for name in fields:
        for value in (None, -1, 1.0, True, "1"):
            with pytest.raises(FrameError, match=f"^{name} = "):
                codec.decode("group_0", fields | {name: value}, arrays)


def test_groups_are_known(item: QueueItem, codec: SegmentCodec) -> None:
    with pytest.raises(FrameError, match=r"'group_1', must be one of \['group_0'\]"):
        codec.decode("group_1", *codec.encode(item.payload, item.info))


def test_sender_is_told_first(item: QueueItem, codec: SegmentCodec) -> None:
    payload = dataclasses.replace(item.payload, reward=item.payload.reward.astype(np.float64))
    with pytest.raises(FrameError, match="trajectory/reward is float64"):
        codec.encode(payload, item.info)
