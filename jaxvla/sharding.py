"""From parameter paths to device placements.

    path --(the model's rules)--> logical axes --(RULES of the role)--> mesh axes

Meshes have Auto axes: the compiler propagates shardings from the jitted functions' inputs
and outputs.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxvla.layout import RoleLayout

_LOG = logging.getLogger(__name__)

LogicalRules = Sequence[tuple[str, tuple[str | None, ...]]]
"""(regular expression over '/'-joined paths, one logical axis or None per dimension)."""

MESH_AXES: Mapping[str, Mapping[str, str]] = {
    "learning": {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
    "serving": {"heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
}
"""Role -> logical axis -> mesh axis. Logical axes that are not listed are replicated: the
single key/value head of multi-query attention, layers, patches."""


def make_mesh(layout: RoleLayout, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of one role.

    Args:
      layout: which devices, and the axis sizes.
      devices: all devices (`jax.Device`) of the run; default `all_devices()`.

    Raises:
      ValueError: the layout needs more devices than there are.
    """
    devices = all_devices() if devices is None else devices
    last = layout.first + layout.num_devices
    if last > len(devices):
        raise ValueError(f"the layout needs devices 0 to {last - 1}, there are {len(devices)}")
    axes = layout.axes
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=devices[layout.first : last],
    )


def all_devices() -> list[Any]:
    """`jax.Device`s of all processes of the learner, in the order that layouts count them in:
    the leader's come first."""
    return sorted(jax.devices(), key=lambda device: device.process_index)


def planned_mesh(layout: RoleLayout) -> AbstractMesh:
    """`make_mesh` without devices: for shapes alone, whatever the machine has."""
    axes = layout.axes
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Splits dimension `axis` over every mesh axis that holds different samples."""
    names = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, names))


def fitting_sharding(mesh: Mesh, size: int, *, axis: int = 0) -> NamedSharding:
    """`batch_sharding` of a dimension of `size`; whole copies where that does not divide."""
    shards = math.prod(mesh.shape.get(name, 1) for name in ("data", "fsdp"))
    return replicated(mesh) if size % shards else batch_sharding(mesh, axis=axis)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed_structs(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree of arrays or structs, each with its place: what a checkpoint is
    read into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def params_shardings(tree: Any, rules: LogicalRules, mesh: Mesh | AbstractMesh, role: str) -> Any:
    """Placement of every parameter of a tree.

    Args:
      tree: nested dict of arrays or shape structs. Also works for an optimizer state: its
        moments lie under paths that end like the parameter's.
      rules: the model's logical axes.
      mesh: the role's mesh.
      role: "learning" or "serving".

    Returns:
      A tree of NamedSharding of the same structure. A dimension that the mesh axis does not
      divide is replicated, with one log line. Leaves that no rule names (counters) are
      replicated.
    """
    axis_of = MESH_AXES[role]

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        logical = _logical_axes(name, leaf.ndim, rules)
        spec = [axis_of.get(axis) if axis else None for axis in logical]
        for dim, axis in enumerate(spec):
            if axis is None or mesh.shape.get(axis, 1) == 1:
                spec[dim] = None
            elif leaf.shape[dim] % mesh.shape[axis]:
                size = mesh.shape[axis]
                _LOG.info("%s: dim %d of %s is not split %d ways", name, dim, leaf.shape, size)
                spec[dim] = None
        return NamedSharding(mesh, PartitionSpec(*_without_repeats(spec)))

    return jax.tree_util.tree_map_with_path(place, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """'/'-joined name of a tree path, such as "PaliGemma/img/head/kernel"."""
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(str(key) for key in keys)


def _logical_axes(name: str, ndim: int, rules: LogicalRules) -> tuple[str | None, ...]:
    for pattern, axes in rules:
        if len(axes) == ndim and re.search(pattern, name):
            return axes
    return (None,) * ndim


def _without_repeats(spec: list[str | None]) -> list[str | None]:
    """A mesh axis may split one dimension only; the first one keeps it."""
    seen: set[str] = set()
    result = []
    for axis in spec:
        result.append(None if axis in seen else axis)
        seen.add(axis or "")
    return result
