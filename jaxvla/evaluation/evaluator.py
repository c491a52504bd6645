"""Evaluator: the deterministic policy on fixed episodes.

consumes    weights, given by the caller
produces    success per task with Wilson intervals; videos
waits for   nobody: it has env groups and compiled functions of its own
unblocked by  -
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from jaxvla import rng
from jaxvla.config import EvaluationConfig
from jaxvla.evaluation.statistics import EvaluationResult, summarise
from jaxvla.serving.sampling import Sampler
from jaxvla.simulation.group import Cursor, EnvGroup
from jaxvla.telemetry.video import write_video
from jaxvla.types import Observation, Params


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One fixed episode of the evaluation."""

    index: int
    task: int
    seed: int
    """Episode number within its task."""


@dataclass(kw_only=True, slots=True)
class _Recording:
    """One episode on video."""

    instruction: str
    frames: list[np.ndarray]
    """Parts uint8 [n, C, h, w, 3]."""


class Evaluator:
    """Runs the same episodes every time it is asked."""

    def __init__(
        self,
        *,
        config: EvaluationConfig,
        sampler: Sampler,
        make_groups: Callable[[], Iterable[EnvGroup]],
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """Args:
        config: episodes, seed, videos.
        sampler: compiled with kind "act".
        make_groups: makes env groups, one at a time, that together play all tasks; each is
          closed after its episodes.
        should_stop: polled between chunks.
        """
        self._config = config
        self._sampler = sampler
        self._make_groups = make_groups
        self._should_stop = should_stop
        self._key = rng.stream(rng.root_key(config.seed), "evaluation")

    def evaluate(self, params: Params, videos: pathlib.Path | None) -> EvaluationResult | None:
        """Runs every episode once.

        Args:
          params: on the serving mesh.
          videos: directory for mp4 files; None writes none.

        Returns:
          The result, or None when asked to stop meanwhile.
        """
        outcomes: dict[int, bool] = {}
        tasks: tuple[str, ...] = ()
        for group in self._make_groups():
            try:
                tasks = group.spec.tasks
                for wave in self._waves(group):
                    outcome = self._wave(group, params, wave, videos)
                    if outcome is None:
                        return None
                    outcomes |= zip([episode.index for episode in wave], outcome, strict=True)
            finally:
                group.close()
        order = sorted(outcomes)
        return summarise(
            tasks=tasks,
            task_ids=np.asarray([index % len(tasks) for index in order], np.int32),
            successes=np.asarray([outcomes[index] for index in order], bool),
        )

    def _waves(self, group: EnvGroup) -> Iterator[list[Episode]]:
        """The group's share of all episodes, as many at a time as it has envs."""
        num_tasks = len(group.spec.tasks)
        episodes = [
            Episode(index=i, task=i % num_tasks, seed=i // num_tasks)
            for i in range(self._config.num_episodes)
            if i % num_tasks in group.task_ids
        ]
        for first in range(0, len(episodes), group.num_envs):
            yield episodes[first : first + group.num_envs]

    def _wave(
        self,
        group: EnvGroup,
        params: Params,
        episodes: list[Episode],
        videos: pathlib.Path | None,
    ) -> list[bool] | None:
        """Runs up to E episodes side by side, each until its first end."""
        # A last wave that is not full repeats its last episode; the copies are ignored.
        padded = episodes + episodes[-1:] * (group.num_envs - len(episodes))
        observation = group.reset_to(
            np.asarray([e.task for e in padded]), np.asarray([e.seed for e in padded])
        )
        recordings = self._recordings(group, episodes, observation) if videos else {}
        success = np.zeros(group.num_envs, bool)
        running = np.ones(group.num_envs, bool)
        chunk = 0
        while running[: len(episodes)].any():
            if self._should_stop():
                return None
            keys = self._keys(padded, chunk)
            sample, _ = self._sampler.run("act", params, [observation], keys)
            result = group.step_chunk(sample.actions, Cursor(segment=chunk))
            observation = result.observation
            self._record(group, recordings, running)
            ended = np.asarray(result.terminated | result.truncated | result.invalid)
            success |= running & np.asarray(result.success)
            running &= ~ended
            chunk += 1
        if videos:
            self._write(videos, group, episodes, recordings, success)
        return success[: len(episodes)].tolist()

    def _keys(self, episodes: list[Episode], chunk: int) -> np.ndarray:
        """Raw keys [E, 2] that depend on the episode and the chunk, not on the wave."""
        indices = np.asarray([episode.index for episode in episodes], np.uint32)
        key = rng.stream(self._key, "chunk", chunk)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
        return np.asarray(jax.random.key_data(keys))

    def _recordings(
        self, group: EnvGroup, episodes: list[Episode], observation: Observation
    ) -> dict[int, _Recording]:
        """Env row -> recording, for the first episodes of each task, with the first frame."""
        return {
            row: _Recording(
                instruction=group.instruction(row),
                frames=[np.asarray(observation.images[row])[None]],
            )
            for row, episode in enumerate(episodes)
            if episode.seed < self._config.num_videos
        }

    def _record(
        self, group: EnvGroup, recordings: dict[int, _Recording], running: np.ndarray
    ) -> None:
        rows = [row for row in recordings if running[row]]
        if rows:
            for row, frames in zip(rows, group.frames(rows), strict=True):
                recordings[row].frames.append(frames)

    def _write(
        self,
        directory: pathlib.Path,
        group: EnvGroup,
        episodes: list[Episode],
        recordings: dict[int, _Recording],
        success: np.ndarray,
    ) -> None:
        for row, recording in recordings.items():
            episode = episodes[row]
            name = f"{group.spec.tasks[episode.task]}_{episode.seed}.mp4"
            write_video(
                directory / name,
                np.concatenate(recording.frames),
                fps=group.frames_per_s,
                instruction=recording.instruction,
                success=bool(success[row]),
            )
