"""From demonstrations on disk to samples: an index over (episode, step), read on demand.

Every format is an `EpisodeDataset`; `EpisodeSamples` makes supervised batches of one. States,
actions and lengths are small, images are read for the samples of a batch only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from jaxvla.config import DatasetConfig
from jaxvla.data.images import resize_with_pad_on_host
from jaxvla.types import Observation, SupervisedBatch, stand_in

NO_CAMERA = "-"
"""Stands in a list of cameras for one that the data set does not have."""

Prompt = Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From an instruction and a state [S] to the prompt's tokens int32 [N] and mask bool [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One control step of an episode, before its action."""

    images: tuple[np.ndarray, ...]
    """uint8 [h, w, 3] each, of the cameras asked for, turned like the env's."""
    state: np.ndarray
    """float32 [S]."""
    instruction: str
    target_mask: np.ndarray | None = None
    """bool [C, h, w] of those cameras: pixels of the object that the instruction names."""


class EpisodeDataset(Protocol):
    """Demonstrations of one robot. Methods are called by one thread at a time."""

    cameras: tuple[str, ...]
    """Names of all cameras."""
    num_steps: Sequence[int]
    """Control steps T of every episode."""
    state_dim: int
    action_dim: int
    instructions: tuple[str, ...]
    """Every instruction that a frame may have, once."""

    def __init__(self, config: DatasetConfig) -> None:
        """Reads the index.

        Raises:
          ValueError: there is no such data set, a file of it is damaged or has another format,
            or a package that reads it is missing.
        """
        ...

    def states(self, episode: int) -> np.ndarray:
        """float32 [T, S]."""
        ...

    def actions(self, episode: int) -> np.ndarray:
        """float32 [T', A] with T' >= T: what was done at every step, and perhaps at some more."""
        ...

    def frame(self, episode: int, step: int, cameras: Sequence[str]) -> Frame:
        """What was seen before step `step`, by some of the cameras."""
        ...

    def close(self) -> None:
        """Closes files."""
        ...


class EpisodeSamples:
    """One sample per control step of a data set.

    A sample's label is the chunk of actions that follows its frame; where the episode ends
    within it, the last action is repeated, as openpi and LeRobot do.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        *,
        cameras: Sequence[str],
        image_size: int,
        action_horizon: int,
        prompt: Prompt,
        with_masks: bool = True,
    ):
        """Args:
        dataset: where to read.
        cameras: names in the order of the policy's C axis, NO_CAMERA for missing ones.
        image_size: pixels of the square images that the policy reads.
        action_horizon: steps H of a chunk.
        prompt: see `Prompt`.
        with_masks: whether masks of the named objects are wanted, where there are any.
        """
        self._dataset = dataset
        self._cameras = tuple(cameras)
        self._image_size = image_size
        self._steps = np.arange(action_horizon)
        self._prompt = prompt
        self._with_masks = with_masks
        self._ends = np.cumsum(np.asarray(dataset.num_steps, np.int64))
        self.num_samples = int(self._ends[-1])

    def read(self, rows: np.ndarray) -> SupervisedBatch:
        """Samples [B, ...] of given numbers, int [B] in [0, num_samples), as numpy arrays."""
        # In the order of the files, so that what was read for one sample serves the next.
        order = np.argsort(rows, kind="stable")
        parts = [self._sample(int(row)) for row in rows[order]]
        batch: SupervisedBatch = jax.tree.map(lambda *x: np.stack(x), *parts)
        back = np.argsort(order, kind="stable")
        return jax.tree.map(lambda x: x[back], batch)

    def where(self, row: int) -> tuple[int, int]:
        """(episode, step) of a sample."""
        episode = int(np.searchsorted(self._ends, row, side="right"))
        first = self._ends[episode - 1] if episode else 0
        return episode, int(row - first)

    def _sample(self, row: int) -> SupervisedBatch:
        """Without a batch axis."""
        episode, step = self.where(row)
        present = [name for name in self._cameras if name != NO_CAMERA]
        frame = self._dataset.frame(episode, step, present)
        tokens, token_mask = self._prompt(frame.instruction, frame.state)
        actions = self._dataset.actions(episode)
        chunk = actions[np.minimum(step + self._steps, len(actions) - 1)]
        return SupervisedBatch(
            observation=Observation(
                images=stand_in(self._images(frame.images)),
                image_mask=stand_in(np.array([name != NO_CAMERA for name in self._cameras])),
                state=stand_in(np.asarray(frame.state, np.float32)),
                tokens=stand_in(tokens),
                token_mask=stand_in(token_mask),
            ),
            actions=stand_in(np.asarray(chunk, np.float32)),
            target_mask=self._target_mask(frame),
        )

    def _images(self, found: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [C, h, w, 3], black where there is no camera."""
        size, given = self._image_size, iter(found)
        images = np.zeros((len(self._cameras), size, size, 3), np.uint8)
        for index, name in enumerate(self._cameras):
            if name != NO_CAMERA:
                images[index] = resize_with_pad_on_host(next(given), size, size)
        return images

    def _target_mask(self, frame: Frame) -> jax.Array | None:
        """bool [C, h, w]; masks are not resized: their edges would not be those of the images."""
        mask = frame.target_mask
        if mask is None or not self._with_masks:
            return None
        shape = (len(self._cameras), self._image_size, self._image_size)
        if mask.shape != shape:
            raise ValueError(
                f"masks of the named objects are {mask.shape}, the policy's {shape}; "
                "model.grounding_coef = 0 leaves them out"
            )
        return stand_in(mask)


def select_cameras(config: DatasetConfig, dataset: EpisodeDataset, num_cameras: int) -> list[str]:
    """Cameras of a data set in the order of the env's.

    Args:
      config: says which, or leaves it to the data set.
      dataset: has them.
      num_cameras: cameras C of the env.

    Raises:
      ValueError: their number is another, or one does not exist.
    """
    chosen, known = list(config.cameras or dataset.cameras), ", ".join(dataset.cameras)
    unknown = [name for name in chosen if name not in (*dataset.cameras, NO_CAMERA)]
    if unknown:
        raise ValueError(f"the data set has no camera {unknown[0]!r}; it has {known}")
    if len(chosen) != num_cameras:
        raise ValueError(
            f"the env has {num_cameras} cameras, {len(chosen)} are given: {', '.join(chosen)}; "
            f"the data set has {known}"
        )
    return chosen
