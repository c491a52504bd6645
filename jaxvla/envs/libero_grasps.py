"""Where a parallel gripper that points down can take hold of a body made of boxes.

`find_grasps` tries grid points: closing directions, lines beside the centre of mass, and heights.
On each line it looks for stretches of material, between free stretches, that fit between the
fingers. A can or a box gives one stretch across all of it; a bowl or a mug too wide for the hand
gives its two walls; a handle gives itself. Numbers are those of robosuite's Panda gripper, whose
hand frame is the site "gripper0_grip_site": x is the closing direction, z points at the tips.
"""

import itertools
from dataclasses import dataclass

import mujoco
import numpy as np

OPENING_M = 0.08
"""Distance of the open fingers' pads."""
TIP_M = 0.01
"""How far the finger tips reach beyond the hand's site."""

_MAX_WIDTH_M = 0.071
"""Widest stretch that the fingers may be put around."""
_PAD_HALF_M = 0.008
"""Half the width of a pad, across the closing direction."""
_PAD_ABOVE_M = 0.011
"""Height of a pad above the site."""
_FINGER_HALF_M = 0.0105
_FINGER_OUTER_M = 0.067
"""Outer side of an open finger, from the site."""
_PALM_HALF_M = (0.104, 0.032)
_PALM_M = 0.029
"""Height of the palm's underside above the site, less 2 mm."""
_ABOVE_BOTTOM_M = 0.013
"""Least height of the site above the body's lowest point: keeps the tips off the table."""
_SPACING_M = 0.004
"""Greatest distance between sample points within a box."""
_SLACK_M = 0.003
"""How far material may stick out on either side of a stretch, next to the pads."""
_NUM_YAWS = 12
_SIDES_M = (0.0, 0.012, -0.012, 0.024, -0.024)
"""Lines' distances from the centre of mass."""
_DEPTHS_M = (0.024, 0.018, 0.012, 0.006)
"""Heights of the material above the site."""

UPS = np.asarray(
    [
        np.divide(direction, np.linalg.norm(direction))
        for direction in itertools.product((-1, 0, 1), repeat=3)
        if 1 <= np.abs(direction).sum() <= 2
    ]
)
"""Directions in the body's frame, float [18, 3], one of which is roughly up in the world: faces
and edges of a cube. A body may have come to lie on its side or to lean on something."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BodyBoxes:
    """Collision boxes of a body, N of them, in the frames of the bodies they are fixed to."""

    body: np.ndarray
    """int [N]."""
    centre: np.ndarray
    """float [N, 3], m."""
    rotation: np.ndarray
    """float [N, 3, 3], box frame to body frame."""
    half_size: np.ndarray
    """float [N, 3], m."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grasps:
    """G ways to hold a body in each attitude of `UPS`, padded with ways of infinite cost."""

    point: np.ndarray
    """float32 [18, G, 3], place of the hand's site in the body's frame, m."""
    axis: np.ndarray
    """float32 [18, G, 3], closing direction in the body's frame; its sign does not matter."""
    width: np.ndarray
    """float32 [18, G], opening of the fingers once they hold, m."""
    cost: np.ndarray
    """float32 [18, G], lower is better."""


def collision_boxes(model: mujoco.MjModel, bodies: np.ndarray) -> BodyBoxes:
    """Collects the collision geoms of some bodies.

    Cylinders, capsules and spheres count as the boxes around them. Planes are left out.

    Args:
      bodies: int [B], body ids.

    Raises:
      ValueError: one is of another kind.
    """
    found, sizes = [], []
    for geom in np.flatnonzero(np.isin(model.geom_bodyid, bodies)):
        is_colliding = model.geom_contype[geom] or model.geom_conaffinity[geom]
        if is_colliding and model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_PLANE:
            found.append(int(geom))
            sizes.append(_half_size(model, int(geom)))
    rotation = np.empty((len(found), 9))
    for row, geom in zip(rotation, found, strict=True):
        mujoco.mju_quat2Mat(row, model.geom_quat[geom])
    return BodyBoxes(
        body=model.geom_bodyid[found].astype(int),
        centre=model.geom_pos[found].reshape(-1, 3),
        rotation=rotation.reshape(-1, 3, 3),
        half_size=np.asarray(sizes).reshape(-1, 3),
    )


def _half_size(model: mujoco.MjModel, geom: int) -> np.ndarray:
    kinds = mujoco.mjtGeom
    radius, length, _ = size = model.geom_size[geom]
    kind = model.geom_type[geom]
    if kind == kinds.mjGEOM_BOX:
        return size
    if kind == kinds.mjGEOM_CYLINDER:
        return np.array([radius, radius, length])
    if kind == kinds.mjGEOM_CAPSULE:
        return np.array([radius, radius, length + radius])
    if kind == kinds.mjGEOM_SPHERE:
        return np.array([radius, radius, radius])
    raise ValueError(f"geom {model.geom(geom).name!r}: no box for its kind")


def find_grasps(boxes: BodyBoxes, centre_of_mass: np.ndarray, max_grasps: int = 24) -> Grasps:
    """Plans how to hold a body.

    Args:
      boxes: all of one body.
      centre_of_mass: float [3], in the body's frame.
      max_grasps: G; the best are kept.
    """
    points = _sample(boxes) - centre_of_mass
    tables = [_grasps_of_attitude(points, up, max_grasps) for up in UPS]
    point, axis, width, cost = (np.stack(column) for column in zip(*tables, strict=True))
    return Grasps(
        point=(point + centre_of_mass).astype(np.float32),
        axis=axis.astype(np.float32),
        width=width.astype(np.float32),
        cost=cost.astype(np.float32),
    )


def _sample(boxes: BodyBoxes) -> np.ndarray:
    """Points throughout the boxes, [P, 3], those that share a cell of the grid once."""
    clouds = []
    for centre, rotation, half in zip(boxes.centre, boxes.rotation, boxes.half_size, strict=True):
        axes = [np.linspace(-h, h, 2 + int(2 * h / _SPACING_M)) for h in half]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        clouds.append(centre + grid @ rotation.T)
    points = np.concatenate(clouds)
    cells = np.round(points / (0.5 * _SPACING_M)).astype(int)
    return points[np.unique(cells, axis=0, return_index=True)[1]]


def _frame(up: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] with two horizontal axes and `up` as columns."""
    first = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(up, first), up], -1)


def _grasps_of_attitude(
    points: np.ndarray, up: np.ndarray, max_grasps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Point [G, 3], axis [G, 3], width [G] and cost [G], with the origin in the centre of mass."""
    frame = _frame(up)
    level = points @ frame
    level = level[np.argsort(level[:, 2])]
    best: dict[tuple[int, int], tuple[float, np.ndarray, np.ndarray, float]] = {}
    for index in range(_NUM_YAWS):
        yaw = np.pi * index / _NUM_YAWS
        cosine, sine = np.cos(yaw), np.sin(yaw)
        turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1.0]])
        for cost, place, width in _grasps_of_yaw(level @ turn):
            key = (index, round(place[0] / 0.05))
            if key not in best or cost < best[key][0]:
                rotation = frame @ turn
                best[key] = (cost, rotation @ place, rotation[:, 0], width)
    chosen = sorted(best.values(), key=lambda entry: entry[0])[:max_grasps]
    point, axis = np.zeros((2, max_grasps, 3))
    axis[:, 0] = 1.0
    width, cost = np.zeros(max_grasps), np.full(max_grasps, np.inf)
    for i, entry in enumerate(chosen):
        cost[i], point[i], axis[i], width[i] = entry
    return point, axis, width, cost


def _grasps_of_yaw(points: np.ndarray) -> list[tuple[float, np.ndarray, float]]:
    """Cost, place [3] and width of the grasps that close along x.

    Args:
      points: [P, 3], z is height, in ascending order of it.
    """
    bottom, top = points[0, 2], points[-1, 2]
    found = []
    for side in _SIDES_M:
        beside = points[np.abs(points[:, 1] - side) < _PALM_HALF_M[1]]
        strip = beside[np.abs(beside[:, 1] - side) < _FINGER_HALF_M]
        if not len(strip):
            continue
        levels = np.unique(np.round(strip[:, 2] / 0.02)) * 0.02 - _DEPTHS_M[0]
        heights = {strip[-1, 2] - depth for depth in _DEPTHS_M} | set(levels.tolist())
        for height in {round(max(z, bottom + _ABOVE_BOTTOM_M), 4) for z in heights}:
            for low, high in _stretches(_above(strip, height), side, height):
                place = np.array([(low + high) / 2, side, height])
                if _is_free(_above(beside, height), place, low, high):
                    found.append((_cost(place, high - low, top), place, high - low))
    return found


def _above(points: np.ndarray, height: float) -> np.ndarray:
    """Those of the sorted points that a hand at this height can touch."""
    return points[np.searchsorted(points[:, 2], height - TIP_M) :]


def _stretches(strip: np.ndarray, side: float, height: float) -> list[tuple[float, float]]:
    """Ends along x of the material between the pads."""
    is_between = np.abs(strip[:, 1] - side) < _PAD_HALF_M
    is_between &= strip[:, 2] < height + _PAD_ABOVE_M
    x = np.sort(strip[is_between, 0])
    if not len(x):
        return []
    breaks = np.flatnonzero(np.diff(x) > 2.5 * _SPACING_M)
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(x) - 1)
    stretches = [(float(x[i]), float(x[j])) for i, j in zip(starts, ends, strict=True)]
    return [(low, high) for low, high in stretches if high - low < _MAX_WIDTH_M]


def _is_free(points: np.ndarray, place: np.ndarray, low: float, high: float) -> bool:
    """Whether open fingers and palm get there from above, and nothing else is between them.

    Args:
      points: those above the tips and below or beside the palm.
      place: of the hand's site.
      low, high: ends of what is to be held.
    """
    x, y, _ = np.abs(points - place).T
    height = points[:, 2] - place[2]
    is_beside = (points[:, 0] < low - _SLACK_M) | (points[:, 0] > high + _SLACK_M)
    at_pads = (height < _PAD_ABOVE_M) & is_beside
    at_fingers = (at_pads | (x > OPENING_M / 2 - 0.001)) & (x < _FINGER_OUTER_M)
    at_palm = (height > _PALM_M) & (x < _PALM_HALF_M[0])
    return not ((at_fingers & (y < _FINGER_HALF_M)) | at_palm).any()


def _cost(place: np.ndarray, width: float, top: float) -> float:
    """Prefers to hold near the centre of mass, low, square to faces (where the body is narrow),
    and with some room beside the fingers."""
    above = top - place[2]
    tight = max(width - 0.06, 0.0)
    distance = float(np.hypot(place[0], place[1]))
    return 10.0 * (distance + width - min(above, 0.02)) + 30.0 * tight
