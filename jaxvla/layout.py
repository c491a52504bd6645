"""The layout language: which devices each role has, and its mesh axes. No jax.

    colocated=8                                       every role on the same 8 devices
    simulation=2 serving=2 learning=4:data2,fsdp2     disjoint role meshes
    simulation+serving=4 learning=4:fsdp4             hybrid: two roles share 4 devices

Each group of roles takes the next devices in order. An axis that is not named gets
size 1, except `data`, which takes what is left.
"""

import math
import re
from dataclasses import dataclass

ROLES = ("simulation", "serving", "learning")
AXES = {
    "simulation": ("data",),
    "serving": ("data", "tensor"),
    "learning": ("data", "fsdp", "tensor"),
}
"""Mesh axes of each role, in mesh order."""


class LayoutError(ValueError):
    """The layout string is malformed or impossible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleLayout:
    """Devices and axes of one role."""

    first: int
    """Index of the first device."""
    num_devices: int
    axes: dict[str, int]
    """Axis name -> size, in mesh order; the product is `num_devices`."""

    def __str__(self) -> str:
        sizes = ",".join(f"{axis}{size}" for axis, size in self.axes.items())
        last = self.first + self.num_devices - 1
        span = str(self.first) if self.num_devices == 1 else f"{self.first}-{last}"
        return f"devices {span}, {sizes}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A parsed layout: one entry per role."""

    text: str
    roles: dict[str, RoleLayout]

    @property
    def num_devices(self) -> int:
        """Devices that the layout needs."""
        return max(role.first + role.num_devices for role in self.roles.values())

    @property
    def placement(self) -> str:
        """ "colocated", "disaggregated" or "hybrid"."""
        spans = {(role.first, role.num_devices) for role in self.roles.values()}
        return {1: "colocated", len(ROLES): "disaggregated"}.get(len(spans), "hybrid")


def parse_layout(text: str) -> Layout:
    """Parses a layout string.

    Raises:
      LayoutError: unknown role or axis, a role that is missing or named twice, an axis that is
        named twice or that no role of its part has, or axis sizes whose product is not the
        number of devices.
    """
    roles: dict[str, RoleLayout] = {}
    first = 0
    for part in text.split():
        names, num_devices, given = _parse_part(part)
        for name in names:
            if name in roles:
                raise LayoutError(f"role {name!r} is given twice")
            axes = _mesh_axes(name, num_devices, given)
            roles[name] = RoleLayout(first=first, num_devices=num_devices, axes=axes)
        first += num_devices
    missing = [name for name in ROLES if name not in roles]
    if missing:
        raise LayoutError(f"no devices for {', '.join(missing)}")
    return Layout(text=text, roles=roles)


def _parse_part(part: str) -> tuple[tuple[str, ...], int, dict[str, int]]:
    """Roles, devices and named axes of a part such as "learning=4:data2,fsdp2"."""
    match = re.fullmatch(r"([a-z+]+)=([0-9]+)(?::([a-z0-9,]+))?", part)
    if not match or int(match[2]) < 1:
        raise LayoutError(f"{part!r} is not ROLE[+ROLE]=DEVICES[:AXISn,AXISn]")
    names = ROLES if match[1] == "colocated" else tuple(match[1].split("+"))
    for name in names:
        if name not in ROLES:
            raise LayoutError(f"{name!r} is no role; roles: colocated, {', '.join(ROLES)}")
    known = [axis for axis in AXES["learning"] if any(axis in AXES[name] for name in names)]
    given: dict[str, int] = {}
    for item in match[3].split(",") if match[3] else ():
        axis = re.fullmatch(r"([a-z]+)([0-9]+)", item)
        if not axis or int(axis[2]) < 1:
            raise LayoutError(f"{item!r} is not AXISn, such as data2")
        if axis[1] not in known:
            raise LayoutError(f"{match[1]} has no axis {axis[1]!r}; axes: {', '.join(known)}")
        if axis[1] in given:
            raise LayoutError(f"axis {axis[1]!r} is given twice in {part!r}")
        given[axis[1]] = int(axis[2])
    return names, int(match[2]), given


def _mesh_axes(role: str, num_devices: int, given: dict[str, int]) -> dict[str, int]:
    """Sizes of a role's mesh axes. Where the part names axes that only other roles of it have
    (colocated=8:data2,fsdp4), this role's `data` takes what is left."""
    axes = {axis: given.get(axis, 1) for axis in AXES[role]}
    if "data" not in given or set(given) - set(axes):
        others = math.prod(size for axis, size in axes.items() if axis != "data")
        if num_devices % others:
            raise LayoutError(f"{role}: {num_devices} devices do not divide by {others}")
        axes["data"] = num_devices // others
    if math.prod(axes.values()) != num_devices:
        raise LayoutError(f"{role}: axes {axes} do not multiply to {num_devices} devices")
    return axes
