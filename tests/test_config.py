"""The configs that ship, and the helpers of the config module."""

import dataclasses
import json
import pathlib
import shlex
from typing import Any

import compiled_libero
import pytest

from jaxvla import main
from jaxvla.config import (
    ConfigError,
    ExperimentConfig,
    ScheduleConfig,
    UsageError,
    field_names,
    override,
    to_dict,
)
from jaxvla.envs.libero_mjx import LiberoMjxConfig
from jaxvla.envs.libero_task import CACHE_VARIABLE
from jaxvla.runtime.build import draw_blueprint
from jaxvla.validation import validate

_CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


_SOURCES = [str(path) for path in _CONFIGS] + [
    f"{path}:tiny" for path in _CONFIGS if "def tiny" in path.read_text()
]
"""What --config may name."""
_TOY = pathlib.Path(__file__).parent / "data" / "oracle" / "toy_tokenizer.model"


def _load(source: str | pathlib.Path) -> ExperimentConfig:
    return main.load_config(str(source))


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=compiled_libero.MARKS if source.endswith("_mjx.py") else ())
        for source in _SOURCES
    ],
    ids=lambda source: pathlib.Path(source).name,
)
def test_a_shipped_config_loads_validates_overrides_and_resolves(
    source: str, monkeypatch: pytest.MonkeyPatch
):
    config = _load(source)
    if config.model.tokenizer == "paligemma":  # neither it nor the weights can be shipped
        pytest.importorskip("sentencepiece")
        monkeypatch.setenv("JAXVLA_TOKENIZER", str(_TOY))
        config.model.initial_weights = ""
    if isinstance(config.env, LiberoMjxConfig):
        tasks = compiled_libero.task_dir(config.env.suite, *config.env.task_ids)
        monkeypatch.setenv(CACHE_VARIABLE, tasks)
    validate(config)
    _, changed = main.parse(["jaxvla", f"--config={source}", "--config.seed=11"])
    assert changed is not None and changed.seed == 11
    changed.model.initial_weights = config.model.initial_weights
    validate(changed)
    assert to_dict(dataclasses.replace(changed, seed=config.seed)) == to_dict(config)
    blueprint = draw_blueprint(config)
    resolved = to_dict(blueprint.config)
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    for name in field_names(blueprint.config):
        assert _get(blueprint.config, name) != -1, name
    # What is resolved is valid, and resolves to itself.
    validate(blueprint.config)
    assert to_dict(draw_blueprint(blueprint.config).config) == resolved


def test_there_are_configs():
    assert {"debug", "quickstart"} <= {path.stem for path in _CONFIGS}


def test_field_names_reach_every_setting():
    names = list(field_names(_load(_CONFIGS[0])))
    assert len(names) == len(set(names))
    assert {"seed", "env.tasks", "warm_start.optimizer.eps", "schedule.max_staleness"} <= set(names)
    assert "optimizer" not in names


def test_an_override_survives_a_shell():
    for value in ("a b", "x'y", "(8,)", "$HOME", ""):
        [argument] = shlex.split(override("name", value))
        assert argument == f"--config.name={value}"


def test_a_config_error_names_value_rule_and_fix():
    error = ConfigError("seed", -1, "must be >= 0", override("seed", 0))
    assert str(error) == "config.seed = -1: must be >= 0. Fix: --config.seed=0"
    assert error.name == "seed" and isinstance(error, UsageError)


def test_without_overlap_nothing_is_stale_and_nothing_overtakes():
    for is_on, in_force in ((True, (3, 5)), (False, (0, 1))):
        schedule = ScheduleConfig(max_staleness=3, window=5, overlap_training=is_on)
        assert (schedule.staleness_in_force, schedule.window_in_force) == in_force
