"""Renders scenes with mujoco.Renderer in a process of its own.

The choice of an OpenGL backend lasts as long as a process, so the test process makes none.
Usage: python gl_reference.py SCENES.json OUTPUT.npz, with the environment of `environment()`.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One world of a model, seen by some of its cameras."""

    xml: str
    qpos: list[float]
    mocap_pos: list[list[float]]
    geom_rgb: list[list[float]] | None
    """Colours of all geoms in place of the model's, or None."""
    cameras: list[str]
    size: int
    """Pixels per side."""

    def load(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Compiles the model and puts the world where it is."""
        model = mujoco.MjModel.from_xml_string(self.xml)
        if self.geom_rgb is not None:
            model.geom_rgba[:, :3] = self.geom_rgb
        data = mujoco.MjData(model)
        data.qpos[:] = self.qpos
        data.mocap_pos[:] = np.reshape(self.mocap_pos, data.mocap_pos.shape)
        mujoco.mj_forward(model, data)
        return model, data


def environment() -> dict[str, str]:
    """Variables that select software rendering."""
    return {**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}


def render_all(scenes: list[Scene], folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    """Runs this file on `scenes`.

    Returns:
      Per scene: rgb uint8 [C, h, w, 3], depth float32 [C, h, w] (m) and segmentation
      int32 [C, h, w], the geom's id or -1.
    """
    order, output = folder / "scenes.json", folder / "images.npz"
    order.write_text(json.dumps([dataclasses.asdict(scene) for scene in scenes]))
    process = subprocess.run(
        [sys.executable, __file__, str(order), str(output)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout
    with np.load(output) as arrays:
        kinds = ("rgb", "depth", "segmentation")
        return [{kind: arrays[f"{kind}_{i}"] for kind in kinds} for i in range(len(scenes))]


def render(scene: Scene) -> dict[str, np.ndarray]:
    """Images of one scene; see `render_all`."""
    model, data = scene.load()
    return render_views(model, data, scene.cameras, scene.size, mujoco.MjvOption())


def render_views(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    cameras: Sequence[str],
    size: int,
    option: mujoco.MjvOption,
) -> dict[str, np.ndarray]:
    """Images of one world as `render_all` returns them.

    Args:
      model: what is seen.
      data: the world, after mj_forward.
      cameras: names of the cameras.
      size: pixels per side.
      option: which groups of geoms and sites are seen.
    """
    images: dict[str, list[np.ndarray]] = {"rgb": [], "depth": [], "segmentation": []}
    with mujoco.Renderer(model, size, size) as renderer:
        for camera in cameras:
            renderer.update_scene(data, camera, option)
            images["rgb"].append(renderer.render())
            renderer.enable_depth_rendering()
            images["depth"].append(renderer.render())
            renderer.disable_depth_rendering()
            renderer.enable_segmentation_rendering()
            objects = renderer.render()
            is_geom = objects[..., 1] == mujoco.mjtObj.mjOBJ_GEOM
            images["segmentation"].append(np.where(is_geom, objects[..., 0], -1))
            renderer.disable_segmentation_rendering()
    return {kind: np.stack(parts) for kind, parts in images.items()}


def main(order: str, output: str) -> None:
    """Renders what the file `order` lists."""
    scenes = [Scene(**fields) for fields in json.loads(pathlib.Path(order).read_text())]
    arrays = {
        f"{kind}_{i}": array
        for i, scene in enumerate(scenes)
        for kind, array in render(scene).items()
    }
    np.savez(output, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
