"""The task file: round trip, and refusal of what is damaged or of another format."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxvla.envs import libero_task
from jaxvla.envs.libero_task import ContactBudget, LiberoTask, TaskCamera


def make_task(**changes: Any) -> LiberoTask:
    random = np.random.default_rng(0)
    values: dict[str, Any] = {
        "suite": "libero_spatial",
        "task_id": 3,
        "name": "pick_up_the_bowl",
        "language": "pick up the bowl, 把碗拿起来",
        "physics_xml": "<mujoco>\n  <worldbody/>\n</mujoco>",
        "init_states": random.normal(size=(4, 9)),
        "start_states": random.normal(size=(4, 9)),
        "goal_rotations": random.normal(size=(4, 3, 3)),
        "fixtures": ("cabinet_main", "stove_main"),
        "fixture_poses": random.normal(size=(4, 2, 7)),
        "time_limit": 220,
        "cameras": (
            TaskCamera(
                name="wrist", body="hand", pos=(0.1, 0.0, 1 / 3), quat=(0, 0.6, 0.8, 0), fovy_deg=75
            ),
        ),
        "contact_budget": ContactBudget(
            max_geom_pairs=48,
            max_contact_points=64,
            measured_pairs=30,
            measured_contacts=41,
        ),
        "goal": ({"kind": "up", "object": "bowl", "height_m": 0.1, "at": [1, 2]},),
        "surfaces": {
            "triangles": random.normal(size=(5, 3, 3)).astype(np.float32),
            "geom": np.arange(5, dtype=np.int32),
            "body_names": np.array(["hand", "bowl"]),
            "near_m": np.asarray(0.01),
        },
        "versions": {"mujoco": "3.17.0"},
    }
    return LiberoTask(**{**values, **changes})


def assert_equal(one: LiberoTask, other: LiberoTask) -> None:
    for field in dataclasses.fields(LiberoTask):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "surfaces":
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
                np.testing.assert_array_equal(a[key], b[key])
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b and type(a) is type(b), field.name


def rewrite(path: Path, member: str, change: Any) -> None:
    """Changes one member of the archive, with valid checksums."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents[member] = change(contents[member])
    with zipfile.ZipFile(path, "w") as archive:
        for name, payload in contents.items():
            archive.writestr(name, payload)


def test_round_trip_keeps_everything(tmp_path: Path):
    path = tmp_path / "a" / "b" / "task.zip"
    make_task().save(path)
    assert_equal(LiberoTask.load(path), make_task())
    assert LiberoTask.load(path).content_hash() == make_task().content_hash()
    assert [file.name for file in path.parent.iterdir()] == ["task.zip"]


def test_equal_tasks_give_equal_files(tmp_path: Path):
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    make_task().save(first)
    LiberoTask.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_fortran_ordered_arrays_hash_as_what_they_hold(tmp_path: Path):
    states = np.asfortranarray(make_task().init_states)
    assert make_task(init_states=states).content_hash() == make_task().content_hash()
    make_task(init_states=states).save(tmp_path / "task.zip")
    assert_equal(LiberoTask.load(tmp_path / "task.zip"), make_task())


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": 4},
        {"physics_xml": "<mujoco/>"},
        {"init_states": np.zeros((4, 9))},
        {"init_states": make_task().init_states.reshape(9, 4)},
        {"goal": ()},
        {"surfaces": {}},
        {"fixtures": ("stove_main", "cabinet_main")},
        {"versions": {"mujoco": "3.18.0"}},
    ],
)
def test_the_hash_covers_every_part(change: dict[str, Any]):
    assert make_task(**change).content_hash() != make_task().content_hash()


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("scene.xml", lambda xml: xml.replace(b"worldbody", b"worldbodi")),
        ("a0.npy", lambda array: array[:-8] + bytes(8)),
        ("task.json", lambda text: text.replace(b'"time_limit": 220', b'"time_limit": 230')),
        ("task.json", lambda text: text.replace(b'"near_m"', b'"far_m"')),
    ],
)
def test_changed_content_is_refused(tmp_path: Path, member: str, change: Any):
    path = tmp_path / "task.zip"
    make_task().save(path)
    rewrite(path, member, change)
    with pytest.raises(ValueError, match=r"task.zip is damaged.* compile the task again"):
        LiberoTask.load(path)


def test_any_damaged_byte_is_refused(tmp_path: Path):
    path, good = tmp_path / "task.zip", tmp_path / "good.zip"
    make_task().save(good)
    content = good.read_bytes()
    for position in np.random.default_rng(1).integers(len(content), size=200):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            task = LiberoTask.load(path)
        except ValueError as error:
            assert "compile the task again" in str(error)
        else:  # a byte without meaning, such as of a time stamp
            assert_equal(task, make_task())


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "task.zip"
    make_task().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="compile the task again"):
        LiberoTask.load(path)


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "task.zip"
    monkeypatch.setattr(libero_task, "FORMAT_VERSION", libero_task.FORMAT_VERSION + 1)
    make_task().save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format version 2, .* compile the task again"):
        LiberoTask.load(path)


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "arrays.npz"
    np.savez(path, states=np.zeros(3))
    with pytest.raises(ValueError, match="no readable task file"):
        LiberoTask.load(path)
    make_task().save(path)
    rewrite(path, "task.json", lambda text: json.dumps({**json.loads(text), "format": "x"}))
    with pytest.raises(ValueError, match="no LIBERO task file"):
        LiberoTask.load(path)
    with pytest.raises(FileNotFoundError):
        LiberoTask.load(tmp_path / "none.zip")


def test_pickled_arrays_are_not_opened(tmp_path: Path):
    path, arrays = tmp_path / "task.zip", tmp_path / "objects.npy"
    make_task().save(path)
    np.save(arrays, np.array([{}], object), allow_pickle=True)
    rewrite(path, "a0.npy", lambda _: arrays.read_bytes())
    with pytest.raises(ValueError, match="no readable task file"):
        LiberoTask.load(path)


@pytest.mark.parametrize("value", [{"a": {1: 2}}, {"a": object()}, {"a": np.array([None])}])
def test_what_has_no_file_format_is_refused(tmp_path: Path, value: Any):
    with pytest.raises(ValueError, match=r"goal\[0\]\.a"):
        make_task(goal=(value,)).save(tmp_path / "task.zip")


def test_the_cache_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(libero_task.CACHE_VARIABLE, raising=False)
    assert libero_task.cache_dir() == Path.home() / ".cache/jaxvla/libero"
    monkeypatch.setenv(libero_task.CACHE_VARIABLE, "~/tasks")
    assert libero_task.cache_dir() == Path.home() / "tasks"
    path = libero_task.task_path("libero_goal", 7)
    assert path == Path.home() / "tasks/libero_goal/task_007.zip"
    assert libero_task.task_path("libero_goal", 7, "here") == Path("here/libero_goal/task_007.zip")
