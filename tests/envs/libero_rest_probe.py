"""Lets the objects of LIBERO scenes come to rest in LIBERO's own model; see test_libero_rest.py.

    python libero_rest_probe.py DIRECTORY SUITE:TASK ...

Writes DIRECTORY/SUITE_TASK.npz: the reduced scene as XML, where fixtures are, the state after
10 control steps, and poses of the bodies 100 control steps later, with the arm held by gravity
compensation; commands that swing the arm, and where they take it; and what must be equal in the
reduced scene.
"""

import pathlib
import sys
from typing import Any

import mujoco
import numpy as np
from libero_stock import open_env, reduced_scene

from jaxvla.envs.libero_deviation import rest, swing

NUM_SWING_STEPS = 200
KEPT = ("body_mass", "body_inertia", "body_ipos", "jnt_type", "jnt_qposadr", "jnt_range", "qpos0")


def main(directory: pathlib.Path, suite: str, task_id: int) -> None:
    with open_env(suite, task_id) as (env, states):
        seen: dict[str, Any] = reduced_scene(env)
        model = env.env.sim.model._model
        start = rest(model, states[0, 1:], num_control_steps=10)
        seen["start"] = np.concatenate([start.qpos, start.qvel])
        end = rest(model, seen["start"], num_control_steps=100)
        seen["xipos"], seen["xquat"] = end.xipos, end.xquat
        seen["controls"], seen["joints"] = swing(model, seen["start"], NUM_SWING_STEPS)
        seen |= {name: getattr(model, name) for name in KEPT}
        seen["bodies"] = [model.body(index).name for index in range(model.nbody)]
        seen["free"] = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        np.savez(directory / f"{suite}_{task_id}.npz", **seen)


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        name, number = argument.split(":")
        main(pathlib.Path(sys.argv[1]), name, int(number))
