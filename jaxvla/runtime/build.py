"""From a config to the parts of a run: env, policy, meshes, compiled functions.

Nothing here starts a thread. `Blueprint` places nothing on devices but what an env plug-in
keeps there; `Parts` does.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxvla import rng, sharding
from jaxvla.algorithms import ALGORITHMS
from jaxvla.assignment import most_groups
from jaxvla.checkpoint import Checkpointer
from jaxvla.config import (
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxvla.data.normalization import NormStats, normalize_on_host
from jaxvla.envs import ENVS
from jaxvla.layout import Layout, parse_layout
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.learning.train_state import TrainState, init_state, state_shardings
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.models import MODELS
from jaxvla.models.prompts import encode_prompt, pad_prompt, tokenize_prompt
from jaxvla.models.state_prompts import StateText, head_ids, make_state_text
from jaxvla.models.tokenizer import Tokenizer
from jaxvla.runtime.pretrained import (
    CHECKPOINTS,
    STATS_FILE,
    find_stats,
    find_tokenizer,
    load_initial_weights,
)
from jaxvla.segments import resolve_segments
from jaxvla.serving.sampling import Sampler
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import EnvSpec, Observation, Params, PolicySample, Trajectory, stand_in


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What follows from the config alone."""

    config: ExperimentConfig
    """Resolved: no -1 left."""
    env: Any
    policy: Any
    layout: Layout
    tokenizer: Tokenizer
    stats: NormStats
    """Of states and actions, which the policy normalises with."""
    table: TokenTable
    """numpy arrays."""

    @property
    def spec(self) -> EnvSpec:
        """The env's."""
        return self.env.spec

    def observation_struct(self, num_rows: int) -> Observation:
        """Shapes and dtypes of a batch of observations."""
        spec, tokens = self.spec, self.table.tokens.shape[1]
        size, cameras = spec.image_size, len(spec.cameras)

        def struct(dtype: Any, *shape: int) -> jax.Array:
            return stand_in(jax.ShapeDtypeStruct((num_rows, *shape), dtype))

        return Observation(
            images=struct(np.uint8, cameras, size, size, 3),
            image_mask=struct(np.bool_, cameras),
            state=struct(np.float32, spec.state_dim),
            tokens=struct(np.int32, tokens),
            token_mask=struct(np.bool_, tokens),
        )

    def params_struct(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(lambda: self.policy.init(rng.root_key(0)))

    def sample_struct(self, num_rows: int) -> PolicySample:
        """Shapes and dtypes of an explored batch."""
        keys = jax.eval_shape(lambda: jax.random.split(rng.root_key(0), num_rows))
        explore = functools.partial(self.policy.act, explore=True)
        return jax.eval_shape(
            explore, self.params_struct(), self.observation_struct(num_rows), keys
        )

    def value_struct(self, num_rows: int) -> jax.Array:
        """Shape and dtype of the critic's answer."""
        return stand_in(jax.ShapeDtypeStruct((num_rows,), np.float32))

    def trajectory_struct(self) -> Trajectory:
        """Shapes and dtypes of what a simulator makes per ticket."""
        simulation = self.config.simulation
        num_rows = simulation.envs_per_group

        def in_time(x: Any) -> Any:
            return jax.ShapeDtypeStruct((simulation.segment_length, *x.shape), x.dtype)

        def struct(dtype: Any) -> Any:
            return in_time(jax.ShapeDtypeStruct((num_rows,), dtype))

        sample = self.sample_struct(num_rows)
        return Trajectory(
            observation=jax.tree.map(in_time, self.observation_struct(num_rows)),
            trace=jax.tree.map(in_time, sample.trace),
            behavior_log_prob=struct(np.float32),
            value=struct(np.float32),
            reward=struct(np.float32),
            terminated=struct(np.bool_),
            truncated=struct(np.bool_),
            bootstrap_value=struct(np.float32),
            valid=struct(np.bool_),
            policy_version=struct(np.int32),
        )

    def tokenize(self, text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of any instruction and a state, on the host.

        Args:
          text: in natural language.
          state: [S], in the env's units.

        Returns:
          ids int32 [N] and mask bool [N].

        Raises:
          ValueError: it is too long, or the state is not finite.
        """
        told = None
        if self.config.model.tells_state():
            told = normalize_on_host(state, self.stats.state, self.stats.kind)
        return tokenize_prompt(self.tokenizer, text, self.table.tokens.shape[1], told)

    @property
    def identity(self) -> dict[str, str]:
        """What weights mean beyond their shapes: token ids of another tokenizer are other words,
        actions of other statistics are other motions."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "norm_stats": self.stats.fingerprint,
        }

    def checkpointer(self, workdir: pathlib.Path) -> Checkpointer:
        """Of the run in a work directory."""
        return Checkpointer(
            workdir / CHECKPOINTS, keep=self.config.checkpoint.keep, identity=self.identity
        )


def draw_blueprint(config: ExperimentConfig, workdir: pathlib.Path | None = None) -> Blueprint:
    """Resolves a validated config.

    Args:
      config: validated.
      workdir: of the run, whose statistics are kept; None: it has none yet.

    Raises:
      ConfigError: the sections do not fit each other.
      ValueError: a plug-in is unknown or an optional package is missing.
    """
    env = ENVS.get(config.env.name)(config.env)
    tokenizer = find_tokenizer(config.model)
    model = config.model.resolve(
        env.spec, num_executed=config.env.num_executed, tokenizer=tokenizer
    )
    config = dataclasses.replace(
        config, env=env.config, model=model, serving=_resolve_serving(config)
    )
    spec = env.spec
    config = resolve_segments(config, spec.max_episode_steps)
    stats = find_stats(_stats_model(config, workdir), spec, workdir)
    blueprint = Blueprint(
        config=config,
        env=env,
        policy=MODELS.get(model.name)(model, stats),
        layout=parse_layout(config.meshes.layout),
        tokenizer=tokenizer,
        stats=stats,
        table=make_table(model, spec.instructions, tokenizer, stats),
    )
    _require_frozen_encoder(blueprint)
    return blueprint


def _stats_model(config: ExperimentConfig, workdir: pathlib.Path | None) -> ModelConfig:
    """The model's config, which names no statistics once some were computed for the work directory:
    named ones only stand in until then, so that every later job finds the computed ones."""
    if not config.finetune.compute_norm_stats or workdir is None:
        return config.model
    if (workdir / STATS_FILE).is_file():
        return dataclasses.replace(config.model, norm_stats="")
    return config.model


def make_table(
    model: ModelConfig, instructions: Sequence[str], tokenizer: Tokenizer, stats: NormStats
) -> TokenTable:
    """Prompts of instructions, whole or without the state that is still to be told.

    Args:
      model: resolved; `max_tokens` holds the longest prompt.
      instructions: in the order of the table.
      tokenizer: of the policy.
      stats: that the policy normalises with.

    Raises:
      ConfigError: the tokenizer cannot tell states.
    """
    state_text = None
    if model.tells_state():
        state_text = _make_state_text(instructions, tokenizer, stats)
        ids = [head_ids(tokenizer, text) for text in instructions]
    else:
        ids = [encode_prompt(tokenizer, text) for text in instructions]
    prompts = [pad_prompt(x, model.max_tokens, pad_id=tokenizer.pad_id) for x in ids]
    return TokenTable(
        tokens=stand_in(np.stack([ids for ids, _ in prompts])),
        mask=stand_in(np.stack([mask for _, mask in prompts])),
        state_text=state_text,
    )


def _make_state_text(
    instructions: Sequence[str], tokenizer: Tokenizer, stats: NormStats
) -> StateText:
    offset, scale = stats.state_affine()
    try:
        return make_state_text(tokenizer, instructions, offset=offset, scale=scale)
    except ValueError as error:
        fix = override("model.state_input", "none")
        raise ConfigError("model.state_input", "prompt", str(error), fix) from error


def _require_frozen_encoder(blueprint: Blueprint) -> None:
    """Encodings can only be kept over optimizer steps that do not change the encoder."""
    config, encoder = blueprint.config, blueprint.policy.encoder
    if not config.learning.encode_once:
        return
    for path, _ in jax.tree_util.tree_leaves_with_path(blueprint.params_struct()):
        name = sharding.path_name(path)
        if re.search(encoder, name) and re.search(config.optimizer.trainable, name):
            raise ConfigError(
                "learning.encode_once",
                True,
                f"the encoder must be frozen, and optimizer.trainable matches {name}",
                override("learning.encode_once", False),
            )


def _resolve_serving(config: ExperimentConfig) -> Any:
    """Fills the -1s of the serving section from the env groups."""
    serving, per_group = config.serving, config.simulation.envs_per_group
    num_groups = most_groups(
        serving.assignment,
        num_groups=config.simulation.num_groups,
        num_servers=serving.num_servers,
    )
    max_batch = per_group * num_groups if serving.max_batch == -1 else serving.max_batch
    trigger = per_group if serving.trigger_size == -1 else serving.trigger_size
    buckets = serving.buckets or tuple(range(per_group, max_batch + 1, per_group))
    return dataclasses.replace(
        serving, max_batch=max_batch, trigger_size=min(trigger, max_batch), buckets=buckets
    )


class Placed(Protocol):
    """Training of any kind, as far as its parameters need a place."""

    @property
    def placed(self) -> TrainState:
        """Shardings."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """One optimizer's train functions and the state they change."""

    functions: TrainFunctions
    optimizer: optax.GradientTransformation
    struct: TrainState
    """Shapes and dtypes."""
    placed: TrainState
    """Shardings."""

    def init(self, params: Params) -> TrainState:
        """A fresh state around `params`, which must lie as `placed` says."""
        start = jax.jit(lambda p: init_state(p, self.optimizer), out_shardings=self.placed)
        return start(params)

    def compile(self, parts: "Parts") -> None:
        """Compiles what an update calls; streamed updates compile at their first one.

        Args:
          parts: of the run.
        """
        if parts.config.schedule.stream_microbatches:
            return
        self.functions.compile(
            self.target(),
            [parts.blueprint.trajectory_struct()] * parts.config.learning.trajectories_per_update,
            jax.eval_shape(lambda: parts.root),
        )

    def target(self) -> TrainState:
        """What a checkpoint must hold, and where its leaves go."""
        return sharding.placed_structs(self.struct, self.placed)


class Meshes(dict[str, Mesh]):
    """Role -> mesh, made when it is first asked for: a process of one role may have no devices for
    the others."""

    def __init__(self, layout: Layout):
        super().__init__()
        self._layout = layout

    def __missing__(self, role: str) -> Mesh:
        mesh = self[role] = sharding.make_mesh(self._layout.roles[role])
        return mesh


class Parts:
    """Meshes and functions on devices, made on first use."""

    def __init__(self, blueprint: Blueprint):
        self.blueprint = blueprint
        self.config = blueprint.config
        self.root = rng.root_key(self.config.seed)

    @functools.cached_property
    def meshes(self) -> "Meshes":
        """Role -> mesh."""
        return Meshes(self.blueprint.layout)

    @functools.cached_property
    def samplers(self) -> tuple[Sampler, ...]:
        """Inference functions by policy server; not compiled yet. Servers on the same devices
        share them."""
        count, role = self.config.serving.num_servers, self.blueprint.layout.roles["serving"]
        if not self.config.serving.split_devices:
            return (self._make_sampler(self.meshes["serving"]),) * count
        return tuple(self._make_sampler(sharding.make_mesh(part)) for part in role.split(count))

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Those of the first policy server, which also evaluate."""
        return self.samplers[0]

    def _make_sampler(self, mesh: Mesh) -> Sampler:
        policy, params = self.blueprint.policy, self.blueprint.params_struct()
        return Sampler(
            policy,
            mesh=mesh,
            params_shardings=sharding.params_shardings(params, policy.rules(), mesh, "serving"),
            buckets=self.config.serving.buckets,
        )

    def training(self, optimizer_config: OptimizerConfig) -> Training:
        """Train functions on the learning mesh; nothing is compiled yet."""
        policy, mesh = self.blueprint.policy, self.meshes["learning"]
        params = self.blueprint.params_struct()
        optimizer = make_optimizer(optimizer_config, params)
        struct = jax.eval_shape(lambda p: init_state(p, optimizer), params)
        placed = state_shardings(struct, policy.rules(), mesh)
        functions = TrainFunctions(
            policy=policy,
            algorithm=ALGORITHMS.get(self.config.algorithm.name)(self.config.algorithm),
            optimizer=optimizer,
            trainable=optimizer_config.trainable,
            mesh=mesh,
            shardings=placed,
            num_minibatches=self.config.algorithm.num_minibatches,
            num_microbatches=self.config.learning.num_microbatches,
            encode_once=self.config.learning.encode_once,
        )
        return Training(functions=functions, optimizer=optimizer, struct=struct, placed=placed)

    def fresh_params(self, training: Placed) -> Params:
        """Initial parameters, random or from a file, made directly where they will live."""
        placed = training.placed.params
        if self.config.model.initial_weights:
            return self.initial_params(placed)
        init = jax.jit(self.blueprint.policy.init, out_shardings=placed)
        return init(rng.stream(self.root, "init"))

    def initial_params(self, placed: Params) -> Params:
        """Those of `model.initial_weights`, placed as a tree of shardings says."""
        return load_initial_weights(
            self.blueprint.policy,
            self.config.model,
            placed,
            key=rng.stream(self.root, "init"),
            identity=self.blueprint.identity,
        )
