"""Our own format of demonstrations: plain arrays, one directory per episode.

    DIR/dataset.json             {"format": "jaxvla-episodes", "version": 1,
                                  "cameras": [name, ...], "key": text,
                                  "episodes": [{"instruction": text, "num_steps": T}, ...]}
    DIR/episode_000000/images.npy       uint8 [T, C, h, w, 3]
                       state.npy        float32 [T, S]
                       actions.npy      float32 [T', A], T' >= T; beyond T: what the expert would
                                        have gone on to do
                       target_mask.npy  bool [T, C, h, w], in every episode or in none: pixels
                                        of what the instruction names

`dataset.json` is written last: a directory without it is not complete. While episodes are written
`.dataset.json.partial` lies in its place and says that what is there is ours to replace. Arrays
are memory-mapped, so that a sample reads its own frame only. "key" says what was recorded, see
`write_episodes`.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvla.config import DatasetConfig
from jaxvla.data.episodes import Frame

_FORMAT, _VERSION = "jaxvla-episodes", 1
_INDEX = "dataset.json"
_PARTIAL = f".{_INDEX}.partial"
_MAX_MAPPED = 1024
"""Arrays that stay mapped; opening one takes longer than reading a frame of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedEpisode:
    """What is written of one episode; see the module docstring."""

    instruction: str
    images: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    target_mask: np.ndarray | None = None


def write_episodes(
    directory: pathlib.Path,
    episodes: Iterable[RecordedEpisode],
    *,
    cameras: Sequence[str],
    key: str,
) -> None:
    """Writes a data set; what an interrupted call left is overwritten.

    Args:
      directory: made when missing.
      episodes: in order, read one by one.
      cameras: names in the order of the C axis.
      key: what a later run must ask for to be given these episodes, see `read_key`.

    Raises:
      ValueError: the directory holds a complete data set or other files, or there are no
        episodes.
    """
    if (directory / _INDEX).exists():
        raise ValueError(f"{directory} holds a data set already")
    require_free(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / _PARTIAL
    partial.touch()
    entries = []
    for number, episode in enumerate(episodes):
        _write_episode(_folder(directory, number), episode)
        entries.append({"instruction": episode.instruction, "num_steps": len(episode.state)})
    if not entries:
        raise ValueError(f"{directory}: there are no episodes to write")
    index = {"format": _FORMAT, "version": _VERSION, "cameras": list(cameras), "key": key}
    with partial.open("w", encoding="utf-8") as file:
        json.dump(index | {"episodes": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / _INDEX)


def require_free(directory: pathlib.Path) -> None:
    """Raises ValueError unless there is nothing, an empty directory, or a recording that was
    interrupted."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if not (directory / _PARTIAL).exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} holds files that are no recorded episodes")


def read_key(directory: pathlib.Path) -> str | None:
    """The key that a data set was written with; None when there is no complete one.

    Raises:
      ValueError: the index is damaged or of another format.
    """
    return _read_index(directory)["key"] if (directory / _INDEX).exists() else None


class RecordedEpisodes:
    """Reads such a directory. Implements `EpisodeDataset`."""

    def __init__(self, config: DatasetConfig):
        self._directory = pathlib.Path(config.path)
        self._mapped: dict[tuple[int, str], np.ndarray] = {}
        self._has_masks = (_folder(self._directory, 0) / "target_mask.npy").exists()
        index = _read_index(self._directory)
        self.cameras = tuple(index["cameras"])
        self.num_steps = [int(entry["num_steps"]) for entry in index["episodes"]]
        self._texts = [str(entry["instruction"]) for entry in index["episodes"]]
        self.instructions = tuple(dict.fromkeys(self._texts))
        if not self.num_steps or min(self.num_steps) < 1:
            raise ValueError(f"{self._directory / _INDEX}: an episode without steps, or none")
        self.state_dim = self.states(0).shape[-1]
        self.action_dim = self.actions(0).shape[-1]

    def states(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.states`."""
        states = self._array(episode, "state")
        self._require(episode, "state", len(states) == self.num_steps[episode], states)
        return states

    def actions(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.actions`."""
        actions = self._array(episode, "actions")
        self._require(episode, "actions", len(actions) >= self.num_steps[episode], actions)
        return actions

    def frame(self, episode: int, step: int, cameras: Sequence[str]) -> Frame:
        """See `EpisodeDataset.frame`."""
        chosen = [self.cameras.index(name) for name in cameras]
        images = self._array(episode, "images")
        self._require(episode, "images", len(images) == self.num_steps[episode], images)
        mask = None
        if self._has_masks:
            mask = np.asarray(self._array(episode, "target_mask")[step, chosen])
        return Frame(
            images=tuple(np.asarray(images[step, camera]) for camera in chosen),
            state=np.asarray(self.states(episode)[step]),
            instruction=self._texts[episode],
            target_mask=mask,
        )

    def close(self) -> None:
        """Lets go of the files."""
        self._mapped.clear()

    def _array(self, episode: int, name: str) -> np.ndarray:
        key = (episode, name)
        if key not in self._mapped:
            if len(self._mapped) >= _MAX_MAPPED:
                self._mapped.pop(next(iter(self._mapped)))
            self._mapped[key] = _load(_folder(self._directory, episode) / f"{name}.npy")
        return self._mapped[key]

    def _require(self, episode: int, name: str, holds: bool, array: np.ndarray) -> None:
        if not holds:
            path = _folder(self._directory, episode) / f"{name}.npy"
            steps = self.num_steps[episode]
            raise ValueError(f"{path} is {array.shape}, the episode has {steps} steps")


def _load(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _folder(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / f"episode_{number:06d}"


def _write_episode(folder: pathlib.Path, episode: RecordedEpisode) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for name in ("images", "state", "actions", "target_mask"):
        array = getattr(episode, name)
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _read_index(directory: pathlib.Path) -> dict[str, Any]:
    """dataset.json.

    Raises:
      ValueError: it is missing, damaged or of another format.
    """
    path = directory / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"] == _FORMAT and index["version"] == _VERSION
        complete = {"cameras", "key", "episodes"} <= set(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of recorded episodes: {error!r}") from error
    if not known or not complete:
        raise ValueError(f"{path} is not of format {_FORMAT}, version {_VERSION}")
    _check_entries(path, index)
    return index


def _check_entries(path: pathlib.Path, index: dict[str, Any]) -> None:
    """Raises ValueError when what the index says has another form."""
    names, entries = index["cameras"], index["episodes"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: cameras = {names!r} are no list of names")
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        steps = entry.get("num_steps") if isinstance(entry, dict) else None
        if not isinstance(steps, int) or not isinstance(entry.get("instruction"), str):
            raise ValueError(f"{path}: episode {number} lacks its instruction or num_steps")
