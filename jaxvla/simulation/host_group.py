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
from jaxvla.telemetry.metrics import Recorder, Total
from jaxvla.types import ChunkResult, EnvObservation, EnvSpec, Observation, stand_in

_LOG = logging.getLogger(__name__)


class HostEnvGroup:
    """E worker processes that step side by side. Implements EnvGroup.

    Every env keeps one task, because switching scenes costs seconds; env e of a group whose
    first env has number f in the run plays task (f + e) mod num_tasks. Episode seeds are a
    function of the run's seed, the env's number and its episode counter.

    With a group size G, so many neighbours at a time play one episode each and then stand still
    until the next reset. Neighbours share task and seed, which are functions of their number in
    the run and of the segment; n of them in the run take turns at the tasks, n tasks further with
    every segment, and so keep theirs where n is a multiple of the tasks.

    An env that fails too often in a row is set aside: from then on all its samples are invalid.
    Not so in an evaluation, whose success rate it would lower: that ends with an error.
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
        recorder: Recorder,
        observe_final: bool = True,
        group_size: int = 0,
        num_starts: int = 1,
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
        group_size: see `SimulationConfig.group_size`.
        num_starts: with a group size, n of the class docstring.
        """
        self.name = name
        self.spec = spec
        self.task_ids = tuple(range(len(spec.tasks)))
        self.num_envs = num_envs
        self.frames_per_s = spec.control_hz / num_executed
        self._table = table
        self._num_executed = num_executed
        self._numbers = first_env + np.arange(num_envs)
        self._seed = seed
        self._recorder = recorder
        self._observe_final = observe_final
        self._group_size = group_size
        self._num_starts = num_starts
        self._is_over = np.zeros(num_envs, bool)
        """Which envs stand still."""
        self._episodes = np.zeros(num_envs, np.int32)
        """Episodes begun so far, per env."""
        self._task = (self._numbers % len(spec.tasks)).astype(np.int32)
        self._steps = np.zeros(num_envs, np.int32)
        self._returns = np.zeros(num_envs, np.float32)
        self._resetting: dict[int, int] = {}
        """Env -> seed of the episode that it has been asked to begin."""
        self._final_images: Any = None
        self._faults: dict[str, int] = {}
        self._set_aside: set[int] = set()
        self._is_evaluating = False
        self._pool = make_pool(num_envs)

    def reset(self, cursor: Cursor) -> Observation:
        """See EnvGroup.reset. The episode counters, not the cursor, decide the seeds, but with a
        group size the cursor does."""
        if self._group_size:
            self._begin_alike(cursor.segment)
        else:
            for env in range(self.num_envs):
                self._begin(env)
        return self._fresh()

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        """See EnvGroup.reset_to.

        Raises:
          RuntimeError: an env fails again and again, now or in a chunk that follows.
        """
        self._is_evaluating = True
        self._task = tasks.astype(np.int32)
        for env, seed in enumerate(seeds.astype(np.uint32).tolist()):
            self._submit_reset(env, seed)
        return self._fresh()

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        """See EnvGroup.step_chunk. An env whose episode ends begins the next one at once, while
        others still run their chunk."""
        limits = np.asarray(self.spec.max_episode_steps)[self._task]
        left = limits - self._steps
        running = set(np.flatnonzero(~self._is_over).tolist())
        failed = running.intersection(self._pool.quarantined)
        stepping = running - failed
        for env in sorted(stepping):
            count = min(self._num_executed, int(left[env]))
            self._pool.submit_step_chunk(env, np.asarray(actions[env, :count], np.float32))
        results = [HostResult(failed=env in failed) for env in range(self.num_envs)]
        if self._group_size:
            self._is_over[list(failed)] = True
        # What of them is not written below belongs to envs that stand still.
        images, state = np.array(self._pool.images), np.array(self._pool.state)
        while stepping or self._resetting:
            for env, result in self._answers():
                stepping.remove(env)
                results[env] = result
                images[env], state[env] = self._pool.images[env], self._pool.state[env]
                if result.failed or result.success or result.num_steps == left[env]:
                    self._end(env)
        self._note_faults()
        return self._outcome(results, limits, self._observation(images, state))

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

    def _outcome(
        self, results: list[HostResult], limits: np.ndarray, final: Observation
    ) -> ChunkResult:
        """Books a chunk whose ended episodes have been followed by new ones, and reports."""
        invalid = np.asarray([result.failed for result in results])
        success = np.asarray([result.success for result in results]) & ~invalid
        reward = np.where(invalid, 0.0, [result.reward for result in results]).astype(np.float32)
        num_steps = np.where(invalid, 0, [result.num_steps for result in results]).astype(np.int32)
        steps, returns = self._steps + num_steps, self._returns + reward
        truncated = (steps >= limits) & ~success & ~invalid
        ended = success | truncated | invalid
        self._steps, self._returns = steps.copy(), returns.copy()
        self._steps[ended], self._returns[ended] = 0, 0.0
        self._final_images = final.images
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
            task=self._task.copy(),
            invalid=invalid,
            contact_overflow=np.zeros(self.num_envs, np.int32),  # C MuJoCo has no such limit
        )

    def _end(self, env: int) -> None:
        """What follows an episode."""
        if self._group_size:
            self._is_over[env] = True
        else:
            self._begin(env)

    def _begin(self, env: int) -> None:
        """Asks for the next episode of an env."""
        self._episodes[env] += 1
        self._submit_reset(env, self._draw_seed(self._numbers[env], self._episodes[env]))

    def _begin_alike(self, segment: int) -> None:
        """Asks for the episodes of a segment; neighbours get the same one."""
        starts = self._numbers // self._group_size
        self._task = ((starts + segment * self._num_starts) % len(self.spec.tasks)).astype(np.int32)
        for env in range(self.num_envs):
            self._submit_reset(env, self._draw_seed(starts[env], segment))

    def _draw_seed(self, *counters: int) -> int:
        """uint32, a function of the run's seed and of counters."""
        entropy = (self._seed, *(int(x) for x in counters))
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _submit_reset(self, env: int, seed: int) -> None:
        if env in self._pool.quarantined:
            return
        self._resetting[env] = seed
        self._pool.submit_reset(env, task=int(self._task[env]), seed=seed)

    def _answers(self) -> list[tuple[int, HostResult]]:
        """Waits for the next answers of any kind, and gives those to chunks. Where a worker fails
        in a reset, its successor is asked for the same one."""
        chunks = []
        for env in self._pool.wait(math.inf):
            result = self._pool.collect(env)
            if env not in self._resetting:
                chunks.append((env, result))
            elif result.failed and env not in self._pool.quarantined:
                self._submit_reset(env, self._resetting[env])
            else:
                del self._resetting[env]
        return chunks

    def _fresh(self) -> Observation:
        """Waits until every env has begun its episode; what the policy reads then."""
        while self._resetting:
            self._answers()
        self._note_faults()
        self._steps[:], self._returns[:], self._is_over[:] = 0, 0.0, False
        return self._observe()

    def _note_faults(self) -> None:
        for cause, count in self._pool.restarts.items():
            new = count - self._faults.get(cause, 0)
            if new:
                _LOG.warning("%s: %d worker process(es) replaced, cause %s", self.name, new, cause)
                self._recorder.add(f"faults/simulator_restarts/{cause}", new, Total)
            self._faults[cause] = count
        for env in self._pool.quarantined.keys() - self._set_aside:
            why = self._pool.quarantined[env]
            if self._is_evaluating:
                raise RuntimeError(f"{self.name}: {why}")
            _LOG.error("%s: env %d is set aside: %s", self.name, env, why)
            self._recorder.add("faults/quarantined_envs", 1, Total)
            self._set_aside.add(env)

    def _observe(self) -> Observation:
        """Copies the shared rows: workers overwrite them."""
        return self._observation(np.array(self._pool.images), np.array(self._pool.state))

    def _observation(self, images: np.ndarray, state: np.ndarray) -> Observation:
        seen = EnvObservation(
            images=stand_in(images), state=stand_in(state), instruction=stand_in(self._task)
        )
        return self._table.complete(seen)
