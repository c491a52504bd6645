"""A HostEnv for the tests of the host pool: numpy only, misbehaves on demand.

`actions[0, 0]` of a chunk picks what happens; see the constants.
"""

import ctypes
import os
import pathlib
import sys
import threading
from typing import Any

import numpy as np

from jaxvla.envs.host_worker import ChunkOutcome, HostFrame

STEP, RAISE, HANG, EXIT, SEGFAULT, SUCCEED, GATE, BAD_IMAGES, BAD_STATE, BAD_STEPS, NO_FRAME = (
    index / 16 for index in range(11)
)
IMAGE_SHAPE = (2, 4, 4, 3)
STATE_DIM = 3
ACTION_DIM = 2


class FakeHostEnv:
    """State is [task, seed, control steps since the reset]; images repeat the step count.

    Config, each entry optional: raise_in_build, raise_in_reset; directory, of the FIFO "gate"
    that a chunk of kind GATE waits at; opens_gate, the task whose second reset opens it.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = config
        self._task = self._seed = self._num_steps = self._num_resets = 0
        if config.get("raise_in_build"):
            raise KeyError("no such scene")
        place = f"{os.environ.get('FAKE_VARIABLE')} in {pathlib.Path.cwd()}"
        sys.stdout.write(f"built {place}, jax: {'jax' in sys.modules}\n")

    def reset(self, task: int, seed: int) -> HostFrame:
        if self._config.get("raise_in_reset"):
            raise OSError("scene file is gone")
        self._num_resets += 1
        if task == self._config.get("opens_gate") and self._num_resets == 2:
            (pathlib.Path(self._config["directory"]) / "gate").write_text("go")
        self._task, self._seed, self._num_steps = task, seed, 0
        return self._frame()

    def step_chunk(self, actions: np.ndarray) -> ChunkOutcome:
        kind = float(actions[0, 0])
        self._misbehave(kind)
        if kind == SUCCEED:
            return ChunkOutcome(reward=1.0, success=True, num_steps=1, frame=None)
        self._num_steps += len(actions)
        frame = self._frame()
        if kind == BAD_IMAGES:
            frame = HostFrame(images=frame.images.astype(np.float32), state=frame.state)
        if kind == BAD_STATE:
            frame = HostFrame(images=frame.images, state=frame.state[:-1])
        return ChunkOutcome(
            reward=float(actions[:, 1].sum()),
            success=False,
            num_steps=len(actions) + (kind == BAD_STEPS),
            frame=None if kind == NO_FRAME else frame,
        )

    def _misbehave(self, kind: float) -> None:
        if kind == RAISE:
            raise ArithmeticError("the gripper left the table")
        if kind == HANG:
            threading.Event().wait()
        if kind == EXIT:
            sys.exit(7)
        if kind == SEGFAULT:
            ctypes.string_at(0)
        if kind == GATE:  # a FIFO: opening it blocks until the other side opens it too
            directory = pathlib.Path(self._config["directory"])
            (directory / "entered").write_text("")
            (directory / "gate").read_text()

    def _frame(self) -> HostFrame:
        state = np.array([self._task, self._seed, self._num_steps], np.float32)
        return HostFrame(images=np.full(IMAGE_SHAPE, self._num_steps, np.uint8), state=state)
