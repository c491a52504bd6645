"""An env group that plays a script, and what a policy says to it; numpy only.

Every row of an observation is told by one number, which everything else follows from: the
number of env e before chunk t is even, that of the end of its episode in chunk t is odd.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvla.simulation.group import Cursor
from jaxvla.types import ChunkResult, EnvSpec, Observation, PolicySample

GOES_ON, TERMINATED, TRUNCATED, INVALID = range(4)
"""Outcomes of a chunk."""
NOTHING = 999_999
"""Number of observations that nobody may read."""
NUM_TASKS = 3
HORIZON, ACTION_DIM = 2, 1


def numbers(chunk: int, num_envs: int) -> np.ndarray:
    """int32 [E], of what the policy reads before a chunk."""
    return 2 * np.arange(chunk * num_envs, (chunk + 1) * num_envs, dtype=np.int32)


def final_number(number: np.ndarray) -> np.ndarray:
    """Of the end of an episode that ends in the chunk before which `number` was read."""
    return number + 1


def observation_of(number: Any) -> Any:
    """Rows that show their numbers in every leaf."""
    column = number[:, None]
    mask: Any = np.ones_like(column, bool)
    return Observation(
        images=(column % 256).astype(np.uint8)[:, :, None, None, None].repeat(3, axis=-1),
        image_mask=mask,
        state=column.astype(np.float32),
        tokens=column.astype(np.int32),
        token_mask=mask,
    )


def number_of(observation: Any) -> np.ndarray:
    """int32 [...], after a check that the leaves belong together."""
    number = np.asarray(observation.tokens)[..., 0]
    np.testing.assert_array_equal(np.asarray(observation.state)[..., 0], number)
    np.testing.assert_array_equal(np.asarray(observation.images)[..., 0, 0, 0, 1], number % 256)
    assert np.asarray(observation.image_mask).all() and np.asarray(observation.token_mask).all()
    return number


def value_of(number: Any) -> Any:
    """float32, the critic: no two observations have the same value."""
    return (1000 + number / 4).astype(np.float32)


def sample_of(number: Any) -> Any:
    """What the policy answers to the query with these numbers."""
    actions: Any = np.tile(number.astype(np.float32)[:, None, None], (1, HORIZON, ACTION_DIM))
    return PolicySample(
        actions=actions,
        trace={"noise": -actions, "choice": number + 7},
        log_prob=(-number / 8).astype(np.float32),
        value=value_of(number),
    )


def result_of(chunk: int, outcome: np.ndarray) -> Any:
    """What happens in a chunk; `outcome` is int [E]."""
    number = numbers(chunk, len(outcome))
    final = np.where(outcome == TRUNCATED, final_number(number), NOTHING)
    return ChunkResult(
        observation=observation_of(numbers(chunk + 1, len(outcome))),
        final_observation=observation_of(final),
        reward=(number / 16).astype(np.float32),
        terminated=outcome == TERMINATED,
        truncated=outcome == TRUNCATED,
        success=(outcome == TERMINATED) & (number % 4 == 0),
        num_steps=1 + number % 5,
        episode_return=(number / 2).astype(np.float32),
        episode_steps=number + 3,
        task=number // 2 % NUM_TASKS,
        invalid=outcome == INVALID,
        contact_overflow=number % 3,
    )


class ScriptedGroup:
    """Implements EnvGroup. Plays `script`, int [n, E], over and over."""

    spec = EnvSpec(
        cameras=("eye",),
        image_size=1,
        state_dim=1,
        state_low=(0.0,),
        state_high=(1.0,),
        action_dim=ACTION_DIM,
        action_names=("number",),
        tasks=("a", "b", "c"),
        instructions=("do a", "do b", "do c"),
        max_episode_steps=(9, 9, 9),
        control_hz=10.0,
    )
    frames_per_s = 10.0

    def __init__(self, name: str, script: np.ndarray, log: list[tuple[Any, ...]] | None = None):
        """Args: the script, and where to note what was called."""
        self.name = name
        self.num_envs = script.shape[1]
        self.script = script
        self.log = [] if log is None else log
        self.chunk = 0
        self.is_closed = False

    def reset(self, cursor: Cursor) -> Observation:
        self.log.append(("reset", self.name, cursor.segment))
        return observation_of(numbers(self.chunk, self.num_envs))

    def reset_to(self, tasks: np.ndarray, seeds: np.ndarray) -> Observation:
        raise NotImplementedError("for evaluation")

    def step_chunk(self, actions: np.ndarray, cursor: Cursor) -> ChunkResult:
        self.log.append(("step", self.name, cursor.segment, cursor.chunk))
        asked = sample_of(numbers(self.chunk, self.num_envs))
        np.testing.assert_array_equal(actions, asked.actions)
        result = result_of(self.chunk, self.script[self.chunk % len(self.script)])
        self.chunk += 1
        return result

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        raise NotImplementedError("for evaluation")

    def instruction(self, row: int) -> str:
        raise NotImplementedError("for evaluation")

    def state(self) -> Any:
        return {"chunk": self.chunk}

    def load_state(self, state: Any) -> Observation:
        self.log.append(("load", self.name, state["chunk"]))
        self.chunk = state["chunk"]
        return observation_of(numbers(self.chunk, self.num_envs))

    def close(self) -> None:
        self.is_closed = True
