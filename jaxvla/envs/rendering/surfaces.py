"""What the cameras of a MuJoCo model can see, as a bounded number of textured triangles.

`extract_surfaces` turns every visible geom into triangles in the frame of its body: primitives
are tessellated, meshes simplified together until the scene fits a triangle budget. Normals and
textures are taken from the original. The result is plain NumPy and holds names, not ids, of
bodies, so that it fits another model with the same bodies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import mujoco
import numpy as np

from jaxvla.envs.rendering import texturing
from jaxvla.envs.rendering.decimation import Simplifier
from jaxvla.envs.rendering.tessellation import SHAPES
from jaxvla.envs.rendering.texturing import SourceMesh, Texels

_GEOM = mujoco.mjtGeom
_FIRST_TOLERANCE_M = 5e-4
_TOLERANCE_STEP = 1.2
_LAST_TOLERANCE_M = 0.1
_NEARBY_SHARE = 0.15
"""Tolerance of geoms on bodies that carry a camera, relative to the others."""
_CREASE_COSINE = 0.7
"""Faces of primitives that meet at less than about 45 degrees are shaded as one surface."""
_SKY_BANDS = 256
_PLANE_CELLS = 6
_NO_ATTENUATION = (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lights:
    """Lights of a scene, L besides the headlight. Strengths are RGB, 1 = full."""

    ambient: np.ndarray
    """float32 [3], sum over all lights."""
    headlight: np.ndarray
    """float32 [3], diffuse strength of the light along the camera's axis."""
    headlight_specular: np.ndarray
    """float32 [3], its strength in highlights."""
    diffuse: np.ndarray
    """float32 [L, 3]."""
    specular: np.ndarray
    """float32 [L, 3]."""
    position: np.ndarray
    """float32 [L, 3], m, world frame."""
    direction: np.ndarray
    """float32 [L, 3], unit length, direction of travel along the light's axis."""
    is_directional: np.ndarray
    """bool [L]; the others are spotlights."""
    cutoff_cos: np.ndarray
    """float32 [L], cosine of a spotlight's half opening angle."""
    exponent: np.ndarray
    """float32 [L], falloff of a spotlight: cosine to this power."""
    sky: np.ndarray
    """float32 [B, 3] in [0, 1], colours where there is nothing, from straight down to straight
    up in steps of equal sine of the elevation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surfaces:
    """Visible triangles (T) of G geoms on N bodies, with S texels."""

    triangles: np.ndarray
    """float32 [T, 3, 3] (corner, xyz), m, body frame, counter-clockwise seen from outside."""
    normals: np.ndarray
    """float32 [T, 3, 3], unit corner normals, body frame."""
    geom: np.ndarray
    """int32 [T], index into geom_names."""
    texels: np.ndarray
    """uint8 [S, 3], texture colours, which multiply the lit surface; see `texturing`."""
    texel_start: np.ndarray
    """int32 [T], a triangle's first texel."""
    texel_cells: np.ndarray
    """int32 [T], R: the triangle has (R + 1)(R + 2) / 2 texels."""
    geom_body: np.ndarray
    """int32 [G], index into body_names."""
    geom_rgb: np.ndarray
    """float32 [G, 3] in [0, 1], colour before texture and light."""
    geom_specular: np.ndarray
    """float32 [G], strength of highlights."""
    geom_shininess: np.ndarray
    """float32 [G], exponent of highlights."""
    geom_emission: np.ndarray
    """float32 [G], light of its own, relative to geom_rgb."""
    geom_names: tuple[str, ...]
    """Names in the model they were taken from; "body/i" for a body's i-th geom if it has none."""
    body_names: tuple[str, ...]
    """Bodies that carry visible geoms."""
    lights: Lights
    """Lights at the time of extraction: they do not move with bodies."""
    near_m: float
    """Nothing nearer to the camera than this is seen."""
    num_source_triangles: int
    """Triangles before simplification."""
    tolerance_m: float
    """Largest simplification tolerance used; 0 if there was no need."""

    def body_ids(self, model: mujoco.MjModel) -> list[int]:
        """Ids of `body_names` in a model.

        Raises:
          ValueError: the model lacks one of them.
        """
        ids = [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, n) for n in self.body_names]
        missing = [n for n, i in zip(self.body_names, ids, strict=True) if i < 0]
        if missing:
            raise ValueError(f"the model has no body {', '.join(missing)}")
        return ids

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays without objects, for np.savez; see `from_arrays`."""
        own = {
            f.name: np.asarray(getattr(self, f.name)) for f in fields(self) if f.name != "lights"
        }
        lights = {f"lights.{f.name}": getattr(self.lights, f.name) for f in fields(self.lights)}
        return own | lights

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Surfaces":
        """Inverse of `to_arrays`; other keys are ignored.

        Raises:
          KeyError: an array is missing.
        """
        own: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls) if f.name != "lights"}
        own["lights"] = Lights(**{f.name: arrays[f"lights.{f.name}"] for f in fields(Lights)})
        for name in ("geom_names", "body_names"):
            own[name] = tuple(str(x) for x in arrays[name])
        for name in ("near_m", "num_source_triangles", "tolerance_m"):
            own[name] = np.asarray(arrays[name]).item()
        return cls(**own)


def extract_surfaces(
    model: mujoco.MjModel, *, max_triangles: int = 12_000, groups: Sequence[int] = (1, 2)
) -> Surfaces:
    """Visible geoms of a compiled model with its meshes and textures.

    Args:
      model: the model, with meshes and textures.
      max_triangles: budget of the scene. Primitives count but are not simplified.
      groups: geom groups that are seen. LIBERO's cameras leave out group 0 (collision shapes).

    Raises:
      ValueError: a visible geom is of a type that cannot be drawn (height field, SDF, ...), or
        the budget cannot be met within a tolerance of 0.1 m.
    """
    geoms = [g for g in range(model.ngeom) if model.geom_group[g] in groups]
    geoms = [g for g in geoms if geom_alpha(model, g) > 0]
    meshes = [g for g in geoms if model.geom_type[g] == _GEOM.mjGEOM_MESH]
    shapes = {g: _primitive(model, g) for g in geoms if g not in meshes}
    left = max_triangles - sum(len(shape) for shape in shapes.values())
    simplified, tolerance = _simplify(model, meshes, left)
    shapes |= simplified
    # A mesh that is smaller than the tolerance is gone.
    return _collect(model, {g: shapes[g] for g in geoms if len(shapes[g])}, tolerance)


def geom_alpha(model: mujoco.MjModel, g: int) -> float:
    """Opacity of a geom, in [0, 1]. Everything above 0 is drawn opaque."""
    material = model.geom_matid[g]
    return float(model.geom_rgba[g, 3] * (model.mat_rgba[material, 3] if material >= 0 else 1.0))


def _primitive(model: mujoco.MjModel, g: int) -> np.ndarray:
    kind = _GEOM(model.geom_type[g])
    if kind not in SHAPES:
        raise ValueError(f"geom {model.geom(g).name!r}: type {kind.name} cannot be drawn")
    # The middle of a floor gets finer texels than the rest.
    return SHAPES[kind](model.geom_size[g], _PLANE_CELLS if kind == _GEOM.mjGEOM_PLANE else 1)


def mesh_arrays(model: mujoco.MjModel, mesh: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] (m, geom frame) and faces [F, 3] of a mesh."""
    first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
    vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
    faces = model.mesh_face[first_face : first_face + model.mesh_facenum[mesh]]
    return vertices.astype(np.float64), faces.astype(np.int64)


def _simplify(
    model: mujoco.MjModel, geoms: list[int], budget: int
) -> tuple[dict[int, np.ndarray], float]:
    """Triangles [T, 3, 3] of mesh geoms, simplified together until they fit the budget, and the
    tolerance that it took.

    Geoms near a camera that moves with a body get a fraction of the tolerance: a wrist camera
    sees the hand from a few centimetres.
    """
    if not geoms:
        return {}, 0.0
    nearby = _bodies_near_cameras(model)
    kinds: dict[bytes, int] = {}
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    shares: list[float] = []
    kind_of = []
    for g in geoms:  # objects of one kind have equal meshes
        vertices, faces = mesh_arrays(model, int(model.geom_dataid[g]))
        kind = kinds.setdefault(vertices.tobytes() + faces.tobytes(), len(kinds))
        if kind == len(arrays):
            arrays.append((vertices, faces))
            shares.append(1.0)
        if model.geom_bodyid[g] in nearby:
            shares[kind] = _NEARBY_SHARE
        kind_of.append(kind)
    copies = np.bincount(kind_of)
    simplifier = _join(arrays, np.array(shares), copies)
    tolerance = 0.0
    while simplifier.num_faces() > budget:
        tolerance = max(tolerance * _TOLERANCE_STEP, _FIRST_TOLERANCE_M)
        if tolerance > _LAST_TOLERANCE_M:
            raise ValueError(f"the meshes do not fit {budget} triangles: raise max_triangles")
        simplifier.collapse(tolerance, enough=budget)
    return {g: simplifier.triangles(k) for g, k in zip(geoms, kind_of, strict=True)}, tolerance


def _join(
    arrays: list[tuple[np.ndarray, np.ndarray]], shares: np.ndarray, copies: np.ndarray
) -> Simplifier:
    """All meshes (vertices, faces) in one simplifier: few large array operations."""
    counts = [len(vertices) for vertices, _ in arrays]
    starts = np.cumsum([0, *counts[:-1]])
    return Simplifier(
        np.concatenate([vertices for vertices, _ in arrays]),
        np.concatenate([faces + start for (_, faces), start in zip(arrays, starts, strict=True)]),
        mesh=np.repeat(np.arange(len(arrays)), counts),
        share=shares,
        copies=copies.astype(np.float64),
    )


def _bodies_near_cameras(model: mujoco.MjModel) -> set[int]:
    """Bodies that carry a camera, and what hangs on them; the world and a robot's fixed base
    are no such bodies, since their cameras look from afar."""
    moving = {int(b) for b in model.cam_bodyid if model.body_weldid[b] != 0}
    for body in range(model.nbody):  # parents come before children
        if model.body_parentid[body] in moving:
            moving.add(body)
    return moving


@dataclass(kw_only=True, slots=True)
class _Parts:
    """Arrays of several geoms that are to be joined."""

    triangles: list[np.ndarray]
    normals: list[np.ndarray]
    geom: list[np.ndarray]
    texels: list[np.ndarray]
    texel_start: list[np.ndarray]
    texel_cells: list[np.ndarray]


def _collect(model: mujoco.MjModel, shapes: dict[int, np.ndarray], tolerance: float) -> Surfaces:
    bodies = sorted({int(model.geom_bodyid[g]) for g in shapes})
    parts = _Parts(
        triangles=[],
        normals=[],
        geom=[],
        texels=[np.full((3, 3), 255, np.uint8)],  # white, for all that has no texture
        texel_start=[],
        texel_cells=[],
    )
    sources: dict[int, SourceMesh] = {}
    num_source = 0
    for index, (g, corners) in enumerate(shapes.items()):
        _add_geom(parts, model, g, index, corners, sources)
        is_mesh = model.geom_type[g] == _GEOM.mjGEOM_MESH
        num_source += int(model.mesh_facenum[model.geom_dataid[g]]) if is_mesh else len(corners)
    finishes = [texturing.finish(model, g) for g in shapes]
    joined = {f.name: np.concatenate(getattr(parts, f.name)) for f in fields(_Parts)}
    materials = {
        f"geom_{f.name}": np.array([getattr(x, f.name) for x in finishes], np.float32)
        for f in fields(texturing.Finish)
    }
    return Surfaces(
        **joined,
        **materials,
        geom_body=np.array([bodies.index(model.geom_bodyid[g]) for g in shapes], np.int32),
        geom_names=tuple(_geom_name(model, g) for g in shapes),
        body_names=tuple(model.body(b).name for b in bodies),
        lights=_read_lights(model),
        near_m=float(model.vis.map.znear * model.stat.extent),
        num_source_triangles=num_source,
        tolerance_m=tolerance,
    )


def _add_geom(
    parts: _Parts,
    model: mujoco.MjModel,
    g: int,
    index: int,
    corners: np.ndarray,
    sources: dict[int, SourceMesh],
) -> None:
    """Adds triangles [T, 3, 3] (geom frame) of one geom; `sources` keeps meshes for others."""
    source: SourceMesh | None = None
    if model.geom_type[g] == _GEOM.mjGEOM_MESH:
        mesh = int(model.geom_dataid[g])
        source = sources[mesh] = sources.get(mesh) or SourceMesh(model, mesh)
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.geom_quat[g])
    rotation = rotation.reshape(3, 3)
    normals = (
        corner_normals(corners) if source is None else texturing.smooth_normals(source, corners)
    )
    texels = texturing.bake(model, g, corners, source)
    if texels is None:
        zeros = np.zeros(len(corners), np.int32)
        texels = Texels(colors=np.empty((0, 3), np.uint8), start=zeros, cells=zeros + 1)
        first = 0
    else:
        first = sum(len(x) for x in parts.texels)
    parts.triangles.append((corners @ rotation.T + model.geom_pos[g]).astype(np.float32))
    parts.normals.append((normals @ rotation.T).astype(np.float32))
    parts.geom.append(np.full(len(corners), index, np.int32))
    parts.texels.append(texels.colors)
    parts.texel_start.append(texels.start + np.int32(first))
    parts.texel_cells.append(texels.cells)


def _geom_name(model: mujoco.MjModel, g: int) -> str:
    body = model.geom_bodyid[g]
    unnamed = f"{model.body(body).name}/{g - model.body_geomadr[body]}"
    return model.geom(g).name or unnamed


def corner_normals(triangles: np.ndarray) -> np.ndarray:
    """Unit normals [T, 3, 3] at the corners of triangles [T, 3, 3] (geom frame).

    A corner's normal is the area-weighted mean over the triangles that meet there and are not
    across a crease.
    """
    face = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    unit = face / np.maximum(np.linalg.norm(face, axis=-1, keepdims=True), 1e-30)
    extent = max(float(np.ptp(triangles.reshape(-1, 3), axis=0).max(initial=0.0)), 1e-9)
    grid = np.round(triangles.reshape(-1, 3) / (1e-6 * extent)).astype(np.int64)
    _, place = np.unique(grid, axis=0, return_inverse=True)
    place = place.reshape(-1)
    corner_face = np.repeat(np.arange(len(triangles)), 3)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    total = np.zeros((len(place), 3))
    for members in np.split(order, starts[1:]):
        around = corner_face[members]
        smooth = unit[around] @ unit[around].T > _CREASE_COSINE
        total[members] = smooth @ face[around]
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    return (total / np.maximum(length, 1e-30)).reshape(triangles.shape)


def _read_lights(model: mujoco.MjModel) -> Lights:
    """Active lights at their places in the reference configuration."""
    head = model.vis.headlight
    active = np.flatnonzero(model.light_active)
    kinds = mujoco.mjtLightType
    for light in active:
        kind = kinds(model.light_type[light])
        fades = not np.array_equal(model.light_attenuation[light], _NO_ATTENUATION)
        if kind not in (kinds.mjLIGHT_DIRECTIONAL, kinds.mjLIGHT_SPOT) or (
            fades and kind == kinds.mjLIGHT_SPOT
        ):
            raise ValueError(f"light {light}: {kind.name} with its attenuation cannot be drawn")
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_camlight(model, data)
    values = {
        "ambient": model.light_ambient[active].sum(0) + head.ambient * head.active,
        "headlight": head.diffuse * head.active,
        "headlight_specular": head.specular * head.active,
        "diffuse": model.light_diffuse[active],
        "specular": model.light_specular[active],
        "position": data.light_xpos[active],
        "direction": data.light_xdir[active],
        "cutoff_cos": np.cos(np.deg2rad(model.light_cutoff[active])),
        "exponent": model.light_exponent[active],
        "sky": _sky(model),
    }
    return Lights(
        **{name: np.asarray(value, np.float32) for name, value in values.items()},
        is_directional=model.light_type[active] == kinds.mjLIGHT_DIRECTIONAL,
    )


def _sky(model: mujoco.MjModel) -> np.ndarray:
    """Mean colours [B, 3] of the skybox at equal elevation, black without one."""
    textures = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)
    if not len(textures):
        return np.zeros((1, 3))
    sine = np.linspace(-1.0, 1.0, _SKY_BANDS)[:, None]
    around = 2.0 * np.pi * np.arange(64) / 64
    cosine = np.sqrt(1.0 - sine**2)
    # MuJoCo turns the cube by 90 degrees about x.
    x, y, z = np.broadcast_arrays(cosine * np.cos(around), sine, -cosine * np.sin(around))
    directions = np.stack([x, y, z], -1).reshape(-1, 3)
    texture = int(textures[0])
    intensity = texturing.intensities(model, texture)
    pixels = texturing.shrink(texturing.texture_pixels(model, texture), 1.0, intensity)
    return texturing.cube_lookup(pixels, directions).reshape(_SKY_BANDS, -1, 3).mean(1)
