"""Mesh simplification by quadric edge collapse, many independent edges at a time.

Garland and Heckbert, "Surface Simplification Using Quadric Error Metrics" (SIGGRAPH 1997,
https://doi.org/10.1145/258734.258849): every vertex carries the weighted sum of squared
distances to the planes it stands for; an edge collapses to the point where the sum of its
ends' quadrics is least. The paper collapses the cheapest edge of a heap; here a round
collapses every edge that is the most urgent one within two edges around it, so that a round
is a few array operations and collapses do not disturb each other.
"""

from dataclasses import dataclass

import numpy as np

_ATTRACTION = 1e-3
"""Pull towards an edge's middle, relative to the planes: it places points on flat patches."""
_MIN_COSINE = 0.2
"""A collapse may turn a face by at most about 78 degrees."""
_MIN_PROGRESS = 0.002
"""A round that finds fewer edges, relative to the vertices, is the last one."""
_NEVER = np.iinfo(np.int64).max


@dataclass(kw_only=True, slots=True)
class _Quadrics:
    """x^T a x + 2 b^T x + c, the area-weighted squared distance (m^4); `weight` m^2."""

    a: np.ndarray
    """float64 [V, 3, 3]."""
    b: np.ndarray
    """float64 [V, 3]."""
    c: np.ndarray
    """float64 [V]."""
    weight: np.ndarray
    """float64 [V], area that the planes stand for."""

    def of(self, edges: np.ndarray) -> "_Quadrics":
        """Sums over the two ends of edges [E, 2]."""
        first, second = edges.T  # sums over an axis of two are slow
        return _Quadrics(
            a=self.a[first] + self.a[second],
            b=self.b[first] + self.b[second],
            c=self.c[first] + self.c[second],
            weight=self.weight[first] + self.weight[second],
        )

    def take(self, rows: np.ndarray) -> "_Quadrics":
        """The quadrics of some rows."""
        return _Quadrics(a=self.a[rows], b=self.b[rows], c=self.c[rows], weight=self.weight[rows])

    def best_points(self, near: np.ndarray) -> np.ndarray:
        """Where each is least, [V, 3], and in directions that do not matter close to `near`."""
        pull = _ATTRACTION * np.maximum(self.weight, 1e-12)
        a = self.a + pull[:, None, None] * np.eye(3)
        return near + _solve(a, -(np.einsum("vij,vj->vi", self.a, near) + self.b))

    def square(self, x: np.ndarray) -> np.ndarray:
        """Sum of the squared distances of x [V, 3] to the planes times their areas, [V], m^4."""
        value = (
            np.einsum("vi,vi->v", x, np.einsum("vij,vj->vi", self.a, x))
            + 2 * np.einsum("vi,vi->v", self.b, x)
            + self.c
        )
        return np.maximum(value, 0.0)


class Simplifier:
    """Triangle meshes that grow coarser with every call of `collapse`.

    Attributes:
      vertices: float64 [V, 3], m.
      faces: int64 [F, 3], counter-clockwise seen from outside.
      mesh: int64 [V], the mesh that a vertex belongs to.
    """

    def __init__(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        *,
        mesh: np.ndarray | None = None,
        share: np.ndarray | None = None,
        copies: np.ndarray | None = None,
    ):
        """Joins vertices of a mesh at equal places and drops faces without area.

        Args:
          vertices: [V, 3], m.
          faces: integers [F, 3] into vertices.
          mesh: integers [V], mesh of each vertex; None: there is one.
          share: [M], tolerance of each mesh relative to that of `collapse`; None: 1.
          copies: [M], how often the faces of each mesh count; None: once.
        """
        mesh = np.zeros(len(vertices), np.int64) if mesh is None else mesh.astype(np.int64)
        ones = np.ones(mesh.max(initial=0) + 1)
        self._share = ones if share is None else share
        self._copies = ones if copies is None else copies
        grid = np.round(vertices / (1e-6 * _extents(vertices, mesh))[:, None]).astype(np.int64)
        keys = np.concatenate([mesh[:, None], grid], axis=1)
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        self.vertices = vertices[first].astype(np.float64)
        self.mesh = mesh[first]
        self.faces = _without_degenerate(inverse.reshape(-1)[faces.astype(np.int64)])
        self._quadrics = _quadrics(self.vertices, self.faces)
        self._ids = np.arange(len(self.vertices))
        self._next_id = len(self.vertices)
        self._rng = np.random.default_rng(0)

    def triangles(self, mesh: int) -> np.ndarray:
        """Corners [T, 3, 3] of one mesh's faces, m."""
        return self.vertices[self.faces[self.mesh[self.faces[:, 0]] == mesh]]

    def num_faces(self) -> int:
        """Number of faces, copies included."""
        return int(self._copies[self.mesh[self.faces[:, 0]]].sum())

    def collapse(self, tolerance_m: float, *, enough: int = 0) -> None:
        """Collapses edges as long as the new point stays within the tolerance of the planes that
        the ends stand for; then drops parts smaller than twice the tolerance.

        The distance is the root of the planes' squared distances times their areas, per area
        of the smaller end.

        Args:
          tolerance_m: greatest distance.
          enough: stops when this number of faces, copies included, is reached.
        """
        refused = np.empty(0, np.int64)
        while self.num_faces() > enough:
            edges = _edges(self.faces, len(self.vertices))
            most = self.num_faces() - enough if enough else len(edges)
            refused, tried = self._round(edges, refused, tolerance_m, most)
            if tried < _MIN_PROGRESS * len(self.vertices) or tried == 0:
                break
        self._drop_small_parts(2.0 * tolerance_m)

    def _round(
        self, edges: np.ndarray, refused: np.ndarray, tolerance_m: float, most: int
    ) -> tuple[np.ndarray, int]:
        """One round that removes about `most` faces, copies included, or fewer; returns the
        keys of edges to leave alone and the number tried."""
        joined = self._quadrics.of(edges)
        first, second = self.vertices[edges[:, 0]], self.vertices[edges[:, 1]]
        middle = 0.5 * (first + second)
        points = joined.best_points(middle)
        is_far = _square(points - middle) > 4.0 * _square(second - first)
        points = np.where(is_far[:, None], middle, points)
        weight = self._quadrics.weight
        smaller = np.minimum(weight[edges[:, 0]], weight[edges[:, 1]])
        # Per area of the smaller end: a rim must not vanish beside the plate that it borders.
        cost = joined.square(points) / np.maximum(smaller, 1e-30)
        # Ids outlive renumbering; a vertex that moves gets a new one, so its edges are tried again.
        keys = self._ids[edges[:, 0]] * 2**31 + self._ids[edges[:, 1]]
        tolerance = tolerance_m * self._share[self.mesh[edges[:, 0]]]
        allowed = (cost <= tolerance**2) & ~np.isin(keys, refused)
        chosen = np.flatnonzero(self._independent(edges, cost, allowed))
        flips = self._flips(edges[chosen], points[chosen])
        refused = np.concatenate([refused, keys[chosen[flips]]])
        kept = chosen[~flips]
        kept = kept[np.argsort(cost[kept], kind="stable")]
        removed = 2.0 * np.cumsum(self._copies[self.mesh[edges[kept, 0]]])
        kept = kept[: np.searchsorted(removed, most) + 1]
        self._merge(edges[kept], points[kept], joined.take(kept))
        return refused, len(chosen)

    def _independent(self, edges: np.ndarray, cost: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Allowed edges that come first among all edges at their ends' neighbours, bool [E].

        The order is by powers of four of the cost, at random within one: by cost alone few
        edges would be first in a smooth region.
        """
        magnitude = np.floor(0.5 * np.log2(np.maximum(cost, 1e-30)))
        order = np.lexsort((self._rng.random(len(edges)), magnitude))
        rank = np.empty(len(edges), np.int64)
        rank[order] = np.arange(len(edges))
        rank[~allowed] = _NEVER
        at_vertex = np.full(len(self.vertices), _NEVER)
        for end in (0, 1):
            np.minimum.at(at_vertex, edges[:, end], rank)
        nearby = at_vertex.copy()
        for end in (0, 1):
            np.minimum.at(nearby, edges[:, end], at_vertex[edges[:, 1 - end]])
        return allowed & (rank == nearby[edges[:, 0]]) & (rank == nearby[edges[:, 1]])

    def _flips(self, edges: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Which collapses would turn over a face that remains, bool [E]."""
        edge_of = np.full(len(self.vertices), -1)
        edge_of[edges] = np.arange(len(edges))[:, None]
        touching = edge_of[self.faces]
        moved = (touching >= 0).sum(1)
        faces = np.flatnonzero(moved == 1)  # faces at both ends vanish
        corner_edge = touching[faces]
        old = self.vertices[self.faces[faces]]
        new = np.where((corner_edge >= 0)[..., None], points[corner_edge], old)
        before, after = _cross(old), _cross(new)
        cosine = np.einsum("fi,fi->f", before, after)
        scale = np.sqrt(_square(before) * _square(after))
        flipped = cosine < _MIN_COSINE * scale
        result = np.zeros(len(edges), bool)
        result[corner_edge.max(1)[flipped]] = True
        return result

    def _merge(self, edges: np.ndarray, points: np.ndarray, quadrics: _Quadrics) -> None:
        """Moves first ends to the points, joins second ends to them, renumbers."""
        first, second = edges[:, 0], edges[:, 1]
        self.vertices[first] = points
        self._ids[first] = self._next_id + np.arange(len(first))
        self._next_id += len(first)
        for name in ("a", "b", "c", "weight"):
            getattr(self._quadrics, name)[first] = getattr(quadrics, name)
        target = np.arange(len(self.vertices))
        target[second] = first
        self.faces = _without_degenerate(target[self.faces])
        self._renumber()

    def _renumber(self) -> None:
        """Drops vertices without faces."""
        used = np.zeros(len(self.vertices), bool)
        used[self.faces] = True
        self.faces = (np.cumsum(used) - 1)[self.faces]
        self.vertices = self.vertices[used]
        self.mesh = self.mesh[used]
        self._ids = self._ids[used]
        self._quadrics = self._quadrics.take(used)

    def _drop_small_parts(self, diagonal_m: float) -> None:
        """Drops connected parts whose bounding box has a shorter diagonal (times share)."""
        part = _parts(self.faces, len(self.vertices))
        low = np.full((len(self.vertices), 3), np.inf)
        high = np.full((len(self.vertices), 3), -np.inf)
        np.minimum.at(low, part, self.vertices)
        np.maximum.at(high, part, self.vertices)
        least = diagonal_m * self._share[self.mesh]
        keep = np.linalg.norm(high - low, axis=-1)[part] >= least
        self.faces = self.faces[keep[self.faces[:, 0]]]
        self._renumber()


def _extents(vertices: np.ndarray, mesh: np.ndarray) -> np.ndarray:
    """Longest side [V] of the bounding box of each vertex's mesh."""
    shape = (mesh.max(initial=0) + 1, 3)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    np.minimum.at(low, mesh, vertices)
    np.maximum.at(high, mesh, vertices)
    return np.maximum((high - low).max(1), 1e-9)[mesh]


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x [V, 3] with a x = b, for symmetric positive a [V, 3, 3], by Cramer's rule: many times
    faster than LAPACK called V times."""
    columns = [_product(a[:, (i + 1) % 3], a[:, (i + 2) % 3]) for i in range(3)]
    determinant = np.einsum("vi,vi->v", a[:, 0], columns[0])
    adjugate = sum(b[:, i : i + 1] * columns[i] for i in range(3))
    return adjugate / determinant[:, None]


def _cross(corners: np.ndarray) -> np.ndarray:
    """Normals of triangles [F, 3, 3], as long as twice their areas."""
    return _product(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross products [F, 3]; np.cross takes several times as long."""
    result = np.empty_like(a)
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        result[:, i] = a[:, j] * b[:, k] - a[:, k] * b[:, j]
    return result


def _square(a: np.ndarray) -> np.ndarray:
    """Squared lengths [F] of vectors [F, 3]."""
    return np.einsum("fi,fi->f", a, a)


def _without_degenerate(faces: np.ndarray) -> np.ndarray:
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]


def _edges(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Distinct edges [E, 2], smaller vertex first."""
    pairs = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    keys = np.sort(pairs[:, 0] * num_vertices + pairs[:, 1])
    keys = keys[np.diff(keys, prepend=-1) > 0]  # np.unique hashes, which is slower here
    return np.stack(np.divmod(keys, num_vertices), axis=1)


def _parts(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Connected part of each vertex, [V], named after its smallest vertex."""
    part = np.arange(num_vertices)
    while True:
        smallest = part[faces].min(1)
        previous = part.copy()
        for corner in range(3):
            np.minimum.at(part, faces[:, corner], smallest)
        part = part[part]
        if np.array_equal(part, previous):
            return part


def _quadrics(vertices: np.ndarray, faces: np.ndarray) -> _Quadrics:
    """Planes of the faces around each vertex, and upright planes along open edges."""
    num_vertices = len(vertices)
    normals = _cross(vertices[faces])
    double_area = np.linalg.norm(normals, axis=-1)
    normals = normals / np.maximum(double_area, 1e-30)[:, None]
    open_edges, open_faces = _open_edges(faces, num_vertices)
    along = vertices[open_edges[:, 1]] - vertices[open_edges[:, 0]]
    upright = np.cross(along, normals[open_faces])
    length = np.linalg.norm(along, axis=-1)
    upright /= np.maximum(length, 1e-30)[:, None]
    result = _Quadrics(
        a=np.zeros((num_vertices, 3, 3)),
        b=np.zeros((num_vertices, 3)),
        c=np.zeros(num_vertices),
        weight=np.zeros(num_vertices),
    )
    _add_planes(result, faces, vertices[faces[:, 0]], normals, 0.5 * double_area)
    np.add.at(result.weight, faces, (0.5 * double_area)[:, None])
    _add_planes(result, open_edges, vertices[open_edges[:, 0]], upright, length**2)
    return result


def _add_planes(
    quadrics: _Quadrics,
    corners: np.ndarray,
    points: np.ndarray,
    normals: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Adds each plane (point [3], unit normal [3], weight) to its corner vertices."""
    offset = -(normals * points).sum(-1)
    a = weights[:, None, None] * normals[:, :, None] * normals[:, None, :]
    b = (weights * offset)[:, None] * normals
    c = weights * offset**2
    for corner in range(corners.shape[1]):
        np.add.at(quadrics.a, corners[:, corner], a)
        np.add.at(quadrics.b, corners[:, corner], b)
        np.add.at(quadrics.c, corners[:, corner], c)


def _open_edges(faces: np.ndarray, num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges [E, 2] with a single face, and that face [E]."""
    pairs = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    keys, first, counts = np.unique(
        pairs[:, 0] * num_vertices + pairs[:, 1], return_index=True, return_counts=True
    )
    single = counts == 1
    return np.stack(np.divmod(keys[single], num_vertices), axis=1), first[single] // 3
