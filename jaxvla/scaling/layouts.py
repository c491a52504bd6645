"""All layouts of a number of devices, and those of them worth trying. No jax.

Enumerated are the layouts in which every device has a role, and any two roles share all of
their devices or none; or in which one role lies across all devices and the other two share
them out:

    colocated=N                              all roles share
    simulation+serving=A learning=B          two share, in three ways (hybrid)
    simulation=A serving=B learning=C        none share (disaggregated)
    simulation=A serving=B learning=N@0      one across two, in three ways (hybrid)

with all A, B, C, all orders of the parts, and all sizes of the mesh axes. Roles that overlap
in part can be written in the layout language but are not enumerated.

Every layout is counted: it is kept, or pruned for exactly one of `REASONS`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from jaxvla.config import ConfigError, ExperimentConfig
from jaxvla.layout import ROLES, Layout, RoleLayout, write_layout
from jaxvla.validation import validate_batches

_Part = tuple[str, ...]
"""Roles on the same devices."""

_MISFITS = {
    "simulation": "envs do not divide over the simulation mesh",
    "serving": "batches do not divide over the serving mesh",
    "learning": "batches do not divide over the learning mesh",
}
_HOSTS = "a role neither lies within one host nor fills whole ones"
_MEMORY = "needs more memory than a device has"
_ORDER = "the same parts in another order"
_TENSOR = "tensor parallelism of what fits with less of it"
_FSDP = "sharding of a learner that fits with less of it"

REASONS = (*_MISFITS.values(), _HOSTS, _MEMORY, _ORDER, _TENSOR, _FSDP)
"""Why layouts are pruned, in the order in which they are looked at: the first ones make a layout
impossible, the last three not worth trying."""

RULES = {"order": _ORDER, "tensor": _TENSOR, "fsdp": _FSDP}
"""The last three by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """What a layout has to fit."""

    config: ExperimentConfig
    """Valid but for its layout, which is not read."""
    devices_per_host: int = 0
    """0: all devices are of one host."""
    memory: Callable[[str, RoleLayout], int] | None = None
    """(role, its devices and axes) -> bytes on each of its devices."""
    device_memory: int = 0
    """Bytes of a device; 0: no limit."""
    keep: tuple[str, ...] = ()
    """Names of `RULES` that are not applied."""


@dataclass(kw_only=True, slots=True)
class Survey:
    """What became of all layouts."""

    kept: list[Layout] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)
    """Reason -> number of layouts."""

    @property
    def total(self) -> int:
        """Layouts looked at."""
        return len(self.kept) + self.pruned.total()


def enumerate_layouts(num_devices: int, constraints: Constraints) -> list[Layout]:
    """Layouts worth trying, see `survey_layouts`."""
    return survey_layouts(num_devices, constraints).kept


def survey_layouts(num_devices: int, constraints: Constraints) -> Survey:
    """Looks at all layouts of a number of devices, all of which are used.

    Args:
      num_devices: at least 1.
      constraints: what they have to fit.

    Raises:
      ConfigError: the config fits no layout whatever.
      ValueError: `num_devices` < 1, or a name of `constraints.keep` is unknown.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices = {num_devices}: must be > 0")
    unknown = sorted(set(constraints.keep) - set(RULES))
    if unknown:
        raise ValueError(f"no rule {unknown[0]!r}; rules: {', '.join(RULES)}")
    surveyor = _Surveyor(constraints)
    for form in _FORMS:
        for sizes in _compositions(num_devices, len(form.parts)):
            surveyor.look_at(form, sizes)
    return surveyor.survey


@dataclass(frozen=True, slots=True)
class _Form:
    """Which roles share devices."""

    parts: tuple[_Part, ...]
    """They share out all devices."""
    across: str = ""
    """Role that lies across all parts."""


_FORMS = (
    _Form((ROLES,)),
    *(_Form(((first,), (second,)), across) for across, first, second in (
        ("learning", "simulation", "serving"),
        ("serving", "simulation", "learning"),
        ("simulation", "serving", "learning"),
    )),
    _Form((("simulation", "serving"), ("learning",))),
    _Form((("simulation",), ("serving", "learning"))),
    _Form((("simulation", "learning"), ("serving",))),
    _Form((("simulation",), ("serving",), ("learning",))),
)  # fmt: skip


def _compositions(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `count` positive integers."""
    for cuts in itertools.combinations(range(1, total), count - 1):
        edges = (0, *cuts, total)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def role_layouts(role: str, num_devices: int) -> Iterator[RoleLayout]:
    """A role on the first devices, with every choice of its axes; large `data` first."""
    for tensor in _divisors(num_devices if role != "simulation" else 1):
        for fsdp in _divisors(num_devices // tensor if role == "learning" else 1):
            sizes = {"data": num_devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            known = {"simulation": ("data",), "serving": ("data", "tensor")}.get(role, sizes)
            axes = {axis: sizes[axis] for axis in known}
            yield RoleLayout(first=0, num_devices=num_devices, axes=axes)


def _divisors(number: int) -> list[int]:
    return [x for x in range(1, number + 1) if number % x == 0]


class _RoleOptions:
    """Meshes of each role by its number of devices. Whether batches divide over a mesh does not
    depend on the other roles, so each is looked at once."""

    def __init__(self, config: ExperimentConfig):
        self._config = config
        self._known: dict[tuple[str, int], tuple[list[RoleLayout], list[RoleLayout]]] = {}
        serving = config.serving
        servers = serving.num_servers if serving.split_devices else 1
        self._smallest = {
            role: next(role_layouts(role, servers if role == "serving" else 1)) for role in ROLES
        }
        validate_batches(config, Layout(text="", roles=self._smallest))

    def of(self, role: str, num_devices: int) -> tuple[list[RoleLayout], list[RoleLayout]]:
        """(all meshes, those that the batches divide over)."""
        key = role, num_devices
        if key not in self._known:
            meshes = list(role_layouts(role, num_devices))
            self._known[key] = meshes, [x for x in meshes if self._fits(role, x)]
        return self._known[key]

    def _fits(self, role: str, mesh: RoleLayout) -> bool:
        roles = self._smallest | {role: mesh}
        try:
            validate_batches(self._config, Layout(text="", roles=roles))
        except ConfigError:
            return False
        return True


class _Surveyor:
    """Sorts layouts into kept and pruned ones."""

    def __init__(self, constraints: Constraints):
        self.survey = Survey()
        self._constraints = constraints
        self._options = _RoleOptions(constraints.config)
        self._bytes: dict[tuple[str, int, tuple[int, ...]], int] = {}

    def look_at(self, form: _Form, sizes: tuple[int, ...]) -> None:
        """All orders and all meshes of parts of given sizes."""
        counts = {role: n for part, n in zip(form.parts, sizes, strict=True) for role in part}
        if form.across:
            counts[form.across] = sum(sizes)
        options = {role: self._options.of(role, counts[role]) for role in ROLES}
        orders = list(itertools.permutations(zip(form.parts, sizes, strict=True)))
        fitting = 1
        for index, role in enumerate(ROLES):
            num_all, num_good = (len(meshes) for meshes in options[role])
            # Roles before it fit, it does not, those after it may or may not.
            rest = math.prod(len(options[later][0]) for later in ROLES[index + 1 :])
            self._prune(_MISFITS[role], len(orders) * fitting * (num_all - num_good) * rest)
            fitting *= num_good
        if fitting:
            self._look_at_orders(form, orders, options, fitting)

    def _look_at_orders(
        self,
        form: _Form,
        orders: list[tuple[tuple[_Part, int], ...]],
        options: dict[str, tuple[list[RoleLayout], list[RoleLayout]]],
        fitting: int,
    ) -> None:
        is_found = False
        for order in orders:
            first = _first_devices(form, order)
            every, good = (
                [[replace(x, first=first[r]) for x in options[r][kind]] for r in ROLES]
                for kind in (0, 1)
            )
            if not all(self._fits_hosts(meshes[0]) for meshes in good):
                self._prune(_HOSTS, fitting)
            elif is_found and "order" not in self._constraints.keep:
                self._prune(_ORDER, fitting)
            else:
                is_found = True
                self._choose_axes(every, good)

    def _choose_axes(self, every: list[list[RoleLayout]], good: list[list[RoleLayout]]) -> None:
        """Of the good meshes on given devices, those that fit with the least splitting of the
        model. A model that would fit with less does not get more of it because batches divide so:
        other numbers of devices are for that."""
        alternatives = [x for x in _products(every) if self._fits_memory(x)]
        keep = self._constraints.keep
        tensors = {_sizes(x, "tensor") for x in alternatives}
        both = {(_sizes(x, "tensor"), _sizes(x, "fsdp")) for x in alternatives}
        for roles in _products(good):
            tensor, fsdp = _sizes(roles, "tensor"), _sizes(roles, "fsdp")
            if not self._fits_memory(roles):
                self._prune(_MEMORY, 1)
            elif "tensor" not in keep and any(_is_less(x, tensor) for x in tensors):
                self._prune(_TENSOR, 1)
            elif "fsdp" not in keep and any(t == tensor and _is_less(x, fsdp) for t, x in both):
                self._prune(_FSDP, 1)
            else:
                self.survey.kept.append(write_layout(roles))

    def _fits_hosts(self, mesh: RoleLayout) -> bool:
        size, devices = self._constraints.devices_per_host, mesh.devices
        if not size:
            return True
        is_within = devices[0] // size == devices[-1] // size
        return is_within or (devices.start % size == 0 and devices.stop % size == 0)

    def _fits_memory(self, roles: dict[str, RoleLayout]) -> bool:
        """Whether all roles of every device fit in it together."""
        limit = self._constraints.device_memory
        if not limit or self._constraints.memory is None:
            return True
        occupants = Layout(text="", roles=roles).occupants()
        return all(
            sum(self._role_bytes(role, roles[role]) for role in names) <= limit
            for _, names in occupants
        )

    def _role_bytes(self, role: str, mesh: RoleLayout) -> int:
        assert self._constraints.memory is not None, "there is a limit only with an estimate"
        key = role, mesh.num_devices, tuple(mesh.axes.values())
        if key not in self._bytes:
            self._bytes[key] = self._constraints.memory(role, mesh)
        return self._bytes[key]

    def _prune(self, reason: str, count: int) -> None:
        if count:
            self.survey.pruned[reason] += count


def _first_devices(form: _Form, order: tuple[tuple[_Part, int], ...]) -> dict[str, int]:
    """Role -> index of its first device, where the parts follow each other in an order."""
    first, start = {form.across: 0} if form.across else {}, 0
    for part, size in order:
        first |= dict.fromkeys(part, start)
        start += size
    return first


def _products(meshes: list[list[RoleLayout]]) -> Iterator[dict[str, RoleLayout]]:
    """All choices of a mesh per role."""
    for choice in itertools.product(*meshes):
        yield dict(zip(ROLES, choice, strict=True))


def _sizes(roles: dict[str, RoleLayout], axis: str) -> tuple[int, ...]:
    """Of an axis in every role."""
    return tuple(roles[role].axes.get(axis, 1) for role in ROLES)


def _is_less(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether no size is greater, and some size is less."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
