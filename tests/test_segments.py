"""Group sizes and lengths of trajectories: what is refused with which fix, what is filled in."""

import copy
import functools
import pathlib
import re
from typing import Any

import pytest

from jaxvla import main
from jaxvla.algorithms.grpo import GRPOConfig
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import ConfigError, ExperimentConfig
from jaxvla.segments import resolve_segments
from jaxvla.validation import validate

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@functools.cache
def _loaded(name: str) -> ExperimentConfig:
    return main.load_config(str(_CONFIGS / f"{name}.py"))


def _grpo(**simulation: Any) -> ExperimentConfig:
    """The debug config with 8 envs per group, for GRPO."""
    config = copy.deepcopy(_loaded("debug"))
    config.algorithm = GRPOConfig()
    for name, value in ({"group_size": 4, "segment_length": -1} | simulation).items():
        setattr(config.simulation, name, value)
    return config


def _refusal(config: ExperimentConfig) -> tuple[str, int]:
    """(setting, value that the fix gives it), after which nothing else is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        validate(config)
    found = re.search(r"Fix: --config\.simulation\.(\w+)=(-?\d+)$", str(caught.value))
    assert found, str(caught.value)
    name, value = found[1], int(found[2])
    assert caught.value.name == f"simulation.{name}"
    setattr(config.simulation, name, value)
    if name == "envs_per_group":
        config.serving.max_batch = value
    validate(config)
    return name, value


@pytest.mark.parametrize(
    ("simulation", "fix"),
    [
        ({"group_size": 0}, ("group_size", 8)),
        ({"group_size": 1}, ("group_size", 8)),
        ({"group_size": 3}, ("group_size", 8)),
        ({"group_size": 16}, ("group_size", 8)),
        ({"envs_per_group": 6, "group_size": 4}, ("group_size", 2)),
    ],
)
def test_what_grpo_needs(simulation: dict[str, int], fix: tuple[str, int]) -> None:
    config = _grpo(**simulation)
    config.serving.max_batch = config.simulation.envs_per_group
    assert _refusal(config) == fix


def test_one_env_has_none_to_be_compared_with() -> None:
    config = _grpo(envs_per_group=1)
    with pytest.raises(ConfigError, match=r"envs_per_group = 1: must be >= 2.*grpo compares"):
        validate(config)


def test_a_negative_group_size_is_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"group_size = -8: must be >= 0"):
        validate(_grpo(group_size=-8))


def test_ppo_has_no_use_for_groups() -> None:
    config = copy.deepcopy(_loaded("debug"))
    config.simulation.group_size = 4
    assert _refusal(config) == ("group_size", 0)
    config.simulation.segment_length = -1
    assert _refusal(config) == ("segment_length", 8)


@pytest.mark.parametrize(("limits", "length"), [((32,), 8), ((32, 80, 64), 20), ((1, 33), 9)])
def test_a_trajectory_is_as_long_as_the_longest_episode(
    limits: tuple[int, ...], length: int
) -> None:
    """Four control steps to a chunk."""
    config = _grpo()
    validate(config)
    resolved = resolve_segments(config, limits)
    assert isinstance(resolved.algorithm, GRPOConfig)
    assert (resolved.simulation.segment_length, resolved.algorithm.group_size) == (length, 4)
    assert config.simulation.segment_length == -1  # a copy
    validate(resolved)
    assert resolve_segments(resolved, limits) == resolved


@pytest.mark.parametrize("length", [7, 9])
def test_another_length_is_refused(length: int) -> None:
    """Episodes would be cut, or the queue would be full of padding."""
    config = _grpo(segment_length=length)
    validate(config)
    with pytest.raises(ConfigError, match=rf"h = {length}: must be -1 or the 8 chunk.*length=-1"):
        resolve_segments(config, (32, 30))


def test_minibatches_must_divide_what_was_filled_in() -> None:
    config = _grpo()
    config.algorithm.num_minibatches = 3
    validate(config)
    with pytest.raises(ConfigError, match=r"num_minibatches = 3: .*segment_length = 8"):
        resolve_segments(config, (32,))
    assert resolve_segments(config, (36,)).simulation.segment_length == 9


def test_without_groups_nothing_is_filled_in() -> None:
    config = copy.deepcopy(_loaded("debug"))
    assert resolve_segments(config, (32,)) == config
    assert not PPOConfig().compares_episodes()


def test_the_shipped_config_plans_whole_episodes() -> None:
    config = _loaded("tabletop_grpo")
    validate(config)
    assert config.simulation.group_size == 8
    assert resolve_segments(config, (32,)).simulation.segment_length == 8
