"""What --dry_run prints: the plan of a run, from shapes alone."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxvla.algorithms import ALGORITHMS
from jaxvla.assignment import parse_assignment
from jaxvla.config import to_dict
from jaxvla.layout import span
from jaxvla.learning.optimizer import freeze, make_optimizer, trained
from jaxvla.learning.train_state import init_state
from jaxvla.runtime.build import Blueprint
from jaxvla.sharding import params_shardings, path_name, planned_mesh
from jaxvla.transport.staleness import credit_rule
from jaxvla.types import Params, TrainingBatch, Trajectory, stand_in

_MIB = 2.0**20


def plan_lines(blueprint: Blueprint) -> Iterator[str]:
    """Lines of the plan: config, meshes, shardings, memory, batch arithmetic, bound."""
    yield json.dumps(to_dict(blueprint.config), indent=2)
    yield ""
    yield from _mesh_lines(blueprint)
    yield from _memory_lines(blueprint)
    yield from _batch_lines(blueprint)
    yield from _server_lines(blueprint)
    yield from _schedule_lines(blueprint)


def _mesh_lines(blueprint: Blueprint) -> Iterator[str]:
    layout = blueprint.layout
    yield f"layout     {layout.text} ({layout.placement}), {jax.device_count()} devices present"
    for role, where in layout.roles.items():
        yield f"  {role:<11}{where}"
    count, learning = blueprint.config.runtime.learner_processes, layout.roles["learning"]
    if count > 1:
        own = learning.num_devices // count
        yield f"  learning is spread over {count} processes of {own} devices"
    for devices, roles in layout.occupants():
        if len(roles) > 1:
            yield f"  {' + '.join(roles)} share {span(devices)}"


def _server_lines(blueprint: Blueprint) -> Iterator[str]:
    """Policy servers: devices, and the env groups that they answer."""
    serving, num_groups = blueprint.config.serving, blueprint.config.simulation.num_groups
    count, role = serving.num_servers, blueprint.layout.roles["serving"]
    servers = parse_assignment(serving.assignment, num_groups=num_groups, num_servers=count)
    yield (
        f"serving    {count} policy server{'s' if count > 1 else ''}, {serving.assignment}; "
        f"buckets {serving.buckets}, trigger {serving.trigger_size} rows, "
        f"wait at most {serving.max_wait_ms} ms"
    )
    parts = role.split(count) if serving.split_devices else (role,) * count
    for index, part in enumerate(parts):
        groups = [f"group_{g}" for g in range(num_groups) if servers and servers[g] == index]
        yield f"  server_{index:<4}{part}, answers {', '.join(groups) or 'any env group'}"


def _memory_lines(blueprint: Blueprint) -> Iterator[str]:
    """What a device holds in each role. Meshes need no devices for this."""
    params = blueprint.params_struct()
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    yield f"parameters {count:,} in {len(jax.tree.leaves(params))} leaves"
    yield from _learning_lines(blueprint, params)
    yield from _serving_lines(blueprint, params)


def _learning_lines(blueprint: Blueprint, params: Params) -> Iterator[str]:
    """Parameters, gradients, optimizer state and saved activations, per learning device."""
    config, mesh = blueprint.config, planned_mesh(blueprint.layout.roles["learning"])
    optimizer = make_optimizer(config.optimizer, params)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    placed = params_shardings(state, blueprint.policy.rules(), mesh, "learning")
    split = [
        f"  {path_name(path)} {leaf.shape} {sharding.spec}"
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(placed.params),
            strict=True,
        )
        if any(sharding.spec)
    ]
    yield f"  {len(split)} leaves are split over devices" + (":" if split else "")
    yield from split
    gradients = [trained(x, config.optimizer.trainable) for x in (params, placed.params)]
    yield f"  parameters      {_mib(params, placed.params)} per learning device"
    yield f"  gradients       {_mib(*gradients)} per learning device"
    yield f"  optimizer state {_mib(state.opt_state, placed.opt_state)} per learning device"
    rows = _minibatch_rows(blueprint) // config.learning.num_microbatches
    saved = _activation_bytes(blueprint, rows) / mesh.size
    yield f"  activations     {saved / _MIB:.1f} MiB per learning device ({rows} samples)"
    if config.learning.encode_once:
        samples = _minibatch_rows(blueprint) * config.algorithm.num_minibatches
        kept = _encoding_bytes(blueprint, samples) / mesh.size
        yield f"  encodings       {kept / _MIB:.1f} MiB per learning device ({samples} samples)"


def _serving_lines(blueprint: Blueprint, params: Params) -> Iterator[str]:
    """Weights, those that are being swapped in, and the encodings of the largest batch; for every
    policy server on the device."""
    serving, trainable = blueprint.config.serving, blueprint.config.optimizer.trainable
    role = blueprint.layout.roles["serving"]
    mesh = planned_mesh(role.split(serving.num_servers)[0] if serving.split_devices else role)
    placed = params_shardings(params, blueprint.policy.rules(), mesh, "serving")
    rows = serving.buckets[-1]
    kept = _encoding_bytes(blueprint, rows) / mesh.shape["data"]
    swapped = [trained(tree, trainable) for tree in (params, placed)]
    yield f"  parameters      {_mib(params, placed)} per serving device"
    yield f"  new parameters  {_mib(*swapped)} per serving device, while they are swapped in"
    yield f"  encodings       {kept / _MIB:.1f} MiB per serving device ({rows} rows)"


def _mib(tree: Any, placed: Any) -> str:
    total = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    )
    return f"{total / _MIB:.1f} MiB"


def _minibatch_rows(blueprint: Blueprint) -> int:
    config = blueprint.config
    per_update = (
        config.learning.trajectories_per_update
        * config.simulation.envs_per_group
        * config.simulation.segment_length
    )
    return per_update // config.algorithm.num_minibatches


def _activation_bytes(blueprint: Blueprint, rows: int) -> int:
    """Bytes that the forward pass of one minibatch keeps for its backward pass, its encoding
    included."""
    config, policy = blueprint.config, blueprint.policy
    algorithm = ALGORITHMS.get(config.algorithm.name)(config.algorithm)
    params, observation = blueprint.params_struct(), blueprint.observation_struct(rows)
    sample = blueprint.sample_struct(rows)
    scalar = stand_in(jax.ShapeDtypeStruct((rows,), jnp.float32))
    batch = TrainingBatch(
        observation=observation,
        trace=sample.trace,
        behavior_log_prob=scalar,
        proximal_log_prob=scalar,
        proximal_value=scalar,
        staleness=stand_in(jax.ShapeDtypeStruct((rows,), jnp.int32)),
        advantage=scalar,
        return_=scalar,
        weight=scalar,
    )

    def residuals(params: Any, batch: TrainingBatch) -> Any:
        def loss(params: Any) -> jax.Array:
            params = freeze(params, config.optimizer.trainable)
            encoding = policy.encode(params, batch.observation)
            encoded = dataclasses.replace(batch, observation=encoding)
            return algorithm.loss(policy, params, encoded)[0]

        return jax.vjp(loss, params)[1]

    return _nbytes(jax.eval_shape(residuals, params, batch))


def _trajectory_bytes(blueprint: Blueprint) -> int:
    """Bytes of a trajectory in the queue."""
    simulation = blueprint.config.simulation
    rows = simulation.envs_per_group * simulation.segment_length
    sample = blueprint.sample_struct(rows)
    flag = stand_in(jax.ShapeDtypeStruct((rows,), jnp.bool_))
    trajectory = Trajectory(
        observation=blueprint.observation_struct(rows),
        trace=sample.trace,
        behavior_log_prob=sample.log_prob,
        value=sample.value,
        reward=sample.value,
        terminated=flag,
        truncated=flag,
        bootstrap_value=sample.value,
        valid=flag,
        policy_version=stand_in(jax.ShapeDtypeStruct((rows,), jnp.int32)),
    )
    return _nbytes(trajectory)


def _encoding_bytes(blueprint: Blueprint, rows: int) -> int:
    """Bytes of the encodings that a whole update keeps."""
    observation = blueprint.observation_struct(rows)
    encode = blueprint.policy.encode
    return _nbytes(jax.eval_shape(encode, blueprint.params_struct(), observation))


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _batch_lines(blueprint: Blueprint) -> Iterator[str]:
    config = blueprint.config
    simulation, learning = config.simulation, config.learning
    samples = _minibatch_rows(blueprint) * config.algorithm.num_minibatches
    yield (
        f"batch      {learning.trajectories_per_update} trajectories x "
        f"{simulation.envs_per_group} envs x {simulation.segment_length} chunk queries = "
        f"{samples} samples per update, {samples * config.env.num_executed} control steps at most"
    )
    yield (
        f"  {config.algorithm.num_epochs} epochs x {config.algorithm.num_minibatches} minibatches "
        f"of {_minibatch_rows(blueprint)} samples"
        + (f" in {learning.num_microbatches} parts" if learning.num_microbatches > 1 else "")
    )


def _schedule_lines(blueprint: Blueprint) -> Iterator[str]:
    schedule = blueprint.config.schedule
    switches = ("overlap_training", "overlap_rollout", "stream_microbatches")
    states = ", ".join(f"{name} {'on' if getattr(schedule, name) else 'off'}" for name in switches)
    yield f"schedule   {states}"
    rule, nbytes = credit_rule(blueprint.config), _trajectory_bytes(blueprint)
    window = f" (max_staleness {rule.max_staleness}, window {rule.window})"
    published = f"published every {schedule.publish_interval}"
    yield f"staleness  bound {rule.bound}{window if rule.window > 1 else ''}, {published}"
    yield (
        f"queue      at most {rule.most_present} trajectories of {nbytes / _MIB:.2f} MiB = "
        f"{rule.most_present * nbytes / _MIB:.1f} MiB"
    )
