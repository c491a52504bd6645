"""How close libero_mjx's images are to MuJoCo's own, task by task.

    MUJOCO_GL=osmesa python scripts/libero_images.py [--suites ...] [--task_ids ...] [--json=FILE]

Needs the libero extra, compiled tasks (--job=compile_tasks) and an OpenGL that renders without a
display (osmesa or egl). Draws three init states of each task, with the arm at its start and moved,
by LIBERO's own model and mujoco.Renderer, and from the task file by the rasterizer: 128 px, both
cameras, 12 frames. Collision shapes and sites are hidden, as in LIBERO's images. One line per
task, and camera:

  IoU     intersection over union of the bodies' pixels, the mean over the bodies weighted by
          their pixels in the reference: mean over frames, and the least frame
  depth   error in mm where the body is right: the worst frame's median and 95th percentile
  colour  mean absolute error of all pixels, of 255: mean over frames, and the worst frame

What --json has from an earlier time is not measured again.
"""

import argparse
import json
import pathlib
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

from jaxvla.envs.libero_compiler import original_model, with_fixtures  # noqa: E402
from jaxvla.envs.libero_host import CAMERAS  # noqa: E402
from jaxvla.envs.libero_task import LiberoTask, task_path  # noqa: E402
from jaxvla.envs.osc import find_arm  # noqa: E402
from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer  # noqa: E402
from jaxvla.envs.rendering.surfaces import Surfaces  # noqa: E402

_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
_LEAST_IOU = 0.97
_SIZE = 128
_NUM_STATES = 3
_ARM_OFFSETS_RAD = ([0.0] * 7, [0.4, 0.5, -0.2, 0.3, 0.0, 0.4, 0.3])


def main() -> None:
    """Measures what is missing, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="*", default=_SUITES)
    parser.add_argument("--task_ids", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    known: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
    rows = {(row["suite"], row["task_id"]): row for row in known}
    for suite in options.suites:
        for task_id in options.task_ids:
            if (suite, task_id) not in rows:
                rows[suite, task_id] = _measure(suite, task_id)
            print(_line(rows[suite, task_id]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    ious = [iou for row in rows.values() for name in CAMERAS for iou in row[name]["iou"]]
    enough = sum(iou >= _LEAST_IOU for iou in ious)
    print(f"{len(rows)} tasks, {len(ious)} frames: IoU at least {_LEAST_IOU} in {enough}")


def _measure(suite: str, task_id: int) -> dict[str, Any]:
    """Figures of a task: {"suite", "task_id", camera: {figure: one number per frame}}."""
    task = LiberoTask.load(task_path(suite, task_id))
    original = original_model(suite, task_id)
    reduced: Any = mujoco.MjModel.from_xml_string(task.physics_xml)
    surfaces = Surfaces.from_arrays(task.surfaces)
    # Bodies of the two models by name: their numbers need not be the same.
    names = [
        original.body(geom.bodyid[0]).name for geom in map(original.geom, range(original.ngeom))
    ]
    body_of = np.asarray([reduced.body(name).id for name in names])
    drawn = np.asarray(surfaces.body_ids(reduced))[surfaces.geom_body]
    worlds = [
        _world(with_fixtures(original, task.fixtures, task.fixture_poses[k]), task, k, offset)
        for k in range(_NUM_STATES)
        for offset in _ARM_OFFSETS_RAD
    ]
    references = [_reference(model, data) for model, data in worlds]
    rasterizer = Rasterizer(surfaces, body_ids=surfaces.body_ids(original), size=_SIZE)
    row: dict[str, Any] = {"suite": suite, "task_id": task_id}
    for name in CAMERAS:
        frames = _draw(rasterizer, worlds, CAMERAS[name])
        scores = [
            _scores(jax.tree.map(lambda x, i=i: x[i], frames), views[name], body_of, drawn)
            for i, views in enumerate(references)
        ]
        row[name] = {figure: [score[figure] for score in scores] for figure in scores[0]}
    return row


def _world(
    model: mujoco.MjModel, task: LiberoTask, state: int, offset: list[float]
) -> tuple[mujoco.MjModel, mujoco.MjData]:
    data = mujoco.MjData(model)
    data.qpos[:] = task.start_states[state, : model.nq]
    data.qpos[find_arm(model).qpos] += offset
    mujoco.mj_forward(model, data)
    return model, data


def _reference(model: mujoco.MjModel, data: mujoco.MjData) -> dict[str, dict[str, np.ndarray]]:
    """By camera: rgb uint8 [h, w, 3], depth float32 [h, w] (m), geom int32 [h, w] (or -1)."""
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    option.sitegroup[:] = 0
    views = {}
    with mujoco.Renderer(model, _SIZE, _SIZE) as renderer:
        for name, camera in CAMERAS.items():
            renderer.update_scene(data, camera, option)
            rgb = renderer.render()
            renderer.enable_depth_rendering()
            depth = renderer.render()
            renderer.disable_depth_rendering()
            renderer.enable_segmentation_rendering()
            objects = renderer.render()
            renderer.disable_segmentation_rendering()
            is_geom = objects[..., 1] == mujoco.mjtObj.mjOBJ_GEOM
            geom = np.where(is_geom, objects[..., 0], -1)
            views[name] = {"rgb": rgb, "depth": depth, "geom": geom}
    return views


def _draw(rasterizer: Rasterizer, worlds: list[Any], camera: str) -> Frame:
    """The same worlds by the rasterizer: leaves [worlds, ...]."""
    model = worlds[0][0]
    index = model.camera(camera).id
    poses = BodyPoses(
        xpos=jnp.float32([data.xpos for _, data in worlds]),
        xmat=jnp.float32([data.xmat.reshape(-1, 3, 3) for _, data in worlds]),
    )
    cameras = Camera(
        xpos=jnp.float32([data.cam_xpos[index] for _, data in worlds]),
        xmat=jnp.float32([data.cam_xmat[index].reshape(3, 3) for _, data in worlds]),
        fovy_rad=jnp.full(len(worlds), np.deg2rad(model.cam_fovy[index]), jnp.float32),
    )
    return jax.tree.map(np.asarray, jax.jit(rasterizer.render_batch)(poses, cameras))


def _scores(
    frame: Frame, view: dict[str, np.ndarray], body_of: np.ndarray, drawn: np.ndarray
) -> dict[str, float]:
    """Figures of one frame.

    Args:
      frame: the rasterizer's.
      view: the reference, see `_reference`.
      body_of: int [ngeom], the body of each of the reference's geoms.
      drawn: int [G], the body of each of the rasterizer's geoms.
    """
    expected = np.where(view["geom"] >= 0, body_of[view["geom"]], -1)
    seen = np.where(frame.geom >= 0, drawn[frame.geom], -1)
    bodies, pixels = np.unique(expected, return_counts=True)
    ious = [
        ((expected == b) & (seen == b)).sum() / ((expected == b) | (seen == b)).sum()
        for b in bodies
    ]
    apart_mm = 1e3 * np.abs(frame.depth - view["depth"])[(expected == seen) & (seen >= 0)]
    return {
        "iou": float(np.average(ious, weights=pixels)),
        "depth_median_mm": float(np.median(apart_mm)),
        "depth_95_mm": float(np.quantile(apart_mm, 0.95)),
        "colour": float(np.abs(frame.rgb.astype(float) - view["rgb"]).mean()),
        "dropped_pairs": int(frame.num_dropped_pairs),
    }


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['suite']:<15}{row['task_id']:>3}"]
    for name in CAMERAS:
        figures = row[name]
        iou, colour = figures["iou"], figures["colour"]
        cells.append(
            f"{name}: IoU {np.mean(iou):.3f} / {min(iou):.3f}  "
            f"depth {max(figures['depth_median_mm']):.2f} / {max(figures['depth_95_mm']):.1f} mm  "
            f"colour {np.mean(colour):.1f} / {max(colour):.1f}"
            + f"  {sum(figures['dropped_pairs'])} pairs dropped"
            * any(figures["dropped_pairs"])
        )
    return "  ".join(cells)


if __name__ == "__main__":
    main()
