"""What a MuJoCo geom's surface looks like, carried over to triangles that stand for it.

Simplified meshes lose their texture coordinates at seams. So the texture is sampled anew, into
texels that belong to a triangle: those of one with R cells per side lie at the barycentric
places (i / R, j / R, 1 - (i + j) / R), ordered by j, then i. Yuksel, Keyser and House, "Mesh
Colors" (ACM Transactions on Graphics 29(2), 2010, https://doi.org/10.1145/1731047.1731053).
"""

from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.spatial import KDTree

_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0], np.float32)
_TEXEL_SIZES_M = (0.002, 0.004, 0.008, 0.016, 0.032)
_TEXEL_RATE = 1 / 40
"""Side of a texel over the distance from the geom's middle, where cameras come closest to it."""
_MAX_CELLS = 512
_FLAT = 6.0
"""A triangle whose texels differ by less from linear ones, of 255, keeps three."""
_INWARD = 0.2
"""Texels look up colours that much nearer to the triangle's middle, relative to their side: not
on its rim, where the next face might answer."""
_SAMPLE_SPACING_M = 0.004
_MAX_SAMPLES = 200_000
_NORMAL_WEIGHT_M = 0.005
"""Faces that look the other way count as that much farther (half per unit of difference)."""
_CUBE_AXES = (
    ((2, -1.0), (1, -1.0)),
    ((2, 1.0), (1, -1.0)),
    ((0, 1.0), (2, 1.0)),
    ((0, 1.0), (2, -1.0)),
    ((0, 1.0), (1, -1.0)),
    ((0, -1.0), (1, -1.0)),
)
"""Axis and sign of s and t on the sides +x, -x, +y, -y, +z, -z of a cube map: OpenGL 2.1
specification, table 3.21."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """How a geom answers to light: MuJoCo's material."""

    rgb: np.ndarray
    """float64 [3] in [0, 1], multiplies diffuse and ambient light."""
    specular: float
    shininess: float
    """Exponent of the highlight."""
    emission: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Texels:
    """Texture of T triangles."""

    colors: np.ndarray
    """uint8 [S, 3]."""
    start: np.ndarray
    """int32 [T], a triangle's first texel."""
    cells: np.ndarray
    """int32 [T], R."""


def finish(model: mujoco.MjModel, g: int) -> Finish:
    """Material of a geom. Its own colour counts unless left at MuJoCo's default."""
    material = int(model.geom_matid[g])
    rgba = model.geom_rgba[g]
    if material < 0:  # defaults of a material: XMLreference.html#asset-material
        return Finish(rgb=rgba[:3].astype(np.float64), specular=0.5, shininess=64.0, emission=0.0)
    if np.array_equal(rgba, _DEFAULT_RGBA):
        rgba = model.mat_rgba[material]
    return Finish(
        rgb=rgba[:3].astype(np.float64),
        specular=float(model.mat_specular[material]),
        shininess=128.0 * float(model.mat_shininess[material]),
        emission=float(model.mat_emission[material]),
    )


class SourceMesh:
    """A mesh as MuJoCo has it, asked for what is nearest to points near its surface."""

    def __init__(self, model: mujoco.MjModel, mesh: int):
        """Scatters samples over the faces, at most about 4 mm apart.

        Args:
          model: holds the mesh.
          mesh: its id.
        """
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        vertex = model.mesh_vertadr[mesh] + model.mesh_face[faces]
        normal = model.mesh_normaladr[mesh] + model.mesh_facenormal[faces]
        self.corners = model.mesh_vert[vertex].astype(np.float64)
        self.normals = model.mesh_normal[normal].astype(np.float64)
        self.coordinates: np.ndarray | None = None
        if model.mesh_texcoordadr[mesh] >= 0:
            place = model.mesh_texcoordadr[mesh] + model.mesh_facetexcoord[faces]
            self.coordinates = model.mesh_texcoord[place].astype(np.float64)
        cross = _cross(self.corners)
        area = 0.5 * np.linalg.norm(cross, axis=-1)
        self._direction = cross / np.maximum(2.0 * area, 1e-30)[:, None]
        self._face, points = _scatter(self.corners, area)
        self._tree = KDTree(
            np.concatenate([points, _NORMAL_WEIGHT_M * self._direction[self._face]], -1)
        )

    def closest(self, points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Faces [P] next to points [P, 3] whose surface looks along directions [P, 3], and the
        barycentric weights [P, 3] of the points' projections, moved into the face."""
        query = np.concatenate([points, _NORMAL_WEIGHT_M * directions], -1)
        _, sample = self._tree.query(query)
        face = self._face[sample]
        return face, _weights(self.corners[face], points)


def _scatter(corners: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Faces [S] and points [S, 3] of samples on triangles [F, 3, 3] of some area [F]."""
    rng = np.random.default_rng(0)
    wanted = max(len(corners), int(area.sum() / _SAMPLE_SPACING_M**2))
    extra = max(min(wanted, _MAX_SAMPLES), 1000)
    drawn = rng.choice(len(corners), extra, p=area / area.sum())
    face = np.concatenate([np.arange(len(corners)), drawn])
    inside = np.concatenate(
        [np.full((len(corners), 3), 1.0 / 3.0), rng.dirichlet(np.ones(3), extra)]
    )
    return face, np.einsum("sk,skx->sx", inside, corners[face])


def _cross(corners: np.ndarray) -> np.ndarray:
    """Normals [T, 3] of triangles [T, 3, 3], as long as twice their areas."""
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _weights(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Barycentric weights [P, 3] of points' projections on triangles [P, 3, 3], none negative."""
    normal = _cross(corners)
    weights = [
        (
            np.cross(
                corners[:, (k + 2) % 3] - corners[:, (k + 1) % 3], points - corners[:, (k + 1) % 3]
            )
            * normal
        ).sum(-1)
        for k in range(3)
    ]
    inside = np.maximum(np.stack(weights, -1), 0.0)
    return inside / np.maximum(inside.sum(-1, keepdims=True), 1e-300)


def smooth_normals(source: SourceMesh, triangles: np.ndarray) -> np.ndarray:
    """Unit normals [T, 3, 3] of a mesh at the corners of triangles [T, 3, 3] near it."""
    middle = triangles.mean(1, keepdims=True)
    points = triangles + 0.1 * (middle - triangles)
    cross = _cross(triangles)
    unit = cross / np.maximum(np.linalg.norm(cross, axis=-1, keepdims=True), 1e-30)
    face, weights = source.closest(points.reshape(-1, 3), np.repeat(unit, 3, 0))
    normals = np.einsum("pk,pkx->px", weights, source.normals[face])
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.where(length > 1e-6, normals / np.maximum(length, 1e-6), np.repeat(unit, 3, 0))
    return normals.reshape(triangles.shape)


def barycentric_grid(cells: int) -> np.ndarray:
    """Places of a triangle's texels, [(R + 1)(R + 2) / 2, 3]."""
    j, i = np.meshgrid(np.arange(cells + 1), np.arange(cells + 1), indexing="ij")
    inside = i + j <= cells
    i, j = i[inside], j[inside]
    return np.stack([i, j, cells - i - j], -1) / cells


def bake(
    model: mujoco.MjModel, g: int, triangles: np.ndarray, source: SourceMesh | None
) -> Texels | None:
    """Texture of a geom on triangles [T, 3, 3] (geom frame) near its surface.

    Args:
      model: holds the geom.
      g: its id.
      triangles: what stands for it.
      source: the geom's mesh; None for a primitive.

    Returns:
      None if the geom has no texture.
    """
    material = int(model.geom_matid[g])
    role = mujoco.mjtTextureRole.mjTEXROLE_RGB
    if material < 0 or model.mat_texid[material, role] < 0:
        return None
    paint = _Paint(model, g, source)
    cross = _cross(triangles)
    area2 = np.linalg.norm(cross, axis=-1)
    distance = np.linalg.norm(triangles.mean(1), axis=-1)
    size = np.searchsorted(_TEXEL_SIZES_M[1:], _TEXEL_RATE * distance, side="right")
    # The side of a right triangle of equal area: a sliver gets no more texels than it fills.
    cells = np.ceil(np.sqrt(area2) / np.take(_TEXEL_SIZES_M, size))
    cells = np.clip(cells, 1, _MAX_CELLS).astype(np.int64)
    places, owner = _texel_points(triangles, cells)
    directions = (cross / np.maximum(area2, 1e-30)[:, None])[owner]
    colors = np.empty((len(places), 3))
    for k, texel_m in enumerate(_TEXEL_SIZES_M):
        rows = np.flatnonzero(size[owner] == k)
        if len(rows):
            colors[rows] = paint.at(places[rows], directions[rows], texel_m)
    return _pack(np.round(255.0 * colors).clip(0, 255), cells)


def _texel_points(triangles: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [S, 3] of all texels, and the triangle [S] of each."""
    points, owners = [], []
    for t, r in enumerate(cells):
        grid = barycentric_grid(int(r))
        inward = min(_INWARD / r, 0.02)
        points.append((grid + inward * (1.0 / 3.0 - grid)) @ triangles[t])
        owners.append(np.full(len(grid), t))
    return np.concatenate(points), np.concatenate(owners)


def _pack(colors: np.ndarray, cells: np.ndarray) -> Texels:
    """Joins the texels of all triangles, three of those that are linear enough."""
    kept, start, used, first, total = [], [], [], 0, 0
    for r in map(int, cells):
        grid = barycentric_grid(r)
        own = colors[first : first + len(grid)]
        first += len(grid)
        # Corners (1, 0, 0), (0, 1, 0), (0, 0, 1) are the last of row 0, the last, the first.
        corners = own[[r, len(grid) - 1, 0]]
        if r > 1 and np.abs(grid @ corners - own).max() < _FLAT:
            r, own = 1, own[[0, r, len(grid) - 1]]
        kept.append(own)
        start.append(total)
        used.append(r)
        total += len(own)
    return Texels(
        colors=np.concatenate(kept).astype(np.uint8),
        start=np.array(start, np.int32),
        cells=np.array(used, np.int32),
    )


class _Paint:
    """Texture colour at points of one geom."""

    def __init__(self, model: mujoco.MjModel, g: int, source: SourceMesh | None):
        material = int(model.geom_matid[g])
        texture = int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB])
        self._is_cube = model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D
        self._has_coordinates = source is not None and source.coordinates is not None
        self._source = source
        self._size = _full_size(model, g)
        self._is_mesh = source is not None
        self._is_uniform = bool(model.mat_texuniform[material])
        self._repeat = model.mat_texrepeat[material].astype(np.float64)
        self._pixels = texture_pixels(model, texture)
        self._intensity = intensities(model, texture)
        self._density = self._pixels_per_m(self._pixels.shape[1], self._pixels.shape[0])

    def _pixels_per_m(self, width: int, height: int) -> float:
        if self._has_coordinates:
            assert self._source is not None and self._source.coordinates is not None
            flat = np.zeros((*self._source.coordinates.shape[:2], 3))
            flat[..., :2] = self._source.coordinates * np.array([width, height])
            pixels = np.linalg.norm(_cross(flat), axis=-1).sum()
            return float(
                np.sqrt(pixels / np.linalg.norm(_cross(self._source.corners), axis=-1).sum())
            )
        if self._is_cube:
            return float(0.5 * width / np.sort(self._size)[-2])
        repeat = self._repeat if self._is_uniform else self._repeat / self._size[:2]
        return float(0.5 * np.sqrt(repeat[0] * width * repeat[1] * height))

    def at(self, points: np.ndarray, directions: np.ndarray, texel_m: float) -> np.ndarray:
        """Colours [P, 3] in [0, 1] at points [P, 3] (m) of faces that look along directions,
        averaged over about a texel."""
        pixels = shrink(self._pixels, texel_m * self._density, self._intensity)
        if self._has_coordinates:
            assert self._source is not None and self._source.coordinates is not None
            face, weights = self._source.closest(points, directions)
            uv = np.einsum("pk,pkx->px", weights, self._source.coordinates[face])
            return lookup(pixels, uv)
        if self._is_cube:
            scaled = points if self._is_mesh else points / self._size
            return cube_lookup(pixels, scaled * self._size if self._is_uniform else scaled)
        repeat = self._repeat if self._is_uniform else self._repeat / self._size[:2]
        return lookup(pixels, 0.5 * repeat * points[:, :2] * [1.0, -1.0] - 0.5)


def _full_size(model: mujoco.MjModel, g: int) -> np.ndarray:
    """Half-sizes [3] of a geom along its axes, as MuJoCo's renderer scales it."""
    size = np.array(model.geom_size[g], np.float64)
    kind = model.geom_type[g]
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return np.full(3, size[0])
    if kind in (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER):
        return np.array([size[0], size[0], size[1]])
    return np.where(size > 0, size, 1.0)


def texture_pixels(model: mujoco.MjModel, texture: int) -> np.ndarray:
    """uint8 [h, w, 3]; the first row is t = 0, sides of a cube follow each other."""
    height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
    channels = int(model.tex_nchannel[texture])
    start = model.tex_adr[texture]
    data = model.tex_data[start : start + height * width * channels]
    return data.reshape(height, width, channels)[..., :3]


def intensities(model: mujoco.MjModel, texture: int) -> np.ndarray:
    """float32 [256] in [0, 1], what OpenGL makes of a texture's numbers: textures in the sRGB
    colour space (IEC 61966-2-1) are decoded, though MuJoCo's images are not encoded again."""
    value = np.arange(256) / 255.0
    if model.tex_colorspace[texture] != mujoco.mjtColorSpace.mjCOLORSPACE_SRGB:
        return value.astype(np.float32)
    dark = value <= 0.04045
    return np.where(dark, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def shrink(pixels: np.ndarray, factor: float, intensity: np.ndarray) -> np.ndarray:
    """float32 [h', w', 3] in [0, 1]: means over squares of 2^k <= factor pixels per side.

    Args:
      pixels: uint8 [h, w, 3].
      factor: see above.
      intensity: float32 [256], what each number stands for.
    """
    step = 2 ** int(np.log2(max(factor, 1.0)))
    step = min(step, *pixels.shape[:2])
    height, width = (n // step * step for n in pixels.shape[:2])
    total = np.zeros((height // step, width // step, 3), np.float32)
    for row in range(step):
        for column in range(step):
            total += intensity[pixels[row:height:step, column:width:step]]
    return total / np.float32(step * step)


def lookup(pixels: np.ndarray, st: np.ndarray) -> np.ndarray:
    """Bilinear colours [P, 3] of a texture that repeats, at coordinates [P, 2]."""
    height, width = pixels.shape[:2]
    x, y = st[:, 0] * width - 0.5, st[:, 1] * height - 0.5
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - column)[:, None], (y - row)[:, None]
    upper = (1 - fx) * pixels[row % height, column % width]
    upper = upper + fx * pixels[row % height, (column + 1) % width]
    lower = (1 - fx) * pixels[(row + 1) % height, column % width]
    lower = lower + fx * pixels[(row + 1) % height, (column + 1) % width]
    return (1 - fy) * upper + fy * lower


def cube_lookup(pixels: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Colours [P, 3] of a cube map along directions [P, 3]; one image serves for all sides."""
    axis = np.abs(directions).argmax(1)
    length = np.take_along_axis(directions, axis[:, None], 1)[:, 0]
    side = 2 * axis + (length < 0)
    width = pixels.shape[1]
    height = len(pixels) // (6 if len(pixels) > 2 * width else 1)
    result = np.empty((len(directions), 3), np.float32)
    for k, ((s_axis, s_sign), (t_axis, t_sign)) in enumerate(_CUBE_AXES):
        rows = np.flatnonzero(side == k)
        scale = 0.5 / np.maximum(np.abs(length[rows]), 1e-30)
        s = s_sign * directions[rows, s_axis] * scale + 0.5
        t = t_sign * directions[rows, t_axis] * scale + 0.5
        image = pixels if len(pixels) == height else pixels[k * height : (k + 1) * height]
        # Half a pixel from the rim: colours do not wrap around.
        rim = 0.5 / width
        result[rows] = lookup(image, np.stack([s, t], -1).clip(rim, 1.0 - rim))
    return result
