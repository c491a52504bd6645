"""Every check of a config that needs no device and no plug-in code. No jax."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

from jaxvla.assignment import validate_servers
from jaxvla.cluster import KINDS, PLACEMENTS, validate_cluster, validate_gang
from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.endpoint import validate_websocket
from jaxvla.layout import Layout, LayoutError, parse_layout
from jaxvla.segments import validate_segments

_MAX_FLOAT32 = 3.4028234663852886e38
_SELECTIONS = ("env.tasks", "env.task_ids", "telemetry.writers")
"""Settings, of whichever plug-ins have them, that pick things out of a list."""
_MAX_BUCKETS = 64
"""Batch sizes compiled without being asked for one by one."""


def validate(config: ExperimentConfig) -> None:
    """Checks everything that needs no device.

    Raises:
      ConfigError: the first setting found that cannot work.
    """
    _validate_types(config)
    _validate_names(config)
    _validate_ranges(config)
    _validate_selections(config)
    config.env.validate()
    config.model.validate()
    config.algorithm.validate()
    layout = _validate_layout(config)
    validate_segments(config)
    _validate_schedule(config)
    validate_batches(config, layout)
    _validate_warm_start(config)
    validate_cluster(config)
    validate_gang(config, layout)


def validate_batches(config: ExperimentConfig, layout: Layout) -> None:
    """Checks that batches divide over the meshes of a layout.

    Args:
      config: valid but for its layout, which is not read.
      layout: the one to check.

    Raises:
      ConfigError: the first setting found that does not fit.
    """
    _validate_learning(config, layout)
    _validate_serving(config, layout)
    validate_websocket(config.websocket, layout.roles["serving"])


def validate_devices(config: ExperimentConfig, num_devices: int) -> None:
    """Checks that the layout fits the devices present.

    Raises:
      ConfigError: it needs more.
    """
    needed = parse_layout(config.meshes.layout).num_devices
    if needed > num_devices:
        raise ConfigError(
            "meshes.layout",
            config.meshes.layout,
            f"needs {needed} devices, {num_devices} present",
            f"--config.meshes.layout=colocated={num_devices}, or on CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """A range that many settings share."""

    allowed: str
    holds: Callable[[Any], bool]
    fix: Any
    """Suggested where the setting has no default that holds."""
    names: tuple[str, ...]


def _is_regular_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _of_optimizers(*names: str) -> tuple[str, ...]:
    return tuple(
        f"{section}.{name}"
        for section in ("optimizer", "warm_start.optimizer", "finetune.optimizer")
        for name in names
    )


_RANGES = (
    _Range(
        allowed="must be > 0",
        holds=lambda x: x > 0,
        fix=1,
        names=(
            "env.num_executed",
            "model.action_horizon",
            "algorithm.num_epochs",
            "algorithm.num_minibatches",
            "simulation.num_groups",
            "simulation.num_simulators",
            "runtime.learner_processes",
            "simulation.envs_per_group",
            "simulation.lease_s",
            "simulation.straggler_s",
            "serving.num_servers",
            "serving.publish_lag_s",
            "schedule.window",
            "schedule.publish_interval",
            "learning.num_updates",
            "learning.trajectories_per_update",
            "learning.num_microbatches",
            "learning.max_skipped_updates",
            "warm_start.batch_size",
            "warm_start.num_episodes",
            *(f"finetune.{name}" for name in ("num_steps", "batch_size", "accumulation_steps")),
            *(f"finetune.{name}" for name in ("prefetch", "log_interval", "checkpoint_interval")),
            "finetune.dataset.num_episodes",
            "evaluation.num_judge_envs",
            "checkpoint.interval",
            "checkpoint.max_failed_saves",
            *(f"sweep.{name}" for name in ("warmup_updates", "measured_updates", "repeats")),
            *(f"sweep.{name}" for name in ("max_trials", "timeout_s")),
            *_of_optimizers("learning_rate", "value_learning_rate", "clip_norm", "eps"),
        ),
    ),
    _Range(
        allowed="must be >= 0",
        holds=lambda x: x >= 0,
        fix=0,
        names=(
            "simulation.group_size",
            "schedule.max_staleness",
            "runtime.max_restarts",
            "runtime.weights_fanout",
            "warm_start.num_steps",
            "warm_start.num_grounding_steps",
            "warm_start.noise_std",
            "finetune.dataset.noise_std",
            "evaluation.num_episodes",
            "evaluation.interval",
            "evaluation.num_videos",
            "telemetry.profile_updates",
            "telemetry.profile_start",
            *(f"sweep.{x}" for x in ("host_devices", "devices_per_host", "device_memory_gib")),
            *_of_optimizers("weight_decay", "warmup_steps", "decay_steps"),
        ),
    ),
    _Range(
        allowed="must be in [0, 3600000], at most an hour",
        holds=lambda x: 0 <= x <= 3.6e6,
        fix=20.0,
        names=("serving.max_wait_ms", "serving.deadline_ms"),
    ),
    _Range(
        allowed="must be in (0, 3600], at most an hour",
        holds=lambda x: 0 < x <= 3600,
        fix=12.0,
        names=tuple(
            f"runtime.{name}" for name in ("grace_s", "restart_backoff_s", "silence_s", "meeting_s")
        ),
    ),
    _Range(
        allowed="must be in [0, 1]",
        holds=lambda x: 0 <= x <= 1,
        fix=0.1,
        names=_of_optimizers("final_fraction"),
    ),
    _Range(
        allowed="must be in [0, 1)",
        holds=lambda x: 0 <= x < 1,
        fix=0.9,
        names=("finetune.ema_decay", *_of_optimizers("beta1", "beta2")),
    ),
    _Range(
        allowed="must be in [0, 2**32): seeds are 32 bits wide",
        holds=lambda x: 0 <= x < 2**32,
        fix=0,
        names=("seed", "evaluation.seed"),
    ),
    _Range(
        allowed="must be -1 or > 0",
        holds=lambda x: x == -1 or x > 0,
        fix=-1,
        names=("simulation.segment_length", "serving.trigger_size", "serving.max_batch"),
    ),
    _Range(
        allowed="must be >= 2: one may turn out damaged",
        holds=lambda x: x >= 2,
        fix=2,
        names=("checkpoint.keep",),
    ),
    _Range(
        allowed="must be letters, digits, '_', '-' or '.', as it names the work directory",
        holds=lambda x: re.fullmatch(r"\w[\w.-]*", x) is not None,
        fix="run",
        names=("name",),
    ),
    _Range(
        allowed="must be a regular expression",
        holds=_is_regular_expression,
        fix=".*",
        names=_of_optimizers("trainable"),
    ),
)
_CHOICES = {
    "runtime.kind": KINDS,
    "runtime.placement": PLACEMENTS,
    "runtime.matmul_precision": ("default", "high", "highest"),
    "serving.batching": ("fixed", "adaptive"),
}


def _get(config: ExperimentConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(config: ExperimentConfig, name: str, holds: bool, allowed: str, fix: Any) -> None:
    """Raises ConfigError about `name` unless the condition holds."""
    if not holds:
        raise ConfigError(name, _get(config, name), allowed, override(name, fix))


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted name, value, field) of every section and setting, sections first."""
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        yield name, value, item
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{name}.")


def _validate_types(config: ExperimentConfig) -> None:
    """Config files assign freely; what the command line gives has been parsed by type."""
    for name, value, item in _settings(config):
        if not _is_a(value, item.type):
            fix = override(name, _default(item, "VALUE"))
            raise ConfigError(name, value, f"must be {type_name(item.type)}", fix)


def type_name(kind: Any) -> str:
    """How error messages call the type of a setting."""
    names = {
        int: "an integer",
        float: "a finite 32-bit float",
        bool: "True or False",
        str: "a string",
    }
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each element {type_name(typing.get_args(kind)[0])}"
    return names.get(kind, f"of type {getattr(kind, '__name__', kind)}")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value fits an annotation. Floats must fit in float32, and a bool is no number."""
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) <= _MAX_FLOAT32
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_is_a(x, element) for x in value)
    return isinstance(value, kind)


def _default(item: dataclasses.Field, otherwise: Any) -> Any:
    return otherwise if item.default is dataclasses.MISSING else item.default


def _validate_names(config: ExperimentConfig) -> None:
    """The names of plug-ins fit the config classes that the sections hold."""
    for section in ("env", "model", "algorithm"):
        held = getattr(config, section)
        own = next(_default(x, None) for x in dataclasses.fields(held) if x.name == "name")
        # "package.module:Attribute" names a plug-in that reuses another one's config class.
        if ":" not in held.name and held.name != own:
            raise ConfigError(
                f"{section}.name",
                held.name,
                f"the config file has settings for {own!r} ({type(held).__name__})",
                f"{override(f'{section}.name', own)}, or the --config of a run with that {section}",
            )


def _validate_ranges(config: ExperimentConfig) -> None:
    fields = {name: item for name, _, item in _settings(config)}
    for name, item in fields.items():
        if item.type is int and not name.endswith("seed"):
            holds = abs(_get(config, name)) < 2**31
            _require(config, name, holds, "must be less than 2**31", _default(item, 1))
    for rule in _RANGES:
        for name in rule.names:
            default = _default(fields[name], rule.fix)
            fix = default if rule.holds(default) else rule.fix
            _require(config, name, rule.holds(_get(config, name)), rule.allowed, fix)
    for name, choices in _CHOICES.items():
        allowed = f"must be {' or '.join(choices)}"
        _require(config, name, _get(config, name) in choices, allowed, choices[0])
    horizon = config.model.action_horizon
    _require(
        config,
        "env.num_executed",
        config.env.num_executed <= horizon,
        f"must be <= model.action_horizon = {horizon}",
        horizon,
    )


def _validate_selections(config: ExperimentConfig) -> None:
    """Twice the same task would count as two; twice the same writer would write to one place."""
    for name, value, _ in _settings(config):
        if name in _SELECTIONS:
            distinct = tuple(dict.fromkeys(value))
            holds = len(distinct) == len(value)
            _require(config, name, holds, "must name each one once", distinct)


def _validate_warm_start(config: ExperimentConfig) -> None:
    warm_start = config.warm_start
    _require(
        config,
        "warm_start.num_grounding_steps",
        warm_start.num_steps > 0 or not warm_start.num_grounding_steps,
        "must be 0 when warm_start.num_steps is 0",
        0,
    )


def _validate_layout(config: ExperimentConfig) -> Layout:
    try:
        return parse_layout(config.meshes.layout)
    except LayoutError as error:
        raise ConfigError(
            "meshes.layout", config.meshes.layout, str(error), "--config.meshes.layout=colocated=1"
        ) from error


def _validate_schedule(config: ExperimentConfig) -> None:
    schedule, learning = config.schedule, config.learning
    longest, groups = schedule.staleness_in_force + 1, config.simulation.num_groups
    _require(
        config,
        "schedule.publish_interval",
        schedule.publish_interval <= longest,
        f"must be <= max_staleness in force + 1 = {longest}, else the simulators wait for ever",
        longest,
    )
    _require(
        config,
        "learning.trajectories_per_update",
        schedule.overlap_rollout or learning.trajectories_per_update % groups == 0,
        f"must be a multiple of simulation.num_groups = {groups} in lockstep "
        "(schedule.overlap_rollout is off)",
        groups,
    )
    if schedule.stream_microbatches:
        for name in ("num_epochs", "num_minibatches"):
            _require(
                config,
                f"algorithm.{name}",
                getattr(config.algorithm, name) == 1,
                "must be 1 with schedule.stream_microbatches: one optimizer update per batch",
                1,
            )


def _validate_learning(config: ExperimentConfig, layout: Layout) -> None:
    simulation, warm_start = config.simulation, config.warm_start
    envs = simulation.envs_per_group
    _require(
        config,
        "learning.num_microbatches",
        config.learning.num_microbatches == 1 or not config.schedule.stream_microbatches,
        "must be 1 with schedule.stream_microbatches, where a trajectory is a microbatch",
        1,
    )
    data = layout.roles["simulation"].axes["data"]
    axes = layout.roles["learning"].axes
    shards = axes["data"] * axes["fsdp"]
    both = math.lcm(data, shards)
    # An update's trajectories are joined before they are split, unless they stream in one by one.
    joined = 1 if config.schedule.stream_microbatches else config.learning.trajectories_per_update
    times = f"times learning.trajectories_per_update = {joined} " if joined > 1 else ""
    for size, count, what in (
        (envs, data, f"must be a multiple of the simulation mesh's data axis, {data}"),
        (
            envs * joined,
            shards,
            f"{times}must be a multiple of the learning mesh's data x fsdp = "
            f"{shards}: trajectories are split by envs",
        ),
    ):
        fix = both * max(1, envs // both)
        _require(config, "simulation.envs_per_group", size % count == 0, what, fix)
    _require(
        config,
        "warm_start.batch_size",
        not warm_start.num_steps or warm_start.batch_size % shards == 0,
        f"must be a multiple of the learning mesh's data x fsdp = {shards}",
        shards * max(1, warm_start.batch_size // shards),
    )


def _validate_serving(config: ExperimentConfig, layout: Layout) -> None:
    serving, envs = config.serving, config.simulation.envs_per_group
    where, max_batch = layout.roles["serving"], serving.max_batch
    num_groups = validate_servers(config, where)
    data = where.axes["data"] // (serving.num_servers if serving.split_devices else 1)
    if max_batch == -1:
        max_batch = envs * num_groups
    _require(
        config,
        "serving.max_batch",
        max_batch >= envs,
        f"must hold the {envs} rows of one env group's query",
        envs,
    )
    _require(
        config,
        "serving.max_batch",
        bool(serving.buckets) or max_batch % envs == 0,
        f"must be a multiple of simulation.envs_per_group = {envs} unless serving.buckets is given",
        envs * (max_batch // envs),
    )
    _require(
        config,
        "serving.buckets",
        bool(serving.buckets) or max_batch // envs <= _MAX_BUCKETS,
        f"must be given: the default would compile {max_batch // envs} batch sizes",
        (envs, data * -(-max_batch // data)),
    )
    _require(
        config,
        "serving.trigger_size",
        serving.trigger_size <= max_batch,
        f"must be <= the largest batch, {max_batch} rows",
        max_batch,
    )
    wait_ms, deadline_ms = serving.max_wait_ms, serving.deadline_ms
    allowed = (
        f"must be 0 or above serving.max_wait_ms = {wait_ms}, which a request may be held back"
    )
    _require(config, "serving.deadline_ms", not 0 < deadline_ms <= wait_ms, allowed, 0.0)
    _validate_buckets(config, max_batch, data)


def _validate_buckets(config: ExperimentConfig, max_batch: int, data: int) -> None:
    envs, given = config.simulation.envs_per_group, config.serving.buckets
    buckets = given or (envs,)
    _require(
        config,
        "serving.buckets",
        all(bucket > 0 and bucket % data == 0 for bucket in buckets)
        and list(buckets) == sorted(set(buckets)),
        f"must ascend and be multiples of a policy server's data axis, {data} (without buckets, "
        f"simulation.envs_per_group = {envs} must be)",
        f"({data * -(-max_batch // data)},)",
    )
    _require(
        config,
        "serving.buckets",
        not given or given[-1] >= max_batch,
        f"the largest must hold serving.max_batch = {max_batch} rows",
        f"({data * -(-max_batch // data)},)",
    )
