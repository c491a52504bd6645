"""Messages: openpi-client's bytes, both ways, and bytes that are meant to do harm."""

import pathlib
import struct
import tracemalloc
from typing import Any

import hypothesis
import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.serving import wire

_ORACLE = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "transforms.npz"
_DTYPES = ("?", "u1", "i1", "<u2", ">i2", "<i4", ">u4", "<i8", "<u8", "<f2", ">f4", "<f8", "<U3")


@pytest.fixture(scope="module")
def recorded() -> bytes:
    """A request for a LIBERO policy, packed by openpi-client."""
    with np.load(_ORACLE) as file:
        return file["wire"].tobytes()


def _same(left: Any, right: Any) -> None:
    """Equal in value, and in type down to the dtype."""
    if isinstance(left, (np.ndarray, np.generic)):
        assert type(left) is type(right) and left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
        return
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


def _require_plain(value: Any) -> None:
    """Nothing but data."""
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        for item in value.values():
            _require_plain(item)
    elif isinstance(value, list):
        for item in value:
            _require_plain(item)
    elif isinstance(value, (np.ndarray, np.generic)):
        assert value.dtype.kind in "biufU" and value.tolist() is not None
    else:
        assert value is None or type(value) in (bool, int, float, str, bytes)


def _array(data: Any = b"\0" * 8, dtype: Any = "<f8", shape: Any = (1,), mark: Any = True) -> dict:
    return {b"__ndarray__": mark, b"data": data, b"dtype": dtype, b"shape": shape}


def _scalar(data: Any, dtype: Any) -> dict:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


# --------------------------------------------------------------------------- what is meant


def test_the_recorded_request(recorded: bytes) -> None:
    message = wire.unpack(recorded)
    assert message["prompt"] == "pick up the black bowl"
    for name in ("image", "wrist_image"):
        image = message[f"observation/{name}"]
        assert image.dtype == np.uint8 and image.shape == (40, 64, 3)
    with np.load(_ORACLE) as file:
        for name in ("observation/image", "observation/state"):
            np.testing.assert_array_equal(message[name], file[f"policy/{name}"])
    assert wire.pack(message) == recorded


def _arrays() -> st.SearchStrategy[np.ndarray]:
    def build(dtype: str, shape: list[int], seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if dtype == "<U3":
            return rng.choice(np.array(["", "a", "äß", "\U0001f600x"], dtype), shape)
        return rng.integers(0, 2**15, shape).astype(dtype)

    shapes = st.lists(st.integers(0, 3), max_size=4)
    return st.builds(build, st.sampled_from(_DTYPES), shapes, st.integers(0, 99))


_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    _TEXTS,
    st.binary(max_size=8),
    _arrays(),
    st.sampled_from(
        [np.float32(0.1), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.str_("up")]
    ),
)
_MESSAGES = st.dictionaries(
    _TEXTS,
    st.recursive(
        _LEAVES,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(_TEXTS, x, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@hypothesis.given(_MESSAGES)
@hypothesis.settings(deadline=None, max_examples=150)
def test_messages_survive_both_ways_to_the_real_client(message: dict[str, Any]) -> None:
    client: Any = pytest.importorskip(
        "openpi_client.msgpack_numpy", reason="openpi-client: scripts/environment.sh"
    )
    packed = wire.pack(message)
    assert packed == client.packb(message)
    _same(client.unpackb(packed), wire.unpack(packed))


def test_arrays_are_views_of_what_came() -> None:
    """One copy of an image is enough, and nobody writes into it."""
    array = wire.unpack(wire.pack({"x": np.arange(6.0).reshape(2, 3)}))["x"]
    assert not array.flags.owndata and not array.flags.writeable
    np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.zeros(2, "i4,f4"), np.complex64(1), np.datetime64(1, "s")]
)
def test_other_dtypes_are_not_sent(value: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype .* cannot be sent"):
        wire.pack({"x": value})


def test_other_types_are_not_sent() -> None:
    with pytest.raises(TypeError, match="a set cannot be sent"):
        wire.pack({"x": {1}})


# -------------------------------------------------------------------------- what is not

_BAD_VALUES = {
    "object dtype": (_array(dtype="|O"), r"dtype '\|O': send"),
    "object dtype by name": (_array(dtype="O"), "dtype 'O'"),
    "structured dtype": (_array(dtype="i4,f4"), "dtype 'i4,f4'"),
    "dtype with fields": (_array(dtype=[["x", "<f8"]]), "dtype list"),
    "subarray dtype": (_array(dtype="(2,)<f4"), "dtype "),
    "void dtype": (_array(dtype="|V8"), "dtype "),
    "complex dtype": (_array(dtype="<c8"), "dtype "),
    "times": (_array(dtype="<M8[s]"), "dtype "),
    "dtype by alias": (_array(dtype="float64"), "dtype 'float64'"),
    "text of no characters": (_array(b"", "<U0"), "dtype '<U0'"),
    "long dtype": (_array(dtype="<U" + "9" * 40), r"dtype '<U9{18}': send"),
    "dtype in bytes": (_array(dtype=b"<f8"), "dtype bytes"),
    "dtype with a line break": (_array(dtype="<f8\n"), r"dtype '<f8\\n'"),
    "negative axis": (_array(shape=(-1,)), "no shape"),
    "two negative axes": (_array(shape=(-1, -1)), "no shape"),
    "fractional axis": (_array(shape=(1.0,)), "no shape"),
    "boolean axis": (_array(shape=(True,)), "no shape"),
    "shape that is no list": (_array(shape=1), "no shape"),
    "too many axes": (_array(shape=(1,) * 9), "at most 8 axes"),
    "huge axis": (_array(shape=(2**63,)), "no shape"),
    "product that wraps to 8 bytes": (_array(shape=(2**30, 2**30, 2**4)), "data are 8 bytes"),
    "empty but too large": (_array(b"", shape=(0, *(2**31 - 1,) * 4)), "cannot be an array"),
    "too few bytes": (_array(shape=(2,)), "shape \\(2,\\), but its data are 8 bytes"),
    "too many bytes": (_array(b"\0" * 9), "data are 9 bytes"),
    "data as text": (_array("01234567"), "data are str"),
    "data as a list": (_array([0] * 8), "data are list"),
    "mark that is no mark": (_array(mark=1), "is no __ndarray__"),
    "extra field": (_array() | {b"x": 1}, "is no __ndarray__"),
    "field by another name": ({b"__ndarray__": True, b"data": b""}, "is no __ndarray__"),
    "array and scalar": (_array() | {b"__npgeneric__": True}, "is no __ndarray__"),
    "booleans of 2": (_array(b"\2", "|b1"), "booleans other than"),
    "no Unicode": (_array(struct.pack("<I", 0x110000), "<U1"), "not Unicode"),
    "no Unicode, big-endian": (_array(struct.pack(">I", 0x110000), ">U1"), "not Unicode"),
    "half a character": (_array(struct.pack("<I", 0xD800), "<U1"), "not Unicode"),
    "scalar of an object": (_scalar(1, "|O"), "dtype "),
    "scalar out of range": (_scalar(300, "|u1"), "no uint8"),
    "scalar that overflows": (_scalar(1e300, "<f4"), "no float32"),
    "scalar of another type": (_scalar("1", "<f4"), "no float32"),
    "bool for an integer": (_scalar(True, "<i4"), "no int32"),
    "scalar that is a list": (_scalar([1], "<i4"), "no int32"),
    "scalar with a shape": (_scalar(1, "<i4") | {b"shape": []}, "is no __npgeneric__"),
    "bytes for a key": ({b"x": 1}, "no map with text keys"),
    "mark as text": ({"__ndarray__": {b"y": 1}}, "no map with text keys"),
}


@pytest.mark.parametrize("case", _BAD_VALUES)
def test_a_bad_value_is_refused_by_name(case: str) -> None:
    value, message = _BAD_VALUES[case]
    with pytest.raises(ValueError, match=message) as raised:
        wire.unpack(msgpack.packb({"observation": {"state": value}}))
    assert "'observation/state" in str(raised.value) and "\n" not in str(raised.value)


def _nested(depth: int) -> bytes:
    return b"\x81\xa1x" + b"\x91" * depth + b"\xc0"


_BAD_BYTES = {
    "nothing": (b"", "incomplete"),
    "no map": (msgpack.packb([1]), "the message is no map"),
    "an array alone": (msgpack.packb(_array()), "the message is no map"),
    "cut": (msgpack.packb({"x": b"0123"})[:-1], "incomplete"),
    "more behind it": (msgpack.packb({}) + b"\0", "extra data"),
    "a byte that means nothing": (b"\x81\xa1x\xc1", "FormatError"),
    "text that is no UTF-8": (b"\x81\xa1\xff\xc0", "utf-8"),
    "integer key": (msgpack.packb({1: 2}), "not allowed for map key"),
    "list as key": (b"\x81\x90\xc0", "not allowed for map key"),
    "key twice": (b"\x82\xa1x\x01\xa1x\x02", "a key comes twice"),
    "array field twice": (b"\x82\xc4\x04data\x01\xc4\x04data\x02", "a key comes twice"),
    "timestamp": (msgpack.packb({"x": msgpack.Timestamp(1, 2)}), "max_ext_len"),
    "short timestamp": (b"\x81\xa1x\xd6\xff\0\0\0\1", "max_ext_len"),
    "extension": (msgpack.packb({"x": msgpack.ExtType(5, b"pickle")}), "max_ext_len"),
    "extension of no bytes": (b"\x81\xa1x\xc7\x00\x05", "extension type 5"),
    "list of 4 G items": (b"\x81\xa1x\xdd\xff\xff\xff\xff", "max_array_len"),
    "map of 4 G items": (b"\xdf\xff\xff\xff\xff", "max_map_len"),
    "4 GiB of bytes": (b"\x81\xa1x\xc6\xff\xff\xff\xff", "incomplete"),
    "4 GiB of text": (b"\x81\xa1x\xdb\xff\xff\xff\xff", "incomplete"),
    "long list": (msgpack.packb({"x": [0] * 257}), "max_array_len"),
    "long text": (msgpack.packb({"x": "a" * 65_537}), "max_str_len"),
    "nine levels": (_nested(9), "deeper than 8"),
    "a thousand levels": (_nested(1000), "more than 256 maps"),
    "a million levels": (_nested(1_000_000), "StackError"),
    "many empty lists": (b"\x81\xa1x\xdc\x00\x02" + 2 * (b"\xdc\x00\xff" + b"\x90" * 255), "more"),
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("case", _BAD_BYTES)
def test_bad_bytes_are_refused(case: str) -> None:
    data, message = _BAD_BYTES[case]
    with pytest.raises(ValueError, match=message) as raised:
        wire.unpack(data)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("item", [b"\x90", b"\x80", b"\xc0", b"\xdc\x00\xff", b"\xde\x00\xff"])
def test_small_items_do_not_fill_the_memory(item: bytes) -> None:
    """A container costs dozens of bytes for one on the wire."""
    lists = b"\xdc\x01\x00" * 3
    data = b"\x81\xa1x" + lists + item * (2**20 // len(item))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            wire.unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


def _survives(data: bytes) -> None:
    try:
        message = wire.unpack(data)
    except ValueError:
        return
    assert type(message) is dict
    _require_plain(message)
    packed = wire.pack(message)
    assert wire.pack(wire.unpack(packed)) == packed


@pytest.mark.fault(27)
@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(deadline=None, max_examples=300)
def test_random_bytes_are_data_or_a_value_error(data: bytes) -> None:
    _survives(data)


@hypothesis.given(
    message=_MESSAGES,
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4
    ),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_mutated_messages_are_data_or_a_value_error(
    message: dict[str, Any], edits: list[tuple[float, int, bytes]]
) -> None:
    """Bytes are replaced, removed and put in, at places anywhere in the message."""
    data = wire.pack({"a": np.arange(4, dtype=np.float32), "b": np.float16(1), **message})
    for where, num_removed, added in edits:
        start = int(where * len(data))
        data = data[:start] + added + data[start + num_removed :]
    _survives(data)


@hypothesis.given(
    data=st.one_of(st.binary(max_size=16), _LEAVES.filter(lambda x: not hasattr(x, "dtype"))),
    dtype=st.one_of(
        st.sampled_from(["|O", "<f8", "|u1", "|b1", "<U1", ">U2", "|V4", "<c8", "|S2", "f8,O"]),
        st.text(st.sampled_from("<>|=biufcOUSVMm0123456789,()[]{}: \n"), max_size=6),
    ),
    shape=st.lists(st.integers(-3, 2**64 - 1) | st.integers(0, 4), max_size=4),
    is_scalar=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_forged_arrays_are_data_or_a_value_error(
    data: Any, dtype: str, shape: list[int], is_scalar: bool
) -> None:
    forged = _scalar(data, dtype) if is_scalar else _array(data, dtype, shape)
    _survives(msgpack.packb({"x": forged}))
