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
      LayoutError: unknown role or axis, a role that is missing or named twice, or axis
        sizes whose product is not the number of devices.
    """
    roles: dict[str, RoleLayout] = {}
    first = 0
    for part in text.split():
        match = re.fullmatch(r"([a-z+]+)=(\d+)(?::([a-z0-9,]+))?", part)
        if not match or int(match[2]) < 1:
            raise LayoutError(f"{part!r} is not ROLE[+ROLE]=DEVICES[:AXISn,AXISn]")
        names = ROLES if match[1] == "colocated" else tuple(match[1].split("+"))
        for name in names:
            if name not in ROLES:
                raise LayoutError(f"{name!r} is no role; roles: colocated, {', '.join(ROLES)}")
            if name in roles:
                raise LayoutError(f"role {name!r} is given twice")
            axes = _parse_axes(name, int(match[2]), match[3] or "")
            roles[name] = RoleLayout(first=first, num_devices=int(match[2]), axes=axes)
        first += int(match[2])
    missing = [name for name in ROLES if name not in roles]
    if missing:
        raise LayoutError(f"no devices for {', '.join(missing)}")
    return Layout(text=text, roles=roles)


def _parse_axes(role: str, num_devices: int, text: str) -> dict[str, int]:
    """Sizes of a role's mesh axes; axes of other roles (colocated=8:fsdp4) are left out."""
    given: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z]+)(\d+)", item)
        if not match or int(match[2]) < 1:
            raise LayoutError(f"{item!r} is not AXISn, such as fsdp2")
        if match[1] not in AXES["learning"]:
            raise LayoutError(f"{match[1]!r} is no mesh axis; axes: {', '.join(AXES['learning'])}")
        given[match[1]] = int(match[2])
    axes = {axis: given.get(axis, 1) for axis in AXES[role]}
    others = math.prod(size for axis, size in axes.items() if axis != "data")
    if "data" not in given or set(given) - set(AXES[role]):
        if num_devices % others:
            raise LayoutError(f"{role}: {num_devices} devices do not divide by {others}")
        axes["data"] = num_devices // others
    if math.prod(axes.values()) != num_devices:
        raise LayoutError(f"{role}: axes {axes} do not multiply to {num_devices} devices")
    return axes
