"""Init-state files: both formats, and everything that has to be refused."""

import io
import os
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxvla.envs import libero_init_states
from jaxvla.envs.libero_init_states import load_init_states

STATES = np.random.default_rng(0).normal(size=(5, 7))


def write_torch_zip(path: pathlib.Path, payload: bytes) -> pathlib.Path:
    """Writes what torch.save does: a zip with the pickle and a few more entries."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def pickled(value: Any) -> bytes:
    """Protocol 2, which is torch's."""
    return pickle.dumps(value, protocol=2)


class RunsACommand:
    """Pickles to a call of os.system."""

    def __init__(self, command: str):
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def test_npz(tmp_path: pathlib.Path):
    path = tmp_path / "task.pruned_init.npz"
    np.savez_compressed(path, states=STATES)
    np.testing.assert_array_equal(load_init_states(path), STATES)


@pytest.mark.parametrize("package", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_pruned_init_of_either_numpy(tmp_path: pathlib.Path, package: bytes):
    own = b"numpy._core.multiarray"
    payload = pickled(STATES)
    assert own in payload
    path = write_torch_zip(tmp_path / "task.pruned_init", payload.replace(own, package))
    loaded = load_init_states(path)
    assert loaded.dtype == np.float64
    np.testing.assert_array_equal(loaded, STATES)


@given(
    states=hnp.arrays(
        st.sampled_from(["<f8", ">f8", "<f4"]),
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    is_transposed=st.booleans(),
    protocol=st.integers(2, 4),  # torch's is 2
)
def test_pickled_arrays_survive(states: np.ndarray, is_transposed: bool, protocol: int):
    states = states.T if is_transposed else states  # Fortran order
    loaded = libero_init_states._read_pickled_array(pickle.dumps(states, protocol))
    assert loaded.dtype == states.dtype
    np.testing.assert_array_equal(loaded, states)


@pytest.mark.fault(27)
def test_a_command_in_the_pickle_is_refused_and_not_run(tmp_path: pathlib.Path):
    witness = tmp_path / "witness"
    hostile = pickled(RunsACommand(f"touch {witness}"))
    path = write_torch_zip(tmp_path / "task.pruned_init", hostile)
    with pytest.raises(ValueError, match=r"posix\.system is not allowed"):
        load_init_states(path)
    assert not witness.exists()
    pickle.loads(hostile)  # the file is hostile indeed
    assert witness.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (pickled([1.0, 2.0]), "holds a list"),
        (pickled({"states": STATES}), "holds a dict"),
        (pickled(np.array([["a"]], dtype=object)), "not numeric"),
        (pickled(np.zeros((2, 2), np.int64)), "dtype 'i8'"),
        (pickled(np.zeros(3)), r"got shape \(3,\)"),
        (pickled(np.full((1, 2), np.nan)), "not finite"),
        (pickled(np.ndarray), "holds a str"),
        (pickled(STATES)[:-40], "refused pickle"),
        (b"", "refused pickle"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "torch tensors"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval is not allowed"),
        (b"cnumpy\nload\n.", "numpy.load is not allowed"),
    ],
)
def test_other_pickles_are_refused(tmp_path: pathlib.Path, payload: bytes, message: str):
    path = write_torch_zip(tmp_path / "task.pruned_init", payload)
    with pytest.raises(ValueError, match=message) as error:
        load_init_states(path)
    assert str(path) in str(error.value)


def test_a_shape_beyond_the_data_is_refused(tmp_path: pathlib.Path):
    payload = pickled(np.zeros((3, 5))).replace(b"K\x03K\x05", b"K\x7fK\x05")
    path = write_torch_zip(tmp_path / "task.pruned_init", payload)
    with pytest.raises(ValueError, match=r"shape \(127, 5\) holds 120 bytes"):
        load_init_states(path)


def test_object_arrays_in_npz_are_refused(tmp_path: pathlib.Path):
    witness = tmp_path / "witness"
    states = np.array([[RunsACommand(f"touch {witness}")]], dtype=object)
    path = tmp_path / "task.npz"
    np.savez(path, states=states)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_init_states(path)
    assert not witness.exists()


def test_archives_with_other_content_are_refused(tmp_path: pathlib.Path):
    path = tmp_path / "task.npz"
    np.savez(path, states=STATES, more=STATES)
    with pytest.raises(ValueError, match="found 2 and 0"):
        load_init_states(path)
    np.savez(path, states=STATES[:0])
    with pytest.raises(ValueError, match=r"got shape \(0, 7\)"):
        load_init_states(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a readable zip"):
        load_init_states(path)
    with pytest.raises(FileNotFoundError):
        load_init_states(tmp_path / "none.npz")


def test_damaged_archives_are_refused(tmp_path: pathlib.Path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, states=STATES)
    damaged = bytearray(buffer.getvalue())
    damaged[80:120] = bytes(40)
    path = tmp_path / "task.npz"
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="not a readable zip"):
        load_init_states(path)


def test_size_limit_holds_for_what_is_unpacked(tmp_path: pathlib.Path):
    limit = libero_init_states.MAX_BYTES
    path = tmp_path / "task.npz"
    np.savez_compressed(path, states=np.zeros((1, limit // 8 + 1)))
    assert path.stat().st_size < limit / 100
    with pytest.raises(ValueError, match=f"more than the {limit} allowed"):
        load_init_states(path)
