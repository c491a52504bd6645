"""The layout language: which devices each role has, and its mesh axes. No jax.

    colocated=8                                       every role on the same 8 devices
    simulation=2 serving=2 learning=4:data2,fsdp2     disjoint role meshes
    simulation+serving=4 learning=4:fsdp4             hybrid: two roles share 4 devices
    simulation=1@0 serving=4@0 learning=6@2:fsdp6     any overlap: COUNT@FIRST_DEVICE

A part takes the devices that follow those of the part before it, unless it names its first.
An axis that is not named gets size 1, except `data`, which takes what is left.
"""

import itertools
import math
import re
from dataclasses import dataclass, replace

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

    @property
    def devices(self) -> range:
        """Indices of the devices."""
        return range(self.first, self.first + self.num_devices)

    def split(self, count: int) -> "tuple[RoleLayout, ...]":
        """Equal parts, one after the other; it is the `data` axis that is cut.

        Raises:
          LayoutError: the axis does not divide.
        """
        data = self.axes["data"]
        if data % count:
            raise LayoutError(f"a data axis of {data} does not divide into {count} parts")
        size, axes = self.num_devices // count, self.axes | {"data": data // count}
        return tuple(
            replace(self, first=self.first + index * size, num_devices=size, axes=axes)
            for index in range(count)
        )

    def __str__(self) -> str:
        sizes = ",".join(f"{axis}{size}" for axis, size in self.axes.items())
        return f"{span(self.devices)}, {sizes}"


def span(devices: range) -> str:
    """Such as "devices 2-5"."""
    return f"devices {devices[0]}" + (f"-{devices[-1]}" if len(devices) > 1 else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A parsed layout: one entry per role."""

    text: str
    roles: dict[str, RoleLayout]

    @property
    def num_devices(self) -> int:
        """Devices that the layout needs."""
        return max(role.devices.stop for role in self.roles.values())

    def in_own_processes(self) -> "Layout":
        """The same where every program has devices of its own: each role's begin at device 0."""
        roles = {name: replace(role, first=0) for name, role in self.roles.items()}
        return replace(self, roles=roles)

    @property
    def placement(self) -> str:
        """ "colocated" (all roles on the same devices), "disaggregated" (no two roles share a
        device) or "hybrid" (anything between)."""
        if len({role.devices for role in self.roles.values()}) == 1:
            return "colocated"
        is_disjoint = all(len(roles) == 1 for _, roles in self.occupants())
        return "disaggregated" if is_disjoint else "hybrid"

    def occupants(self) -> list[tuple[range, tuple[str, ...]]]:
        """Runs of devices that have the same roles, in order; devices without any are left out."""
        edges = {edge for x in self.roles.values() for edge in (x.devices.start, x.devices.stop)}
        runs = [range(*pair) for pair in itertools.pairwise(sorted(edges))]
        found = [
            (run, tuple(name for name, x in self.roles.items() if run.start in x.devices))
            for run in runs
        ]
        return [(run, roles) for run, roles in found if roles]


def parse_layout(text: str) -> Layout:
    """Parses a layout string.

    Raises:
      LayoutError: unknown role or axis, a role that is missing or named twice, an axis that is
        named twice or that no role of its part has, or axis sizes whose product is not the
        number of devices.
    """
    roles: dict[str, RoleLayout] = {}
    following = 0
    for part in text.split():
        names, num_devices, first, given = _parse_part(part)
        first = following if first is None else first
        for name in names:
            if name in roles:
                raise LayoutError(f"role {name!r} is given twice")
            axes = _mesh_axes(name, num_devices, given)
            roles[name] = RoleLayout(first=first, num_devices=num_devices, axes=axes)
        following = first + num_devices
    missing = [name for name in ROLES if name not in roles]
    if missing:
        raise LayoutError(f"no devices for {', '.join(missing)}")
    return Layout(text=text, roles=roles)


def _parse_part(part: str) -> tuple[tuple[str, ...], int, int | None, dict[str, int]]:
    """Roles, devices, the first of them and axes of a part such as "learning=4@2:data2,fsdp2"."""
    match = re.fullmatch(r"([a-z+]+)=([0-9]+)(?:@([0-9]+))?(?::([a-z0-9,]+))?", part)
    if not match or int(match[2]) < 1:
        raise LayoutError(f"{part!r} is not ROLE[+ROLE]=DEVICES[@FIRST][:AXISn,AXISn]")
    names = ROLES if match[1] == "colocated" else tuple(match[1].split("+"))
    for name in names:
        if name not in ROLES:
            raise LayoutError(f"{name!r} is no role; roles: colocated, {', '.join(ROLES)}")
    known = [axis for axis in AXES["learning"] if any(axis in AXES[name] for name in names)]
    given: dict[str, int] = {}
    for item in match[4].split(",") if match[4] else ():
        axis = re.fullmatch(r"([a-z]+)([0-9]+)", item)
        if not axis or int(axis[2]) < 1:
            raise LayoutError(f"{item!r} is not AXISn, such as data2")
        if axis[1] not in known:
            raise LayoutError(f"{match[1]} has no axis {axis[1]!r}; axes: {', '.join(known)}")
        if axis[1] in given:
            raise LayoutError(f"axis {axis[1]!r} is given twice in {part!r}")
        given[axis[1]] = int(axis[2])
    first = None if match[3] is None else int(match[3])
    return names, int(match[2]), first, given


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


def write_layout(roles: dict[str, RoleLayout]) -> Layout:
    """The layout of role layouts, with its shortest text.

    Args:
      roles: one entry per role.
    """
    ordered = {role: roles[role] for role in ROLES}
    joined = _joined_text(ordered)
    try:
        if parse_layout(joined).roles == ordered:
            return Layout(text=joined, roles=ordered)
    except LayoutError:  # roles on the same devices have axes that no common part can tell
        pass
    return Layout(text=_explicit_text(ordered), roles=ordered)


def _joined_text(roles: dict[str, RoleLayout]) -> str:
    """One part for all roles on the same devices, by first device. Others than those that follow
    each other say where they begin."""
    parts: dict[range, list[str]] = {}
    for name, role in roles.items():
        parts.setdefault(role.devices, []).append(name)
    texts, following = [], 0
    # The parts that tile the devices come first, then what lies across them.
    for devices in sorted(parts, key=lambda x: (_is_spanning(x, parts), x.start)):
        names = parts[devices]
        title = "colocated" if len(names) == len(ROLES) else "+".join(names)
        axes: dict[str, int] = {}
        for name in names:
            axes |= roles[name].axes
        texts.append(_part_text(title, devices, axes, following))
        following = devices.stop
    return " ".join(texts)


def _is_spanning(devices: range, parts: dict[range, list[str]]) -> bool:
    """Whether other parts lie within these devices."""
    return any(x != devices and x.start in devices and x[-1] in devices for x in parts)


def _explicit_text(roles: dict[str, RoleLayout]) -> str:
    """One part per role, each of which says where it begins."""
    return " ".join(_part_text(name, x.devices, x.axes, -1) for name, x in roles.items())


def _part_text(title: str, devices: range, axes: dict[str, int], following: int) -> str:
    """One part; `data` is left out, as it takes what is left."""
    where = "" if devices.start == following else f"@{devices.start}"
    given = ",".join(f"{axis}{n}" for axis, n in axes.items() if axis != "data" and n > 1)
    return f"{title}={len(devices)}{where}" + (f":{given}" if given else "")
