"""The task file: all that a LIBERO task needs at run time, without libero or robosuite.

A file is a zip archive that holds

  task.json     numbers, names, goal and surfaces; arrays stand in it as {"$array": "a0"}
  scene.xml     the physics model, which needs no other file
  a0.npy, ...   the arrays

Nothing in it is a pickle. `content_hash` covers all of it, and `load` refuses a file whose
content gives another hash, or whose format is another version.

Files are built from LIBERO's assets by `libero_compiler` and stay on the machine that built
them: `cache_dir()` names the place.
"""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "jaxvla.libero_task"
FORMAT_VERSION = 1
"""Raised whenever a file of before can no longer be used as it is."""

CACHE_VARIABLE = "JAXVLA_LIBERO_CACHE"
"""Environment variable that names another cache directory."""

_ARRAY = "$array"
_MAX_BYTES = 2**30
"""Upper limit on what a file may hold, unpacked; a task takes a few MB."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of all members, so that equal tasks give equal files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCamera:
    """A camera that is fixed to a body. Looks along its -z axis, with y up, as in MuJoCo."""

    name: str
    """Our name: "agentview" or "wrist"."""
    body: str
    """Body it is fixed to; "world" for a camera that does not move."""
    pos: tuple[float, float, float]
    """Place in the body's frame, m."""
    quat: tuple[float, float, float, float]
    """Orientation in the body's frame, unit quaternion (w, x, y, z)."""
    fovy_deg: float
    """Vertical field of view, degrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContactBudget:
    """The sizes of MJX's contact buffers for a task, and what they were derived from."""

    max_geom_pairs: int
    """Pairs per kind of pair that go through collision functions; MuJoCo numeric of that name."""
    max_contact_points: int
    """Contacts that reach the solver; MuJoCo numeric of that name."""
    measured_pairs: int
    """Rank of touching pairs in `broad_phase`, in nearly all instants of the measured runs."""
    measured_contacts: int
    """Number of contacts that MJX would have found in nearly all of these instants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiberoTask:
    """One LIBERO task, ready for MJX. K init states, F fixtures that are placed at random."""

    suite: str
    """Benchmark suite, such as "libero_spatial"."""
    task_id: int
    """Position in the suite, in LIBERO's default order."""
    name: str
    """LIBERO's name of the task."""
    language: str
    """The instruction."""
    physics_xml: str
    """MJCF that `mujoco.MjModel.from_xml_string` loads without any file."""
    init_states: np.ndarray
    """float64 [K, nq + nv]: qpos and qvel in that model's order, LIBERO's own."""
    start_states: np.ndarray
    """float64 [K, nq + nv]: what init states have become when the policy takes over."""
    goal_rotations: np.ndarray
    """float64 [K, 3, 3]: where the hand is told to point at that time, hand to world frame."""
    fixtures: tuple[str, ...]
    """Bodies of the world whose places are part of an episode (cabinet, stove, ...)."""
    fixture_poses: np.ndarray
    """float64 [K, F, 7]: `body_pos` (m) and `body_quat` (w, x, y, z) that go with init state k.
    Those of state 0 are also in `physics_xml`."""
    time_limit: int
    """Control steps per episode."""
    cameras: tuple[TaskCamera, ...]
    contact_budget: ContactBudget
    goal: tuple[dict[str, Any], ...]
    """Goal terms, all of which must hold, as `predicates.term_to_dict` writes them."""
    surfaces: dict[str, np.ndarray]
    """What cameras see, as `rendering.surfaces.Surfaces.to_arrays` writes it."""
    versions: dict[str, str]
    """Package -> version that the task was made with."""

    def content_hash(self) -> str:
        """SHA-256 over everything in the task, as 64 hexadecimal digits."""
        document, arrays = _encode(self)
        return _digest(document, self.physics_xml, arrays)

    def save(self, path: str | Path) -> None:
        """Writes the task file, in place of one of that name. Creates missing directories.

        Raises:
          ValueError: goal or surfaces hold something that is no plain data.
        """
        path = Path(path)
        document, arrays = _encode(self)
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hash": _digest(document, self.physics_xml, arrays),
            "task": document,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed at the end: another process never sees half a file.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            _write(archive, "task.json", json.dumps(header, indent=1).encode())
            _write(archive, "scene.xml", self.physics_xml.encode())
            for name, array in arrays.items():
                _write(archive, f"{name}.npy", _to_npy(array))
        os.replace(partial, path)

    @staticmethod
    def load(path: str | Path) -> "LiberoTask":
        """Reads a task file.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no task file, of another format version, or damaged. The message
            says what to do.
        """
        path = Path(path)
        content = io.BytesIO(path.read_bytes())
        # What zipfile, zlib, json and numpy raise on damaged files.
        damages = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError)
        try:
            with zipfile.ZipFile(content) as archive:
                header, arrays, xml = _read(archive)
        except (*damages, RuntimeError, OSError, struct.error) as error:
            raise ValueError(_advice(path, f"is no readable task file ({error})")) from error
        if header.get("format") != FORMAT:
            raise ValueError(_advice(path, "is no LIBERO task file"))
        version = header.get("format_version")
        if version != FORMAT_VERSION:
            what = f"has format version {version}, this program reads {FORMAT_VERSION}"
            raise ValueError(_advice(path, what))
        if header.get("hash") != _digest(header.get("task"), xml, arrays):
            raise ValueError(_advice(path, "is damaged: its content does not match its hash"))
        try:
            return _decode(header["task"], xml, arrays)
        except (KeyError, TypeError) as error:  # other fields, under the same version
            raise ValueError(_advice(path, f"has fields of another program ({error})")) from error


def cache_dir() -> Path:
    """Where task files are kept: `$JAXVLA_LIBERO_CACHE`, or ~/.cache/jaxvla/libero."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given or "~/.cache/jaxvla/libero").expanduser()


def task_path(suite: str, task_id: int, directory: str | Path | None = None) -> Path:
    """Place of a task's file.

    Args:
      suite: benchmark suite.
      task_id: position in the suite.
      directory: cache directory; None: `cache_dir()`.
    """
    root = cache_dir() if directory is None else Path(directory)
    return root / suite / f"task_{task_id:03d}.zip"


def _encode(task: LiberoTask) -> tuple[Any, dict[str, np.ndarray]]:
    """Splits a task into a JSON document (without the XML) and its arrays by name."""
    arrays: dict[str, np.ndarray] = {}
    document = {
        field.name: _pack(getattr(task, field.name), field.name, arrays)
        for field in fields(task)
        if field.name != "physics_xml"
    }
    return document, arrays


def _pack(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """Returns `value` as JSON data; arrays move to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise ValueError(f"{where} holds an array of Python objects, which has no file format")
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, TaskCamera | ContactBudget):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key != _ARRAY for key in value):
            raise ValueError(f"{where} has a key that is no string, or is {_ARRAY!r}")
        return {key: _pack(item, f"{where}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{where}[{i}]", arrays) for i, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, which is no plain data")


def _unpack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Inverse of `_pack`, except that tuples come back as lists and records as dicts."""
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_ARRAY}:
        return arrays[value[_ARRAY]]
    return {key: _unpack(item, arrays) for key, item in value.items()}


def _decode(document: Any, xml: str, arrays: dict[str, np.ndarray]) -> LiberoTask:
    """Builds the task from what `_encode` made of it."""
    values = _unpack(document, arrays)
    make: dict[str, Callable[[Any], Any]] = {
        "fixtures": tuple,
        "goal": tuple,
        "cameras": lambda items: tuple(_camera(item) for item in items),
        "contact_budget": lambda item: ContactBudget(**item),
    }
    values = {key: make[key](item) if key in make else item for key, item in values.items()}
    return LiberoTask(physics_xml=xml, **values)


def _camera(item: dict[str, Any]) -> TaskCamera:
    return TaskCamera(**{**item, "pos": tuple(item["pos"]), "quat": tuple(item["quat"])})


def _digest(document: Any, xml: str, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over document, XML and arrays (name, dtype, shape, bytes in C order)."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    digest.update(b"\0" + xml.encode() + b"\0")
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()


def _write(archive: zipfile.ZipFile, name: str, payload: bytes) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(member, payload)


def _read(archive: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """Returns header, arrays and XML. zipfile checks each member's CRC."""
    total = sum(member.file_size for member in archive.infolist())
    if total > _MAX_BYTES:
        raise ValueError(f"it holds {total} bytes, more than the {_MAX_BYTES} allowed")
    header = json.loads(archive.read("task.json"))
    if not isinstance(header, dict):
        raise ValueError("task.json is no object")
    arrays = {
        name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
        for name in archive.namelist()
        if name.endswith(".npy")
    }
    return header, arrays, archive.read("scene.xml").decode()


def _advice(path: Path, what: str) -> str:
    return f"{path} {what}. Fix: delete it and compile the task again (--job=compile_tasks)"
