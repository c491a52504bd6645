"""Batched triangle renderer in JAX: a z-buffer over square tiles of the image.

Triangles become linear functions of a pixel's ray; see `edge_functions`. They hold for triangles
that reach behind the camera, so nothing is clipped: pixels nearer than the near plane are left
out one by one.

1. All triangles are moved to the camera frame; back faces, triangles outside the view and
   triangles whose bounding box holds no pixel centre are dropped.
2. Every remaining triangle is paired with the tiles that its bounding box meets; the pairs
   are sorted by tile.
3. For every tile a loop takes `_BLOCK` of its pairs at a time and tests them against all its
   pixels, keeping the largest 1 / t. Its length follows the number of pairs.
4. Colours are computed for the winners only; see `shading`.

Geometry that keeps still can be drawn once (`visible`) and passed on as `behind`.
"""

import copy
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxvla.envs.rendering.edge_functions import edge_functions, evaluate
from jaxvla.envs.rendering.shading import Shader, View
from jaxvla.envs.rendering.surfaces import Surfaces
from jaxvla.envs.rendering.vectors import Vec, vec

TILE = 16
"""Pixels per side of a tile."""
_BLOCK_BITS = 4
_BLOCK = 1 << _BLOCK_BITS
"""Triangles tested together."""
_BLOCK_MASK = _BLOCK - 1
_INDEX_BITS = 18
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_MAX_TILES_PER_SIDE = 90
"""So that a tile's number fits the 13 bits above the triangle's and is never _NO_PAIR's."""
_PAIRS_PER_PIXEL = 64
"""Default limit on pairs, relative to the image's side."""
_NO_PAIR = 2**31 - 1
_SLACK_PX = 1e-3

Span = tuple[jax.Array, jax.Array]
_DrawState = tuple[jax.Array, jax.Array, jax.Array]


@flax.struct.dataclass(kw_only=True)
class BodyPoses:
    """World poses of a model's bodies, as in `mjx.Data` (B bodies)."""

    xpos: jax.Array
    """float32 [B, 3], m."""
    xmat: jax.Array
    """float32 [B, 3, 3]."""


@flax.struct.dataclass(kw_only=True)
class Camera:
    """A pinhole camera; it looks along its -z, x to the right, y up."""

    xpos: jax.Array
    """float32 [3], m."""
    xmat: jax.Array
    """float32 [3, 3]."""
    fovy_rad: jax.Array
    """float32 [], vertical opening angle."""


@flax.struct.dataclass(kw_only=True)
class Visible:
    """What each pixel sees, in tiles (N tiles of TILE x TILE pixels, row by row)."""

    inverse_depth: jax.Array
    """float32 [N, TILE^2], 1/m; 0 where nothing is hit."""
    triangle: jax.Array
    """int32 [N, TILE^2], row of `Surfaces.triangles`; -1 where nothing is hit."""
    num_dropped_pairs: jax.Array
    """int32 [], pairs of triangle and tile beyond `max_pairs`: not drawn."""


@flax.struct.dataclass(kw_only=True)
class Frame:
    """One image. Unused outputs are dropped by XLA under jit."""

    rgb: jax.Array
    """uint8 [h, w, 3]."""
    depth: jax.Array
    """float32 [h, w], m along the viewing axis; inf where nothing is hit."""
    geom: jax.Array
    """int32 [h, w], index into `Surfaces.geom_names`; -1 where nothing is hit."""
    num_dropped_pairs: jax.Array
    """int32 []; see `Visible`."""


@flax.struct.dataclass(kw_only=True)
class _Tile:
    """What it takes to draw one tile."""

    start: jax.Array
    """int32 [], its first pair."""
    stop: jax.Array
    """int32 [], the first pair of the next tile."""
    x: jax.Array
    """float32 [TILE^2], rays at z = -1."""
    y: jax.Array
    inverse_depth: jax.Array
    """float32 [TILE^2], as in `Visible`, before drawing."""
    triangle: jax.Array
    """int32 [TILE^2], likewise."""


class Rasterizer:
    """Renders one scene's triangles at one image size."""

    def __init__(
        self,
        surfaces: Surfaces,
        *,
        body_ids: Sequence[int],
        size: int,
        max_pairs: int | None = None,
    ):
        """Keeps the scene's constants.

        Args:
          surfaces: triangles, colours and lights.
          body_ids: row of `BodyPoses` for each of `surfaces.body_names`.
          size: image height and width in pixels, a multiple of TILE.
          max_pairs: pairs of triangle and tile per image; more are dropped and counted. None:
            64 x size, half as many again as LIBERO's images take with 12,000 triangles.

        Raises:
          ValueError: the size is no multiple of TILE, or there are too many triangles.
        """
        if size % TILE or not 0 < size <= TILE * _MAX_TILES_PER_SIDE:
            raise ValueError(
                f"size={size}: choose a multiple of {TILE} up to {TILE * _MAX_TILES_PER_SIDE}"
            )
        if len(surfaces.triangles) > _INDEX_MASK:
            raise ValueError(f"{len(surfaces.triangles)} triangles, more than {_INDEX_MASK}")
        self.size = size
        self._surfaces = surfaces
        self._max_pairs = _PAIRS_PER_PIXEL * size if max_pairs is None else max_pairs
        self._shader = Shader(surfaces)
        self._body_ids = np.asarray(body_ids, np.int32)
        self._drawn = np.ones(len(surfaces.triangles), bool)
        self._tiles_per_side = size // TILE

    def only(self, drawn: np.ndarray, *, max_pairs: int | None = None) -> "Rasterizer":
        """The same scene, of which only some triangles are drawn.

        Rows of `Visible.triangle` mean the same for both, so that one may draw the still part
        of a scene and the other the rest over it.

        Args:
          drawn: bool [T].
          max_pairs: as in the constructor; default: unchanged.
        """
        result = copy.copy(self)
        result._drawn = self._drawn & drawn
        result._max_pairs = self._max_pairs if max_pairs is None else max_pairs
        return result

    def for_bodies(self, drawn: np.ndarray, *, max_pairs: int | None = None) -> "Rasterizer":
        """As `only`, with a choice bool [N] over `Surfaces.body_names`.

        With a camera and bodies that keep still for an episode:

            still, moving = rasterizer.for_bodies(is_still), rasterizer.for_bodies(~is_still)
            background = still.visible(poses, camera)  # once
            frame = moving.render(poses, camera, behind=background)  # the same as drawing all
        """
        return self.only(drawn[self._surfaces.geom_body[self._surfaces.geom]], max_pairs=max_pairs)

    def render(self, poses: BodyPoses, camera: Camera, *, behind: Visible | None = None) -> Frame:
        """Renders one image of one world; see `visible` and `shade`."""
        return self.shade(self.visible(poses, camera, behind=behind), poses, camera)

    def render_batch(
        self, poses: BodyPoses, camera: Camera, *, behind: Visible | None = None
    ) -> Frame:
        """Renders a batch of images; arguments and results gain a leading axis [E].

        On CPU images are made one after the other: the buffers of one image fit the cache.
        """
        return jax.lax.platform_dependent(
            (poses, camera, behind),
            cpu=lambda batch: jax.lax.map(lambda one: self._render_tuple(*one), batch),
            default=lambda batch: jax.vmap(self._render_tuple)(*batch),
        )

    def _render_tuple(self, poses: BodyPoses, camera: Camera, behind: Visible | None) -> Frame:
        return self.render(poses, camera, behind=behind)

    def visible(
        self, poses: BodyPoses, camera: Camera, *, behind: Visible | None = None
    ) -> Visible:
        """Which triangle every pixel sees.

        Args:
          poses: body poses of one world.
          camera: where it is seen from.
          behind: what has been drawn already for this camera; nothing if None.
        """
        if behind is None:
            shape = (self._tiles_per_side**2, TILE * TILE)
            behind = Visible(
                inverse_depth=jnp.zeros(shape),
                triangle=jnp.full(shape, -1, jnp.int32),
                num_dropped_pairs=jnp.zeros((), jnp.int32),
            )
        drawn = np.flatnonzero(self._drawn).astype(np.int32)
        corners = self._corners(poses, camera, drawn)
        functions, is_front = edge_functions(corners, _SLACK_PX * self._pixel(camera))
        columns, rows, is_inside = self._tiles(corners, camera)
        keys, num_dropped = self._pairs(columns, rows, is_front & is_inside)
        inverse_depth, triangle = self._draw(keys, functions, jnp.asarray(drawn), behind, camera)
        return Visible(
            inverse_depth=inverse_depth,
            triangle=triangle,
            num_dropped_pairs=behind.num_dropped_pairs + num_dropped,
        )

    def shade(self, visible: Visible, poses: BodyPoses, camera: Camera) -> Frame:
        """Colours, depths and geoms of what the pixels see; arguments as in `visible`."""
        rotation, translation = self._body_frames(poses, camera)
        x, y = self.rays(camera)
        triangle, inverse_depth, x, y = (
            array.reshape(self._tiles_per_side, -1)
            for array in (visible.triangle, visible.inverse_depth, x, y)
        )
        view = View(
            rotation=rotation,
            translation=translation,
            from_world=camera.xmat.T,
            place=camera.xpos,
        )
        rgb = self._shader.colors(triangle, inverse_depth, (x, y), view)
        is_hit = visible.triangle >= 0
        geom = jnp.asarray(self._surfaces.geom)[jnp.maximum(visible.triangle, 0)]
        depth = 1.0 / jnp.where(is_hit, visible.inverse_depth, 1.0)
        return Frame(
            rgb=jax.lax.bitcast_convert_type(self._untile(rgb.reshape(is_hit.shape)), jnp.uint8)[
                ..., :3
            ],
            depth=self._untile(jnp.where(is_hit, depth, jnp.inf)),
            geom=self._untile(jnp.where(is_hit, geom, -1)),
            num_dropped_pairs=visible.num_dropped_pairs,
        )

    def _body_frames(self, poses: BodyPoses, camera: Camera) -> tuple[jax.Array, jax.Array]:
        """Rotations [N, 3, 3] and places [N, 3] of the scene's bodies in the camera frame."""
        rotation = camera.xmat.T @ poses.xmat[self._body_ids]
        return rotation, (poses.xpos[self._body_ids] - camera.xpos) @ camera.xmat

    def _pixel(self, camera: Camera) -> jax.Array:
        """Side of a pixel at depth 1."""
        return 2.0 * jnp.tan(0.5 * camera.fovy_rad) / self.size

    def rays(self, camera: Camera) -> tuple[jax.Array, jax.Array]:
        """x and y at z = -1 of the rays through the pixels' centres, float32 [N, TILE^2] each,
        in the order of `Visible`."""
        tile, lane = jnp.arange(self._tiles_per_side**2)[:, None], np.arange(TILE * TILE)
        column = tile % self._tiles_per_side * TILE + lane % TILE
        row = tile // self._tiles_per_side * TILE + lane // TILE
        middle = 0.5 * (self.size - 1)
        return (column - middle) * self._pixel(camera), (middle - row) * self._pixel(camera)

    def _corners(self, poses: BodyPoses, camera: Camera, rows: np.ndarray) -> list[Vec]:
        """Corners of some triangles in the camera frame, three arrays [T] each."""
        rotation, translation = self._body_frames(poses, camera)
        body = self._surfaces.geom_body[self._surfaces.geom[rows]]
        rotation, translation = rotation[body], translation[body]
        points = self._surfaces.triangles[rows]
        return [
            vec(_rotated(rotation, points[:, k, :], i) + translation[:, i] for i in range(3))
            for k in range(3)
        ]

    def _tiles(self, corners: list[Vec], camera: Camera) -> tuple[Span, Span, jax.Array]:
        """Tile columns and rows that the triangles' bounding boxes meet, and whether any.

        The box of a triangle that reaches behind the near plane is the whole image.
        """
        near = self._surfaces.near_m
        depths = [-z for _, _, z in corners]
        is_ahead = [depth > near for depth in depths]
        whole = ~(is_ahead[0] & is_ahead[1] & is_ahead[2])
        is_inside = is_ahead[0] | is_ahead[1] | is_ahead[2]
        scale = 1.0 / self._pixel(camera)
        spans = []
        for axis, sign in ((0, 1.0), (1, -1.0)):
            places = [
                sign * corner[axis] / jnp.maximum(depth, near) * scale
                for corner, depth in zip(corners, depths, strict=True)
            ]
            span, is_met = self._pixel_span(places, whole)
            # All corners beyond one side of the view: true whatever lies behind the camera.
            limit = 0.5 * self.size / scale
            beyond = [
                [side * corner[axis] > limit * depth for side in (1.0, -1.0)]
                for corner, depth in zip(corners, depths, strict=True)
            ]
            for side in range(2):
                is_inside &= ~(beyond[0][side] & beyond[1][side] & beyond[2][side])
            is_inside &= is_met
            spans.append(span)
        return spans[0], spans[1], is_inside

    def _pixel_span(self, places: list[jax.Array], whole: jax.Array) -> tuple[Span, jax.Array]:
        """First and last tile along an axis for corners at `places` (pixels from the image's
        middle), and whether there is a pixel centre between them."""
        middle = 0.5 * (self.size - 1)
        low = jnp.minimum(jnp.minimum(places[0], places[1]), places[2]) + middle
        high = jnp.maximum(jnp.maximum(places[0], places[1]), places[2]) + middle
        first = jnp.where(whole, 0.0, jnp.maximum(jnp.ceil(low - _SLACK_PX), 0.0))
        last = jnp.where(whole, self.size, jnp.floor(high + _SLACK_PX))
        last = jnp.minimum(last, self.size - 1.0)
        span = (first.astype(jnp.int32) // TILE, last.astype(jnp.int32) // TILE)
        return span, first <= last

    def _pairs(self, columns: Span, rows: Span, is_drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sorted keys int32 [max_pairs + _BLOCK] of pairs (tile, triangle), padded with
        _NO_PAIR, and the number of pairs that did not fit."""
        width, height = columns[1] - columns[0] + 1, rows[1] - rows[0] + 1
        counts = jnp.where(is_drawn, width * height, 0)
        ends = jnp.cumsum(counts)
        slot = jnp.arange(self._max_pairs, dtype=jnp.int32)
        triangle = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
        triangle = jnp.minimum(triangle, len(counts) - 1)
        within = slot - (ends - counts)[triangle]
        across = jnp.maximum(width[triangle], 1)
        column, row = columns[0][triangle] + within % across, rows[0][triangle] + within // across
        key = ((row * self._tiles_per_side + column) << _INDEX_BITS) | triangle
        key = jnp.where(slot < ends[-1], key, _NO_PAIR)
        padding = jnp.full(_BLOCK, _NO_PAIR, jnp.int32)
        return (
            jnp.concatenate([jnp.sort(key), padding]),
            jnp.maximum(ends[-1] - self._max_pairs, 0),
        )

    def _draw(
        self,
        keys: jax.Array,
        functions: jax.Array,
        ids: jax.Array,
        behind: Visible,
        camera: Camera,
    ) -> tuple[jax.Array, jax.Array]:
        """Tests the pairs; returns inverse depths and winners [N, TILE^2].

        On CPU tiles are drawn one after the other, elsewhere all at once.

        Args:
          keys: from `_pairs`.
          functions: edge functions [T, 12].
          ids: row of `Surfaces.triangles` for each of the T drawn triangles.
          behind: what the image holds already.
          camera: where it is seen from.
        """
        tiles = jnp.arange(self._tiles_per_side**2, dtype=jnp.int32)
        starts = jnp.searchsorted(keys, tiles << _INDEX_BITS).astype(jnp.int32)
        stops = jnp.searchsorted(keys, (tiles + 1) << _INDEX_BITS).astype(jnp.int32)
        x, y = self.rays(camera)
        # In the order of the pairs: gathers inside the loop would be done once per pixel.
        index = keys & _INDEX_MASK
        functions, ids = functions.at[index].get(mode="clip"), ids.at[index].get(mode="clip")

        def draw_tile(tile: _Tile) -> tuple[jax.Array, jax.Array]:
            return self._draw_tile(tile, functions, ids)

        return jax.lax.platform_dependent(
            _Tile(
                start=starts,
                stop=stops,
                x=x,
                y=y,
                inverse_depth=behind.inverse_depth,
                triangle=behind.triangle,
            ),
            cpu=lambda batch: jax.lax.map(draw_tile, batch),
            default=jax.vmap(draw_tile),
        )

    def _draw_tile(
        self, tile: _Tile, functions: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Inverse depths and winners [TILE^2] of one tile, from edge functions and ids of the
        triangles of all pairs."""

        def has_more(state: _DrawState) -> jax.Array:
            return state[0] < tile.stop

        def draw_block(state: _DrawState) -> _DrawState:
            position, best, who = state
            rows = jax.lax.dynamic_slice_in_dim(functions, position, _BLOCK)
            nearest = self._nearest(rows, tile.stop - position, tile.x, tile.y)
            # Positive floats are ordered like their bits, the last of which tell the triangle.
            closer = nearest & ~_BLOCK_MASK
            is_closer = closer > jax.lax.bitcast_convert_type(best, jnp.int32)
            name = ids[position + _BLOCK_MASK - (nearest & _BLOCK_MASK)]
            inverse = jax.lax.bitcast_convert_type(closer, jnp.float32)
            return (
                position + _BLOCK,
                jnp.where(is_closer, inverse, best),
                jnp.where(is_closer, name, who),
            )

        start = (tile.start, tile.inverse_depth, tile.triangle)
        _, inverse_depth, winner = jax.lax.while_loop(has_more, draw_block, start)
        return inverse_depth, winner

    def _nearest(self, rows: jax.Array, count: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """Largest inverse depth among the first triangles of a block, int32 [TILE^2].

        The bits of the float32, of which the last _BLOCK_BITS (2e-6 of the depth) give way to
        _BLOCK_MASK minus the triangle's place; 0 where none is hit. One number per pixel and
        not two, and one reduction: both spare XLA evaluating triangles more than once.
        """
        rows = rows[:, None, :]
        edges = [evaluate(rows, k, x, y) for k in range(3)]
        inverse = evaluate(rows, 3, x, y)
        covers = jnp.minimum(jnp.minimum(edges[0], edges[1]), edges[2]) >= 0.0
        bits = jax.lax.bitcast_convert_type(inverse, jnp.int32) & ~_BLOCK_MASK
        place = jnp.arange(_BLOCK)[:, None]
        bits |= _BLOCK_MASK - place
        is_seen = (
            covers & (place < count) & (inverse > 0.0) & (inverse < 1.0 / self._surfaces.near_m)
        )
        return jnp.where(is_seen, bits, 0).max(0)

    def _untile(self, tiles: jax.Array) -> jax.Array:
        """[N, TILE^2] -> [h, w]."""
        n = self._tiles_per_side
        grid = tiles.reshape(n, n, TILE, TILE)
        return jnp.swapaxes(grid, 1, 2).reshape(self.size, self.size)


def _rotated(rotation: jax.Array, points: np.ndarray, i: int) -> jax.Array:
    """Component i of rotation [T, 3, 3] times points [T, 3]."""
    return sum(
        (rotation[:, i, j] * points[:, j] for j in range(1, 3)), rotation[:, i, 0] * points[:, 0]
    )
