"""Photographs a LIBERO task with MuJoCo's renderer, in a process of its own.

    python libero_images_probe.py SUITE TASK_ID OUTPUT_NPZ

MUJOCO_GL must be set. Writes the extracted surfaces ("surfaces.*"), the reference images
[F, h, w, ...], the poses and cameras of each of the F frames, and what it takes to name the
body at a pixel: `geom_body` of the model, and for each of the surfaces' geoms its body's id.
Two states are seen: an episode's first one, and one with the arm moved.
"""

import sys

import mujoco
import numpy as np
from gl_reference import render_views

from jaxvla.envs.libero_compiler import original_model
from jaxvla.envs.libero_host import CAMERAS, LiberoHost, LiberoHostConfig
from jaxvla.envs.libero_init_states import load_init_states
from jaxvla.envs.rendering.surfaces import extract_surfaces

SIZE = 128
ARM_OFFSETS_RAD = ([0.0] * 7, [0.4, 0.5, -0.2, 0.3, 0.0, 0.4, 0.3])


def main(suite: str, task_id: int, output: str) -> None:
    model = original_model(suite, task_id)
    host = LiberoHost(LiberoHostConfig(suite=suite, task_ids=(task_id,)))
    task = host.worker_spec().config["tasks"][0]
    state = load_init_states(task["init_states_file"])[0]
    arrays: dict[str, list] = {}
    for offset in ARM_OFFSETS_RAD:
        data = mujoco.MjData(model)
        data.qpos[:] = state[1 : 1 + model.nq]
        data.qpos[:7] += offset
        mujoco.mj_forward(model, data)
        for name, values in photograph(model, data).items():
            arrays.setdefault(name, []).extend(values)
    surfaces = extract_surfaces(model)
    ids = np.array(surfaces.body_ids(model))
    np.savez(
        output,
        **{name: np.array(values) for name, values in arrays.items()},
        **{f"surfaces.{name}": value for name, value in surfaces.to_arrays().items()},
        geom_body=model.geom_bodyid,
        body_ids=ids,
    )


def photograph(model: mujoco.MjModel, data: mujoco.MjData) -> dict[str, list]:
    """Both cameras' images of one state, without sites and collision shapes, which LIBERO's
    own images do not show either."""
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    option.sitegroup[:] = 0
    names = list(CAMERAS.values())
    images = render_views(model, data, names, SIZE, option)
    ids = [model.camera(name).id for name in names]
    return {
        **{kind: list(image) for kind, image in images.items()},
        "xpos": [data.xpos.copy()] * len(ids),
        "xmat": [data.xmat.reshape(-1, 3, 3).copy()] * len(ids),
        "camera_xpos": list(data.cam_xpos[ids]),
        "camera_xmat": list(data.cam_xmat[ids].reshape(-1, 3, 3)),
        "fovy_rad": list(np.deg2rad(model.cam_fovy[ids])),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
