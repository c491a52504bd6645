"""LeRobot data sets, read back from files in LeRobot's layouts."""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_files import FPS, Episode, config, write_lerobot, write_video

from jaxvla.data.lerobot import LeRobotDataset
from jaxvla.data.video_reader import VideoReader

CAMERAS = ("image", "wrist_image")
VERSIONS = ("v2.0", "v2.1", "v3.0")


def make_episodes() -> list[Episode]:
    sentences = ["open the drawer", "close it", "open the drawer"]
    return [
        Episode(i, steps, text)
        for i, (steps, text) in enumerate(zip((5, 4, 9), sentences, strict=True))
    ]


def coded(numbers: np.ndarray, size: int = 32) -> np.ndarray:
    """Pictures [n, size, size, 3] that show a number each: a grey per bit, in blocks of 8 px."""
    bits = (numbers[:, None] >> np.arange(16)) & 1
    blocks = np.where(bits, 220, 30).reshape(-1, 4, 4).astype(np.uint8)
    return np.repeat(np.kron(blocks, np.ones((size // 4, size // 4), np.uint8))[..., None], 3, -1)


def decoded(picture: np.ndarray) -> int:
    bits = picture[4::8, 4::8, 0].ravel() > 125
    return int((bits * (1 << np.arange(16))).sum())


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def test_frames_with_pictures(version: str, tmp_path: pathlib.Path) -> None:
    episodes = make_episodes()
    write_lerobot(tmp_path, episodes, version=version)
    dataset = LeRobotDataset(config(tmp_path))
    assert dataset.cameras == CAMERAS and list(dataset.num_steps) == [5, 4, 9]
    assert (dataset.state_dim, dataset.action_dim) == (8, 7)
    assert dataset.instructions == ("open the drawer", "close it")
    order = [(e, s) for e, episode in enumerate(episodes) for s in range(len(episode))]
    for index in np.random.default_rng(0).permutation(len(order)):
        number, step = order[index]
        frame = dataset.frame(number, step, CAMERAS[::-1])
        for name, image in zip(CAMERAS[::-1], frame.images, strict=True):
            np.testing.assert_array_equal(image, episodes[number].images[name][step])
        np.testing.assert_array_equal(frame.state, episodes[number].state[step])
        assert frame.instruction == episodes[number].instruction and frame.target_mask is None
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(dataset.states(number), episode.state)
        np.testing.assert_array_equal(dataset.actions(number), episode.actions)
    dataset.close()


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_frames_of_videos_are_exact(version: str, tmp_path: pathlib.Path) -> None:
    """Every picture shows its own number, so that a neighbour would be noticed."""
    episodes = [Episode(i, steps, "go") for i, steps in enumerate((17, 23, 5))]
    for number, episode in enumerate(episodes):
        for camera, name in enumerate(CAMERAS):
            numbers = np.arange(len(episode)) + 100 * number + 1000 * camera
            episode.images[name] = coded(numbers)
    write_lerobot(tmp_path, episodes, version=version, videos=True)
    dataset = LeRobotDataset(config(tmp_path))
    order = [(e, s) for e, episode in enumerate(episodes) for s in range(len(episode))]
    for index in np.random.default_rng(0).permutation(len(order)):
        number, step = order[index]
        images = dataset.frame(number, step, CAMERAS).images
        found = [decoded(image) for image in images]
        assert found == [step + 100 * number, step + 100 * number + 1000]
        assert images[0].dtype == np.uint8 and images[0].shape == (32, 32, 3)
    dataset.close()


def test_a_time_without_a_frame(tmp_path: pathlib.Path) -> None:
    write_video(tmp_path / "a.mp4", coded(np.arange(6)))
    reader = VideoReader(fps=FPS)
    assert decoded(reader.read(tmp_path / "a.mp4", 0.549)) == 5
    with pytest.raises(ValueError, match=r"no frame at 0\.700 s, the nearest frame is at 0\.500"):
        reader.read(tmp_path / "a.mp4", 0.7)
    assert decoded(reader.read(tmp_path / "a.mp4", 0.0)) == 0
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"b\.mp4 cannot be opened"):
        reader.read(tmp_path / "b.mp4", 0.0)
    reader.close()


def test_many_videos_are_not_all_kept_open(tmp_path: pathlib.Path) -> None:
    reader = VideoReader(fps=FPS)
    for _ in range(2):
        for number in range(10):
            path = tmp_path / f"{number}.mp4"
            if not path.exists():
                write_video(path, coded(np.arange(2) + 10 * number))
            assert decoded(reader.read(path, 0.1)) == 10 * number + 1
    assert len(reader._open) == 8
    reader.close()
    assert not reader._open


def test_images_can_be_turned(tmp_path: pathlib.Path) -> None:
    (episode,) = [Episode(0, 3, "go")]
    write_lerobot(tmp_path, [episode], version="v3.0")
    dataset = LeRobotDataset(config(tmp_path, rotate_images=True))
    (image,) = dataset.frame(0, 1, ["image"]).images
    np.testing.assert_array_equal(image, np.rot90(episode.images["image"][1], 2))


def test_the_names_of_state_and_actions_can_be_given(tmp_path: pathlib.Path) -> None:
    episode = Episode(0, 3, "go")
    write_lerobot(tmp_path, [episode], version="v2.1")
    dataset = LeRobotDataset(config(tmp_path, state_key="actions", action_key="state"))
    np.testing.assert_array_equal(dataset.states(0), episode.actions)
    np.testing.assert_array_equal(dataset.actions(0), episode.state)
    message = r"no feature joints; it has image, .*Set finetune\.dataset\.state_key"
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(config(tmp_path, state_key="joints"))


def _edit_info(root: pathlib.Path, **values: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damage_is_named(version: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"info\.json is no LeRobot index"):
        LeRobotDataset(config(tmp_path))
    write_lerobot(tmp_path, make_episodes(), version=version)
    _edit_info(tmp_path, codebase_version="v9.0")
    with pytest.raises(ValueError, match=r"layout 'v9\.0' is none of v2\.0, v2\.1, v3\.0"):
        LeRobotDataset(config(tmp_path))
    _edit_info(tmp_path, codebase_version=version)
    path = sorted((tmp_path / "data").rglob("*.parquet"))[0]
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 3), path)
    with pytest.raises(ValueError, match=r"are not the 5 frames of episode 0"):
        LeRobotDataset(config(tmp_path)).states(0)
    pq.write_table(table.drop_columns("state"), path)
    with pytest.raises(ValueError, match=r"parquet lacks state"):
        LeRobotDataset(config(tmp_path)).states(0)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"parquet cannot be read"):
        LeRobotDataset(config(tmp_path)).states(0)


def test_tasks_without_a_text(tmp_path: pathlib.Path) -> None:
    """Known as soon as the states are read, not when a batch has such a frame."""
    write_lerobot(tmp_path, [Episode(0, 3, "go")], version="v2.1")
    tasks = tmp_path / "meta" / "tasks.jsonl"
    tasks.write_text(json.dumps({"task_index": 7, "task": "come"}))
    with pytest.raises(ValueError, match=r"parquet: task 0 has no text in meta/"):
        LeRobotDataset(config(tmp_path)).states(0)
    tasks.write_text(json.dumps({"task_index": 0}))
    with pytest.raises(ValueError, match=r"tasks\.jsonl: a task lacks 'task'"):
        LeRobotDataset(config(tmp_path))


def test_a_cell_that_is_no_picture(tmp_path: pathlib.Path) -> None:
    write_lerobot(tmp_path, [Episode(0, 3, "go")], version="v2.1")
    path = next((tmp_path / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    cells = table.column("image").to_pylist()
    cells[1] = {"bytes": b"nothing", "path": ""}
    place = table.column_names.index("image")
    pq.write_table(table.set_column(place, "image", pa.array(cells)), path)
    dataset = LeRobotDataset(config(tmp_path))
    dataset.frame(0, 0, ["image"])
    with pytest.raises(ValueError, match=r"row 1, image is no picture"):
        dataset.frame(0, 1, ["image"])


@pytest.mark.parametrize("package", ["pyarrow.parquet", "av.error"])
def test_a_missing_package(
    package: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = Episode(0, 3, "go", size=16)
    write_lerobot(tmp_path, [episode], version="v2.1", videos=True)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"need (pyarrow|PyAV): pip install 'jaxvla\[data\]'"):
        LeRobotDataset(config(tmp_path)).frame(0, 0, ["image"])
