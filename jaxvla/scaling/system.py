"""What is simulated, and what comes out: no simpy, no jax."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxvla.assignment import most_groups, parse_assignment
from jaxvla.config import ScheduleConfig
from jaxvla.layout import parse_layout
from jaxvla.telemetry.activity import Activity

HOST_ENVS = ("libero_host",)
"""Envs that step in processes beside the devices. Their groups are taken not to slow each other."""
_CORES = "cores"
"""Name of a machine whose stages share its cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """What is simulated. Every list names devices; programs that name the same ones share them."""

    group_devices: tuple[tuple[str, ...], ...]
    """By env group: where it steps."""
    server_devices: tuple[tuple[str, ...], ...]
    """By policy server."""
    learner_devices: tuple[str, ...]
    cores: Mapping[str, float] = field(default_factory=dict)
    """Name -> processor cores, of those "devices" that are machines whose stages share cores."""
    envs_per_group: int
    segment_length: int
    """Chunk queries of an env in a whole trajectory."""
    assignment: tuple[int, ...] | None
    """Server of each env group; None: greedy."""
    buckets: tuple[int, ...]
    """Batch sizes, ascending."""
    trigger_rows: int
    max_wait_s: float
    max_batch: int
    is_adaptive: bool = False
    schedule: ScheduleConfig
    trajectories_per_update: int
    lockstep_groups: int = 0
    """Groups that move together where `schedule.overlap_rollout` is off; 0: all."""
    num_warmup: int
    """First updates, which are not measured; at least 1."""
    num_updates: int
    """Of the whole run."""
    is_endless: bool = False
    """Simulation goes on as if there were updates after the last one."""
    num_train_pieces: int = 1
    """Parts of a whole batch's training, between which others may use the learner's devices."""

    def __post_init__(self):
        if not 1 <= self.num_warmup < self.num_updates:
            raise ValueError(
                f"num_warmup = {self.num_warmup}, num_updates = {self.num_updates}; need "
                "1 <= num_warmup < num_updates"
            )
        for name in ("group_devices", "server_devices", "learner_devices", "buckets"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if self.max_batch > self.buckets[-1]:
            raise ValueError(f"max_batch = {self.max_batch}, the last bucket is {self.buckets[-1]}")

        together = self.lockstep_groups or self.num_groups
        if not self.schedule.overlap_rollout and self.trajectories_per_update % together:
            raise ValueError(
                f"trajectories_per_update = {self.trajectories_per_update} in lockstep, must be a "
                f"multiple of the {together} env groups that move together"
            )

    @property
    def num_groups(self) -> int:
        """Env groups."""
        return len(self.group_devices)

    @property
    def devices(self) -> list[str]:
        """Names of all devices, in order of mention."""
        sets = (*self.group_devices, *self.server_devices, self.learner_devices)
        return list(dict.fromkeys(name for names in sets for name in names))


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Simulated figures, over the measured updates."""

    env_steps_per_s: float
    update_s: float
    """Mean time of an update."""
    update_std_s: float
    staleness_mean: float
    staleness_max: int
    """Of the whole run."""
    staleness_bound: int
    activities: Mapping[str, Activity]
    """Role -> what its threads did."""
    device_busy: Mapping[str, float]
    """Share of the time in which a device worked; of shared cores, the share of them."""
    rows_per_batch: float
    """Of all batches of the run."""

    @property
    def busy(self) -> dict[str, float]:
        """Role -> share of its threads' time in which they worked."""
        return {role: activity.busy_fraction for role, activity in self.activities.items()}


def system_of(
    config: Mapping[str, Any], *, platform: str, num_cores: float, num_warmup: int
) -> System:
    """The run that a resolved config describes, in one process.

    Args:
      config: by section, as config.json has it.
      platform: of its devices. On "cpu" every stage shares the cores of the machine, whatever the
        layout; elsewhere stages on the same devices take turns.
      num_cores: of the machine; only read on "cpu".
      num_warmup: first updates that are not measured.

    Raises:
      ValueError: a field is unknown here or has a value that no run would have.
    """
    simulation, serving = config["simulation"], config["serving"]
    num_groups, num_servers = simulation["num_groups"], serving.get("num_servers", 1)
    assignment = serving.get("assignment", "round_robin")
    most_groups(assignment, num_groups=num_groups, num_servers=num_servers)
    is_shared = platform == "cpu"
    group_devices, server_devices, learner_devices = (
        (((_CORES,),) * num_groups, ((_CORES,),) * num_servers, (_CORES,))
        if is_shared
        else _devices(config, num_groups, num_servers)
    )
    return System(
        group_devices=group_devices,
        server_devices=server_devices,
        learner_devices=learner_devices,
        cores={_CORES: num_cores} if is_shared else {},
        envs_per_group=simulation["envs_per_group"],
        segment_length=simulation["segment_length"],
        assignment=parse_assignment(assignment, num_groups=num_groups, num_servers=num_servers),
        buckets=tuple(serving["buckets"]),
        trigger_rows=serving["trigger_size"],
        max_wait_s=serving["max_wait_ms"] / 1e3,
        max_batch=serving["max_batch"],
        is_adaptive=serving.get("batching", "fixed") == "adaptive",
        schedule=ScheduleConfig(**config["schedule"]),
        trajectories_per_update=config["learning"]["trajectories_per_update"],
        lockstep_groups=num_groups // simulation.get("num_simulators", 1),
        num_warmup=num_warmup,
        num_updates=config["learning"]["num_updates"],
    )


def _devices(
    config: Mapping[str, Any], num_groups: int, num_servers: int
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Devices of every group, of every server and of the learner. Those that the same programs
    use have one name."""
    layout = parse_layout(config["meshes"]["layout"])
    serving = layout.roles["serving"]
    split = config["serving"].get("split_devices", False)
    parts = serving.split(num_servers) if split else (serving,) * num_servers
    users: dict[int, list[str]] = {}
    is_hosted = config["env"]["name"] in HOST_ENVS
    uses = {"simulation": layout.roles["simulation"].devices} if not is_hosted else {}
    uses |= {f"server_{index}": part.devices for index, part in enumerate(parts)}
    uses["learning"] = layout.roles["learning"].devices
    for user, devices in uses.items():
        for device in devices:
            users.setdefault(device, []).append(user)
    names = {device: "+".join(found) for device, found in users.items()}
    used = {u: tuple(dict.fromkeys(names[d] for d in devices)) for u, devices in uses.items()}
    groups = tuple(
        (f"host_{index}",) if is_hosted else used["simulation"] for index in range(num_groups)
    )
    return groups, tuple(used[f"server_{i}"] for i in range(num_servers)), used["learning"]
