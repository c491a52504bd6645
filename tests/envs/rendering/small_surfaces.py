"""Hand-made surfaces for the rasterizer's tests, and a float64 reference that draws them."""

from dataclasses import dataclass

import numpy as np

from jaxvla.envs.rendering.surfaces import Lights, Surfaces

NEAR_M = 0.05


def lights(**changes: np.ndarray) -> Lights:
    """Ambient light only, black background."""
    values = {
        "ambient": np.ones(3, np.float32),
        "headlight": np.zeros(3, np.float32),
        "diffuse": np.zeros((0, 3), np.float32),
        "position": np.zeros((0, 3), np.float32),
        "direction": np.zeros((0, 3), np.float32),
        "is_directional": np.zeros(0, bool),
        "cutoff_cos": np.zeros(0, np.float32),
        "exponent": np.zeros(0, np.float32),
        "headlight_specular": np.zeros(3, np.float32),
        "specular": np.zeros((0, 3), np.float32),
        "sky": np.zeros((1, 3), np.float32),
    }
    if "diffuse" in changes:
        values["specular"] = np.zeros_like(changes["diffuse"])
    return Lights(**{**values, **changes})


def surfaces(
    triangles: np.ndarray,
    *,
    bodies: np.ndarray | None = None,
    colors: np.ndarray | None = None,
    light: Lights | None = None,
) -> Surfaces:
    """One geom per triangle; flat normals; white unless colours [T, 3, 3] are given.

    Args:
      triangles: [T, 3, 3], m.
      bodies: body of each triangle [T]; all on one if None.
      colors: corner colours [T, 3, 3].
      light: default `lights()`.
    """
    count = len(triangles)
    colors = np.ones((count, 3, 3)) if colors is None else colors
    bodies = np.zeros(count, np.int32) if bodies is None else bodies.astype(np.int32)
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return Surfaces(
        triangles=triangles.astype(np.float32),
        normals=np.repeat(normal[:, None], 3, 1).astype(np.float32),
        texels=np.round(255.0 * colors[:, [2, 0, 1]]).astype(np.uint8).reshape(-1, 3),
        texel_start=3 * np.arange(count, dtype=np.int32),
        texel_cells=np.ones(count, np.int32),
        geom_rgb=np.ones((count, 3), np.float32),
        geom_specular=np.zeros(count, np.float32),
        geom_shininess=np.full(count, 64.0, np.float32),
        geom_emission=np.zeros(count, np.float32),
        geom=np.arange(count, dtype=np.int32),
        geom_body=bodies,
        geom_names=tuple(f"geom{i}" for i in range(count)),
        body_names=tuple(f"body{i}" for i in range(int(bodies.max(initial=0)) + 1)),
        lights=lights() if light is None else light,
        near_m=NEAR_M,
        num_source_triangles=count,
        tolerance_m=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An image of the reference, [h, w] each."""

    depth: np.ndarray
    geom: np.ndarray
    colors: np.ndarray
    """[h, w, 3], corner colours interpolated in perspective."""
    is_clear: np.ndarray
    """Whether no edge and no second surface is so close that rounding could decide."""


def draw(
    scene: Surfaces, xpos: np.ndarray, xmat: np.ndarray, size: int, fovy_rad: float
) -> Reference:
    """Every pixel against every triangle, seen from the origin along -z with y up.

    A ray d is written as a combination of the corners, d = w_0 a + w_1 b + w_2 c, by solving the
    3 x 3 system: it meets the triangle where no w is negative, at depth 1 / (w_0 + w_1 + w_2).
    """
    focal = 0.5 * size / np.tan(0.5 * fovy_rad)
    u = (np.arange(size) + 0.5 - 0.5 * size) / focal
    rays = np.stack([*np.meshgrid(u, -u), -np.ones((size, size))], -1)
    body = scene.geom_body[scene.geom]
    corners = np.einsum("tij,tkj->tki", xmat[body], scene.triangles.astype(np.float64))
    corners += xpos[body][:, None]
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    is_front = (outward * corners[:, 0]).sum(-1) < 0
    depth = np.full((size, size), np.inf)
    second = depth.copy()
    geom = np.full((size, size), -1)
    colors = np.zeros((size, size, 3))
    margin = np.full((size, size), np.inf)
    for t in np.flatnonzero(is_front):
        weights = np.linalg.solve(corners[t].T, rays.reshape(-1, 3).T).T.reshape(size, size, 3)
        total = weights.sum(-1)
        # Distance to the nearest edge relative to the triangle; infinite if far behind.
        shares = weights / np.maximum(np.abs(total), 1e-9)[..., None]
        margin = np.minimum(margin, np.abs(shares.min(-1)))
        t_hit = np.where(
            (weights.min(-1) >= 0) & (total > 0), 1.0 / np.maximum(total, 1e-9), np.inf
        )
        t_hit = np.where(t_hit > NEAR_M, t_hit, np.inf)
        margin = np.minimum(margin, np.abs(1.0 / np.where(total == 0, 1e-9, total) - NEAR_M))
        closer = t_hit < depth
        second = np.where(closer, depth, np.minimum(second, t_hit))
        depth = np.where(closer, t_hit, depth)
        geom = np.where(closer, scene.geom[t], geom)
        # Texels are at (0, 0, 1), (1, 0, 0), (0, 1, 0).
        first = scene.texel_start[t]
        corner_colors = scene.texels[[first + 1, first + 2, first]] / 255.0
        seen = np.einsum("hwk,kc->hwc", shares, corner_colors)
        colors = np.where(closer[..., None], seen, colors)
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isfinite(second), second - depth, np.inf)
    return Reference(depth=depth, geom=geom, colors=colors, is_clear=(margin > 1e-3) & (gap > 1e-3))
