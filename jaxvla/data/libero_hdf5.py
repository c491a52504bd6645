"""LIBERO's demonstrations in HDF5, as LIBERO distributes them and its scripts write them.

A file holds the demonstrations of one task
(https://github.com/Lifelong-Robot-Learning/LIBERO/blob/master/scripts/create_dataset.py):

    data                       attributes: problem_info (JSON, "language_instruction"),
                               macros_image_convention ("opengl")
    data/demo_0/actions        [T, 7], in [-1, 1]; gripper +1 closes
    data/demo_0/obs/agentview_rgb, eye_in_hand_rgb     uint8 [T, h, w, 3]
    data/demo_0/obs/ee_states  [T, 6] position (m) and axis-angle (rad); or ee_pos and ee_ori
    data/demo_0/obs/gripper_states   [T, 2], finger positions (m)

State and images are made those of `jaxvla.envs.libero_host`, i.e. of openpi's client: the state
is [ee_states, gripper_states], and images are turned. robosuite's "opengl" images have their
bottom row first; the policies' images are these turned by 180 degrees (and so mirrored against
the scene). In files written with "opencv" the top row is first: those are mirrored only.

Frames and actions are paired by their index, as LIBERO's own training does. In the distributed
files frame t shows the world after action t, not before it; files that were recorded anew, as
OpenVLA's and openpi's were, have frame t before action t.

States and actions of an episode are kept in memory once they were read: a read of HDF5 costs more
than a whole chunk of them.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvla.config import DatasetConfig
from jaxvla.data.episodes import Frame

_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_STATE_DIM, _ACTION_DIM = 8, 7


class LiberoHdf5:
    """Reads one file, or every *.hdf5 below a directory. Implements `EpisodeDataset`."""

    cameras = _CAMERAS
    state_dim = _STATE_DIM
    action_dim = _ACTION_DIM

    def __init__(self, config: DatasetConfig):
        self._files = [_open(path) for path in _paths(pathlib.Path(config.path))]
        self._episodes: list[tuple[Any, str, bool]] = []
        for file in self._files:
            is_upright, text = _is_upright(file), _instruction(file)
            names = sorted(file["data"], key=_number)
            self._episodes += [(file["data"][name], text, is_upright) for name in names]
        if not self._episodes:
            raise ValueError(f"{config.path} holds no demonstrations")
        self.num_steps = [_check(group) for group, _, _ in self._episodes]
        self.instructions = tuple(dict.fromkeys(text for _, text, _ in self._episodes))
        self._vectors: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def states(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.states`."""
        return self._read(episode)[0]

    def actions(self, episode: int) -> np.ndarray:
        """See `EpisodeDataset.actions`."""
        return self._read(episode)[1]

    def frame(self, episode: int, step: int, cameras: Sequence[str]) -> Frame:
        """See `EpisodeDataset.frame`."""
        group, text, is_upright = self._episodes[episode]
        images = [np.asarray(group["obs"][name][step]) for name in cameras]
        return Frame(
            images=tuple(x[:, ::-1] if is_upright else x[::-1, ::-1] for x in images),
            state=self.states(episode)[step],
            instruction=text,
        )

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()

    def _read(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [T, S] and actions float32 [T, A], from memory but for the first time."""
        if episode not in self._vectors:
            group = self._episodes[episode][0]
            seen = group["obs"]
            parts = [seen[name][:] for name in (*_pose_names(seen), "gripper_states")]
            states = np.concatenate(parts, axis=-1).astype(np.float32)
            self._vectors[episode] = states, np.asarray(group["actions"], np.float32)
        return self._vectors[episode]


def _open(path: pathlib.Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ValueError("LIBERO's demonstrations need h5py: pip install 'jaxvla[data]'") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "data" not in file:
        raise ValueError(f"{path} has no group 'data': it holds no demonstrations of LIBERO")
    return file


def _paths(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.hdf5"))
    if not found:
        raise ValueError(f"{path} is no file, and no directory with *.hdf5 files")
    return found


def _number(name: str) -> int:
    """Position of "demo_12" among its siblings."""
    match = re.fullmatch(r"demo_(\d+)", name)
    if match is None:
        raise ValueError(f"data/{name} is not named demo_NUMBER")
    return int(match[1])


def _is_upright(file: Any) -> bool:
    """Whether the top row of an image is its first."""
    convention = file["data"].attrs.get("macros_image_convention", "opengl")
    if convention not in ("opengl", "opencv"):
        raise ValueError(f"{file.filename}: unknown image convention {convention!r}")
    return convention == "opencv"


def _instruction(file: Any) -> str:
    """What the file says, or else what its name says."""
    info = file["data"].attrs.get("problem_info")
    if info is not None:
        # A string or a list of characters; some sentences have quotation marks around them.
        try:
            return "".join(json.loads(info)["language_instruction"]).strip('" ')
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file.filename}: problem_info has no instruction") from error
    name = pathlib.Path(file.filename).stem.removesuffix("_demo")
    return re.sub(r"^[A-Z][A-Z0-9_]*SCENE\d+_", "", name).replace("_", " ")


def _pose_names(seen: Any) -> tuple[str, ...]:
    return ("ee_states",) if "ee_states" in seen else ("ee_pos", "ee_ori")


def _check(group: Any) -> int:
    """Control steps of a demonstration whose arrays fit each other, else ValueError."""
    where = f"{group.file.filename}: {group.name}"
    sizes = {"ee_states": (6,), "ee_pos": (3,), "ee_ori": (3,), "gripper_states": (2,)}
    try:
        seen, num_steps = group["obs"], len(group["actions"])
        arrays = {"actions": (group["actions"], (_ACTION_DIM,))}
        for name in (*_pose_names(seen), "gripper_states"):
            arrays[name] = (seen[name], sizes[name])
        for name in _CAMERAS:
            arrays[name] = (seen[name], (*seen[name].shape[1:3], 3))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where} is incomplete: {error}") from error
    for name, (array, shape) in arrays.items():
        if array.shape != (num_steps, *shape):
            raise ValueError(f"{where}: {name} is {array.shape}, not {(num_steps, *shape)}")
    if num_steps < 1:
        raise ValueError(f"{where} has no steps")
    return num_steps
