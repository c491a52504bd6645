"""Typed configuration: what a run is.

A config file returns an `ExperimentConfig` from `get_config()`. Plug-ins (env,
model, algorithm) keep their own Config dataclass beside their code, as a subclass
of the bases below. `jaxvla.validation` refuses what cannot work; every -1 is filled in
when the run is planned.

Rules that `ml_collections.config_flags` imposes here and in plug-in config modules:
no postponed annotations, no Literal, not frozen. No jax.
"""

import dataclasses
import enum
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


class UsageError(ValueError):
    """What was asked for cannot work. The message is one line and says what to change."""


class ConfigError(UsageError):
    """A bad setting. The message names the field, its value, what is allowed and the fix."""

    def __init__(self, name: str, value: Any, allowed: str, fix: str):
        super().__init__(f"config.{name} = {value!r}: {allowed}. Fix: {fix}")
        self.name = name


def override(name: str, value: Any) -> str:
    """The argument that changes a setting, quoted for a shell."""
    text = str(value)
    # shlex can only write a quoted name as '"'"'name'"'"', which is hard to read.
    is_plain = "'" in text and not set(text) & set('"$`\\!')
    return f"--config.{name}=" + (f'"{text}"' if is_plain else shlex.quote(text))


@dataclass(kw_only=True, slots=True)
class EnvConfig:
    """Base of the env plug-ins' configs."""

    name: str
    """Entry of the env registry."""
    num_executed: int = 8
    """Control steps run of each predicted action chunk, in [1, model.action_horizon]."""

    def validate(self) -> None:
        """Raises ConfigError when a setting of the plug-in cannot work."""

    def judge(self) -> "EnvConfig":
        """The env with the last word on policies trained in this one: same spec, same tasks.

        Raises:
          ConfigError: there is none.
        """
        raise ConfigError("env.name", self.name, "has no judge", "leave --judge out")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Base of the model plug-ins' configs."""

    name: str
    """Entry of the model registry."""
    action_horizon: int = 8
    """Control steps H predicted per chunk query."""
    max_tokens: int = -1
    """Length N of the padded prompt; -1: the env's longest, rounded up to a multiple of 8."""
    tokenizer: str = "byte"
    """"byte": one token per byte; "paligemma": openpi's, see `jaxvla.models.tokenizer`; or the path
    of a sentencepiece .model or of a tokenizer.json."""
    initial_weights: str = ""
    """What a new run begins with: an openpi checkpoint (a path, or a gs:// address that lies in
    openpi's cache), a model.safetensors of its PyTorch port, PaliGemma's .npz, or a work directory
    of jaxvla; empty: random weights."""
    norm_stats: str = ""
    """Statistics of states and actions: the path of a norm_stats.json, the asset id of one in
    `initial_weights`, or "bounds": the env's. Empty: those of the work directory, else the only
    ones of `initial_weights`, else the bounds."""
    normalization: str = "quantile"
    """What is done with them: "quantile" (pi0.5) or "zscore" (pi0)."""

    def validate(self) -> None:
        """Raises ConfigError when a setting cannot work, whatever the env."""

    def tells_state(self) -> bool:
        """Whether the policy reads the state in its prompt."""
        return False

    def resolve(self, spec: Any, *, num_executed: int, tokenizer: Any) -> "ModelConfig":
        """A copy with every -1 filled in from the env, validated. Every model has its own.

        Args:
          spec: `EnvSpec` of the env that the policy acts in.
          num_executed: control steps run of each chunk.
          tokenizer: `Tokenizer` of the instructions.

        Raises:
          ConfigError: the sizes do not fit each other or the env.
        """
        raise NotImplementedError


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

    def resolve(self, *, group_size: int) -> "AlgorithmConfig":
        """A copy with every -1 filled in. `group_size`: `simulation.group_size`."""
        del group_size
        return self

    def compares_episodes(self) -> bool:
        """Whether it compares episodes that began alike, `simulation.group_size` of them, and reads
        no values: critics are not asked what follows a trajectory."""
        return False

    def reads_final_values(self) -> bool:
        """Whether the value of the last observation of truncated episodes matters."""
        return True


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
    """Decay of the mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the mean square, against division by zero."""
    weight_decay: float = 0.0
    """Decoupled decay; never applied to frozen leaves."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    trainable: str = ".*"
    """Regular expression over parameter paths; leaves that do not match are frozen."""


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised start on scripted demonstrations, before RL."""

    num_steps: int = 0
    """Optimizer steps on demonstrations; 0 skips the warm start."""
    num_grounding_steps: int = 0
    """Optimizer steps before those, on random scenes: the vision-language half of the policy
    learns where the named object is. For envs that can tell, and policies with a grounding
    head."""
    num_episodes: int = 128
    """Scripted demonstration episodes, split evenly over the tasks."""
    noise_std: float = 0.5
    """Disturbance of the expert's actions, so that demonstrations show how to recover."""
    batch_size: int = 32
    """Samples per optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of both stages; each starts afresh."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """Demonstrations to fine-tune on."""

    kind: str = "expert"
    """Where they are from: expert (the env's, scripted), or an entry of the dataset registry:
    recorded, libero_hdf5, lerobot."""
    path: str = ""
    """Directory, or one file of libero_hdf5. For "expert": where they are recorded, unless they
    have been already; empty: demonstrations/ in the work directory."""
    num_episodes: int = 128
    """Of the expert: episodes, split evenly over the tasks."""
    noise_std: float = 0.5
    """Of the expert: disturbance of its actions, so that demonstrations show how to recover."""
    cameras: tuple[str, ...] = ()
    """Names of the data set's cameras in the order of the env's; "-" where there is none. Empty:
    all of them in their order."""
    state_key: str = ""
    """Of lerobot: name of the state; empty: observation.state or state."""
    action_key: str = ""
    """Of lerobot: name of the actions; empty: action or actions."""
    rotate_images: bool = False
    """Of lerobot: turn images by 180 degrees, where they were stored as LIBERO renders them."""


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """Supervised fine-tuning: the job "finetune"."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    num_steps: int = 1000
    """Optimizer steps in the whole run (across resumes)."""
    batch_size: int = 32
    """Samples per optimizer step."""
    accumulation_steps: int = 1
    """Parts that a batch is computed in, one after another; the result is that of the batch."""
    ema_decay: float = 0.0
    """Decay, in [0, 1), of the moving average of the parameters that is evaluated and published
    in the place of the newest ones; 0: none is kept."""
    augment: bool = False
    """Random crops, rotations and colours of the images, see `jaxvla.data.augmentation`."""
    prefetch: int = 4
    """Batches read ahead by the thread that reads data."""
    log_interval: int = 10
    """Optimizer steps per record of metrics.jsonl."""
    checkpoint_interval: int = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    compute_norm_stats: bool = False
    """Normalise by statistics of the data set. They are computed once and kept in the work
    directory, where every job finds them; `model.norm_stats` must be empty."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(kw_only=True, slots=True)
class SimulationConfig:
    """Env groups and the segments they collect."""

    num_groups: int = 2
    """Env groups; two or more overlap inference with stepping."""
    num_simulators: int = 1
    """Simulators that the groups are dealt out to, as many to each; divides num_groups."""
    envs_per_group: int = 32
    """Envs E in a group."""
    group_size: int = 0
    """Envs G, next to each other in an env group, that begin every trajectory with the same task
    and the same initial state, and play one episode in it; divides envs_per_group. 0: every env
    plays its own episodes, which go on over trajectories."""
    segment_length: int = 8
    """Chunk queries T in a trajectory. With group_size > 0 it is -1 for those of the longest
    episode, which is what it has to be."""
    lease_s: float = 900.0
    """A trajectory that is not delivered this long after its admission is given up, and its
    credit returns; far above the slowest healthy one."""
    straggler_s: float = 120.0
    """An env group that has been making one trajectory for so long is reported on the screen."""


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """Policy servers, and how each one batches chunk queries. Sizes count rows (one row = one
    env's query)."""

    num_servers: int = 1
    """Policy servers, each with a batcher and weights of its own."""
    assignment: str = "round_robin"
    """Which server answers an env group: round_robin; greedy, which picks the server with the
    fewest rows registered at the start of every segment; or one index per group, as 0,1,1."""
    split_devices: bool = False
    """Each server gets an equal part of the serving devices, not all of them with the others."""
    batching: str = "fixed"
    """"fixed": by trigger_size and max_wait_ms. "adaptive": these are where each server starts; it
    then chooses them from what it measures. In force only with schedule.overlap_rollout."""
    trigger_size: int = -1
    """Rows that start a batch at once; -1: the envs of one group."""
    max_wait_ms: float = 20.0
    """Longest time the oldest waiting request is held back."""
    deadline_ms: float = 0.0
    """A request that has waited this long is not computed any more; the simulator asks again.
    Above max_wait_ms; 0: no deadline."""
    max_batch: int = -1
    """Rows per forward; -1: the envs of all groups that one server may have."""
    buckets: tuple[int, ...] = ()
    """Compiled batch sizes, ascending, the last one at least max_batch; empty: every multiple of
    a group's envs up to max_batch."""
    publish_lag_s: float = 60.0
    """A server that has not swapped weights in for so long after they were published is reported on
    the screen."""


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
    """S: versions that a sample may lie behind the learner that consumes it. In force only with
    overlap_training; otherwise 0."""
    window: int = 1
    """Look-ahead W: trajectories, counted from the oldest unfinished one, among which the learner
    may take those that are ready. W - 1 may so overtake a straggler, and samples lie up to
    max_staleness + ceil((W - 1) / learning.trajectories_per_update) versions behind. In force
    only with overlap_training; otherwise 1."""
    publish_interval: int = 1
    """Updates between weight publications, at most max_staleness + 1."""

    @property
    def staleness_in_force(self) -> int:
        """S that the switches leave."""
        return self.max_staleness if self.overlap_training else 0

    @property
    def window_in_force(self) -> int:
        """W that the switches leave."""
        return self.window if self.overlap_training else 1


@dataclass(kw_only=True, slots=True)
class MeshesConfig:
    """Which devices each role has."""

    layout: str = "colocated=1"
    """For example "colocated=8", "simulation=2 serving=2 learning=4:data2,fsdp2" or
    "simulation=1@0 serving=4@0 learning=4@2"; see `jaxvla.layout`."""


@dataclass(kw_only=True, slots=True)
class LearningConfig:
    """The learner's batch and budget."""

    num_updates: int = 50
    """Learner updates in the whole run (across resumes)."""
    trajectories_per_update: int = 2
    """Trajectories P consumed per update."""
    encode_once: bool = False
    """Encode the observations of a batch once per update, not once per optimizer step. Needs an
    encoder that `optimizer.trainable` leaves frozen, and room for the encodings."""
    num_microbatches: int = 1
    """Parts of a minibatch whose gradients are made one after the other and added up: less memory,
    the same optimizer step. Divides the chunk queries of a minibatch, simulation.segment_length /
    algorithm.num_minibatches."""
    max_skipped_updates: int = 3
    """Updates in a row with a gradient that was not finite, or without a valid sample, after which
    the run stops with exit code 4."""


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
    num_judge_envs: int = 2
    """Envs that play side by side in the env of --judge; for LIBERO a process each."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of the learner and of every counter."""

    interval: int = 10
    """Updates between checkpoints; the last update is always saved."""
    keep: int = 2
    """Newest steps kept, at least 2 (one may turn out damaged)."""
    max_failed_saves: int = 3
    """Checkpoints in a row that could not be written, on a full disk for one, after which the run
    stops with exit code 1."""


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where the programs run."""

    kind: str = "local"
    """"local": threads of one process. A process for every program: "processes" on this machine,
    "ray" on a Ray cluster; each has devices of its own, see docs/cluster.md."""
    address: str = ""
    """Of the Ray cluster: "auto", or HOST:PORT; empty: one on this machine for the run alone."""
    host: str = "127.0.0.1"
    """What the programs listen on: an address of every machine that there is, such as 127.0.0.1;
    "node": the address that Ray knows each machine by."""
    tls_directory: str = ""
    """Directory, on every machine, with the cert.pem and key.pem of the run's connections; empty:
    they are authenticated but not encrypted."""
    placement: str = ""
    """Strategy of the Ray placement group of the run: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD;
    empty: there is none, Ray places one program after the other."""
    learner_resources: str = ""
    """What Ray reserves for the learner, such as "CPU=8,GPU=1" or "TPU=4,TPU-v5e-8-head=1"; empty:
    nothing, it runs anywhere. With "processes" only its GPU or TPU counts: the devices it sees."""
    follower_resources: str = ""
    """The same for every further process of the learner."""
    server_resources: str = ""
    """The same for every policy server."""
    simulator_resources: str = ""
    """The same for every simulator."""
    learner_processes: int = 1
    """Processes of the learner, each with an equal part of the learning devices (docs/pods.md). The
    first one leads: it does all else that a learner of one process does."""
    weights_fanout: int = 0
    """Policy servers that the learner sends weights to, and that each of those sends them on to: a
    tree (docs/cluster.md); 0: the learner sends to all. Not for kind "local"."""
    meeting_s: float = 600.0
    """Seconds that these processes wait for each other at the start."""
    max_restarts: int = 5
    """How often in a row a program is started anew that ended too soon; those that ran for ten
    minutes count from 0 again."""
    restart_backoff_s: float = 0.5
    """Wait before the first restart in a row; it doubles with every further one, up to 30 s."""
    silence_s: float = 30.0
    """A process that is not heard of for so long is taken for lost."""
    grace_s: float = 12.0
    """Seconds from SIGTERM to exit."""
    compilation_cache: str = "~/.cache/jaxvla/xla"
    """Directory of JAX's persistent compilation cache; empty switches it off."""
    matmul_precision: str = "default"
    """jax_default_matmul_precision: default, high or highest (RL is sensitive to TF32)."""


@dataclass(kw_only=True, slots=True)
class WebsocketConfig:
    """The policy server of --job=serve, which openpi's clients talk to."""

    host: str = "127.0.0.1"
    """Address to listen on. All but this machine's own (127.0.0.0/8, ::1, localhost) need a
    token."""
    port: int = 8000
    """TCP port; 0: any free one, which is printed."""
    token_file: str = ""
    """File with the token that clients must send, as `Authorization: Api-Key TOKEN`; empty: none
    is asked for, or that of `token_variable`."""
    token_variable: str = ""
    """Environment variable with the token, instead of a file."""
    max_message_mib: int = 16
    """Longest message of a client, in MiB; two raw camera images have to fit."""
    max_connections: int = 64
    """Clients at a time."""
    deadline_s: float = 30.0
    """A request that has no answer after so many seconds gets an error instead."""
    ping_interval_s: float = 20.0
    """Seconds between the pings that find out whether a client is still there."""
    ping_timeout_s: float = 20.0
    """A connection whose client does not answer a ping for so many seconds is closed."""
    buckets: tuple[int, ...] = ()
    """Compiled batch sizes, ascending; the last one is the most requests that share a forward.
    Empty: 1, 2, 4 and 8 times the serving mesh's data axis."""


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """What is written beside metrics.jsonl."""

    writers: tuple[str, ...] = ()
    """Extra metric writers by registry name: tensorboard, wandb."""
    trace: bool = True
    """Write trace.json (Perfetto)."""
    profile_updates: int = 0
    """Updates that JAX's profiler watches, into WORKDIR/profile; 0: none."""
    profile_start: int = 2
    """Updates before those."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Trials of many layouts and settings: the job "sweep", see docs/scaling.md."""

    layouts: tuple[str, ...] = ("all",)
    """Layouts to try; "all" stands for those worth trying, see `jaxvla.scaling.layouts`."""
    axes: tuple[str, ...] = ()
    """Other settings to try, each as "section.field=VALUE,VALUE"; every layout is tried with every
    combination that can work."""
    num_devices: tuple[int, ...] = ()
    """Device counts that "all" fills, such as (2, 4, 8); empty: all devices that trials have."""
    host_devices: int = 0
    """Devices that JAX makes of this machine's CPUs for every trial; 0: those that are present."""
    devices_per_host: int = 0
    """Of "all": the devices of every role lie within one host or fill whole ones; 0: any."""
    device_memory_gib: float = 0.0
    """Of "all": memory of a device, which parameters, optimizer state, activations and encodings
    have to fit in; 0: what the devices say, and CPU devices say nothing."""
    keep: tuple[str, ...] = ()
    """Of "all": what is kept although it is seldom worth trying: order (the same parts in another
    order), tensor (tensor parallelism of what fits without), fsdp (the same of sharding)."""
    warmup_updates: int = 2
    """Updates of every trial before those that are measured; at least the staleness bound + 1,
    until simulation is as far ahead as it may be. As many follow, for the same reason."""
    measured_updates: int = 8
    """Updates measured. Where trials differ in chunk queries per update, so many that all of them
    make as many chunk queries as this many updates of the config do, rounded up."""
    repeats: int = 3
    """Runs of every trial, all trials in turn."""
    max_trials: int = 32
    """More trials than these are refused."""
    timeout_s: float = 1800.0
    """A run that takes longer has failed."""
    retry_failed: bool = False
    """Try again what sweep.json says has failed."""


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """A whole run."""

    name: str
    """Names the default work directory, runs/NAME."""
    env: EnvConfig
    """What is simulated: the config of an env plug-in."""
    model: ModelConfig
    """What is trained: the config of a model plug-in."""
    algorithm: AlgorithmConfig
    """How it is trained: the config of an algorithm plug-in."""
    seed: int = 0
    """Root of every random stream, in [0, 2**32)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    meshes: MeshesConfig = field(default_factory=MeshesConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    websocket: WebsocketConfig = field(default_factory=WebsocketConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


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
