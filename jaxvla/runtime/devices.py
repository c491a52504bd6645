"""Which accelerators of this machine each process of a run sees. No jax.

For `runtime.kind` "processes"; Ray does the same for its actors. JAX takes every device that it
sees, and most of its memory, so processes of one machine must not see the same ones.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxvla.cluster import parse_resources
from jaxvla.config import ConfigError, RuntimeConfig, override
from jaxvla.runtime.replica_spec import resource_field

GPU, TPU = "GPU", "TPU"

_PATTERNS = {GPU: (r"nvidia\d+",), TPU: (r"accel\d+", r"vfio/\d+")}
"""Device files. Of TPUs, some machines have the one and some the other."""
_CUDA, _JAX_CUDA, _TPU = "CUDA_VISIBLE_DEVICES", "JAX_CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
"""Chips of a process -> how they lie."""

Environment = dict[str, str]
Offers = Mapping[str, Sequence[str]]
"""GPU or TPU -> what its devices are called in the variable that makes them visible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    """Of a process."""

    name: str
    field: str
    """Of the runtime's config, where it is wished."""
    amount: float


def offered_devices(
    environ: Mapping[str, str] = os.environ, directory: pathlib.Path = pathlib.Path("/dev")
) -> dict[str, tuple[str, ...]]:
    """The accelerators that a process with this environment sees.

    Args:
      environ: CUDA_VISIBLE_DEVICES (and within it JAX_CUDA_VISIBLE_DEVICES) and TPU_VISIBLE_CHIPS
        restrict them; ids of any form, such as of MIG devices, are passed on as they are.
      directory: of the device files. Not the driver is asked: a container may have fewer.

    Raises:
      ConfigError: JAX_CUDA_VISIBLE_DEVICES names devices that CUDA_VISIBLE_DEVICES does not have.
    """
    offers = {
        GPU: _named(environ.get(_CUDA), _count(directory, GPU)),
        TPU: _named(environ.get(_TPU), _count(directory, TPU)),
    }
    chosen = environ.get(_JAX_CUDA, "all")
    if chosen != "all":
        try:
            offers[GPU] = tuple(offers[GPU][int(index)] for index in chosen.split(","))
        except (ValueError, IndexError) as error:
            allowed = f"must be indices of the {len(offers[GPU])} visible GPUs"
            raise ConfigError(_JAX_CUDA, chosen, allowed, f"unset {_JAX_CUDA}") from error
    return offers


def share_out(
    settings: RuntimeConfig, kinds: Iterable[str], offers: Offers
) -> dict[str, Environment]:
    """Name of each process -> variables that show it its own devices and no others.

    A process whose resources name none sees none, unless no process names any: then all see what
    this one does. A GPU can be shared by processes with fractions of it, whose share of its memory
    is then the same fraction of nine tenths.

    Args:
      settings: `*_resources`; GPU and TPU count here, other resources are Ray's alone.
      kinds: of all processes of the run.
      offers: see `offered_devices`.

    Raises:
      ConfigError: there are not enough of them, or an amount is none.
    """
    fields = _fields(kinds)
    shares: dict[str, Environment] = {name: {} for name in fields}
    for resource in (GPU, TPU):
        wishes = _wishes(settings, fields, resource)
        if not any(wish.amount for wish in wishes):
            continue
        given = _give(settings, wishes, offers[resource], resource)
        for wish in wishes:
            devices = given[wish.name]
            is_all = len(devices) == len(offers[resource])
            make = _gpu_environment if resource == GPU else _tpu_environment
            shares[wish.name] |= make(devices, wish.amount, is_all)
    return {name: _on_cpu_without_devices(share) for name, share in shares.items()}


def _named(visible: str | None, count: int) -> tuple[str, ...]:
    """Of a variable, whose list ends before the first device that there is none of."""
    if visible is None:
        return tuple(str(index) for index in range(count))
    names: list[str] = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        if name.startswith("-") or name in ("NoDevFiles", "void", "none"):
            break
        names.append(name)
    return tuple(names)


def _count(directory: pathlib.Path, resource: str) -> int:
    for pattern in _PATTERNS[resource]:
        parent, _, name = pattern.rpartition("/")
        files = (directory / parent).iterdir() if (directory / parent).is_dir() else ()
        found = sum(bool(re.fullmatch(name, x.name)) and not x.is_dir() for x in files)
        if found:
            return found
    return 0


def _fields(kinds: Iterable[str]) -> dict[str, str]:
    """Name of each process -> field of the runtime's config that says its resources."""
    counts: dict[str, int] = {}
    fields: dict[str, str] = {}
    for kind in kinds:
        index = counts.get(kind, 0)
        fields[f"{kind}_{index}"], counts[kind] = resource_field(kind, index), index + 1
    return fields


def _wishes(settings: RuntimeConfig, fields: Mapping[str, str], resource: str) -> list[_Wish]:
    wishes = []
    for name, field in fields.items():
        amount = parse_resources(getattr(settings, field)).get(resource, 0.0)
        is_fraction = resource == GPU and amount < 1
        is_block = resource == GPU or not amount or int(amount) in (*_TPU_BOUNDS, 8)
        wish = _Wish(name=name, field=field, amount=amount)
        if not (is_fraction or amount.is_integer()):
            raise _error(settings, wish, f"{name} cannot have {amount:g} {resource}s")
        if not is_block:
            raise _error(settings, wish, f"{name} can have 1, 2, 4 or 8 TPU chips")
        wishes.append(wish)
    return wishes


def _give(
    settings: RuntimeConfig, wishes: Sequence[_Wish], devices: Sequence[str], resource: str
) -> dict[str, tuple[str, ...]]:
    """Devices by process. The largest first: of TPUs, chips of a process then are neighbours."""
    given: dict[str, tuple[str, ...]] = {}
    left, rooms = list(devices), dict[str, float]()
    for wish in sorted(wishes, key=lambda wish: -wish.amount):
        if 0 < wish.amount < 1:
            shared = next((x for x, room in rooms.items() if room >= wish.amount - 1e-9), None)
            if shared is None and left:
                shared = left.pop(0)
            if shared is not None:
                given[wish.name] = (shared,)
                rooms[shared] = rooms.get(shared, 1.0) - wish.amount
                continue
        count = math.ceil(wish.amount)
        if count > len(left):
            total = sum(wish.amount for wish in wishes)
            what = (
                f"all processes together ask for {total:g} {resource}s of this machine, which has "
                f"{len(devices)}, and too little is left for {wish.name}"
            )
            raise _error(settings, wish, what)
        given[wish.name], left = tuple(left[:count]), left[count:]
    return given


def _gpu_environment(devices: Sequence[str], amount: float, is_all: bool) -> Environment:
    del is_all
    share = {_CUDA: ",".join(devices), _JAX_CUDA: "all"}
    if 0 < amount < 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * amount:.3f}"
    return share


def _tpu_environment(devices: Sequence[str], amount: float, is_all: bool) -> Environment:
    """libtpu also has to know that it shall not wait for the other chips of the machine
    (https://github.com/jax-ml/jax/issues/14977)."""
    del amount
    if is_all:
        return {_TPU: ",".join(devices)}
    bounds = _TPU_BOUNDS.get(len(devices), "1,1,1")
    return {
        _TPU: ",".join(devices),
        "TPU_CHIPS_PER_HOST_BOUNDS": bounds,
        "TPU_HOST_BOUNDS": "1,1,1",
    }


def _on_cpu_without_devices(share: Environment) -> Environment:
    """JAX would look for devices, and complain that there are none."""
    has_none = share and not any(share.get(name) for name in (_CUDA, _TPU))
    return {**share, "JAX_PLATFORMS": "cpu"} if has_none else share


def _error(settings: RuntimeConfig, wish: _Wish, allowed: str) -> ConfigError:
    fix = override(f"runtime.{wish.field}", "") + ", or ask for less elsewhere"
    return ConfigError(f"runtime.{wish.field}", getattr(settings, wish.field), allowed, fix)
