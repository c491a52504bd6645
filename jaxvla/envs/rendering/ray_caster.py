"""Batched camera renderer in JAX: ray casting, Lambert shading, no rasteriser needed.

One ray per pixel is tested against every visible geom. The scene (types, sizes,
colours, lights, cameras) comes from a compiled MuJoCo model and is constant under
jit; poses and, if wanted, colours are arguments, so that `jax.vmap` renders a batch
of worlds. Matches `mujoco.Renderer` in geometry (pinhole camera, planar depth,
back faces culled); it leaves out shadows, reflections, speculars and textures
(a textured material shows its texture's mean colour).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.rendering import intersections

_GEOM = mujoco.mjtGeom
_SHAPES = {
    _GEOM.mjGEOM_PLANE: intersections.plane,
    _GEOM.mjGEOM_SPHERE: intersections.sphere,
    _GEOM.mjGEOM_CAPSULE: intersections.capsule,
    _GEOM.mjGEOM_ELLIPSOID: intersections.ellipsoid,
    _GEOM.mjGEOM_CYLINDER: intersections.cylinder,
    _GEOM.mjGEOM_BOX: intersections.box,
    _GEOM.mjGEOM_MESH: intersections.mesh,
}
_VISIBLE_GROUPS = (0, 1, 2)
"""Geom groups that MuJoCo's viewer and renderer show by default."""
_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0], np.float32)


@flax.struct.dataclass(kw_only=True)
class ScenePoses:
    """World poses of geoms and cameras, as in `mjx.Data` (G geoms, K cameras of the model)."""

    geom_xpos: jax.Array
    """float32 [G, 3], metres."""
    geom_xmat: jax.Array
    """float32 [G, 3, 3]."""
    cam_xpos: jax.Array
    """float32 [K, 3], metres."""
    cam_xmat: jax.Array
    """float32 [K, 3, 3]; the camera looks along its -z, x to the right, y up."""


@flax.struct.dataclass(kw_only=True)
class Frames:
    """Images of the requested cameras (C). Unused outputs are dropped by XLA under jit."""

    rgb: jax.Array
    """uint8 [C, h, w, 3]."""
    depth: jax.Array
    """float32 [C, h, w], metres along the viewing axis; inf where nothing is hit."""
    segmentation: jax.Array
    """int32 [C, h, w], geom id; -1 where nothing is hit."""


@flax.struct.dataclass(kw_only=True)
class _Surfaces:
    """What every pixel sees, before colour."""

    depth: jax.Array
    segmentation: jax.Array
    cosines: tuple[jax.Array, ...]
    """max(0, n.l) [C, h, w] per light."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Geom:
    """One visible geom's constants."""

    id: int
    shape: int
    size: np.ndarray
    """Sizes [3], or triangles [F, 3, 3] of a mesh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Light:
    """A directional light; the headlight shines along the camera's axis."""

    is_headlight: bool
    direction: np.ndarray
    """Direction of travel [3], unused by the headlight."""
    diffuse: np.ndarray
    """RGB strength [3]."""


class RayCaster:
    """Renders fixed cameras of one model at one image size."""

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        cameras: Sequence[str],
        size: int,
        max_triangles: int = 2048,
    ):
        """Reads the scene's constants.

        Args:
          model: compiled model.
          cameras: camera names, in the order of the output's first axis.
          size: image height and width in pixels.
          max_triangles: refuse scenes whose visible meshes hold more triangles than this;
            every triangle is tested against every pixel.

        Raises:
          ValueError: unknown camera, unsupported geom type, or too many triangles.
        """
        self.size = size
        self._camera_ids = [_camera_id(model, name) for name in cameras]
        self._geoms = [_read_geom(model, g) for g in _visible_geoms(model)]
        triangles = sum(len(g.size) for g in self._geoms if g.shape == _GEOM.mjGEOM_MESH)
        if triangles > max_triangles:
            raise ValueError(
                f"the scene shows {triangles} triangles, more than max_triangles={max_triangles}: "
                "decimate its meshes or raise the limit"
            )
        self.geom_rgb = np.stack([_mean_color(model, g) for g in range(model.ngeom)])
        """float32 [G, 3] in [0, 1], the model's own colours."""
        self._fovy_rad = np.deg2rad(model.cam_fovy[self._camera_ids])
        self._near_m = float(model.vis.map.znear * model.stat.extent)
        self._ambient, self._lights = _read_lights(model)
        directions = [light.direction for light in self._lights]
        self._light_directions = np.asarray(directions, np.float32).reshape(-1, 3)
        self._background = _background_color(model)

    def render(self, poses: ScenePoses, geom_rgb: jax.Array | None = None) -> Frames:
        """Renders every camera of one world.

        Args:
          poses: world poses of geoms and cameras.
          geom_rgb: float32 [G, 3] in [0, 1], colours of all geoms; default: the model's.

        Returns:
          Frames with C = number of cameras asked for.
        """
        colors = jnp.asarray(self.geom_rgb) if geom_rgb is None else geom_rgb
        frames = self.render_batch(jax.tree.map(lambda x: x[None], poses), colors[None])
        return jax.tree.map(lambda x: x[0], frames)

    def render_batch(self, poses: ScenePoses, geom_rgb: jax.Array) -> Frames:
        """Renders every camera of E worlds; arguments and results gain a leading axis [E].

        On CPU visibility is solved for one world after the other: the intermediate images of
        one world fit the cache and those of a batch do not, and the loop keeps XLA from
        folding the whole scene into the byte-interleaved output (together 10x faster).
        """
        surfaces = jax.lax.platform_dependent(
            poses,
            cpu=lambda worlds: jax.lax.map(self._surfaces, worlds),
            default=jax.vmap(self._surfaces),
        )
        rgb = jax.vmap(self._shade)(surfaces, geom_rgb)
        return Frames(rgb=rgb, depth=surfaces.depth, segmentation=surfaces.segmentation)

    def _surfaces(self, poses: ScenePoses) -> _Surfaces:
        views = [self._camera(k, poses) for k in range(len(self._camera_ids))]
        return jax.tree.map(lambda *images: jnp.stack(images), *views)

    def _camera(self, index: int, poses: ScenePoses) -> _Surfaces:
        camera = self._camera_ids[index]
        to_local = jnp.swapaxes(poses.geom_xmat, -1, -2)
        origins = jnp.einsum("gij,gj->gi", to_local, poses.cam_xpos[camera] - poses.geom_xpos)
        axes = to_local @ poses.cam_xmat[camera]
        towards = -jnp.einsum("gij,lj->gli", to_local, self._light_directions)
        x, y = _pixel_grid(self.size, self._fovy_rad[index])
        depth = jnp.full_like(x, jnp.inf)
        segmentation = jnp.full_like(x, -1, jnp.int32)
        cosines = [jnp.zeros_like(depth) for _ in self._lights]
        for geom in self._geoms:
            rotation = axes[geom.id]
            d = tuple(rotation[i, 0] * x + rotation[i, 1] * y - rotation[i, 2] for i in range(3))
            t, n = _SHAPES[geom.shape](tuple(origins[geom.id]), d, jnp.asarray(geom.size))
            closer = (t < depth) & (t > self._near_m)
            depth = jnp.where(closer, t, depth)
            segmentation = jnp.where(closer, geom.id, segmentation)
            for k, light in enumerate(self._lights):
                to_light = rotation[:, 2] if light.is_headlight else towards[geom.id, k]
                cosine = n[0] * to_light[0] + n[1] * to_light[1] + n[2] * to_light[2]
                cosines[k] = jnp.where(closer, jnp.maximum(cosine, 0.0), cosines[k])
        square = (self.size, self.size)
        return _Surfaces(
            depth=depth.reshape(square),
            segmentation=segmentation.reshape(square),
            cosines=tuple(cosine.reshape(square) for cosine in cosines),
        )

    def _shade(self, surfaces: _Surfaces, colors: jax.Array) -> jax.Array:
        """Colour x (ambient + sum over lights of diffuse max(0, n.l)), uint8 [C, h, w, 3]."""
        channels = []
        for c in range(3):
            # A chain of selects is one vectorised loop; a gather per pixel would not be.
            color = jnp.zeros_like(surfaces.depth)
            for geom in self._geoms:
                color = jnp.where(surfaces.segmentation == geom.id, colors[geom.id, c], color)
            light = self._ambient[c]
            for source, cosine in zip(self._lights, surfaces.cosines, strict=True):
                light = light + source.diffuse[c] * cosine
            value = jnp.where(surfaces.segmentation >= 0, color * light, self._background[c])
            channels.append(jnp.round(255.0 * jnp.clip(value, 0.0, 1.0)).astype(jnp.uint8))
        return jnp.stack(channels, -1)


def _pixel_grid(size: int, fovy_rad: float) -> tuple[np.ndarray, np.ndarray]:
    """Camera-frame x and y [size * size] of the rays through pixel centres, at z = -1.

    With z = -1 the ray parameter is the planar depth.
    """
    focal_px = 0.5 * size / np.tan(0.5 * fovy_rad)
    u = (np.arange(size) + 0.5 - 0.5 * size) / focal_px
    x, y = np.meshgrid(u, -u)
    return x.ravel().astype(np.float32), y.ravel().astype(np.float32)


def _camera_id(model: mujoco.MjModel, name: str) -> int:
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    if camera < 0:
        known = [model.camera(i).name for i in range(model.ncam)]
        raise ValueError(f"the model has no camera {name!r}; cameras: {', '.join(known)}")
    return camera


def _visible_geoms(model: mujoco.MjModel) -> list[int]:
    return [
        g
        for g in range(model.ngeom)
        if model.geom_group[g] in _VISIBLE_GROUPS and _alpha(model, g) > 0
    ]


def _alpha(model: mujoco.MjModel, g: int) -> float:
    material = model.geom_matid[g]
    return float(model.geom_rgba[g, 3] * (model.mat_rgba[material, 3] if material >= 0 else 1.0))


def _read_geom(model: mujoco.MjModel, g: int) -> _Geom:
    shape = _GEOM(model.geom_type[g])
    if shape not in _SHAPES:
        raise ValueError(f"geom {model.geom(g).name!r}: type {shape.name} cannot be rendered")
    size = model.geom_size[g].astype(np.float32)
    if shape == _GEOM.mjGEOM_MESH:
        size = _mesh_triangles(model, model.geom_dataid[g])
    return _Geom(id=g, shape=shape, size=size)


def _mesh_triangles(model: mujoco.MjModel, mesh: int) -> np.ndarray:
    first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
    faces = model.mesh_face[first_face : first_face + model.mesh_facenum[mesh]]
    return model.mesh_vert[first_vertex + faces].astype(np.float32)


def _mean_color(model: mujoco.MjModel, g: int) -> np.ndarray:
    """Colour of a geom (its own unless left at MuJoCo's default, else its material's), times
    the mean of the material's texture."""
    material = model.geom_matid[g]
    if material < 0:
        return model.geom_rgba[g, :3].astype(np.float32)
    is_default = np.array_equal(model.geom_rgba[g], _DEFAULT_RGBA)
    color = model.mat_rgba[material] if is_default else model.geom_rgba[g]
    color = color[:3].astype(np.float32)
    texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
    if texture < 0:
        return color
    channels = model.tex_nchannel[texture]
    pixels = model.tex_width[texture] * model.tex_height[texture]
    start = model.tex_adr[texture]
    data = model.tex_data[start : start + pixels * channels].reshape(pixels, channels)
    return color * data[:, :3].mean(0).astype(np.float32) / 255.0


def _read_lights(model: mujoco.MjModel) -> tuple[np.ndarray, list[_Light]]:
    """Total ambient strength [3], and the active lights that have a diffuse part."""
    head = model.vis.headlight
    candidates = [
        (bool(head.active), _Light(is_headlight=True, direction=np.zeros(3), diffuse=head.diffuse)),
        *(
            (
                bool(model.light_active[i])
                and model.light_type[i] == mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
                _Light(
                    is_headlight=False,
                    direction=model.light_dir[i],
                    diffuse=model.light_diffuse[i],
                ),
            )
            for i in range(model.nlight)
        ),
    ]
    ambients = [head.ambient, *model.light_ambient]
    ambient = sum(a for a, (active, _) in zip(ambients, candidates, strict=True) if active)
    lights = [light for active, light in candidates if active and light.diffuse.any()]
    return ambient + np.zeros(3), lights


def _background_color(model: mujoco.MjModel) -> np.ndarray:
    """Mean colour of the skybox, black without one."""
    for texture in range(model.ntex):
        if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            channels = model.tex_nchannel[texture]
            count = model.tex_width[texture] * model.tex_height[texture] * channels
            start = model.tex_adr[texture]
            data = model.tex_data[start : start + count].reshape(-1, channels)
            return data[:, :3].mean(0).astype(np.float32) / 255.0
    return np.zeros(3, np.float32)
