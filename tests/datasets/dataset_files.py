"""Small data sets on disk, written as LIBERO's and LeRobot's own tools write them."""

import io
import json
import pathlib
from fractions import Fraction
from typing import Any

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jaxvla.config import DatasetConfig

STATE_DIM, ACTION_DIM = 8, 7
FPS = 10


def config(path: pathlib.Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(kind="any", path=str(path), **settings)


class Episode:
    """Random contents of an episode; every frame differs from every other."""

    def __init__(self, seed: int, num_steps: int, instruction: str, *, size: int = 6):
        random = np.random.default_rng(seed)
        self.instruction = instruction
        self.images = {
            name: random.integers(0, 256, (num_steps, size, size, 3), dtype=np.uint8)
            for name in ("image", "wrist_image")
        }
        self.state = random.normal(size=(num_steps, STATE_DIM)).astype(np.float32)
        self.actions = random.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.state)


# ---------------------------------------------------------------------------------- LIBERO


def write_libero(
    path: pathlib.Path,
    episodes: list[Episode],
    *,
    instruction: str | None = "put the bowl on the plate",
    convention: str | None = "opengl",
    is_split: bool = False,
) -> None:
    """One task's file. The pictures are stored as they are; numbers are float64."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if instruction is not None:
            info = {"problem_name": "x", "language_instruction": instruction}
            data.attrs["problem_info"] = json.dumps(info)
        if convention is not None:
            data.attrs["macros_image_convention"] = convention
        for number, episode in enumerate(episodes):
            group = data.create_group(f"demo_{number}")
            group["actions"] = episode.actions.astype(np.float64)
            seen = group.create_group("obs")
            pose = episode.state[:, :6].astype(np.float64)
            if is_split:
                seen["ee_pos"], seen["ee_ori"] = pose[:, :3], pose[:, 3:]
            else:
                seen["ee_states"] = pose
            seen["gripper_states"] = episode.state[:, 6:].astype(np.float64)
            seen["agentview_rgb"] = episode.images["image"]
            seen["eye_in_hand_rgb"] = episode.images["wrist_image"]


# --------------------------------------------------------------------------------- LeRobot


def write_lerobot(
    root: pathlib.Path,
    episodes: list[Episode],
    *,
    version: str,
    videos: bool = False,
    rows_per_group: int = 3,
) -> None:
    """A data set under openpi's names; v3.0 has two episodes per file."""
    tasks = {text: i for i, text in enumerate(dict.fromkeys(x.instruction for x in episodes))}
    kind, size = "video" if videos else "image", episodes[0].images["image"].shape[1:]
    features: dict[str, Any] = {
        name: {"dtype": kind, "shape": list(size), "names": ["height", "width", "channel"]}
        for name in ("image", "wrist_image")
    }
    features["state"] = {"dtype": "float32", "shape": [STATE_DIM], "names": None}
    features["actions"] = {"dtype": "float32", "shape": [ACTION_DIM], "names": None}
    write = _write_v2 if version.startswith("v2") else _write_v3
    paths = write(root, episodes, tasks, videos, rows_per_group)
    info = {"codebase_version": version, "fps": FPS, "features": features, **paths}
    (root / "meta" / "info.json").write_text(json.dumps(info))


def _write_v2(
    root: pathlib.Path, episodes: list[Episode], tasks: dict[str, int], videos: bool, rows: int
) -> dict[str, Any]:
    """Chunks of two episodes, so that the second chunk is read too."""
    (root / "meta").mkdir(parents=True)
    lines, first = [], 0
    for index, episode in enumerate(episodes):
        data = root / f"data/chunk-{index // 2:03d}/episode_{index:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(index, episode, tasks, first, videos), data, row_group_size=rows)
        lines.append(
            {"episode_index": index, "tasks": [episode.instruction], "length": len(episode)}
        )
        if videos:
            for key, frames in episode.images.items():
                write_video(
                    root / f"videos/chunk-{index // 2:03d}/{key}/episode_{index:06d}.mp4", frames
                )
        first += len(episode)
    _json_lines(root / "meta" / "episodes.jsonl", lines)
    named = [{"task_index": index, "task": text} for text, index in tasks.items()]
    _json_lines(root / "meta" / "tasks.jsonl", named)
    return {
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        ),
    }


def _write_v3(
    root: pathlib.Path, episodes: list[Episode], tasks: dict[str, int], videos: bool, rows: int
) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    first = 0
    for file in range(0, len(episodes), 2):
        tables, start_s, shown = [], 0.0, episodes[file : file + 2]
        for index, episode in enumerate(shown, start=file):
            tables.append(_table(index, episode, tasks, first, videos))
            entry = {
                "episode_index": index,
                "tasks": [episode.instruction],
                "length": len(episode),
                "data/chunk_index": 0,
                "data/file_index": file // 2,
                "dataset_from_index": first,
                "dataset_to_index": first + len(episode),
                "stats/state/mean": [0.0] * STATE_DIM,
            }
            end_s = start_s + len(episode) / FPS
            for key in episode.images if videos else ():
                entry |= {
                    f"videos/{key}/chunk_index": 0,
                    f"videos/{key}/file_index": file // 2,
                    f"videos/{key}/from_timestamp": start_s,
                    f"videos/{key}/to_timestamp": end_s,
                }
            entries.append(entry)
            start_s, first = end_s, first + len(episode)
        data = root / f"data/chunk-000/file-{file // 2:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), data, row_group_size=rows)
        for key in shown[0].images if videos else ():
            frames = np.concatenate([x.images[key] for x in shown])
            write_video(root / f"videos/{key}/chunk-000/file-{file // 2:03d}.mp4", frames)
    meta = root / "meta" / "episodes" / "chunk-000"
    meta.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(entries), meta / "file-000.parquet")
    named = pa.table({"task_index": list(tasks.values()), "__index_level_0__": list(tasks)})
    pq.write_table(named, root / "meta" / "tasks.parquet")
    return {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }


def _table(index: int, episode: Episode, tasks: dict[str, int], first: int, videos: bool) -> Any:
    """Frames of an episode; v2 and v3 have the same columns."""
    count = len(episode)
    columns: dict[str, Any] = {
        "state": pa.array(episode.state.tolist(), pa.list_(pa.float32())),
        "actions": pa.array(episode.actions.tolist(), pa.list_(pa.float32(), ACTION_DIM)),
        "timestamp": pa.array(np.arange(count, dtype=np.float32) / np.float32(FPS)),
        "frame_index": pa.array(range(count)),
        "episode_index": pa.array([index] * count),
        "index": pa.array(range(first, first + count)),
        "task_index": pa.array([tasks[episode.instruction]] * count),
    }
    if not videos:
        for key, frames in episode.images.items():
            cells = [{"bytes": png(x), "path": f"frame_{i:06d}.png"} for i, x in enumerate(frames)]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns[key] = pa.array(cells, kind)
    return pa.table(columns)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    return buffer.getvalue()


def write_video(path: pathlib.Path, frames: np.ndarray) -> None:
    """H.264 with key frames far apart and frames between that refer to later ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"g": "7", "bf": "2", "crf": "1", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.time_base = Fraction(1, FPS)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _json_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
