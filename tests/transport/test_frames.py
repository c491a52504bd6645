"""Frames: what goes in comes out, and bytes that are meant to do harm."""

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.transport import frames
from jaxvla.transport.frames import DTYPES, Frame, FrameError, Limits, encode, read_frame

_LIMITS = Limits(max_payload_bytes=1_000_000)


def _bytes(frame: Frame, limits: Limits = _LIMITS) -> bytes:
    return b"".join(encode(frame, limits))


def _reader(data: bytes) -> Callable[[memoryview], None]:
    """Hands out `data` and ends as a closed connection does."""
    left = memoryview(data)

    def read(view: memoryview) -> None:
        nonlocal left
        if len(view) > len(left):
            raise EOFError
        view[:] = left[: len(view)]
        left = left[len(view) :]

    return read


def _decoded(data: bytes, limits: Limits = _LIMITS) -> Frame:
    return read_frame(_reader(data), limits)


def _raw(
    header: Any = ("hello", {}, []),
    payload: bytes = b"",
    *,
    magic: bytes = b"jvla",
    version: int = 1,
    zero: int = 0,
    header_bytes: int | None = None,
    payload_bytes: int | None = None,
) -> bytes:
    """The layout of the module's docstring, put together by hand."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    assert packed is not None
    size = len(packed) if header_bytes is None else header_bytes
    total = len(payload) if payload_bytes is None else payload_bytes
    return struct.pack("<4sHHIQ", magic, version, zero, size, total) + packed + payload


# --------------------------------------------------------------------------- what is meant


def _arrays() -> st.SearchStrategy[np.ndarray]:
    def build(name: str, shape: list[int], seed: int, order: Any) -> np.ndarray:
        dtype, rng = DTYPES[name], np.random.default_rng(seed)
        octets = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        if name == "bool":
            octets = octets % 2
        array = np.frombuffer(octets.tobytes(), dtype).reshape(shape)
        return np.asarray(array, order=order)

    shapes = st.lists(st.integers(0, 2), max_size=frames.MAX_DIMS)
    orders = st.sampled_from(["C", "F"])
    return st.builds(build, st.sampled_from(list(DTYPES)), shapes, st.integers(0, 99), orders)


_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), _TEXTS)
_FIELDS = st.dictionaries(
    _TEXTS,
    st.recursive(
        _LEAVES,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(_TEXTS, x, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
_KINDS = st.from_regex(r"[a-z][a-z_]{0,31}", fullmatch=True)


def _same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            _same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            _same(x, y)
    else:
        assert left == right or (left != left and right != right)


@hypothesis.given(_KINDS, _FIELDS, st.lists(_arrays(), max_size=4))
@hypothesis.settings(deadline=None, max_examples=100)
def test_frames_survive(kind: str, fields: dict[str, Any], arrays: list[np.ndarray]) -> None:
    found = _decoded(_bytes(Frame(kind=kind, fields=fields, arrays=arrays)))
    assert found.kind == kind
    _same(found.fields, fields)
    assert len(found.arrays) == len(arrays)
    for sent, received in zip(arrays, found.arrays, strict=True):
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
        assert received.tobytes() == sent.tobytes()  # NaNs too
        assert received.flags.owndata and received.flags.writeable and received.flags.c_contiguous


def test_the_layout_is_the_documented_one() -> None:
    """Another program, or another version of this one, has to agree on every byte."""
    array = np.array([[1, 2], [3, 4]], "<i4")
    data = _bytes(Frame(kind="put", fields={"id": 7}, arrays=[array.T]))
    header = ("put", {"id": 7}, [("i4", [2, 2])])
    assert data == _raw(header, struct.pack("<4i", 1, 3, 2, 4))


def test_bfloat16_values() -> None:
    values = np.array([1.5, -2.0, np.inf], ml_dtypes.bfloat16)
    found = _decoded(_bytes(Frame(kind="a", arrays=[values]))).arrays[0]
    np.testing.assert_array_equal(found.astype(np.float32), [1.5, -2.0, np.inf])


def test_arrays_are_sent_from_their_own_memory() -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.float32(1)[None], np.zeros((0, 5))]
    _, *pieces = encode(Frame(kind="a", arrays=arrays), _LIMITS)
    assert [len(piece) for piece in pieces] == [48, 4]
    for piece, array in zip(pieces, arrays, strict=False):
        assert np.shares_memory(np.frombuffer(piece, np.uint8), array)


def test_a_frame_ends_where_the_next_begins() -> None:
    first, second = Frame(kind="a", arrays=[np.arange(5)]), Frame(kind="b", fields={"x": 1})
    read = _reader(_bytes(first) + _bytes(second))
    assert [read_frame(read, _LIMITS).kind for _ in range(2)] == ["a", "b"]
    with pytest.raises(EOFError):
        read_frame(read, _LIMITS)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (Frame(kind="Hello"), "kind 'Hello' is not"),
        (Frame(kind=""), "kind"),
        (Frame(kind="a" * 33), "kind"),
        (Frame(kind="a\n"), "kind"),
        (Frame(kind="a", fields={"x": b"1"}), "'fields/x' is a bytes"),
        (Frame(kind="a", fields={"x": (1,)}), "'fields/x' is a tuple"),
        (Frame(kind="a", fields={"x": [np.float64(1)]}), "'fields/x/0' is a float64"),
        (Frame(kind="a", fields={"x": {1: 2}}), "'fields/x' has the key of type int"),
        (Frame(kind="a", fields={"x": 2**64}), "cannot be packed"),
        (Frame(kind="a", fields={"x": "\ud800"}), "cannot be packed"),
        (Frame(kind="a", fields={"x": [0] * 4097}), "'fields/x' has 4097 entries"),
        (Frame(kind="a", fields={"x": "y" * 65_536}), "the header takes 655.. bytes"),
        (Frame(kind="a", arrays=[np.array([object()])]), "array 0 has dtype object"),
        (Frame(kind="a", arrays=[np.array(["x"])]), "array 0 has dtype <U1"),
        (Frame(kind="a", arrays=[np.zeros(1, "V4")]), "array 0 has dtype"),
        (Frame(kind="a", arrays=[np.zeros(1, "c8")]), "array 0 has dtype complex64"),
        (Frame(kind="a", arrays=[np.zeros(1, "i4,f4")]), "array 0 has dtype"),
        (Frame(kind="a", arrays=[np.zeros(1, ">f4")]), "array 0 has dtype >f4"),
        (Frame(kind="a", arrays=[np.zeros((1,) * 9)]), "array 0 has 9 axes"),
        (Frame(kind="a", arrays=[np.zeros(1), np.zeros(125_000)]), "arrays of 1000008 bytes"),
        (Frame(kind="a", arrays=[np.zeros(0)] * 4097), "4097 arrays"),
        (Frame(kind="a", arrays=[[1.0]]), "array 0 is a list"),  # pyright: ignore
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_sent_is_named(frame: Frame, match: str) -> None:
    with pytest.raises(FrameError, match=match):
        encode(frame, _LIMITS)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_depth() -> None:
    """`fields` is the first level, both ways."""
    frame = Frame(kind="a", fields={"x": _nested(frames.MAX_DEPTH - 1)})
    _same(_decoded(_bytes(frame)).fields, frame.fields)
    deeper = {"x": _nested(frames.MAX_DEPTH)}
    with pytest.raises(FrameError, match="lies deeper than 8"):
        encode(Frame(kind="a", fields=deeper), _LIMITS)
    with pytest.raises(FrameError, match="lies deeper than 8"):
        _decoded(_raw(("a", deeper, [])))


# -------------------------------------------------------------------------- what is not


class _Harm:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


_BAD = {
    "magic": _raw(magic=b"jvlb"),
    "version": _raw(version=2),
    "reserved": _raw(zero=1),
    "long header": _raw(header_bytes=65_537),
    "empty header": _raw(b""),
    "pickle": pickle.dumps(_Harm()) + bytes(100),
    "pickle as header": _raw(pickle.dumps(_Harm())),
    "bytes as field": _raw(("a", {"x": pickle.dumps(_Harm())}, [])),
    "empty bytes as field": _raw(("a", {"x": b""}, [])),
    "bytes as key": _raw(("a", {b"x": 1}, [])),
    "empty bytes as key": _raw(("a", {b"": 1}, [])),
    "number as key": _raw(b"\x93\xa1a\x81\x01\x01\x90"),
    "key twice": _raw(b"\x93\xa1a\x82\xa1x\x01\xa1x\x02\x90"),
    "text that is none": _raw(b"\x93\xa1a\x81\xa1x\xa1\xff\x90"),
    "extension": _raw(("a", {"x": msgpack.ExtType(5, b"1")}, [])),
    "timestamp": _raw(("a", {"x": msgpack.Timestamp(1)}, [])),
    "trailing bytes": _raw(b"\x93\xa1a\x80\x90\x00"),
    "no list": _raw({"kind": "a"}),
    "two entries": _raw(("a", {})),
    "kind": _raw(("A", {}, [])),
    "kind is a number": _raw((1, {}, [])),
    "fields are a list": _raw(("a", [], [])),
    "arrays are a dict": _raw(("a", {}, {})),
    "deep": _raw(b"\x91" * 65_000),
    "lists of declared lengths": _raw(b"\xdd\x00\x00\xff\xff" * 1000),
    "object": _raw(("a", {}, [("O", [1])]), bytes(8)),
    "object by character": _raw(("a", {}, [("|O", [1])]), bytes(8)),
    "text array": _raw(("a", {}, [("<U1", [1])]), bytes(4)),
    "void": _raw(("a", {}, [("V4", [1])]), bytes(4)),
    "dtype is a list": _raw(("a", {}, [([["x", "f4"]], [1])]), bytes(4)),
    "negative axis": _raw(("a", {}, [("f4", [-1])])),
    "two negative axes": _raw(("a", {}, [("f4", [-1, -1])]), bytes(4)),
    "axis is a boolean": _raw(("a", {}, [("f4", [True])]), bytes(4)),
    "axis is a float": _raw(("a", {}, [("f4", [1.0])]), bytes(4)),
    "nine axes": _raw(("a", {}, [("f4", [1] * 9)]), bytes(4)),
    "shape is a number": _raw(("a", {}, [("f4", 1)]), bytes(4)),
    "spec of three": _raw(("a", {}, [("f4", [1], 1)]), bytes(4)),
    "product overflows": _raw(("a", {}, [("f4", [2**32, 2**32])])),
    "empty and huge": _raw(("a", {}, [("f4", [0, 2**40, 2**40])])),
    "payload too short": _raw(("a", {}, [("f4", [2])]), bytes(4)),
    "payload too long": _raw(("a", {}, [("f4", [1])]), bytes(8)),
    "payload without arrays": _raw(("a", {}, []), bytes(8)),
    "beyond the limit": _raw(("a", {}, [("u1", [1_000_001])]), payload_bytes=1_000_001),
    "boolean of two": _raw(("a", {}, [("bool", [2])]), b"\1\2"),
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("data", _BAD.values(), ids=_BAD)
def test_bytes_that_are_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError) as raised:
        _decoded(data)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 250


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "data",
    [
        _raw(("a", {}, [("u1", [2**32])]), payload_bytes=2**32),
        _raw(("a", {}, [("u1", [2**32])]), payload_bytes=1000),
        _raw(("a", {}, [("u1", [2**32]), ("u1", [1])]), payload_bytes=2**64 - 1),
        _raw(header_bytes=2**32 - 1),
        # Every list asks for memory before its items come.
        _raw(b"\xdd\x00\x00\xff\xff" * 1000),
        _raw(b"\x91" * 65_000),
    ],
)
def test_nothing_is_allocated_for_a_size_that_is_refused(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            _decoded(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


def test_the_limit_itself_is_allowed() -> None:
    array = np.zeros(1_000_000, np.uint8)
    assert _decoded(_bytes(Frame(kind="a", arrays=[array]))).arrays[0].nbytes == 1_000_000
    with pytest.raises(FrameError, match="more than the limit, 999999"):
        _decoded(_bytes(Frame(kind="a", arrays=[array])), Limits(max_payload_bytes=999_999))


def test_a_truncated_frame_is_an_end_not_a_frame() -> None:
    whole = _bytes(Frame(kind="a", fields={"x": 1}, arrays=[np.arange(3.0), np.arange(2)]))
    for size in range(len(whole)):
        with pytest.raises(EOFError):
            _decoded(whole[:size])


@pytest.mark.fault(27)
@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=200)
def test_changed_bytes_are_a_frame_or_refused(data: st.DataObject) -> None:
    """No other exception, whatever the bytes."""
    whole = bytearray(
        _bytes(Frame(kind="a", fields={"x": [1, {"y": None}]}, arrays=[np.zeros((2, 3), bool)]))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = _decoded(bytes(whole))
    except (FrameError, EOFError):
        return
    assert isinstance(found.fields, dict)
    for array in found.arrays:
        assert array.dtype in DTYPES.values()
        assert array.dtype != bool or array.view(np.uint8).max(initial=0) <= 1


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_payload_bytes = -1"):
        Limits(max_payload_bytes=-1)
