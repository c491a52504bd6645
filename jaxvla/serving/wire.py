"""Messages of openpi's serving protocol: msgpack with numpy arrays in it. No jax.

As openpi-client 0.1.2 has them, an array is the map {b"__ndarray__": true, b"data": its bytes
in C order, b"dtype": numpy's name of the dtype, b"shape": a list}, a numpy scalar the map
{b"__npgeneric__": true, b"data": its value, b"dtype": the name}. Every other key is text.

What comes in was written by strangers. `unpack` makes plain values or raises ValueError, and
takes little more memory than the message: the number of containers and of items in each is
limited, arrays look at the bytes that came, and nothing is unpickled or called by name.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

MAX_CONTAINERS = 256
"""Maps and lists in a message, those of arrays included."""

MAX_ITEMS = 256
"""Entries of one map or list."""

MAX_DEPTH = 8
"""Maps and lists within each other."""

MAX_TEXT_BYTES = 65_536
"""UTF-8 bytes of one text."""

MAX_DIMS = 8
"""Axes of an array."""

_MAX_AXIS = 2**31
_MAX_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_DATA, _DTYPE, _SHAPE = b"data", b"dtype", b"shape"
_FIELDS = {_ARRAY: {_ARRAY, _DATA, _DTYPE, _SHAPE}, _SCALAR: {_SCALAR, _DATA, _DTYPE}}

_ALLOWED = re.compile(r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]U[1-9][0-9]{0,4}")
"""bool, integers, floating point, text. Objects, records, complex numbers, times are not."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Bytes of a message of plain values, numpy arrays and scalars, as the client packs them.

    Raises:
      ValueError: an array or scalar has a dtype that the protocol lacks.
      TypeError: a value of another type.
    """
    return msgpack.Packer(default=_encoded).pack(message)


def unpack(data: bytes) -> dict[str, Any]:
    """The message of some bytes.

    Returns:
      Text keys; values are None, bool, int, float, str, bytes, read-only numpy arrays and
      scalars, and dicts and lists of these.

    Raises:
      ValueError: the bytes are no such message, or it exceeds a limit of this module. The text
        is one line and names the key where there is one.
    """
    return _decoded_map(_parsed(data), ())


def _encoded(value: Any) -> Any:
    """What msgpack does not know, as a map."""
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} cannot be sent")
    if not _ALLOWED.fullmatch(value.dtype.str):
        raise ValueError(f"dtype {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        content = {_ARRAY: True, _DATA: value.tobytes()}
        return content | {_DTYPE: value.dtype.str, _SHAPE: value.shape}
    return {_SCALAR: True, _DATA: value.item(), _DTYPE: value.dtype.str}


def _parsed(data: bytes) -> Any:
    """Maps, lists and scalars of msgpack, with the maps of arrays still as maps."""
    num_left = MAX_CONTAINERS

    def count() -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise ValueError(f"more than {MAX_CONTAINERS} maps and lists")

    def list_of(items: list[Any]) -> list[Any]:
        count()
        return items

    def map_of(pairs: list[tuple[str | bytes, Any]]) -> dict[str | bytes, Any]:
        count()
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice in a map")
        return found

    try:
        return msgpack.unpackb(
            data,
            strict_map_key=True,
            list_hook=list_of,
            object_pairs_hook=map_of,
            ext_hook=_refuse_extension,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=len(data),
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,  # of timestamps too, which the hook does not see
        )
    # Its own errors are ValueErrors; where msgpack is pure Python it recurses.
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"the message cannot be read as msgpack: {reason}") from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _decoded(value: Any, path: tuple[str, ...]) -> Any:
    """Turns the maps of arrays and scalars into what they stand for."""
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{_name(path)} lies deeper than {MAX_DEPTH} maps and lists")
    if isinstance(value, list):
        return [_decoded(item, (*path, str(index))) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    for kind, decode in ((_ARRAY, _array), (_SCALAR, _scalar)):
        if kind in value:
            if set(value) != _FIELDS[kind] or value[kind] is not True:
                raise ValueError(f"{_name(path)} is no {kind.decode()} of openpi-client")
            return decode(value, path)
    return _decoded_map(value, path)


def _decoded_map(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{_name(path)} is no map with text keys: send a dict of str")
    return {key: _decoded(item, (*path, key)) for key, item in value.items()}


def _array(value: dict[bytes, Any], path: tuple[str, ...]) -> np.ndarray:
    dtype, data, shape = _dtype(value, path), value[_DATA], value[_SHAPE]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_axis, shape)):
        raise ValueError(f"{_name(path)} has no shape of at most {MAX_DIMS} axes, each >= 0")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        what = f"{dtype} of shape {tuple(shape)}"
        raise ValueError(f"{_name(path)} is {what}, but its data are {size} bytes")
    try:
        array = np.ndarray(shape, dtype, buffer=data)
    except ValueError as error:  # empty, with axes too long for numpy
        raise ValueError(f"{_name(path)} cannot be an array: {error}") from error
    _require_values(array, path)
    return array


def _is_axis(size: Any) -> bool:
    return type(size) is int and 0 <= size < _MAX_AXIS


def _require_values(array: np.ndarray, path: tuple[str, ...]) -> None:
    """Refuses bytes that are no value of the dtype."""
    if array.dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise ValueError(f"{_name(path)} has booleans other than 0 and 1")
    if array.dtype.kind == "U" and array.size:
        points = np.frombuffer(array.tobytes(), array.dtype.byteorder + "u4")
        low, high = _SURROGATES
        if points.max() > _MAX_CODE_POINT or ((points >= low) & (points <= high)).any():
            raise ValueError(f"{_name(path)} has characters that are not Unicode")


def _scalar(value: dict[bytes, Any], path: tuple[str, ...]) -> Any:
    dtype, data = _dtype(value, path), value[_DATA]
    expected = {"b": bool, "i": int, "u": int, "f": float, "U": str}[dtype.kind]
    holds = type(data) is expected
    if holds and expected is int:
        limits = np.iinfo(dtype)
        holds = limits.min <= data <= limits.max
    if holds and expected is float and math.isfinite(data):
        holds = abs(data) <= float(np.finfo(dtype).max)
    if not holds:
        raise ValueError(f"{_name(path)} has a value that is no {dtype}")
    return dtype.type(data)


def _dtype(value: dict[bytes, Any], path: tuple[str, ...]) -> np.dtype:
    name = value[_DTYPE]
    if not isinstance(name, str) or not _ALLOWED.fullmatch(name):
        shown = repr(name[:20]) if isinstance(name, str) else type(name).__name__
        raise ValueError(
            f"{_name(path)} has dtype {shown}: send bool, integers, floating point or text"
        )
    return np.dtype(name)


def _name(path: tuple[str, ...]) -> str:
    """How an error calls a value."""
    return repr("/".join(path)[:80]) if path else "the message"
