"""Images of LIBERO tasks against MuJoCo's own renderer.

The intersection over union of a frame is the mean over the bodies in the reference, weighted
by their pixels. What may differ in colour: MuJoCo smooths edges (4 samples per pixel), lights
vertices and not pixels, and reflects the scene in shiny boxes.
"""

import os
import pathlib
import subprocess
import sys

import gl_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from libero_marks import needs_libero

from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer
from jaxvla.envs.rendering.surfaces import Surfaces

pytestmark = [
    pytest.mark.libero,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_libero,
]
LEAST_IOU = 0.97
MOST_COLOR_ERROR = 10.0
"""Mean absolute difference of a frame, of 255."""


def _photographs(suite: str, task_id: int, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What libero_images_probe.py writes."""
    output = folder / "seen.npz"
    probe = pathlib.Path(__file__).with_name("libero_images_probe.py")
    process = subprocess.run(
        [sys.executable, str(probe), suite, str(task_id), str(output)],
        env={**gl_reference.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout
    with np.load(output) as arrays:
        return dict(arrays)


def _frames(seen: dict[str, np.ndarray], surfaces: Surfaces) -> Frame:
    """All frames, [F, ...] each."""
    rasterizer = Rasterizer(surfaces, body_ids=seen["body_ids"].tolist(), size=128)
    poses = BodyPoses(xpos=jnp.float32(seen["xpos"]), xmat=jnp.float32(seen["xmat"]))
    cameras = Camera(
        xpos=jnp.float32(seen["camera_xpos"]),
        xmat=jnp.float32(seen["camera_xmat"]),
        fovy_rad=jnp.float32(seen["fovy_rad"]),
    )
    return jax.tree.map(np.asarray, jax.jit(rasterizer.render_batch)(poses, cameras))


def _iou(expected: np.ndarray, seen: np.ndarray) -> float:
    bodies, pixels = np.unique(expected, return_counts=True)
    scores = [
        ((expected == b) & (seen == b)).sum() / ((expected == b) | (seen == b)).sum()
        for b in bodies
    ]
    return float(np.average(scores, weights=pixels))


@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 0), ("libero_10", 0)])
def test_images_look_like_those_of_mujoco(suite: str, task_id: int, tmp_path: pathlib.Path):
    seen = _photographs(suite, task_id, tmp_path)
    prefix = "surfaces."
    arrays = {k.removeprefix(prefix): v for k, v in seen.items() if k.startswith(prefix)}
    surfaces = Surfaces.from_arrays(arrays)
    assert surfaces.num_source_triangles > 200_000
    assert len(surfaces.triangles) <= 12_000
    frames = _frames(seen, surfaces)
    assert (frames.num_dropped_pairs == 0).all()
    bodies = seen["body_ids"][surfaces.geom_body]
    for i, segmentation in enumerate(seen["segmentation"]):
        expected = np.where(segmentation >= 0, seen["geom_body"][segmentation], -1)
        got = np.where(frames.geom[i] >= 0, bodies[frames.geom[i]], -1)
        assert _iou(expected, got) >= LEAST_IOU, i
        both = (expected == got) & (got >= 0)
        depth_error = np.abs(frames.depth[i] - seen["depth"][i])[both]
        assert np.median(depth_error) < 1e-3, i
        assert np.quantile(depth_error, 0.95) < 0.01, i
        color_error = np.abs(frames.rgb[i].astype(float) - seen["rgb"][i])
        assert color_error.mean() < MOST_COLOR_ERROR, i
