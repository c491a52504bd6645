"""Env groups of host simulators: one worker process per env."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxvla.envs.host_pool import HostPool, HostResult
from jaxvla.simulation.group import Cursor
from jaxvla.simulation.unroll import TokenTable
from jaxvla.telemetry.metrics import MetricRecorder, Total
from jaxvla.types import ChunkResult, EnvObservation, EnvSpec, Observation, stand_in

_LOG = logging.getLogger(__name__)


class HostEnvGroup:
    """E worker processes that step side by side. Implements EnvGroup.

    Every env keeps one task, because switching scenes costs seconds; env e of a group whose
    first env has number f in the run plays task (f + e) mod num_tasks. Episode seeds are a
    function of the run's seed, the env's number and its episode counter.
    """

    def __init__(
        self,
        *,
        name: str,
        spec: EnvSpec,
        table: TokenTable,
        make_pool: Callable[[int], HostPool],
        num_envs: int,
        first_env: int,
        num_executed: int,
        seed: int,
        recorder: MetricRecorder,
        observe_final: bool = True,
    ):
        """Args:
        name: unique.
        spec: the env's.
        table: tokenised instructions, numpy arrays.
        make_pool: number of envs -> running pool.
        num_envs: E.
        first_env: number of the first env in the run.
        num_executed: control steps run of each chunk.
        seed: the run's.
        recorder: metrics, for faults.
        observe_final: report the last observation of episodes that the time limit cuts.
        """
        self.name = name
        self.spec = spec
        self.num_envs = num_envs
        self.frames_per_s = spec.control_hz / num_executed
        self._table = table
        self._num_executed = num_executed
        self._numbers = first_env + np.arange(num_envs)
        self._seed = seed
        self._recorder = recorder
        self._observe_final = observe_final
        self._episodes = np.zeros(num_envs, np.int32)
        """Episodes begun so far, per env."""
        self._task = (self._numbers % len(spec.tasks)).astype(np.int32)
        self._steps = np.zeros(num_envs, np.int32)
        self._returns = np.zeros(num_envs, np.float32)
        self._final_images: Any = None
        self._faults: dict[str, int] = {}
        self._pool = make_pool(num_envs)

    def reset(self, cursor: Cursor) -> Observation:
        """See EnvGroup.reset. The episode counters, not the cursor, decide the seeds."""
        self._begin(range(self.num_envs))
        return self._observe()

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        """See EnvGroup.reset_to."""
        self._task = tasks.astype(np.int32)
        self._reset(dict(enumerate(seeds.astype(np.uint32).tolist())))
        return self._observe()

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        """See EnvGroup.step_chunk."""
        limits = np.asarray(self.spec.max_episode_steps)[self._task]
        for env in range(self.num_envs):
            count = min(self._num_executed, int(limits[env] - self._steps[env]))
            self._pool.submit_step_chunk(env, np.asarray(actions[env, :count], np.float32))
        results = self._collect(range(self.num_envs))
        return self._outcome([results[env] for env in range(self.num_envs)], limits)

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        """See EnvGroup.frames: the one frame that the policy reads after each chunk."""
        return [np.array(self._final_images[row])[None] for row in rows]

    def instruction(self, row: int) -> str:
        """See EnvGroup.instruction."""
        return self.spec.instructions[self._task[row]]

    def state(self) -> Any:
        """See EnvGroup.state: a restart begins the running episodes anew."""
        return {"episodes": self._episodes.copy()}

    @staticmethod
    def state_struct(num_envs: int) -> Any:
        """Shapes and dtypes of `state()`."""
        return {"episodes": jax.ShapeDtypeStruct((num_envs,), np.int32)}

    def load_state(self, state: Any) -> Observation:
        """See EnvGroup.load_state."""
        self._episodes = np.asarray(state["episodes"]) - 1
        return self.reset(Cursor())

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def _outcome(self, results: list[HostResult], limits: np.ndarray) -> ChunkResult:
        """Books a chunk, restarts what has ended, and reports."""
        invalid = np.asarray([result.failed for result in results])
        success = np.asarray([result.success for result in results]) & ~invalid
        reward = np.where(invalid, 0.0, [result.reward for result in results]).astype(np.float32)
        num_steps = np.where(invalid, 0, [result.num_steps for result in results]).astype(np.int32)
        self._steps += num_steps
        self._returns += reward
        truncated = (self._steps >= limits) & ~success & ~invalid
        task, steps, returns = self._task.copy(), self._steps.copy(), self._returns.copy()
        final = self._observe()
        self._final_images = final.images
        self._begin(np.flatnonzero(success | truncated | invalid))
        return ChunkResult(
            observation=self._observe(),
            final_observation=final if self._observe_final else None,
            reward=reward,
            terminated=success,
            truncated=truncated,
            success=success,
            num_steps=num_steps,
            episode_return=returns,
            episode_steps=steps,
            task=task,
            invalid=invalid,
        )

    def _begin(self, envs: Sequence[int] | np.ndarray) -> None:
        """Starts the next episode of some envs."""
        seeds = {}
        for env in map(int, envs):
            self._episodes[env] += 1
            entropy = (self._seed, int(self._numbers[env]), int(self._episodes[env]))
            seeds[env] = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        self._reset(seeds)

    def _reset(self, seeds: dict[int, int]) -> None:
        """Resets envs to given seeds; one whose worker fails is reset again in its successor."""
        waiting = dict(seeds)
        while waiting:
            for env, seed in waiting.items():
                self._pool.submit_reset(env, task=int(self._task[env]), seed=seed)
            results = self._collect(waiting)
            for env in list(waiting):
                if not results[env].failed:
                    self._steps[env], self._returns[env] = 0, 0.0
                    del waiting[env]

    def _collect(self, envs: Any) -> dict[int, HostResult]:
        """Answers of some envs, whichever comes first; counts workers that were replaced."""
        pending, results = set(envs), {}
        while pending:
            for env in self._pool.wait(math.inf):
                if env in pending:
                    results[env] = self._pool.collect(env)
                    pending.remove(env)
        self._note_faults()
        return results

    def _note_faults(self) -> None:
        for cause, count in self._pool.restarts.items():
            new = count - self._faults.get(cause, 0)
            if new:
                _LOG.warning("%s: %d worker process(es) replaced, cause %s", self.name, new, cause)
                self._recorder.add(f"faults/simulator_restarts/{cause}", new, Total)
            self._faults[cause] = count

    def _observe(self) -> Observation:
        """Copies the shared rows: workers overwrite them."""
        seen = EnvObservation(
            images=stand_in(np.array(self._pool.images)),
            state=stand_in(np.array(self._pool.state)),
            instruction=stand_in(self._task),
        )
        return self._table.complete(seen)
