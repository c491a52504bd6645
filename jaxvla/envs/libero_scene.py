"""Reduces a LIBERO scene to the physics that MJX can step in batches.

LIBERO builds its objects and furniture of boxes, and its robot of meshes. MJX (impl="jax") has
no collision between cylinders and boxes or meshes, handles a mesh of thousands of vertices
badly, and keeps only a fixed number of contacts. `reduce_scene` therefore changes

  geoms that collide with nothing    dropped, with all meshes, textures and lights
  geoms of a body that coincide      one of them collides
  support surface of the arena       the highest horizontal box face (table top, desk, living
                                     room table) becomes a plane; the arena's other boxes, legs
                                     and floor, which lie below it, are dropped
  cylinder                           a cross of two boxes whose corners are a regular octagon
                                     on its rim
  sphere, capsule, box               kept
  palm and fingers                   boxes around one and three slices of the convex hulls that
                                     C MuJoCo collides with
  arm links and robot mount          dropped: the arm passes through furniture
  pairs that may collide             free objects with everything, robot with furniture; not
                                     furniture with furniture, nor robot with robot
  condim                             3 everywhere: MJX has a contact budget per condim
  friction cone                      pyramidal, impratio IMPRATIO: with the elliptic cone MJX does
                                     not converge in float32, and objects at rest fly off
  solver                             NUM_ITERATIONS, each of NUM_LINE_SEARCH_STEPS; with the
                                     pyramidal cone more change nothing, also in C MuJoCo

and keeps everything else: time step, integrator, drag, joints, actuators, and of every body the
mass and inertia, which are written out. qpos and qvel keep their layout.

The plane is a matter of correctness, not of speed. MJX ranks pairs of geoms by the overlap of
their bounding spheres and lets the first ones through; the sphere of a table overlaps those of
everything in the room and would use up the whole budget. Planes are exempt from the ranking.
What the plane changes: an object pushed over the table's edge does not fall. What the cone
changes: what friction alone holds creeps. A bowl that leans on a ramekin does so by 0.1 mm/s, and
some objects slip from the fingers that hold them in LIBERO (docs/decisions/0012). C MuJoCo need not
put up with that: `with_original_friction`.
"""

import copy
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import mujoco
import numpy as np

NUM_ITERATIONS = 20
"""Limit on Newton iterations, of which MJX does as many as it needs. 4 lets objects fly off."""
NUM_LINE_SEARCH_STEPS = 6
"""Steps of each iteration's line search. MJX does all of them, needed or not: 20 instead of 5
double the time of a physics step."""

IMPRATIO = 2.0
"""How much stiffer friction is than the normal force. With 1, a bowl that leans on a ramekin creeps
by 0.2 mm/s and 0.3 degrees/s; with 10, what the fingers hold slips from them."""

ROBOT_PREFIX = "robot0_"
HAND_PREFIX = "gripper0_"
"""How the names of robosuite's bodies begin."""

_FIXED, _FREE, _ROBOT = 1, 2, 4
_COLLIDES_WITH = {_FIXED: _FREE | _ROBOT, _FREE: _FIXED | _FREE | _ROBOT, _ROBOT: _FIXED | _FREE}
"""contype -> conaffinity."""

_NUM_FINGER_SLICES = 3
"""Boxes per finger. The palm, which is to touch nothing, is one."""
_LEVEL = 0.9999
"""Cosine of the tilt up to which a face counts as horizontal."""

_KEPT = (
    mujoco.mjtGeom.mjGEOM_PLANE,
    mujoco.mjtGeom.mjGEOM_SPHERE,
    mujoco.mjtGeom.mjGEOM_CAPSULE,
    mujoco.mjtGeom.mjGEOM_BOX,
)
"""Kinds of geoms that MJX collides with each other."""

_EXACT = {
    "body": {"pos": "body_pos", "quat": "body_quat"},
    "geom": {"pos": "geom_pos", "quat": "geom_quat", "size": "geom_size"},
    "site": {"pos": "site_pos", "quat": "site_quat", "size": "site_size"},
    "camera": {"pos": "cam_pos", "quat": "cam_quat"},
}
"""XML element -> attribute -> array of mjModel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Place (m) and orientation (w, x, y, z)."""

    pos: tuple[float, float, float]
    quat: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedScene:
    """What became of a scene."""

    xml: str
    """MJCF without any file."""
    support_height_m: float
    """Height of the plane that stands for the table or the floor."""
    num_geoms_before: int
    num_geoms_after: int


def reduce_scene(
    xml: str, placed: Collection[str], places: Mapping[str, Pose] | None = None
) -> ReducedScene:
    """Makes the physics model of a scene.

    Args:
      xml: MJCF of the whole scene; its files must exist.
      placed: root bodies of objects and fixtures. What is neither placed nor robot is arena.
      places: bodies of the world that are moved, with their new poses; None: none.

    Raises:
      ValueError: the scene has a collision geom of a kind, or an arena of a shape, that the
        rules do not cover.
    """
    spec = mujoco.MjSpec.from_string(xml)
    for name, pose in (places or {}).items():
        body = spec.body(name)
        body.pos, body.quat = pose.pos, pose.quat
        body.alt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
    original = spec.compile()
    _resolve_shapes(spec, original)
    height = _replace_arena(spec, original, placed)
    _replace_robot(spec, original)
    _replace_cylinders(spec)
    _drop_visuals(spec)
    _set_collisions(spec)
    _write_inertias(spec, original)
    spec.option.iterations, spec.option.ls_iterations = NUM_ITERATIONS, NUM_LINE_SEARCH_STEPS
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_PYRAMIDAL, IMPRATIO
    reduced = spec.compile()
    _check_layout(original, reduced)
    return ReducedScene(
        xml=exact_xml(spec.to_xml(), reduced),
        support_height_m=height,
        num_geoms_before=original.ngeom,
        num_geoms_after=reduced.ngeom,
    )


def with_original_friction(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of a reduced scene with LIBERO's own cone and solver, which C MuJoCo can afford."""
    original = copy.copy(model)
    original.opt.cone, original.opt.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 20.0
    original.opt.iterations, original.opt.ls_iterations = 100, 50
    return original


def set_numerics(xml: str, numerics: Mapping[str, float]) -> str:
    """Adds custom numbers, which is where MJX reads its contact budget, to a model's XML."""
    tree = ElementTree.fromstring(xml)
    custom = ElementTree.SubElement(tree, "custom")
    for name, value in numerics.items():
        ElementTree.SubElement(custom, "numeric", name=name, data=repr(value))
    return ElementTree.tostring(tree, encoding="unicode")


def exact_xml(xml: str, model: mujoco.MjModel) -> str:
    """Rewrites the numbers of a model's XML, which MuJoCo rounds to six digits, in full.

    Args:
      xml: MJCF as MuJoCo saves it, of `model`.
      model: gives poses, sizes, inertias and armatures.
    """
    tree = ElementTree.fromstring(xml)
    world = tree.find("worldbody")
    assert world is not None
    # Elements stand in the order of their ids.
    for tag, attributes in _EXACT.items():
        elements = list(world.iter(tag))
        for attribute, array in attributes.items():
            values = getattr(model, array)
            assert len(values) - (tag == "body") == len(elements), f"{tag} elements are missing"
            for element, numbers in zip(elements, values[-len(elements) :], strict=True):
                _write_numbers(element, attribute, numbers)
    for joint in world.iter("joint"):
        address = model.joint(joint.get("name")).dofadr
        _write_numbers(joint, "armature", model.dof_armature[address])
    for body in world.iter("body"):
        inertial = body.find("inertial")
        if inertial is not None:
            source = model.body(body.get("name"))
            _write_numbers(inertial, "mass", source.mass)
            _write_numbers(inertial, "pos", source.ipos)
            _write_numbers(inertial, "quat", source.iquat)
            _write_numbers(inertial, "diaginertia", source.inertia)
    return ElementTree.tostring(tree, encoding="unicode")


def _write_numbers(element: ElementTree.Element, attribute: str, numbers: np.ndarray) -> None:
    element.set(attribute, " ".join(repr(float(number)) for number in numbers))


def root_name(body: Any) -> str:
    """Name of the body's ancestor (or of itself) that hangs from the world; "" for the world."""
    while body.parent is not None and body.parent.parent is not None:
        body = body.parent
    return body.name if body.parent is not None else ""


def _resolve_shapes(spec: Any, original: Any) -> None:
    """Gives primitive geoms their place and size as numbers, however the XML had put it."""
    for geom in spec.geoms:
        if geom.type != mujoco.mjtGeom.mjGEOM_MESH:
            geom.pos, geom.quat = original.geom_pos[geom.id], original.geom_quat[geom.id]
            geom.size = original.geom_size[geom.id]
            geom.alt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
            geom.fromto = [math.nan] * 6


def _collides(geom: Any) -> bool:
    return bool(geom.contype or geom.conaffinity)


def _replace_arena(spec: Any, original: Any, placed: Collection[str]) -> float:
    """Turns the arena's support surface into a plane and drops its other collision geoms.

    Returns:
      Height of the plane, m.
    """
    arena = [
        geom
        for geom in spec.geoms
        if _collides(geom)
        and root_name(geom.parent) not in placed
        and not root_name(geom.parent).startswith(ROBOT_PREFIX)
    ]
    data = mujoco.MjData(original)
    mujoco.mj_kinematics(original, data)
    heights = [_top(original, data, geom) for geom in arena]
    if not heights:
        raise ValueError("the scene has no floor and no table")
    support = int(np.argmax(heights))
    _make_plane(arena[support], data, heights[support])
    for geom in arena[:support] + arena[support + 1 :]:
        spec.delete(geom)
    return heights[support]


def _top(original: Any, data: Any, geom: Any) -> float:
    """Height of a horizontal plane or of the upper face of a level box, m."""
    normals = data.geom_xmat[geom.id].reshape(3, 3)[2]
    axis = int(np.argmax(np.abs(normals)))
    is_plane = geom.type == mujoco.mjtGeom.mjGEOM_PLANE
    if is_plane and normals[2] > _LEVEL:
        return float(data.geom_xpos[geom.id][2])
    if geom.type == mujoco.mjtGeom.mjGEOM_BOX and abs(normals[axis]) > _LEVEL:
        return float(data.geom_xpos[geom.id][2] + original.geom_size[geom.id][axis])
    raise ValueError(f"arena geom {geom.name!r} is neither a level box nor a horizontal plane")


def _make_plane(geom: Any, data: Any, height: float) -> None:
    """Puts a horizontal plane at the height, in the place of a geom of a fixed body."""
    body = geom.parent.id
    rotation = data.xmat[body].reshape(3, 3)
    centre = np.array([*data.geom_xpos[geom.id][:2], height])
    inverse = np.empty(4)
    mujoco.mju_negQuat(inverse, data.xquat[body])
    geom.type = mujoco.mjtGeom.mjGEOM_PLANE
    geom.pos = rotation.T @ (centre - data.xpos[body])
    geom.quat = inverse
    geom.size = [0.0, 0.0, 0.05]  # infinite, as every plane is for collisions


def _replace_robot(spec: Any, original: Any) -> None:
    """Drops the arm's and mount's geoms and makes boxes of the hand's meshes."""
    for geom in list(spec.geoms):
        if not _collides(geom) or not root_name(geom.parent).startswith(ROBOT_PREFIX):
            continue
        if not geom.parent.name.startswith(HAND_PREFIX):
            spec.delete(geom)
        elif geom.type == mujoco.mjtGeom.mjGEOM_MESH:
            hull = _hull_vertices(original, original.geom(geom.name).id)
            num_slices = _NUM_FINGER_SLICES if "finger" in geom.parent.name else 1
            for index, (centre, half) in enumerate(slice_boxes(hull, num_slices)):
                _add_box(geom, f"{geom.name}_{index}", centre, half, (1.0, 0.0, 0.0, 0.0))
            spec.delete(geom)


def _hull_vertices(model: Any, geom: int) -> np.ndarray:
    """Vertices of the convex hull of a mesh geom, [N, 3] in its body's frame, m."""
    mesh = model.geom_dataid[geom]
    graph = model.mesh_graph[model.mesh_graphadr[mesh] :]
    num = graph[0]  # then the number of faces, then two lists as long as the vertices
    ids = graph[2 + num : 2 + 2 * num]
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] + ids].astype(np.float64)
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
    return vertices @ rotation.reshape(3, 3).T + model.geom_pos[geom]


def slice_boxes(hull: np.ndarray, num_slices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Approximates a convex hull by boxes along z.

    The hull is cut into slices of equal height. Each gives a box with the extent in x and y
    that the hull has at the slice's middle, which is neither always too large nor too small.

    Args:
      hull: [N, 3] vertices, m.
      num_slices: number of boxes.

    Returns:
      Per box the centre and half the lengths of its edges, both [3], m.
    """
    edges = np.linspace(hull[:, 2].min(), hull[:, 2].max(), num_slices + 1)
    boxes = []
    for low, high in itertools.pairwise(edges):
        section = _section(hull, (low + high) / 2)
        lower = np.array([*section.min(axis=0), low])
        upper = np.array([*section.max(axis=0), high])
        boxes.append(((lower + upper) / 2, (upper - lower) / 2))
    return boxes


def _section(hull: np.ndarray, height: float) -> np.ndarray:
    """Points [M, 2] whose convex hull is the hull's section at z = height.

    Every segment between a vertex below and one above lies in the hull, and those among them
    that are edges meet the plane in the corners of the section.
    """
    below, above = hull[hull[:, 2] <= height], hull[hull[:, 2] > height]
    start, end = below[:, None], above[None]
    fraction = (height - start[..., 2:]) / (end[..., 2:] - start[..., 2:])
    return (start + fraction * (end - start))[..., :2].reshape(-1, 2)


def _replace_cylinders(spec: Any) -> None:
    for geom in list(spec.geoms):
        if not _collides(geom):
            continue
        if geom.type == mujoco.mjtGeom.mjGEOM_CYLINDER:
            radius, half_height = geom.size[0], geom.size[1]
            long, short = radius * math.cos(math.pi / 8), radius * math.sin(math.pi / 8)
            geom.type = mujoco.mjtGeom.mjGEOM_BOX
            geom.size = [long, short, half_height]
            across = (short, long, half_height)
            _add_box(geom, f"{geom.name}_across", geom.pos, across, geom.quat)
        elif geom.type not in _KEPT:
            raise ValueError(f"collision geom {geom.name!r} is a {geom.type.name}")


def _add_box(source: Any, name: str, centre: Any, half: Any, quat: Any) -> None:
    """Adds a box to the source's body that touches as the source does."""
    source.parent.add_geom(
        name=name,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=centre,
        quat=quat,
        size=half,
        contype=1,
        conaffinity=1,
        friction=source.friction,
        solref=source.solref,
        solimp=source.solimp,
        solmix=source.solmix,
        priority=source.priority,
        margin=source.margin,
        gap=source.gap,
        group=source.group,
        mass=0.0,
    )


def _drop_visuals(spec: Any) -> None:
    """Drops what only a renderer needs."""
    for geom in list(spec.geoms):
        if not _collides(geom):
            spec.delete(geom)
    for element in [*spec.geoms, *spec.sites]:
        element.material = ""
    for element in [*spec.meshes, *spec.materials, *spec.textures, *spec.lights, *spec.skins]:
        spec.delete(element)


def _set_collisions(spec: Any) -> None:
    """Sets which geoms may touch, and condim 3."""
    free = {
        body.name
        for body in spec.bodies
        if any(joint.type == mujoco.mjtJoint.mjJNT_FREE for joint in body.joints)
    }
    for geom in spec.geoms:
        root = root_name(geom.parent)
        kind = _ROBOT if root.startswith(ROBOT_PREFIX) else _FREE if root in free else _FIXED
        geom.contype, geom.conaffinity = kind, _COLLIDES_WITH[kind]
        geom.condim = 3
    _silence_twins(spec)


def _silence_twins(spec: Any) -> None:
    """Takes geoms that coincide with another of their body, and double its contacts, out of
    collisions. They stay in the model, since a goal may name them."""
    seen = set()
    for geom in spec.geoms:
        shape = (geom.parent.name, geom.type, *geom.pos, *geom.quat, *geom.size)
        if shape in seen:
            geom.contype = geom.conaffinity = 0
        seen.add(shape)


def _write_inertias(spec: Any, original: Any) -> None:
    """Writes the bodies' masses and inertias out, which no longer follow from their geoms."""
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_FALSE
    for body in spec.bodies[1:]:
        source = original.body(body.name)
        body.explicitinertial = bool(source.mass[0] > 0)
        body.mass = source.mass[0]
        body.ipos = source.ipos
        body.iquat = source.iquat
        body.inertia = source.inertia
        body.fullinertia = [math.nan, 0.0, 0.0, 0.0, 0.0, 0.0]


def _check_layout(original: Any, reduced: Any) -> None:
    """Asserts what everything else relies on: states and bodies are those of the original."""
    assert original.nbody == reduced.nbody and original.nu == reduced.nu
    assert np.array_equal(original.jnt_type, reduced.jnt_type)
    assert np.array_equal(original.jnt_qposadr, reduced.jnt_qposadr)
    assert original.names[: original.name_geomadr[0]] is not None
    assert np.allclose(original.body_mass, reduced.body_mass, rtol=1e-12, atol=0)
    assert np.allclose(original.body_inertia, reduced.body_inertia, rtol=1e-9, atol=1e-15)
