"""One program over several host processes: how they meet, and what takes all of them.

All processes execute the same jitted functions in the same order. A function marked
"collective" must be called by all of them, in the same place of that order: it waits for the
others. In the usual run of one process nothing here waits or copies more than it must.
"""

import functools
import ipaddress
import logging
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LOG = logging.getLogger(__name__)

LEADER = 0
"""Index of the process that has the queue, publishes, records and evaluates."""

_EXIT_FAILED = 1


class NotMetError(RuntimeError):
    """The processes of a learner did not come together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """How the processes of a learner meet."""

    num_processes: int
    process_index: int = LEADER
    """Of this process."""
    coordinator: str = ""
    """HOST:PORT at which they meet, on the leader's host. JAX lets in whoever connects, so the
    network must be trusted. Empty: what TPU, Slurm, MPI or Kubernetes says, as of the index."""
    connect_timeout_s: int = 300
    """Seconds that a process waits for the others."""
    heartbeat_timeout_s: int = 30
    """Seconds of silence after which a process counts as dead, which ends all the others."""


def initialize(settings: GroupSettings) -> None:
    """Joins the learner's processes to one `jax.distributed` group; nothing for one process.

    Must come before anything that starts a JAX backend. Returns once all processes are there; if
    they are not within `connect_timeout_s`, says so and ends this process with exit code 1 (JAX
    would abort it). When one of them dies later, JAX aborts the others within
    `heartbeat_timeout_s`: whoever supervises them starts all of them again.

    Raises:
      NotMetError: the processes did not meet, or their number is another one.
    """
    if settings.num_processes == 1:
        return
    patience = threading.Timer(settings.connect_timeout_s, _give_up, [settings])
    patience.daemon = True
    patience.start()
    try:
        _join(settings)
    finally:
        patience.cancel()
    if jax.process_count() != settings.num_processes:
        raise NotMetError(
            f"the learner has {jax.process_count()} processes, {settings.num_processes} expected"
        )
    _LOG.info(
        "learner process %d of %d, devices %s",
        jax.process_index(),
        jax.process_count(),
        [device.id for device in jax.local_devices()],
    )


def _join(settings: GroupSettings) -> None:
    # jaxvla handles SIGTERM itself: the leader decides between two updates.
    jax.config.update("jax_enable_preemption_service", False)
    address = settings.coordinator or None
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=settings.num_processes if address else None,
            process_id=settings.process_index if address else None,
            initialization_timeout=settings.connect_timeout_s + 60,  # `_give_up` comes first
            heartbeat_timeout_seconds=settings.heartbeat_timeout_s,
            shutdown_timeout_seconds=settings.heartbeat_timeout_s,
            coordinator_bind_address=_bind_address(address),
        )
    except (ValueError, RuntimeError) as error:
        raise NotMetError(
            f"the {settings.num_processes} learner processes did not meet at "
            f"{_where(settings)}: {error}"
        ) from error


def _where(settings: GroupSettings) -> str:
    return settings.coordinator or "the address that the cluster gives"


def _give_up(settings: GroupSettings) -> None:
    sys.stderr.write(
        f"error: learner process {settings.process_index} has waited "
        f"{settings.connect_timeout_s} s at {_where(settings)} for all "
        f"{settings.num_processes} to be there\n"
    )
    sys.stderr.flush()
    os._exit(_EXIT_FAILED)


def _bind_address(address: str | None) -> str | None:
    """Where the coordinator listens. JAX would listen on all addresses of the host; nothing is
    asked of those who connect, so it is the given one where that is a number."""
    host = address.rpartition(":")[0].strip("[]") if address else ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None  # a name may stand for an address of another kind of network
    return address


def is_leader() -> bool:
    """Whether this is process 0; always so in a run of one process."""
    return jax.process_index() == LEADER


def gather(array: jax.Array, *, everywhere: bool = False) -> np.ndarray | None:
    """Collective: a copy of a whole array on the leader's host.

    Where the devices of each receiver hold all of it between them (a mesh whose fsdp and tensor
    axes stay within a host) nothing crosses the network. Otherwise every device holds the whole
    array for a moment.

    Args:
      array: of this process alone, or of all.
      everywhere: on the hosts of all processes.

    Returns:
      The value; None in processes that do not receive it.
    """
    if array.is_fully_addressable:
        # Of a copy: JAX keeps the host value of an array for as long as the array lives.
        return np.asarray(jax.device_put(array, array.sharding, may_alias=False))
    receivers = range(jax.process_count()) if everywhere else (LEADER,)
    if not all(_holds(array.sharding, array.shape, process) for process in receivers):
        array = _replicator(array.sharding)(array)
    return _join_shards(array) if jax.process_index() in receivers else None


def _join_shards(array: jax.Array) -> np.ndarray:
    """The value of an array whose shards are all among those of this process."""
    value = np.empty(array.shape, array.dtype)
    parts = {_bounds(shard.index, array.shape): shard for shard in array.addressable_shards}
    for shard in parts.values():
        copy = jax.device_put(shard.data, shard.data.sharding, may_alias=False)
        value[shard.index] = np.asarray(copy)
    return value


def _holds(placement: jax.sharding.Sharding, shape: tuple[int, ...], process: int) -> bool:
    """Whether the devices of a process hold every part of an array between them."""
    everywhere, there = set(), set()
    for device, index in placement.devices_indices_map(shape).items():
        everywhere.add(_bounds(index, shape))
        if device.process_index == process:
            there.add(_bounds(index, shape))
    return there == everywhere


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Begin and end per dimension; slices cannot be members of a set."""
    pairs = zip(index, shape, strict=True)
    return tuple((x.indices(size)[0], x.indices(size)[1]) for x, size in pairs)


def _replicator(placement: jax.sharding.Sharding) -> Any:
    if not isinstance(placement, NamedSharding) or not isinstance(placement.mesh, Mesh):
        raise ValueError(f"cannot gather an array that lies as {placement}: it has no mesh")
    return _replicate_on(placement.mesh)


@functools.cache
def _replicate_on(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def agree(is_well: bool) -> bool:
    """Collective: whether all processes say True. All get the same answer."""
    if jax.process_count() == 1:
        return is_well
    return bool(np.all(multihost_utils.process_allgather(np.asarray(is_well))))


def same_everywhere(number: int) -> bool:
    """Collective: whether all processes give the same number, in [-2**31, 2**31)."""
    if jax.process_count() == 1:
        return True
    found = multihost_utils.process_allgather(np.asarray(number, np.int32))
    return bool(np.all(found == found[0]))
