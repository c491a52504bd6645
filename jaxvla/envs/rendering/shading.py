"""Colours of what the pixels see: texture, material and light, as in fixed-function OpenGL.

Light is evaluated per pixel, with normals interpolated between a triangle's corners (Phong,
"Illumination for Computer Generated Pictures", CACM 18(6), 1975,
https://doi.org/10.1145/360825.360839); OpenGL does it per vertex of the full mesh. The equation
is that of the OpenGL 2.1 specification, section 2.14.1, in the way MuJoCo's renderer sets it
up: local viewer, one side, highlights added before the texture multiplies. No shadows, no
reflections, no transparency.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.envs.rendering.surfaces import Surfaces
from jaxvla.envs.rendering.vectors import Vec, cross, dot, minus, unit, vec

_TINY = 1e-12


@flax.struct.dataclass(kw_only=True)
class View:
    """Where a scene's N bodies and its lights are, seen by a camera."""

    rotation: jax.Array
    """float32 [N, 3, 3], from the frames of `Surfaces.body_names` to the camera's."""
    translation: jax.Array
    """float32 [N, 3], m, likewise."""
    from_world: jax.Array
    """float32 [3, 3], from the world's axes to the camera's."""
    place: jax.Array
    """float32 [3], m, the camera in the world."""


@flax.struct.dataclass(kw_only=True)
class _Pixels:
    """What a row of pixels sees, [P] each."""

    triangle: jax.Array
    depth: jax.Array
    x: jax.Array
    y: jax.Array

    def points(self) -> Vec:
        """Camera coordinates, m."""
        return self.x * self.depth, self.y * self.depth, -self.depth


class Shader:
    """Colours points on one scene's triangles."""

    def __init__(self, surfaces: Surfaces):
        """Packs the scene's constants.

        Args:
          surfaces: the scene.
        """
        count = len(surfaces.triangles)
        self._lights = surfaces.lights
        self._corners = surfaces.triangles.reshape(count, 9)
        self._normals = surfaces.normals.reshape(count, 9)
        self._geom = surfaces.geom
        self._body = surfaces.geom_body[surfaces.geom]
        self._start, self._cells = surfaces.texel_start, surfaces.texel_cells
        texels = surfaces.texels.astype(np.int32)
        self._texels = texels[:, 0] | texels[:, 1] << 8 | texels[:, 2] << 16
        self._finish = np.concatenate(
            [
                surfaces.geom_rgb,
                surfaces.geom_specular[:, None],
                surfaces.geom_shininess[:, None],
                surfaces.geom_emission[:, None],
            ],
            axis=1,
        )

    def colors(
        self,
        triangle: jax.Array,
        inverse_depth: jax.Array,
        ray: tuple[jax.Array, jax.Array],
        view: View,
    ) -> jax.Array:
        """Lit and textured colours of an image in rows of pixels.

        XLA computes values anew for each output that uses them, which costs several times the
        time. Two loops over the rows keep what is shared, and hold it in the cache.

        Args:
          triangle: int32 [K, P], row of `Surfaces.triangles`; -1: sky.
          inverse_depth: float32 [K, P], 1/m.
          ray: x and y [K, P] of the pixels' rays at z = -1.
          view: where things are.

        Returns:
          int32 [K, P], red in bits 0 to 7, green in 8 to 15, blue in 16 to 23.
        """
        pixels = _Pixels(
            triangle=jnp.maximum(triangle, 0),
            depth=1.0 / jnp.where(triangle >= 0, inverse_depth, 1.0),
            x=jnp.broadcast_to(ray[0], triangle.shape),
            y=jnp.broadcast_to(ray[1], triangle.shape),
        )
        surface = jax.lax.map(lambda row: self._surface(row, view), pixels)
        is_hit = triangle >= 0
        return jax.lax.map(
            lambda row: self._packed(row[0], row[1], row[2], view), (pixels, surface, is_hit)
        )

    def _surface(self, pixels: _Pixels, view: View) -> tuple[jax.Array, jax.Array, Vec]:
        """First two barycentric weights, and unit normals in the camera frame."""
        body = jnp.asarray(self._body)[pixels.triangle]
        turn = view.rotation.reshape(-1, 9)[body]
        weights = self._weights(pixels.triangle, turn, view.translation[body], pixels.points())
        return weights[0], weights[1], self._normal(pixels.triangle, turn, weights)

    def _packed(
        self,
        pixels: _Pixels,
        surface: tuple[jax.Array, jax.Array, Vec],
        is_hit: jax.Array,
        view: View,
    ) -> jax.Array:
        first, second, normal = surface
        texture = self._texture(pixels.triangle, (first, second))
        lit = self._lit(normal, pixels, view)
        sky = self._sky(pixels, view)
        packed = jnp.zeros_like(pixels.triangle)
        for c in range(3):
            value = jnp.where(is_hit, lit[c] * texture[c], sky[c])
            packed |= jnp.round(255.0 * jnp.clip(value, 0.0, 1.0)).astype(jnp.int32) << 8 * c
        return packed

    def _sky(self, pixels: _Pixels, view: View) -> Vec:
        """Background colours [P]."""
        x, y = pixels.x, pixels.y
        up = view.from_world[:, 2]
        sine = (up[0] * x + up[1] * y - up[2]) * jax.lax.rsqrt(x * x + y * y + 1.0)
        bands = self._lights.sky
        band = jnp.round((sine + 1.0) * (0.5 * (len(bands) - 1))).astype(jnp.int32)
        return vec(jnp.asarray(bands[:, c])[band] for c in range(3))

    def _weights(
        self, triangle: jax.Array, turn: jax.Array, translation: jax.Array, point: Vec
    ) -> Vec:
        """Barycentric weights of points (camera frame) on their triangles, not negative."""
        offset = vec(point[i] - translation[:, i] for i in range(3))
        # Into the body's frame: the transpose turns back.
        here = vec(
            turn[:, i] * offset[0] + turn[:, 3 + i] * offset[1] + turn[:, 6 + i] * offset[2]
            for i in range(3)
        )
        rows = jnp.asarray(self._corners)[triangle]
        a, b, c = (vec(rows[:, 3 * k + i] for i in range(3)) for k in range(3))
        normal = cross(minus(b, a), minus(c, a))
        first = dot(cross(minus(c, b), minus(here, b)), normal)
        second = dot(cross(minus(a, c), minus(here, c)), normal)
        scale = 1.0 / jnp.maximum(dot(normal, normal), 1e-30)
        w0 = jnp.clip(first * scale, 0.0, 1.0)
        w1 = jnp.clip(second * scale, 0.0, 1.0 - w0)
        return w0, w1, 1.0 - w0 - w1

    def _normal(self, triangle: jax.Array, turn: jax.Array, weights: Vec) -> Vec:
        """Unit normals in the camera frame."""
        rows = jnp.asarray(self._normals)[triangle]
        mixed = vec(dot(weights, vec(rows[:, 3 * k + i] for k in range(3))) for i in range(3))
        turned = vec(dot(mixed, vec(turn[:, 3 * i + j] for j in range(3))) for i in range(3))
        return unit(turned)

    def _lit(self, normal: Vec, pixels: _Pixels, view: View) -> Vec:
        """Colour before texture, clipped to [0, 1] as OpenGL does."""
        lights = self._lights
        point = pixels.points()
        finish = jnp.asarray(self._finish)[jnp.asarray(self._geom)[pixels.triangle]]
        rgb, specular, shininess = vec(finish[:, c] for c in range(3)), finish[:, 3], finish[:, 4]
        eye = unit(vec(-p for p in point))
        facing = vec(jnp.float32([0.0, 0.0, 1.0]))
        shine, gleam = _phong(normal, facing, eye, shininess)
        strength = [
            lights.ambient[c] + finish[:, 5] + lights.headlight[c] * shine for c in range(3)
        ]
        highlight = [lights.headlight_specular[c] * gleam for c in range(3)]
        for light in range(len(lights.diffuse)):
            way, cone = self._incoming(light, point, view)
            shine, gleam = _phong(normal, way, eye, shininess)
            for c in range(3):
                strength[c] += lights.diffuse[light, c] * cone * shine
                highlight[c] += lights.specular[light, c] * cone * gleam
        return vec(
            jnp.clip(rgb[c] * strength[c] + specular * highlight[c], 0.0, 1.0) for c in range(3)
        )

    def _incoming(self, light: int, point: Vec, view: View) -> tuple[Vec, jax.Array]:
        """Unit vectors towards a light, and what its cone lets through."""
        lights = self._lights
        axis = vec(view.from_world @ lights.direction[light])
        if lights.is_directional[light]:
            return vec(-a for a in axis), jnp.ones(())
        source = view.from_world @ (lights.position[light] - view.place)
        way = unit(vec(source[i] - point[i] for i in range(3)))
        along = -dot(way, axis)
        falloff = jnp.maximum(along, 0.0) ** _number(lights.exponent[light])
        return way, jnp.where(along >= lights.cutoff_cos[light], falloff, 0.0)

    def _texture(self, triangle: jax.Array, weights: tuple[jax.Array, jax.Array]) -> Vec:
        """Texture colours in [0, 1], linear between the three nearest texels."""
        start = jnp.asarray(self._start)[triangle]
        cells = jnp.asarray(self._cells)[triangle]
        x, y = weights[0] * cells, weights[1] * cells
        i = jnp.minimum(x.astype(jnp.int32), cells - 1)
        j = jnp.minimum(y.astype(jnp.int32), cells - 1 - i)
        fx, fy = x - i, y - j
        is_upper = (fx + fy > 1.0) & (i + j < cells - 1)
        flip = is_upper.astype(jnp.int32)
        # The texels right of and above the cell's own, and the one at its other corner.
        shares = (
            jnp.where(is_upper, fx + fy - 1.0, 1.0 - fx - fy),
            jnp.where(is_upper, 1.0 - fy, fx),
            jnp.where(is_upper, 1.0 - fx, fy),
        )
        places = ((i + flip, j + flip), (i + 1, j), (i, j + 1))
        packed = [
            jnp.asarray(self._texels)[start + r * (cells + 1) - r * (r - 1) // 2 + column]
            for column, r in places
        ]
        return vec(
            dot(shares, vec(((p >> 8 * c) & 255).astype(jnp.float32) for p in packed)) / 255.0
            for c in range(3)
        )


def _phong(normal: Vec, way: Vec, eye: Vec, shininess: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Diffuse and specular factors for light that comes from a unit vector `way`."""
    cosine = dot(normal, way)
    half = unit(vec(a + b for a, b in zip(eye, way, strict=True)))
    mirrored = jnp.maximum(dot(normal, half), _TINY)
    gleam = jnp.where(cosine > 0.0, jnp.exp(shininess * jnp.log(mirrored)), 0.0)
    return jnp.maximum(cosine, 0.0), gleam


def _number(x: np.ndarray) -> int | float:
    """An integer where possible: integer powers are a few products."""
    return int(x) if x == int(x) else float(x)
