"""What --dry_run prints: the plan of a run, from shapes alone."""

import json
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxvla.assignment import parse_assignment
from jaxvla.config import to_dict
from jaxvla.layout import span
from jaxvla.runtime.build import Blueprint
from jaxvla.runtime.memory import MemoryEstimate, minibatch_rows, tree_bytes
from jaxvla.sharding import path_name
from jaxvla.transport.staleness import credit_rule
from jaxvla.types import Trajectory, stand_in

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
    """What a device holds in each role."""
    estimate = MemoryEstimate(blueprint)
    params = estimate.params
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    yield f"parameters {count:,} in {len(jax.tree.leaves(params))} leaves"
    yield from _split_lines(blueprint, estimate)
    yield from _learning_lines(blueprint, estimate)
    yield from _serving_lines(blueprint, estimate)


def _split_lines(blueprint: Blueprint, estimate: MemoryEstimate) -> Iterator[str]:
    """Leaves that the learner has in shards."""
    placed = estimate.placed_state(blueprint.layout.roles["learning"])
    split = [
        f"  {path_name(path)} {leaf.shape} {sharding.spec}"
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(estimate.params),
            jax.tree.leaves(placed.params),
            strict=True,
        )
        if any(sharding.spec)
    ]
    yield f"  {len(split)} leaves are split over devices" + (":" if split else "")
    yield from split


def _learning_lines(blueprint: Blueprint, estimate: MemoryEstimate) -> Iterator[str]:
    """Parameters, gradients, optimizer state and saved activations, per learning device."""
    config, samples = blueprint.config, minibatch_rows(blueprint)
    of = {
        "activations": samples // config.learning.num_microbatches,
        "encodings": samples * config.algorithm.num_minibatches,
    }
    for what, nbytes in estimate.learning(blueprint.layout.roles["learning"]).items():
        rows = f" ({of[what]} samples)" if what in of else ""
        yield f"  {what:<15} {nbytes / _MIB:.1f} MiB per learning device{rows}"


def _serving_lines(blueprint: Blueprint, estimate: MemoryEstimate) -> Iterator[str]:
    """Weights, those that are being swapped in, and the encodings of the largest batch; for every
    policy server on the device."""
    notes = {
        "new parameters": ", while they are swapped in",
        "encodings": f" ({blueprint.config.serving.buckets[-1]} rows)",
    }
    for what, nbytes in estimate.serving(blueprint.layout.roles["serving"]).items():
        note = notes.get(what, "")
        yield f"  {what:<15} {nbytes / _MIB:.1f} MiB per serving device{note}"


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
    return tree_bytes(trajectory)


def _batch_lines(blueprint: Blueprint) -> Iterator[str]:
    config = blueprint.config
    simulation, learning = config.simulation, config.learning
    samples = minibatch_rows(blueprint) * config.algorithm.num_minibatches
    yield (
        f"batch      {learning.trajectories_per_update} trajectories x "
        f"{simulation.envs_per_group} envs x {simulation.segment_length} chunk queries = "
        f"{samples} samples per update, {samples * config.env.num_executed} control steps at most"
    )
    yield (
        f"  {config.algorithm.num_epochs} epochs x {config.algorithm.num_minibatches} minibatches "
        f"of {minibatch_rows(blueprint)} samples"
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
