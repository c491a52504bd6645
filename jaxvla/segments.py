"""What a trajectory holds: part of a stream of episodes, or whole episodes that began alike.

No jax.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxvla.config import ConfigError, ExperimentConfig, override


def validate_segments(config: ExperimentConfig) -> None:
    """Checks `simulation.group_size` against the algorithm and the sizes that it meets.

    Raises:
      ConfigError: they do not fit each other.
    """
    simulation, algorithm = config.simulation, config.algorithm
    envs, size, length = (
        simulation.envs_per_group,
        simulation.group_size,
        simulation.segment_length,
    )
    compares = algorithm.compares_episodes()
    if compares and envs < 2:
        allowed = f"must be >= 2: algorithm {algorithm.name} compares episodes that began alike"
        raise _error("envs_per_group", envs, allowed, 8)
    if compares and (size < 2 or envs % size):
        allowed = (
            f"must be >= 2 and divide simulation.envs_per_group = {envs}: algorithm "
            f"{algorithm.name} compares episodes that began alike"
        )
        raise _error("group_size", size, allowed, _fitting_size(envs))
    if size and not compares:
        allowed = f"must be 0: algorithm {algorithm.name} does not compare episodes"
        raise _error("group_size", size, allowed, 0)
    if not size and length == -1:
        allowed = "must be > 0 with simulation.group_size = 0: episodes go on over trajectories"
        raise _error("segment_length", length, allowed, 8)
    if not size:
        _require_whole_minibatches(config)


def resolve_segments(
    config: ExperimentConfig, max_episode_steps: Sequence[int]
) -> ExperimentConfig:
    """A copy of a validated config that says how long trajectories are and what is compared.

    Args:
      config: of the run.
      max_episode_steps: time limit per task, in control steps.

    Raises:
      ConfigError: a length was given and is not that of the longest episode, or the minibatches,
        or their parts, do not divide a trajectory.
    """
    simulation = config.simulation
    if simulation.group_size:
        length = -(-max(max_episode_steps) // config.env.num_executed)
        if simulation.segment_length not in (-1, length):
            allowed = f"must be -1 or the {length} chunk queries of the longest episode"
            raise _error("segment_length", simulation.segment_length, allowed, -1)
        simulation = dataclasses.replace(simulation, segment_length=length)
    algorithm = config.algorithm.resolve(group_size=simulation.group_size)
    config = dataclasses.replace(config, simulation=simulation, algorithm=algorithm)
    _require_whole_minibatches(config)
    return config


def _require_whole_minibatches(config: ExperimentConfig) -> None:
    length, count = config.simulation.segment_length, config.algorithm.num_minibatches
    if length % count:
        raise ConfigError(
            "algorithm.num_minibatches",
            count,
            f"must divide simulation.segment_length = {length}",
            override("algorithm.num_minibatches", 1),
        )
    parts, size = config.learning.num_microbatches, length // count
    if size % parts:
        raise ConfigError(
            "learning.num_microbatches",
            parts,
            f"must divide the {size} chunk queries of a minibatch",
            override("learning.num_microbatches", math.gcd(parts, size)),
        )


def _fitting_size(num_envs: int) -> int:
    """8, as is usual, or else the smallest number of envs above 1 that divides."""
    sizes = (8, *range(2, num_envs + 1))
    return next(size for size in sizes if num_envs % size == 0)


def _error(name: str, value: int, allowed: str, fix: int) -> ConfigError:
    name = f"simulation.{name}"
    return ConfigError(name, value, allowed, override(name, fix))
