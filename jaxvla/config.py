"""Typed configuration: what a run is, and every check that needs no device.

A config file returns an `ExperimentConfig` from `get_config()`. Plug-ins (env,
model, algorithm) keep their own Config dataclass beside their code, as a subclass
of the bases below. `validate` refuses what cannot work, `resolve` fills every -1.

Rules that `ml_collections.config_flags` imposes here and in plug-in config modules:
no postponed annotations, no Literal, not frozen. No jax.
"""

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxvla.layout import Layout, LayoutError, parse_layout


class ConfigError(ValueError):
    """A bad setting. The message names the field, its value, what is allowed and the fix."""

    def __init__(self, name: str, value: Any, allowed: str, fix: str):
        super().__init__(f"config.{name} = {value!r}: {allowed}. Fix: {fix}")
        self.name = name


@dataclass(kw_only=True, slots=True)
class EnvConfig:
    """Base of the env plug-ins' configs."""

    name: str
    """Entry of the env registry."""
    num_executed: int = 8
    """Control steps run of each predicted action chunk, in [1, model.action_horizon]."""

    def validate(self) -> None:
        """Raises ConfigError when a setting of the plug-in cannot work."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Base of the model plug-ins' configs."""

    name: str
    """Entry of the model registry."""
    action_horizon: int = 8
    """Control steps H predicted per chunk query."""


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """Base of the algorithm plug-ins' configs."""

    name: str
    """Entry of the algorithm registry."""
    num_epochs: int = 1
    """Passes over each batch."""
    num_minibatches: int = 1
    """Optimizer updates per pass; divides simulation.segment_length."""

    def validate(self) -> None:
        """Raises ConfigError when a setting of the plug-in cannot work."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant or cosine-decayed rate."""

    learning_rate: float = 3e-4
    """Peak rate of the policy parameters."""
    value_learning_rate: float = 1e-3
    """Peak rate of the value head."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Optimizer steps of cosine decay to `final_fraction` after the warm-up; 0 keeps the rate."""
    final_fraction: float = 0.1
    """Rate at the end of the decay, as a fraction of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled decay; never applied to frozen leaves."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    trainable: str = ".*"
    """Regular expression over parameter paths; leaves that do not match are frozen."""


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised flow-matching start on scripted demonstrations."""

    num_steps: int = 0
    """Optimizer steps; 0 skips the warm start."""
    num_episodes: int = 128
    """Scripted demonstration episodes, split evenly over the tasks."""
    noise_std: float = 0.5
    """Disturbance of the expert's actions, so that demonstrations show how to recover."""
    batch_size: int = 64
    """Samples per optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(kw_only=True, slots=True)
class SimulationConfig:
    """Env groups and the segments they collect."""

    num_groups: int = 2
    """Env groups; two or more overlap inference with stepping."""
    envs_per_group: int = 32
    """Envs E in a group."""
    segment_length: int = 8
    """Chunk queries T in a trajectory."""


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """Dynamic batching of chunk queries. Sizes count rows (one row = one env's query)."""

    trigger_size: int = -1
    """Rows that start a batch at once; -1: the envs of one group."""
    max_wait_ms: float = 20.0
    """Longest time the oldest waiting request is held back."""
    max_batch: int = -1
    """Rows per forward; -1: the envs of all groups."""
    buckets: tuple[int, ...] = ()
    """Compiled batch sizes, ascending; empty: every multiple of a group's envs up to max_batch."""


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Levels of asynchrony. All off is the synchronous algorithm."""

    overlap_training: bool = True
    """Simulation goes on while the learner trains, up to `max_staleness` versions ahead."""
    overlap_rollout: bool = True
    """Every env group asks for inference when it is ready, instead of in lockstep."""
    stream_microbatches: bool = False
    """Gradients are accumulated per trajectory as it arrives; one optimizer update per batch."""
    max_staleness: int = 1
    """Bound S on learner version minus behavior version at consumption. In force only with
    overlap_training; otherwise the bound is 0."""
    publish_interval: int = 1
    """Updates between weight publications, at most bound + 1."""

    @property
    def staleness_bound(self) -> int:
        """The bound in force."""
        return self.max_staleness if self.overlap_training else 0


@dataclass(kw_only=True, slots=True)
class MeshesConfig:
    """Which devices each role has."""

    layout: str = "colocated=1"
    """For example "colocated=8" or "simulation=2 serving=2 learning=4:data2,fsdp2"."""


@dataclass(kw_only=True, slots=True)
class LearningConfig:
    """The learner's batch and budget."""

    num_updates: int = 50
    """Learner updates in the whole run (across resumes)."""
    trajectories_per_update: int = 2
    """Trajectories P consumed per update."""
    max_skipped_updates: int = 3
    """Non-finite updates in a row after which the run stops with exit code 4."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Deterministic policy on fixed seeds."""

    num_episodes: int = 128
    """Episodes per evaluation, split evenly over the tasks; 0 switches evaluation off."""
    interval: int = 0
    """Updates between evaluations during training; 0: only before and after."""
    num_videos: int = 2
    """Episodes per task written to videos/."""
    seed: int = 1_000_003
    """Root of the evaluation episodes, apart from the training seed."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of the learner and of every counter."""

    interval: int = 10
    """Updates between checkpoints; the last update is always saved."""
    keep: int = 2
    """Newest steps kept, at least 2 (one may turn out corrupt)."""


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where the programs run."""

    kind: str = "local"
    """"local": threads of one process."""
    grace_s: float = 12.0
    """Seconds from SIGTERM to exit."""
    compilation_cache: str = "~/.cache/jaxvla/xla"
    """Directory of JAX's persistent compilation cache; empty switches it off."""
    matmul_precision: str = "default"
    """jax_default_matmul_precision: default, high or highest (RL is sensitive to TF32)."""


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """What is written beside metrics.jsonl."""

    writers: tuple[str, ...] = ()
    """Extra metric writers by registry name: tensorboard, wandb."""
    trace: bool = True
    """Write trace.json (Perfetto)."""


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """A whole run."""

    name: str
    env: EnvConfig
    model: ModelConfig
    algorithm: AlgorithmConfig
    seed: int = 0
    """Root of every random stream."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    meshes: MeshesConfig = field(default_factory=MeshesConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


def validate(config: ExperimentConfig) -> None:
    """Checks everything that needs no device.

    Raises:
      ConfigError: the first setting found that cannot work.
    """
    config.env.validate()
    config.algorithm.validate()
    _validate_ranges(config)
    layout = _validate_layout(config)
    _validate_schedule(config)
    _validate_batches(config, layout)


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


_POSITIVE = (
    "env.num_executed",
    "model.action_horizon",
    "algorithm.num_epochs",
    "algorithm.num_minibatches",
    "simulation.num_groups",
    "simulation.envs_per_group",
    "simulation.segment_length",
    "schedule.publish_interval",
    "learning.num_updates",
    "learning.trajectories_per_update",
    "learning.max_skipped_updates",
    "warm_start.batch_size",
    "warm_start.num_episodes",
    "checkpoint.interval",
    "optimizer.learning_rate",
    "optimizer.value_learning_rate",
    "optimizer.clip_norm",
    "runtime.grace_s",
)
_NOT_NEGATIVE = (
    "seed",
    "schedule.max_staleness",
    "serving.max_wait_ms",
    "warm_start.num_steps",
    "warm_start.noise_std",
    "evaluation.num_episodes",
    "evaluation.interval",
    "evaluation.num_videos",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
)
_PRECISIONS = ("default", "high", "highest")


def _get(config: ExperimentConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(config: ExperimentConfig, name: str, holds: bool, allowed: str, fix: Any) -> None:
    """Raises ConfigError about `name` unless the condition holds."""
    if not holds:
        raise ConfigError(name, _get(config, name), allowed, f"--config.{name}={fix}")


def _validate_ranges(config: ExperimentConfig) -> None:
    for name in _POSITIVE:
        _require(config, name, _get(config, name) > 0, "must be > 0", 1)
    for name in _NOT_NEGATIVE:
        _require(config, name, _get(config, name) >= 0, "must be >= 0", 0)
    keep = config.checkpoint.keep
    _require(config, "checkpoint.keep", keep >= 2, "must be >= 2: one may turn out corrupt", 2)
    _require(config, "runtime.kind", config.runtime.kind == "local", "must be local", "local")
    known = config.runtime.matmul_precision in _PRECISIONS
    allowed = f"must be one of {', '.join(_PRECISIONS)}"
    _require(config, "runtime.matmul_precision", known, allowed, "default")
    horizon = config.model.action_horizon
    _require(
        config,
        "env.num_executed",
        config.env.num_executed <= horizon,
        f"must be <= model.action_horizon = {horizon}",
        horizon,
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
    bound, groups = schedule.staleness_bound, config.simulation.num_groups
    _require(
        config,
        "schedule.publish_interval",
        schedule.publish_interval <= bound + 1,
        f"must be <= staleness bound + 1 = {bound + 1}, else the simulators wait for ever",
        bound + 1,
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
        standardize = getattr(config.algorithm, "standardize_advantages", False)
        _require(
            config,
            "algorithm.standardize_advantages",
            not standardize,
            "must be False with schedule.stream_microbatches: statistics of the whole batch are "
            "not known while it arrives",
            False,
        )


def _validate_batches(config: ExperimentConfig, layout: Layout) -> None:
    simulation, learning = config.simulation, config.learning
    envs, length = simulation.envs_per_group, simulation.segment_length
    minibatches = config.algorithm.num_minibatches
    _require(
        config,
        "algorithm.num_minibatches",
        length % minibatches == 0,
        f"must divide simulation.segment_length = {length}",
        1,
    )
    data = layout.roles["simulation"].axes["data"]
    _require(
        config,
        "simulation.envs_per_group",
        envs % data == 0,
        f"must be a multiple of the simulation mesh's data axis, {data}",
        data * max(1, envs // data),
    )
    axes = layout.roles["learning"].axes
    shards = axes["data"] * axes["fsdp"]
    columns = envs * (
        1 if config.schedule.stream_microbatches else learning.trajectories_per_update
    )
    _require(
        config,
        "learning.trajectories_per_update",
        columns % shards == 0 and envs % shards == 0,
        f"the batch of {columns} env columns, {envs} per trajectory, must divide over the "
        f"learning mesh's data x fsdp = {shards} shards",
        learning.trajectories_per_update,
    )
    _validate_buckets(config, layout)


def _validate_buckets(config: ExperimentConfig, layout: Layout) -> None:
    serving, envs = config.serving, config.simulation.envs_per_group
    data = layout.roles["serving"].axes["data"]
    buckets = serving.buckets or (envs,)
    _require(
        config,
        "serving.buckets",
        all(bucket > 0 and bucket % data == 0 for bucket in buckets)
        and list(buckets) == sorted(set(buckets)),
        f"must ascend and be multiples of the serving mesh's data axis, {data}",
        f"({data * max(1, envs // data)},)",
    )
    largest = serving.max_batch if serving.max_batch != -1 else buckets[-1]
    _require(
        config,
        "serving.max_batch",
        largest >= envs,
        f"must hold the {envs} rows of one env group's query",
        envs,
    )
    _require(
        config,
        "serving.buckets",
        not serving.buckets or buckets[-1] >= largest,
        f"the largest must hold serving.max_batch = {largest} rows",
        f"({largest},)",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of plain values, for config.json."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, enum.Enum):
            return value.name
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def field_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting, such as "optimizer.learning_rate"."""
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from field_names(value, f"{name}.")
        else:
            yield name
