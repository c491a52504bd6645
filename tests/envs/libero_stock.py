"""LIBERO's own env for the probes that compare with it, and what starts those probes.

A probe runs in a process of its own and writes what it saw to .npz files.
"""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxvla.envs.libero_host import LiberoHost, LiberoHostConfig
from jaxvla.envs.libero_init_states import load_init_states
from jaxvla.envs.libero_scene import reduce_scene, set_numerics

CONTACT_BUDGET = {"max_geom_pairs": 64, "max_contact_points": 128}


def run_probe(script: str, *arguments: str, timeout_s: float) -> None:
    """Runs a script of this directory, without renderer."""
    path = pathlib.Path(__file__).with_name(script)
    # MuJoCo, once imported with another MUJOCO_GL, has left that one's platform here.
    inherited = {name: x for name, x in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    process = subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**inherited, "MUJOCO_GL": "disable"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert process.returncode == 0, process.stdout


@contextlib.contextmanager
def open_env(suite: str, task_id: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Builds a ControlEnv without renderer; MUJOCO_GL=disable must be set.

    Yields:
      The env, and its init states [K, 1 + nq + nv].
    """
    host = LiberoHost(LiberoHostConfig(suite=suite, task_ids=(task_id,)))
    task = host.worker_spec().config["tasks"][0]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it builds
        from libero.libero.envs.env_wrapper import ControlEnv

        np.random.seed(0)
        env = ControlEnv(
            bddl_file_name=task["bddl_file"],
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
        )
    try:
        yield env, load_init_states(task["init_states_file"])
    finally:
        env.close()


def reduced_scene(env: Any) -> dict[str, Any]:
    """The physics model as XML, and where bodies are fixed in this episode."""
    domain = env.env
    placed = [*domain.objects_dict.values(), *domain.fixtures_dict.values()]
    scene = reduce_scene(domain.model.get_xml(), placed={item.root_body for item in placed})
    model = domain.sim.model
    return {
        "xml": set_numerics(scene.xml, CONTACT_BUDGET),
        "body_pos": model.body_pos.copy(),
        "body_quat": model.body_quat.copy(),
    }
