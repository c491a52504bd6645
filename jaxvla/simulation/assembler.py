"""Builds one trajectory of an env group, chunk by chunk."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.algorithms.returns import SAME_RETURN
from jaxvla.types import ChunkResult, Observation, PolicySample, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeStats:
    """Episodes that ended inside a segment; arrays [n]."""

    task: np.ndarray
    """int32, task id."""
    success: np.ndarray
    """bool."""
    return_: np.ndarray
    """float32, undiscounted."""
    length: np.ndarray
    """int32, control steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentInfo:
    """Host record that travels with a trajectory."""

    group: str
    """Name of the env group."""
    next_segment: int
    """Counter of the group's next segment."""
    end_state: Any
    """The group's state after the segment, from which a restart continues."""
    episodes: EpisodeStats
    num_env_steps: int
    """Control steps executed. None follows the end of an episode: the rest of that chunk is
    not run."""
    num_useful_env_steps: int
    """Those of valid chunk queries, whatever an algorithm makes of the episode."""
    num_queries: int
    """Chunk queries, one per env and chunk step."""
    num_invalid: int
    """Samples lost to non-finite worlds or dead simulators."""
    is_uniform: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [n], for every group of episodes that began alike: all that have a return have the same
    one, so that nothing can be learned from comparing them. True also where fewer than two have."""


class SegmentCounts(NamedTuple):
    """What a segment cost, and what went wrong in it."""

    env_steps: int
    """Control steps."""
    useful_env_steps: int
    """Those of valid chunk queries, whatever an algorithm makes of the episode."""
    queries: int
    """Chunk queries."""
    invalid_samples: int
    contact_overflow: int
    """Contacts that exceeded the physics' fixed buffers."""


@dataclass(kw_only=True)
class SegmentAssembler:
    """Collects T chunk steps of a group."""

    _observations: list[Observation] = field(default_factory=list)
    _samples: list[PolicySample] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _results: list[ChunkResult] = field(default_factory=list)
    _final_observations: list[Observation] = field(default_factory=list)
    _has_ended: np.ndarray | None = None

    @property
    def all_ended(self) -> bool:
        """Whether every env has reached the end of an episode, or failed."""
        return self._has_ended is not None and bool(self._has_ended.all())

    def add(
        self, observation: Observation, sample: PolicySample, version: int, result: ChunkResult
    ) -> None:
        """Appends one chunk step: what was read, what was sampled with which weights, what
        happened. Small arrays come to the host, observations stay where they are."""
        self._observations.append(observation)
        self._samples.append(sample)
        self._versions.append(version)
        small = dataclasses.replace(result, observation=None, final_observation=None)
        self._results.append(jax.device_get(small))
        latest = self._results[-1]
        ended = np.asarray(latest.terminated | latest.truncated | latest.invalid)
        self._has_ended = ended if self._has_ended is None else self._has_ended | ended
        if result.final_observation is not None and self._results[-1].truncated.any():
            self._final_observations.append(
                jax.tree.map(
                    lambda x: np.asarray(x)[self._results[-1].truncated], result.final_observation
                )
            )

    def bootstrap_queries(self, following: Observation) -> list[Observation]:
        """Observations whose value the trajectory needs but does not hold.

        Args:
          following: what the policy reads after the last step, [E].

        Returns:
          Parts of at most E rows: first `following`, then the final observations of truncated
          episodes in order of time. Their values, in this order, go to `finish`.
        """
        num_envs = len(self._results[-1].reward)
        queries = [following]
        if self._final_observations:
            final = jax.tree.map(lambda *x: np.concatenate(x), *self._final_observations)
            total = len(final.state)
            queries += [
                jax.tree.map(lambda x, a=start: x[a : a + num_envs], final)
                for start in range(0, total, num_envs)
            ]
        return queries

    def finish(self, values: list[np.ndarray], *, length: int = 0) -> Trajectory:
        """The trajectory, time-major.

        Args:
          values: float32 answers to `bootstrap_queries`, in its order; empty where no value is
            read.
          length: chunk steps T of the trajectory, if it may have fewer: steps of zeros that are
            not valid fill it up. Their observation is the last one again.
        """
        results = jax.tree.map(lambda *x: np.stack(x), *self._results)
        samples = jax.tree.map(lambda *x: np.stack(x), *self._samples)
        bootstrap = np.zeros_like(results.reward)
        if values:
            bootstrap[-1] = values[0]
            if self._final_observations:
                bootstrap[results.truncated] = np.concatenate(values[1:])
        missing = max(length - len(self._versions), 0)
        version = np.repeat(np.asarray(self._versions, np.int32)[:, None], bootstrap.shape[1], 1)
        steps = Trajectory(
            # Always as many parts, so that a short trajectory compiles nothing anew.
            observation=_stack(self._observations + self._observations[-1:] * missing),
            trace=samples.trace,
            behavior_log_prob=samples.log_prob,
            value=samples.value,
            reward=results.reward,
            terminated=results.terminated,
            # An invalid step cuts the trace like a time limit; it is not trained on itself.
            truncated=results.truncated | results.invalid,
            bootstrap_value=np.where(results.invalid, samples.value, bootstrap),
            valid=~results.invalid & (results.num_steps > 0),
            policy_version=version,
        )
        if not missing:
            return steps
        padded = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]),
            dataclasses.replace(steps, observation=None),
        )
        return dataclasses.replace(padded, observation=steps.observation)

    def versions(self) -> tuple[int, int]:
        """Oldest and newest version that made a sample."""
        return min(self._versions), max(self._versions)

    def episodes(self) -> EpisodeStats:
        """Episodes that ended, in order of time."""
        results = jax.tree.map(lambda *x: np.stack(x), *self._results)
        ended = results.terminated | results.truncated
        return EpisodeStats(
            task=results.task[ended],
            success=results.success[ended],
            return_=results.episode_return[ended],
            length=results.episode_steps[ended],
        )

    def is_uniform(self, group_size: int) -> np.ndarray:
        """See `SegmentInfo.is_uniform`, of episodes that the segment began with.

        Args:
          group_size: envs that began alike. Those that failed count in no group.
        """
        results = jax.tree.map(lambda *x: np.stack(x), *self._results)
        has_return = (results.terminated | results.truncated).any(axis=0)
        returns = results.reward.sum(axis=0)
        highest = np.where(has_return, returns, -np.inf).reshape(-1, group_size).max(axis=1)
        lowest = np.where(has_return, returns, np.inf).reshape(-1, group_size).min(axis=1)
        largest = np.where(has_return, np.abs(returns), 0.0).reshape(-1, group_size).max(axis=1)
        with np.errstate(invalid="ignore"):  # inf - inf of groups without a return
            return ~(highest - lowest > SAME_RETURN * largest)

    def counts(self) -> SegmentCounts:
        """What the segment cost and what went wrong in it."""
        results = jax.tree.map(lambda *x: np.stack(x), *self._results)
        return SegmentCounts(
            env_steps=int(results.num_steps.sum()),
            useful_env_steps=int(results.num_steps[~results.invalid].sum()),
            queries=results.invalid.size,
            invalid_samples=int(results.invalid.sum()),
            contact_overflow=int(results.contact_overflow.sum()),
        )


@jax.jit
def _stack_on_device(observations: list[Observation]) -> Observation:
    return jax.tree.map(lambda *x: jnp.stack(x), *observations)


def _stack(observations: list[Observation]) -> Observation:
    """Time-major stack, on the device that holds the parts or on the host."""
    if isinstance(observations[0].state, np.ndarray):
        return jax.tree.map(lambda *x: np.stack(x), *observations)
    return _stack_on_device(observations)
