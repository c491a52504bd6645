"""LeRobot data sets, layouts v2.0, v2.1 and v3.0 (https://github.com/huggingface/lerobot).

    meta/info.json       codebase_version, fps, features (name -> dtype, shape), path templates
    v2   meta/tasks.jsonl, meta/episodes.jsonl; one parquet file and one video a camera per episode
    v3   meta/tasks.parquet, meta/episodes/**/*.parquet; files and videos hold several episodes

A row of the data is a frame: "action" follows "observation.state" and the images. Images are
columns of encoded pictures (struct of bytes and path) or mp4 videos; a frame's picture is the one
whose time is its `timestamp` after the episode's start in the video.

States, actions and times of a file are kept in memory once they were read. Pictures in parquet
can only be read with the others of their row group; the last few groups are kept.
"""

import functools
import io
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jaxvla.config import DatasetConfig
from jaxvla.data import lerobot_tables as tables
from jaxvla.data.episodes import Frame
from jaxvla.data.lerobot_tables import EpisodeEntry
from jaxvla.data.video_reader import VideoReader

_STATE_KEYS = ("observation.state", "state")
_ACTION_KEYS = ("action", "actions")
_NUM_GROUPS = 8
"""Row groups of pictures that are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """What is kept of a data file, row by row."""

    state: np.ndarray
    """float32 [n, S]."""
    action: np.ndarray
    """float32 [n, A]."""
    timestamp: np.ndarray
    """float64 [n], seconds since the episode's start."""
    task_index: np.ndarray
    """int64 [n]."""
    episode_index: np.ndarray
    """int64 [n]."""


class LeRobotDataset:
    """Reads a data set's directory. Implements `EpisodeDataset`."""

    def __init__(self, config: DatasetConfig):
        tables.require_pyarrow()
        self._root = pathlib.Path(config.path)
        info = tables.read_info(self._root)
        features: dict[str, Any] = info["features"]
        self._kinds = {name: feature["dtype"] for name, feature in features.items()}
        self.cameras = tuple(x for x, kind in self._kinds.items() if kind in ("image", "video"))
        self._state_key = _key(config.state_key, _STATE_KEYS, features, "state_key")
        self._action_key = _key(config.action_key, _ACTION_KEYS, features, "action_key")
        self.state_dim = _size(features[self._state_key])
        self.action_dim = _size(features[self._action_key])
        videos = [name for name, kind in self._kinds.items() if kind == "video"]
        self._tasks = tables.read_tasks(self._root, info)
        self.instructions = tuple(dict.fromkeys(self._tasks.values()))
        self._episodes = tables.read_episodes(self._root, info, videos)
        self.num_steps = [entry.length for entry in self._episodes]
        self._rotate = config.rotate_images
        self._files: dict[pathlib.Path, _Columns] = {}
        self._groups: dict[tuple[pathlib.Path, int, str], Any] = {}
        self._videos = VideoReader(fps=float(info["fps"]))

    def states(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.states`."""
        columns, rows = self._rows(episode)
        return columns.state[rows]

    def actions(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.actions`."""
        columns, rows = self._rows(episode)
        return columns.action[rows]

    def frame(self, episode: int, step: int, cameras: Sequence[str]) -> Frame:
        """See `EpisodeDataset.frame`."""
        columns, rows = self._rows(episode)
        row = rows.start + step
        images = [
            self._image(episode, row, float(columns.timestamp[row]), name) for name in cameras
        ]
        return Frame(
            images=tuple(x[::-1, ::-1] if self._rotate else x for x in images),
            state=columns.state[row],
            instruction=self._tasks[int(columns.task_index[row])],
        )

    def close(self) -> None:
        """Closes the files."""
        self._videos.close()
        self._parquet.cache_clear()
        self._groups.clear()

    def _rows(self, episode: int) -> tuple[_Columns, slice]:
        """Columns of an episode's file, and its rows there."""
        entry = self._episodes[episode]
        columns = self._columns(entry.data_file)
        rows = slice(entry.first_row, entry.first_row + entry.length)
        found = columns.episode_index[rows]
        if len(found) != entry.length or (found != entry.index).any():
            raise ValueError(
                f"{entry.data_file}: rows {rows.start} to {rows.stop - 1} are not the "
                f"{entry.length} frames of episode {entry.index} that meta/ speaks of"
            )
        return columns, rows

    def _columns(self, path: pathlib.Path) -> _Columns:
        if path not in self._files:
            names = (self._state_key, self._action_key, "timestamp", "task_index", "episode_index")
            found = tables.read_columns(path, names)
            sizes = ((self._state_key, self.state_dim), (self._action_key, self.action_dim))
            for name, size in sizes:
                if found[name].shape[1:] != (size,):
                    raise ValueError(f"{path}: {name} is {found[name].shape}, not [n, {size}]")
            unknown = set(found["task_index"].ravel().tolist()) - set(self._tasks)
            if unknown:
                raise ValueError(f"{path}: task {min(unknown)} has no text in meta/")
            self._files[path] = _Columns(
                state=found[self._state_key].astype(np.float32),
                action=found[self._action_key].astype(np.float32),
                timestamp=found["timestamp"].astype(np.float64).ravel(),
                task_index=found["task_index"].astype(np.int64).ravel(),
                episode_index=found["episode_index"].astype(np.int64).ravel(),
            )
        return self._files[path]

    def _image(self, episode: int, row: int, time_s: float, name: str) -> np.ndarray:
        """uint8 [h, w, 3]."""
        entry = self._episodes[episode]
        if self._kinds[name] == "video":
            path, start_s = entry.videos[name]
            return self._videos.read(path, start_s + time_s)
        return self._picture(entry, row, name)

    def _picture(self, entry: EpisodeEntry, row: int, name: str) -> np.ndarray:
        file = self._parquet(entry.data_file)
        group, first = tables.row_group(file, row)
        key = (entry.data_file, group, name)
        if key not in self._groups:
            if len(self._groups) >= _NUM_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            self._groups[key] = file.read_row_group(group, columns=[name]).column(name)
        cell = self._groups[key][row - first].as_py()
        return self._decode(cell, f"{entry.data_file}, row {row}, {name}")

    def _decode(self, cell: Any, where: str) -> np.ndarray:
        """A cell is {"bytes": encoded picture or None, "path": of a file otherwise}."""
        try:
            source = io.BytesIO(cell["bytes"]) if cell["bytes"] else self._root / cell["path"]
            with Image.open(source) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, TypeError, KeyError) as error:
            raise ValueError(f"{where} is no picture: {error}") from error

    @functools.cached_property
    def _parquet(self) -> Any:
        """Opens data files, of which the last few stay open."""
        return functools.lru_cache(maxsize=_NUM_GROUPS)(tables.open_parquet)


def _key(given: str, usual: Sequence[str], features: dict[str, Any], setting: str) -> str:
    """The name of a feature, as given or as is usual."""
    candidates = (given,) if given else usual
    for name in candidates:
        if name in features:
            return name
    raise ValueError(
        f"the data set has no feature {' or '.join(candidates)}; it has {', '.join(features)}. "
        f"Set finetune.dataset.{setting}"
    )


def _size(feature: dict[str, Any]) -> int:
    """Length of a vector."""
    shape = list(feature["shape"])
    if len(shape) != 1:
        raise ValueError(f"state and actions must be vectors, a feature has shape {shape}")
    return int(shape[0])
