"""`Rasterizer` with the ray tracer of MuJoCo Warp in place of the z-buffer, for NVIDIA GPUs.

Needs the `warp` extra, and is imported by nothing that does not ask for it. Warp finds the
triangle that each pixel sees, and its depth; `shading` colours it. Warp's own colours would be
others than those that policies are trained on: it clips light after the texture and not before,
does not multiply highlights by the texture, flattens corner normals that lean more than 37
degrees, and rounds down. So the scene that Warp gets has no light, and one colour per triangle:
its number. The near plane, the sky, textures and highlights are those of the rasterizer.

What differs: a surface behind eight or more back faces of its own geom is not found, and where
surfaces of two geoms coincide Warp shows the one that comes later. There is no `behind`.

Warp draws a fixed number of worlds into buffers that it keeps. They are made when a batch size
is first drawn on a device. Drawing is one call for XLA, so that nothing comes between moving the
geoms and tracing; it cannot be mapped with `jax.vmap`, nor split over devices.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Frame, Rasterizer, Visible
from jaxvla.envs.rendering.surfaces import Surfaces

_BITS = 7
"""Of a triangle's number in each colour channel. The eighth is set: Warp rounds down, and what
is lost is never one of the seven; and the number is not black, which is the background."""
_MASK = (1 << _BITS) - 1
_BLOCK = 2
"""Texels per side with a triangle's number. It is looked up in their middle, where filtering
mixes equal colours."""
_BLOCKS_PER_ROW = 256
_AXIS = np.array([0.9, 0.38, 0.22])
"""Tells faces apart that look opposite ways. It lies in no plane that stands straight."""


class WarpRenderer:
    """Renders one scene's triangles at one image size."""

    def __init__(self, surfaces: Surfaces, *, body_ids: Sequence[int], size: int):
        """Builds the model that Warp draws.

        Args:
          surfaces: triangles, colours and lights.
          body_ids: row of `BodyPoses` for each of `surfaces.body_names`.
          size: image height and width in pixels, a multiple of TILE.

        Raises:
          ValueError: warp is not installed, or as for `Rasterizer`.
        """
        try:
            warp = importlib.import_module("warp")
            mujoco_warp = importlib.import_module("mujoco.mjx.third_party.mujoco_warp")
        except ImportError as error:
            raise ValueError(f"warp: {error}. Fix: pip install 'jaxvla[warp]'") from error
        self._rasterizer = Rasterizer(surfaces, body_ids=body_ids, size=size)
        self._near_m = surfaces.near_m
        self._model, geoms = numbered_model(surfaces)
        self._body = np.asarray(body_ids, np.int32)[surfaces.geom_body[geoms]]
        self._draw = _make_draw(warp, mujoco_warp, self._model, size=size)

    def render_batch(self, poses: BodyPoses, camera: Camera) -> Frame:
        """Renders a batch of images, one per world; inside jit, but not inside vmap.

        Args:
          poses: float32 [E, B, ...].
          camera: float32 [E, ...].

        Returns:
          As `Rasterizer.render_batch`, leading axis [E]; `num_dropped_pairs` is 0.
        """
        seen = (self.visible_batch(poses, camera), poses, camera)
        return jax.lax.platform_dependent(
            seen,
            cpu=lambda batch: jax.lax.map(lambda one: self._rasterizer.shade(*one), batch),
            default=lambda batch: jax.vmap(self._rasterizer.shade)(*batch),
        )

    def visible_batch(self, poses: BodyPoses, camera: Camera) -> Visible:
        """Which triangle every pixel sees; arguments and results as `Rasterizer.visible` has
        them, with a leading axis [E]."""
        num_worlds = len(camera.xpos)
        with jax.default_matmul_precision("highest"):
            geom_xpos, geom_xmat = self._geom_poses(poses)
        # Rays are those of the first world's camera. Others stretch theirs.
        x, y = self._rasterizer.rays(jax.tree.map(lambda a: a[0], camera))
        tangent = jnp.tan(0.5 * camera.fovy_rad)
        stretch = jnp.ones((num_worlds, 3)).at[:, :2].set((tangent / tangent[0])[:, None])
        at_one = jnp.stack([x, y, -jnp.ones_like(x)], -1).reshape(-1, 3)
        shape = (num_worlds, len(at_one))
        code, depth = self._draw(
            geom_xpos,
            geom_xmat,
            camera.xpos[:, None],
            (camera.xmat * stretch[:, None, :])[:, None],
            at_one / jnp.linalg.norm(at_one, axis=-1, keepdims=True),
            self._near_m * at_one,
            output_dims={"code": shape, "depth": shape},
        )
        triangle = decoded(code)
        inverse_depth = jnp.where(triangle >= 0, 1.0 / (depth + self._near_m), 0.0)
        return Visible(
            inverse_depth=inverse_depth.reshape(num_worlds, *x.shape),
            triangle=triangle.reshape(num_worlds, *x.shape),
            num_dropped_pairs=jnp.zeros(num_worlds, jnp.int32),
        )

    def _geom_poses(self, poses: BodyPoses) -> tuple[jax.Array, jax.Array]:
        """World poses [E, M, 3] and [E, M, 3, 3] of the meshes: MuJoCo has moved their frames
        to their centres."""
        turn = np.empty((self._model.ngeom, 9))
        for matrix, quat in zip(turn, self._model.geom_quat, strict=True):
            mujoco.mju_quat2Mat(matrix, quat)
        xmat = poses.xmat[:, self._body]
        center = jnp.asarray(self._model.geom_pos, jnp.float32)[:, :, None]
        xpos = poses.xpos[:, self._body] + (xmat @ center)[..., 0]
        return xpos, xmat @ jnp.asarray(turn.reshape(-1, 3, 3), jnp.float32)


def decoded(code: jax.Array) -> jax.Array:
    """Numbers of triangles, int32, -1 for the background, from Warp's pixels, uint32 of the
    same shape: blue in bits 0 to 7, green in 8 to 15, red in 16 to 23."""
    channels = [(code >> shift + 1 & _MASK).astype(jnp.int32) for shift in (16, 8, 0)]
    number = sum(channel << _BITS * c for c, channel in enumerate(channels))
    return jnp.where(code & 0xFFFFFF, number, -1)


def numbered_model(surfaces: Surfaces) -> tuple[mujoco.MjModel, np.ndarray]:
    """A model whose geoms are the surfaces' meshes, which shine in their triangles' numbers.

    Returns:
      The model, with all geoms on the world body and one camera; and int [M], the index into
      `surfaces.geom_names` for each of its geoms, at most two per name.
    """
    spec = mujoco.MjSpec()
    spec.visual.headlight.active = 0
    spec.worldbody.add_camera()
    texture = _number_texture(len(surfaces.triangles))
    height, width = texture.shape[:2]
    spec.add_texture(
        name="numbers",
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        width=width,
        height=height,
        nchannel=3,
    ).data = texture.tobytes()
    material = spec.add_material(name="numbers", emission=1.0, rgba=[1.0] * 4)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "numbers"
    geoms = []
    for rows in _parts(surfaces):
        _add_mesh(spec, surfaces, rows, (width, height))
        geoms.append(surfaces.geom[rows[0]])
    return spec.compile(), np.asarray(geoms)


def _parts(surfaces: Surfaces) -> list[np.ndarray]:
    """Triangles by geom and by the side that they look to.

    Walls of LIBERO's meshes are two faces at the same place that look opposite ways. In one mesh
    Warp would meet the one that looks away first, half of the time, and go on behind both.
    """
    first, second, third = np.moveaxis(surfaces.triangles.astype(np.float64), 1, 0)
    side = np.cross(second - first, third - first) @ _AXIS > 0.0
    _, part = np.unique(2 * surfaces.geom + side, return_inverse=True)
    return np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part))[:-1])


def _number_texture(count: int) -> np.ndarray:
    """uint8 [h, w, 3], a block of equal texels for each number."""
    number = np.arange(-(-count // _BLOCKS_PER_ROW) * _BLOCKS_PER_ROW)
    channels = np.stack([number >> _BITS * c & _MASK for c in range(3)], -1)
    blocks = (2 * channels + 1).astype(np.uint8).reshape(-1, _BLOCKS_PER_ROW, 3)
    return blocks.repeat(_BLOCK, 0).repeat(_BLOCK, 1)


def _add_mesh(
    spec: mujoco.MjSpec, surfaces: Surfaces, rows: np.ndarray, size: tuple[int, int]
) -> None:
    """One geom of triangles `rows`, looked up in a texture of some width and height."""
    place = np.stack([rows % _BLOCKS_PER_ROW, rows // _BLOCKS_PER_ROW], -1)
    coordinates = (place + 0.5) * _BLOCK / np.asarray(size)
    vertices = surfaces.triangles[rows].reshape(-1, 3)
    # MuJoCo refuses meshes of three vertices.
    vertices = np.concatenate([vertices, vertices[-1:]])
    corners = np.arange(3 * len(rows))
    name = f"mesh{len(spec.meshes)}"
    spec.add_mesh(
        name=name,
        # Others need a volume, which a flat mesh has not.
        inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
        uservert=vertices.ravel(),
        userface=corners,
        usertexcoord=coordinates.repeat(3, 0).ravel(),
        userfacetexcoord=corners,
    )
    spec.worldbody.add_geom(
        type=mujoco.mjtGeom.mjGEOM_MESH,
        meshname=name,
        material="numbers",
        contype=0,
        conaffinity=0,
    )


def _make_draw(
    warp: ModuleType, mujoco_warp: ModuleType, model: mujoco.MjModel, *, size: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The tracer as a function of JAX arrays: geom_xpos [E, M, 3], geom_xmat [E, M, 3, 3],
    camera_xpos [E, 1, 3], camera_xmat [E, 1, 3, 3], ray and start [P, 3] in the camera's frame;
    gives code uint32 and depth beyond the start float32, [E, P] each."""
    buffers: dict[tuple[str, int], tuple[Any, Any, Any]] = {}

    def draw(geom_xpos, geom_xmat, camera_xpos, camera_xmat, ray, start, code, depth) -> None:
        key = (str(warp.get_device()), geom_xpos.shape[0])
        if key not in buffers:
            buffers[key] = _make_buffers(mujoco_warp, model, key[1], size)
        numbered, data, context = buffers[key]
        data.geom_xpos, data.geom_xmat = geom_xpos, geom_xmat
        data.cam_xpos, data.cam_xmat = camera_xpos, camera_xmat
        context.ray, context.ray_offset = ray, start
        context.rgb_data, context.depth_data = code, depth
        mujoco_warp.refit_bvh(numbered, data, context)
        mujoco_warp.render(numbered, data, context)

    vectors, matrices = (warp.array(dtype=x, ndim=2) for x in (warp.vec3, warp.mat33))
    draw.__annotations__ = {
        "geom_xpos": vectors,
        "geom_xmat": matrices,
        "camera_xpos": vectors,
        "camera_xmat": matrices,
        "ray": warp.array(dtype=warp.vec3, ndim=1),
        "start": warp.array(dtype=warp.vec3, ndim=1),
        "code": warp.array(dtype=warp.uint32, ndim=2),
        "depth": warp.array(dtype=warp.float32, ndim=2),
    }
    # Buffers are allocated inside, which a captured graph does not allow.
    mode = warp.JaxCallableGraphMode.NONE
    return warp.jax_callable(draw, num_outputs=2, graph_mode=mode, vmap_method=None)


def _make_buffers(
    mujoco_warp: ModuleType, model: mujoco.MjModel, num_worlds: int, size: int
) -> tuple[Any, Any, Any]:
    """Model, data and render context on Warp's current device."""
    context = mujoco_warp.create_render_context(
        model,
        nworld=num_worlds,
        cam_res=(size, size),
        render_rgb=True,
        render_depth=True,
        render_seg=False,
        use_fast_math=False,
        use_ambient_lighting=False,
        enable_specular=False,
        enable_vertex_normals=False,
    )
    # The switch that makes rays start at `ray_offset`: on the near plane.
    context.has_orthographic_camera = True
    context.zfar = 0.0  # no far plane
    data = mujoco_warp.make_data(model, nworld=num_worlds, naconmax=1, njmax=1)
    return mujoco_warp.put_model(model), data, context
