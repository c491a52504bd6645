"""A HostEnv that breaks in every way an env process can, each once in a run.

Config: "directory", where a file per fault says that it has happened, and when (monotonic
seconds, which all processes share); "faults", in this order; "broken_task", which answers with a
wrong shape always, or -1.
"""

import ctypes
import os
import pathlib
import threading
import time
from typing import Any

import numpy as np

from jaxvla.envs.host_pool import HostPool, WorkerSpec
from jaxvla.envs.host_worker import ChunkOutcome, HostFrame

EXIT, SEGFAULT, HANG, SHAPE, NAN = FAULTS = ("exit", "segfault", "hang", "shape", "nan")
IMAGE_SHAPE, STATE_DIM, ACTION_DIM = (1, 2, 2, 3), 2, 2
_CHUNKS_BEFORE = 3
"""Good chunks of a process before it breaks."""


class FaultyEnv:
    """State is [seed, control steps]; see the module docstring."""

    def __init__(self, config: dict[str, Any]):
        self._directory = pathlib.Path(config["directory"])
        self._faults = config["faults"]
        self._broken_task = config["broken_task"]
        self._num_chunks = 0

    def reset(self, task: int, seed: int) -> HostFrame:
        self._task, self._seed, self._num_steps = task, seed, 0
        return self._frame()

    def step_chunk(self, actions: np.ndarray) -> ChunkOutcome:
        self._num_chunks += 1
        fault = self._claim() if self._num_chunks > _CHUNKS_BEFORE else ""
        if fault == EXIT:
            os._exit(1)
        if fault == SEGFAULT:
            ctypes.string_at(0)
        if fault == HANG:
            threading.Event().wait()
        self._num_steps += len(actions)
        frame = self._frame()
        if fault == SHAPE or self._task == self._broken_task:
            frame = HostFrame(images=frame.images[:, 1:], state=frame.state)
        if fault == NAN:
            frame = HostFrame(images=frame.images, state=np.full_like(frame.state, np.nan))
        return ChunkOutcome(reward=0.1, success=False, num_steps=len(actions), frame=frame)

    def _claim(self) -> str:
        """The next fault that has not happened yet, which is this process's then."""
        for name in self._faults:
            try:
                with open(self._directory / name, "x") as file:
                    file.write(str(time.monotonic()))
                return name
            except FileExistsError:
                continue
        return ""

    def _frame(self) -> HostFrame:
        state = np.array([self._seed % 1000 / 1000.0, self._num_steps], np.float32)
        return HostFrame(images=np.full(IMAGE_SHAPE, self._num_steps, np.uint8), state=state)


class FaultyEnvs:
    """The env plug-in around it, with the tasks of another env."""

    def __init__(
        self,
        spec: Any,
        directory: pathlib.Path,
        *,
        faults: tuple[str, ...] = (),
        broken_task: int = -1,
        step_timeout_s: float,
        max_failures: int = 5,
    ):
        self.spec = spec
        self._config = {
            "directory": str(directory),
            "faults": list(faults),
            "broken_task": broken_task,
        }
        self._step_timeout_s = step_timeout_s
        self._max_failures = max_failures

    def make_pool(self, num_envs: int, log_dir: pathlib.Path) -> HostPool:
        worker = WorkerSpec(
            env="faulty_env:FaultyEnv",
            config=self._config,
            image_shape=IMAGE_SHAPE,
            state_dim=STATE_DIM,
            action_dim=ACTION_DIM,
        )
        return HostPool(
            worker,
            num_envs=num_envs,
            log_dir=log_dir,
            reset_timeout_s=240.0,
            step_timeout_s=self._step_timeout_s,
            max_failures=self._max_failures,
        )
