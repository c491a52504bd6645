"""LIBERO in MJX: the tasks of `libero_host` as pure functions, batched on the accelerator.

Physics, controller, success conditions, cameras, state and instructions are LIBERO's, read
from task files that `libero_compiler` makes once; neither libero nor robosuite is needed. The
spec equals that of `libero_host`, so that one line of a config swaps the two.

Episodes begin in LIBERO's fixed init states, after they have settled. What differs from C
MuJoCo (boxes for meshes, a plane for the table, a bounded number of contacts) is listed in
`libero_scene`; how far that takes the two apart is measured in docs/libero_mjx.md.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from jaxvla.config import ConfigError, EnvConfig, override
from jaxvla.envs.libero_host import (
    ACTION_NAMES,
    CONTROL_HZ,
    STATE_DIM,
    STATE_HIGH,
    STATE_LOW,
    LiberoHostConfig,
)
from jaxvla.envs.libero_task import LiberoTask, cache_dir, task_path
from jaxvla.envs.libero_worlds import LiberoScene
from jaxvla.envs.rendering.rasterizer import TILE
from jaxvla.types import EnvSpec

PHYSICS = ("mjx", "warp", "mujoco")
RENDERERS = ("jax", "warp")


@dataclass(kw_only=True, slots=True)
class LiberoMjxConfig(EnvConfig):
    """LIBERO tasks that share a scene, in MJX."""

    name: str = "libero_mjx"
    suite: str = "libero_spatial"
    """Benchmark suite, such as libero_object, libero_goal, libero_10, libero_90, or a variant."""
    task_ids: tuple[int, ...] = ()
    """Tasks by their position in the suite; empty: all that are compiled."""
    image_size: int = 128
    """Pixels per side, a multiple of 16 in [64, 256]."""
    max_episode_steps: int = -1
    """Time limit in control steps; -1: the suite's (220 to 520)."""
    max_shift_m: float = 0.0
    """Objects and fixtures are shifted together by up to this much along both horizontal axes,
    anew in each episode; 0: LIBERO's init states as they are."""
    physics: str = "mjx"
    """"mjx": on the accelerator. "warp": MJX's other implementation, for NVIDIA GPUs; needs the
    warp extra. "mujoco": the same geometry in C MuJoCo with LIBERO's own friction, on threads of
    the host; on a machine without accelerator ten times faster."""
    renderer: str = "jax"
    """What finds the surface that a pixel shows. "jax": the rasterizer, on any device. "warp":
    MuJoCo Warp's ray tracer, for NVIDIA GPUs; needs the warp extra. Colours are the same."""
    task_dir: str = ""
    """Directory of the task files; empty: $JAXVLA_LIBERO_CACHE, or ~/.cache/jaxvla/libero."""

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        sizes = f"a multiple of {TILE} in 64 to 256 px"
        for is_good, name, allowed, fix in (
            (self.image_size in range(64, 257, TILE), "image_size", sizes, 128),
            (
                self.max_episode_steps > 0 or self.max_episode_steps == -1,
                "max_episode_steps",
                "positive, or -1 for the suite's",
                -1,
            ),
            (self.physics in PHYSICS, "physics", f"one of {', '.join(PHYSICS)}", "mjx"),
            (self.renderer in RENDERERS, "renderer", f"one of {', '.join(RENDERERS)}", "jax"),
            (0.0 <= self.max_shift_m <= 0.1, "max_shift_m", "in [0, 0.1] m", 0.0),
        ):
            if not is_good:
                value = getattr(self, name)
                raise ConfigError(f"env.{name}", value, allowed, override(f"env.{name}", fix))

    def judge(self) -> LiberoHostConfig:
        """LIBERO itself."""
        return LiberoHostConfig(
            num_executed=self.num_executed,
            suite=self.suite,
            task_ids=self.task_ids,
            image_size=self.image_size,
            max_episode_steps=self.max_episode_steps,
        )


class LiberoMjx:
    """Implements SceneFamily; see the module docstring.

    Attributes:
      config: as given, with the tasks filled in.
      spec: task id = position in `task_ids` (or among the compiled tasks) = instruction id.
      scenes: tasks whose models are the same share one.
    """

    def __init__(self, config: LiberoMjxConfig):
        """Reads task files.

        Raises:
          ConfigError: a setting is out of range, or a task is not compiled.
          ValueError: a task file is damaged.
        """
        config.validate()
        tasks = load_tasks(config)
        config = dataclasses.replace(config, task_ids=tuple(task.task_id for task in tasks))
        self.config = config
        self.spec = _spec(config, tasks)
        self.scenes = tuple(
            LiberoScene(
                [tasks[i] for i in members],
                members,
                model=model,
                spec=self.spec,
                config=config,
                max_shift_m=config.max_shift_m,
                physics=config.physics,
                renderer=config.renderer,
            )
            for model, members in _by_scene(tasks)
        )


def _spec(config: LiberoMjxConfig, tasks: Sequence[LiberoTask]) -> EnvSpec:
    limits = tuple(
        task.time_limit if config.max_episode_steps == -1 else config.max_episode_steps
        for task in tasks
    )
    return EnvSpec(
        cameras=tuple(camera.name for camera in tasks[0].cameras),
        image_size=config.image_size,
        state_dim=STATE_DIM,
        state_low=STATE_LOW,
        state_high=STATE_HIGH,
        action_dim=len(ACTION_NAMES),
        action_names=ACTION_NAMES,
        tasks=tuple(task.name for task in tasks),
        instructions=tuple(task.language for task in tasks),
        max_episode_steps=limits,
        control_hz=CONTROL_HZ,
    )


def load_tasks(config: LiberoMjxConfig) -> tuple[LiberoTask, ...]:
    """Reads the configured task files.

    Raises:
      ConfigError: one is missing.
      ValueError: one is damaged.
    """
    directory = config.task_dir or cache_dir()
    first = task_path(config.suite, 0, directory).parent
    ids = config.task_ids or _compiled_ids(first)
    fix = "the same command with --job=compile_tasks (needs the libero extra)"
    if not ids:
        raise ConfigError("env.suite", config.suite, f"no task file in {first}", fix)
    missing = [i for i in ids if not task_path(config.suite, i, directory).is_file()]
    if missing:
        what = f"no task file for {', '.join(map(str, missing))} in {first}"
        raise ConfigError("env.task_ids", config.task_ids, what, fix)
    return tuple(LiberoTask.load(task_path(config.suite, i, directory)) for i in ids)


def _compiled_ids(directory: Path) -> tuple[int, ...]:
    """Tasks of which there is a file."""
    return tuple(
        sorted(int(path.stem.removeprefix("task_")) for path in directory.glob("task_*.zip"))
    )


def _by_scene(tasks: Sequence[LiberoTask]) -> list[tuple[mujoco.MjModel, list[int]]]:
    """Distinct scenes, each with the positions of its tasks.

    A scene's contact budget is the largest of its tasks'.
    """
    scenes: list[tuple[mujoco.MjModel, list[int]]] = []
    for index, task in enumerate(tasks):
        model = mujoco.MjModel.from_xml_string(task.physics_xml)
        for other, members in scenes:
            is_alike = task.fixtures == tasks[members[0]].fixtures
            if is_alike and _is_same_scene(model, other):
                members.append(index)
                break
        else:
            scenes.append((model, [index]))
    for model, members in scenes:
        for name in ("max_geom_pairs", "max_contact_points"):
            budgets = [getattr(tasks[i].contact_budget, name) for i in members]
            model.numeric(name).data[:] = max(budgets)
    return scenes


def _is_same_scene(model: mujoco.MjModel, other: mujoco.MjModel) -> bool:
    """Whether the models are equal but for the places of bodies that hang from the world."""
    if (model.nq, model.ngeom, model.names) != (other.nq, other.ngeom, other.names):
        return False
    arrays = ("geom_type", "geom_size", "geom_pos", "geom_quat", "geom_friction", "geom_contype")
    arrays += ("body_mass", "body_inertia", "jnt_type", "jnt_range", "dof_damping", "dof_armature")
    moving = model.body_parentid != 0
    places = all(
        np.array_equal(getattr(model, name)[moving], getattr(other, name)[moving])
        for name in ("body_pos", "body_quat")
    )
    return places and all(np.array_equal(getattr(model, x), getattr(other, x)) for x in arrays)
