"""One message between jaxvla's processes: a name, plain values and numpy arrays. No jax.

    offset  bytes  content
    0       4      b"jvla"
    4       2      version of this layout, 1
    6       2      0
    8       4      bytes of the header, at most 64 KiB
    12      8      bytes of the payload
    20             header: msgpack of [kind, fields, [[dtype, shape] of each array]]
                   payload: the arrays' elements in C order, one array after the other

All numbers are little-endian, as is every machine that JAX runs on. Arrays are sent from their
own memory and read into memory of their own. Nothing is unpickled or called by name, and nothing
is allocated for the payload before its size has been checked against the header and the limit.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

MAX_HEADER_BYTES = 65_536
"""Kind, fields, dtypes and shapes together."""

MAX_ITEMS = 4096
"""Entries of one list or dict, and arrays of a frame."""

MAX_DEPTH = 8
"""Lists and dicts within each other, `fields` included."""

MAX_DIMS = 8
"""Axes of an array."""

DTYPES: Mapping[str, np.dtype] = {
    "bool": np.dtype(np.bool_),
    **{name: np.dtype(f"<{name}") for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")},
    **{name: np.dtype(f"<{name}") for name in ("f2", "f4", "f8")},
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""What arrays may hold, by its name in the header."""

Buffer = bytes | memoryview

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = struct.Struct("<4sHHIQ")
_MAGIC, _VERSION = b"jvla", 1
_KIND = re.compile(r"[a-z][a-z_]{0,31}")
_MAX_AXIS = 2**40


class FrameError(ValueError):
    """Bytes that are no frame, or a frame beyond a limit. The text is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a frame may take."""

    max_payload_bytes: int = 2**30
    """Bytes of all arrays of a frame; also the most that a peer can make us allocate."""

    def __post_init__(self):
        if self.max_payload_bytes < 0:
            raise ValueError(f"max_payload_bytes = {self.max_payload_bytes} is negative")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One message."""

    kind: str
    """What it is about: up to 32 lower-case letters and underscores."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: None, bool, int of 64 bits, float, str, and lists and dicts with str keys of
    those."""
    arrays: Sequence[np.ndarray] = ()
    """Of the dtypes in `DTYPES`. Those of a frame that was read are writable and own their
    memory."""


def encode(frame: Frame, limits: Limits) -> list[Buffer]:
    """The bytes of a frame, in pieces to be sent one after the other.

    Returns:
      The header, then the memory of every array that has elements: arrays in C order are not
      copied, so they must not be changed until they have been sent.

    Raises:
      FrameError: the frame cannot be sent, or is beyond a limit; the text names the part.
    """
    _require_kind(frame.kind)
    _require_plain(frame.fields, ("fields",))
    if len(frame.arrays) > MAX_ITEMS:
        raise FrameError(f"{len(frame.arrays)} arrays are more than {MAX_ITEMS}")
    specs = [_spec_of(array, index) for index, array in enumerate(frame.arrays)]
    payload_bytes = sum(array.nbytes for array in frame.arrays)
    _require_payload(payload_bytes, limits)
    try:
        header = msgpack.Packer().pack([frame.kind, frame.fields, specs])
    except (ValueError, OverflowError) as error:  # lone surrogates, integers beyond 64 bits
        raise FrameError(f"the fields cannot be packed: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise FrameError(f"the header takes {len(header)} bytes, more than {MAX_HEADER_BYTES}")
    prefix = _PREFIX.pack(_MAGIC, _VERSION, 0, len(header), payload_bytes)
    return [prefix + header, *(_memory(array) for array in frame.arrays if array.nbytes)]


def read_frame(read: Callable[[memoryview], None], limits: Limits) -> Frame:
    """Reads one frame.

    Args:
      read: fills a view with the bytes that come next, or raises.
      limits: checked before anything of that size is allocated.

    Raises:
      FrameError: the bytes are no frame or beyond a limit. Where the next frame begins is not
        known then.
    """
    prefix = bytearray(_PREFIX.size)
    read(memoryview(prefix))
    magic, version, zero, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC or zero != 0:
        raise FrameError("the bytes are no frame")
    if version != _VERSION:
        raise FrameError(f"the frame has version {version}, this program knows {_VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes is more than {MAX_HEADER_BYTES}")
    _require_payload(payload_bytes, limits)
    header = bytearray(header_bytes)
    read(memoryview(header))
    kind, fields, specs = _parsed(header)
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs)
    if total != payload_bytes:
        raise FrameError(f"the arrays take {total} bytes, but the payload has {payload_bytes}")
    arrays = [_read_array(read, *spec, index) for index, spec in enumerate(specs)]
    return Frame(kind=kind, fields=fields, arrays=arrays)


def _require_kind(kind: Any) -> None:
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise FrameError(f"kind {_shown(kind)} is not up to 32 letters a-z and underscores")


def _require_payload(payload_bytes: int, limits: Limits) -> None:
    most = limits.max_payload_bytes
    if payload_bytes > most:
        raise FrameError(f"arrays of {payload_bytes} bytes are more than the limit, {most}")


def _require_plain(value: Any, path: tuple[str, ...]) -> None:
    """Refuses all but the plain types themselves: a subclass would come back as its base."""
    if type(value) not in (dict, list):
        if value is not None and type(value) not in (bool, int, float, str):
            what = type(value).__name__
            raise FrameError(f"{_name(path)} is a {what}: send None, bool, int, float, str")
        return
    if len(path) > MAX_DEPTH:
        raise FrameError(f"{_name(path)} lies deeper than {MAX_DEPTH} lists and dicts")
    if len(value) > MAX_ITEMS:
        raise FrameError(f"{_name(path)} has {len(value)} entries, more than {MAX_ITEMS}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _require_plain(item, (*path, str(index)))
        return
    for key, item in value.items():
        if type(key) is not str:
            raise FrameError(f"{_name(path)} has the key {_shown(key)}: send text keys")
        _require_plain(item, (*path, key))


def _spec_of(array: Any, index: int) -> tuple[str, list[int]]:
    if not isinstance(array, np.ndarray):
        raise FrameError(f"array {index} is a {type(array).__name__}, not a numpy array")
    name = _NAMES.get(array.dtype)
    if name is None:
        raise FrameError(f"array {index} has dtype {array.dtype}: send one of {', '.join(DTYPES)}")
    if array.ndim > MAX_DIMS:
        raise FrameError(f"array {index} has {array.ndim} axes, more than {MAX_DIMS}")
    return name, list(array.shape)


def _memory(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order: its own memory where that is in order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _parsed(header: bytearray) -> tuple[str, dict[str, Any], list[tuple[np.dtype, list[int]]]]:
    """Kind, fields, and dtype and shape of every array."""
    content = _unpacked(header)
    if not isinstance(content, list) or len(content) != 3:
        raise FrameError("the header is no list of kind, fields and arrays")
    kind, fields, specs = content
    _require_kind(kind)
    if not isinstance(fields, dict):
        raise FrameError(f"the fields are a {type(fields).__name__}, not a dict")
    _require_plain(fields, ("fields",))
    if not isinstance(specs, list):
        raise FrameError(f"the arrays are described by a {type(specs).__name__}, not a list")
    return kind, fields, [_parsed_spec(spec, index) for index, spec in enumerate(specs)]


def _unpacked(header: bytearray) -> Any:
    def map_of(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise FrameError("a key comes twice in a dict of the header")
        return found

    try:
        return msgpack.unpackb(
            header,
            object_pairs_hook=map_of,
            ext_hook=_refuse_extension,
            # A list gets its memory when its length is read, before its items: were any length
            # allowed, a kilobyte of lists within lists would take half a gigabyte.
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_bin_len=0,
            max_ext_len=0,
        )
    # Its own errors are ValueErrors; where msgpack is pure Python it recurses.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise FrameError(f"the header cannot be read: {reason}") from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise FrameError(f"extension type {code}")


def _parsed_spec(spec: Any, index: int) -> tuple[np.dtype, list[int]]:
    if not isinstance(spec, list) or len(spec) != 2:
        raise FrameError(f"array {index} is not described by its dtype and its shape")
    name, shape = spec
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise FrameError(f"array {index} has dtype {_shown(name)}, which cannot be sent")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_axis, shape)):
        raise FrameError(f"array {index} has no shape of at most {MAX_DIMS} axes, each >= 0")
    return dtype, shape


def _is_axis(size: Any) -> bool:
    return type(size) is int and 0 <= size <= _MAX_AXIS


def _read_array(
    read: Callable[[memoryview], None], dtype: np.dtype, shape: list[int], index: int
) -> np.ndarray:
    try:
        array = np.empty(shape, dtype)
    except ValueError as error:  # no elements, with axes too long for numpy
        raise FrameError(f"array {index} cannot be an array: {error}") from error
    octets = array.reshape(-1).view(np.uint8)
    if array.nbytes:
        read(octets.data)
    # Other bytes are no booleans: what numpy computes with them is undefined.
    if dtype == np.bool_ and octets.size and octets.max() > 1:
        raise FrameError(f"array {index} has booleans other than 0 and 1")
    return array


def _name(path: tuple[str, ...]) -> str:
    """How an error calls a value."""
    return repr("/".join(path)[:80])


def _shown(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"
