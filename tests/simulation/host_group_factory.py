"""Groups of worker processes with the env of the host pool's tests."""

import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "envs"))  # workers inherit sys.path

import fake_host_env as fake  # pyright: ignore[reportMissingImports]

from jaxvla.envs.host_pool import HostPool, WorkerSpec
from jaxvla.simulation.group import Cursor
from jaxvla.simulation.host_group import HostEnvGroup
from jaxvla.simulation.unroll import TokenTable
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.types import ChunkResult, EnvSpec, stand_in

TIMEOUT_S = 60.0
"""Far above what any call takes: only a lost wake-up can reach it."""
EXECUTED, HORIZON = 2, 3
LIMITS = (3, 4, 7)
"""Control steps per task."""
SPEC = EnvSpec(
    cameras=("front", "wrist"),
    image_size=fake.IMAGE_SHAPE[1],
    state_dim=fake.STATE_DIM,
    state_low=(0.0, 0.0, 0.0),
    state_high=(1.0, 1.0, 1.0),
    action_dim=fake.ACTION_DIM,
    action_names=("kind", "reward"),
    tasks=("a", "b", "c"),
    instructions=("do a", "do b", "do c"),
    max_episode_steps=LIMITS,
    control_hz=20.0,
)
TABLE = TokenTable(
    tokens=stand_in(np.array([[1, 0], [2, 3], [4, 5]], np.int32)),
    mask=stand_in(np.array([[True, False], [True, True], [True, True]])),
)
TASK, SEED, STEPS = range(3)
"""Entries of the fake env's state vector."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A group with what it was made of."""

    group: HostEnvGroup
    pool: HostPool
    recorder: MetricRecorder

    def restarts(self) -> dict[str, int]:
        """Counted replacements by cause."""
        prefix = "faults/simulator_restarts/"
        totals = self.recorder.totals().items()
        return {k.removeprefix(prefix): int(v) for k, v in totals if k.startswith(prefix)}

    def step(self, *kinds: float, reward: float = 0.0, chunk: int = 0) -> ChunkResult:
        """Every env runs a chunk whose first action is of its kind."""
        actions = np.full((self.group.num_envs, HORIZON, fake.ACTION_DIM), reward, np.float32)
        actions[:, :, 0] = np.array(kinds)[:, None]
        return self.group.step_chunk(actions, Cursor(chunk=chunk))


class GroupFactory:
    """Makes groups and closes them at the end."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._made: list[Made] = []

    def __call__(
        self,
        num_envs: int = 1,
        *,
        first_env: int = 0,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        max_failures: int = 5,
        step_timeout_s: float = TIMEOUT_S,
        name: str = "group",
        group_size: int = 0,
        num_starts: int = 1,
    ) -> Made:
        worker = WorkerSpec(
            env="fake_host_env:FakeHostEnv",
            config=config or {},
            image_shape=fake.IMAGE_SHAPE,
            state_dim=fake.STATE_DIM,
            action_dim=fake.ACTION_DIM,
        )
        pools: list[HostPool] = []

        def make_pool(count: int) -> HostPool:
            pools.append(
                HostPool(
                    worker,
                    num_envs=count,
                    log_dir=self._directory / str(len(self._made)),
                    reset_timeout_s=TIMEOUT_S,
                    step_timeout_s=step_timeout_s,
                    max_failures=max_failures,
                )
            )
            return pools[-1]

        recorder = MetricRecorder()
        group = HostEnvGroup(
            name=name,
            spec=SPEC,
            table=TABLE,
            make_pool=make_pool,
            num_envs=num_envs,
            first_env=first_env,
            num_executed=EXECUTED,
            seed=seed,
            recorder=recorder,
            group_size=group_size,
            num_starts=num_starts,
        )
        (pool,) = pools
        self._made.append(Made(group=group, pool=pool, recorder=recorder))
        return self._made[-1]

    def close(self) -> None:
        for made in self._made:
            made.group.close()
