"""LIBERO's demonstration files, read back as the host env shows the same world."""

import pathlib
import sys
from typing import Any

import h5py
import numpy as np
import pytest
from dataset_files import Episode, config, write_libero

from jaxvla.data.libero_hdf5 import LiberoHdf5
from jaxvla.envs.libero_host import state_vector

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


def test_frames(tmp_path: pathlib.Path) -> None:
    """Twelve demonstrations: demo_10 comes after demo_9, not after demo_1."""
    episodes = [Episode(i, 2 + i, "") for i in range(12)]
    write_libero(tmp_path / "task_demo.hdf5", episodes)
    dataset = LiberoHdf5(config(tmp_path / "task_demo.hdf5"))
    assert list(dataset.num_steps) == list(range(2, 14))
    assert dataset.instructions == ("put the bowl on the plate",)
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(dataset.states(number), episode.state)
        np.testing.assert_array_equal(dataset.actions(number), episode.actions)
        assert dataset.states(number).dtype == dataset.actions(number).dtype == np.float32
        frame = dataset.frame(number, 1, CAMERAS)
        np.testing.assert_array_equal(frame.state, episode.state[1])
        for name, image in zip(("image", "wrist_image"), frame.images, strict=True):
            # What `LiberoEnv._frame` does to a rendering, whose bottom row is the first.
            np.testing.assert_array_equal(image, episode.images[name][1][::-1, ::-1])
    dataset.close()


@pytest.mark.parametrize("convention", ["opengl", "opencv", None])
def test_images_are_turned_like_the_envs(convention: str | None, tmp_path: pathlib.Path) -> None:
    """A world with a red top left corner: the env shows the picture upright and mirrored."""
    rendering = np.zeros((8, 8, 3), np.uint8)  # bottom row first, as OpenGL gives it
    rendering[0, 0], rendering[7, 0] = (0, 255, 0), (255, 0, 0)
    shown_by_env = rendering[::-1, ::-1]
    episode = Episode(0, 1, "", size=8)
    stored = rendering[::-1] if convention == "opencv" else rendering
    episode.images["image"] = stored[None]
    write_libero(tmp_path / "a.hdf5", [episode], convention=convention)
    (image,) = LiberoHdf5(config(tmp_path / "a.hdf5")).frame(0, 0, CAMERAS[:1]).images
    np.testing.assert_array_equal(image, shown_by_env)
    assert tuple(image[0, 7]) == (255, 0, 0)


def test_an_unknown_convention(tmp_path: pathlib.Path) -> None:
    write_libero(tmp_path / "a.hdf5", [Episode(0, 2, "")], convention="vulkan")
    with pytest.raises(ValueError, match="unknown image convention 'vulkan'"):
        LiberoHdf5(config(tmp_path))


def test_the_state_is_the_envs(tmp_path: pathlib.Path) -> None:
    """robosuite writes axis-angle from a quaternion; the env's state has the same one."""
    T = pytest.importorskip("robosuite.utils.transform_utils")
    random = np.random.default_rng(0)
    episode, expected = Episode(0, 6, ""), []
    for step in range(6):
        quaternion = random.normal(size=4)
        raw: dict[str, Any] = {
            "robot0_eef_pos": random.normal(size=3),
            "robot0_eef_quat": quaternion / np.linalg.norm(quaternion),
            "robot0_gripper_qpos": random.normal(size=2),
        }
        pose = np.hstack((raw["robot0_eef_pos"], T.quat2axisangle(raw["robot0_eef_quat"].copy())))
        episode.state[step] = np.hstack((pose, raw["robot0_gripper_qpos"]))
        expected.append(state_vector(raw))
    write_libero(tmp_path / "a.hdf5", [episode], is_split=True)
    # float32 of acos(w) / sqrt(1 - w^2) against atan2(|v|, w) / |v|.
    np.testing.assert_allclose(LiberoHdf5(config(tmp_path)).states(0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "instruction", "expected"),
    [
        ("a_demo", '"open the top drawer"', "open the top drawer"),
        ("put_the_mug_on_the_plate_demo", None, "put the mug on the plate"),
        ("KITCHEN_SCENE10_turn_on_the_stove_demo", None, "turn on the stove"),
        ("LIVING_ROOM_SCENE2_pick_up_the_milk", None, "pick up the milk"),
    ],
)
def test_instructions(
    name: str, instruction: str | None, expected: str, tmp_path: pathlib.Path
) -> None:
    write_libero(tmp_path / f"{name}.hdf5", [Episode(0, 2, "")], instruction=instruction)
    dataset = LiberoHdf5(config(tmp_path))
    assert dataset.frame(0, 0, CAMERAS).instruction == expected == dataset.instructions[0]


def test_every_file_below_a_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "suite").mkdir()
    write_libero(tmp_path / "suite" / "b.hdf5", [Episode(1, 3, "")], instruction="second")
    write_libero(tmp_path / "a.hdf5", [Episode(0, 2, ""), Episode(2, 4, "")], instruction="first")
    dataset = LiberoHdf5(config(tmp_path))
    assert list(dataset.num_steps) == [2, 4, 3]
    assert [dataset.frame(i, 0, []).instruction for i in range(3)] == ["first", "first", "second"]


def test_vectors_are_read_once(tmp_path: pathlib.Path) -> None:
    """A sample takes its chunk from memory: not even an open file is needed."""
    episode = Episode(0, 4, "")
    write_libero(tmp_path / "a.hdf5", [episode])
    dataset = LiberoHdf5(config(tmp_path))
    dataset.frame(0, 1, CAMERAS)
    dataset.close()
    np.testing.assert_array_equal(dataset.actions(0), episode.actions)
    np.testing.assert_array_equal(dataset.states(0), episode.state)


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.hdf5"
    with pytest.raises(ValueError, match=r"is no file, and no directory with \*\.hdf5"):
        LiberoHdf5(config(tmp_path))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.hdf5 cannot be read"):
        LiberoHdf5(config(path))
    h5py.File(path, "w").close()
    with pytest.raises(ValueError, match="has no group 'data'"):
        LiberoHdf5(config(path))
    write_libero(path, [])
    with pytest.raises(ValueError, match="holds no demonstrations"):
        LiberoHdf5(config(path))
    for name, value, message in (
        ("obs/gripper_states", np.zeros((2, 3)), r"gripper_states is \(2, 3\), not \(2, 2\)"),
        ("obs/agentview_rgb", np.zeros((3, 4, 4, 3)), r"agentview_rgb is \(3, 4, 4, 3\)"),
        ("actions", np.zeros((2, 6)), r"actions is \(2, 6\), not \(2, 7\)"),
        ("obs/eye_in_hand_rgb", None, "is incomplete"),
    ):
        write_libero(path, [Episode(0, 2, "")])
        with h5py.File(path, "a") as file:
            del file[f"data/demo_0/{name}"]
            if value is not None:
                file[f"data/demo_0/{name}"] = value
        with pytest.raises(ValueError, match=message):
            LiberoHdf5(config(path))


def test_a_missing_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_libero(tmp_path / "a.hdf5", [Episode(0, 2, "")])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"need h5py: pip install 'jaxvla\[data\]'"):
        LiberoHdf5(config(tmp_path))
