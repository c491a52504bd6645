"""Validation of settings: nothing impossible passes, and every suggested fix helps."""

import copy
import functools
import json
import pathlib
import shlex
from typing import Any

import pytest

from jaxvla import main
from jaxvla.config import ConfigError, ExperimentConfig, field_names, to_dict
from jaxvla.envs import ENVS
from jaxvla.envs.libero_host import LiberoHostConfig
from jaxvla.envs.tabletop import Tabletop
from jaxvla.registry import Registry
from jaxvla.runtime.build import _resolve_serving as _resolved_serving
from jaxvla.runtime.build import draw_blueprint
from jaxvla.validation import validate, validate_devices

_DEBUG = pathlib.Path(__file__).parents[1] / "configs" / "debug.py"


@functools.cache
def _loaded() -> ExperimentConfig:
    return main.load_config(str(_DEBUG))


def _debug(**settings: Any) -> ExperimentConfig:
    """The debug config with settings changed: `a__b=c` sets a.b."""
    config = copy.deepcopy(_loaded())
    for name, value in settings.items():
        _set(config, name.replace("__", "."), value)
    return config


def _set(config: Any, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, last, value)


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


# ------------------------------------------------------------------------------- refusals

_REFUSED = [
    # Config files assign freely, so types are checked as well.
    {"seed": "1"},
    {"seed": True},
    {"seed": 1.0},
    {"seed": -1},
    {"seed": 2**32},
    {"learning__num_updates": 2**31},
    {"optimizer__learning_rate": float("nan")},
    {"optimizer__learning_rate": 1e300},
    {"optimizer__learning_rate": 0.0},
    {"optimizer__beta2": 1.0},
    {"optimizer__clip_norm": 0.0},
    {"warm_start__optimizer__eps": 0},
    {"serving__buckets": [8]},
    {"serving__buckets": (8, 8)},
    {"serving__buckets": (0, 8)},
    {"serving__buckets": (8.0,)},
    {"serving__max_batch": 4},
    {"serving__max_batch": 12},
    {"serving__max_batch": 0},
    {"serving__num_servers": 0},
    {"serving__num_servers": 3},  # of 2 groups
    {"serving__assignment": "nearest"},
    {"serving__assignment": "0"},
    {"serving__assignment": "0,1"},  # one server
    {"serving__assignment": "0,0", "serving__num_servers": 2},
    {"serving__split_devices": True, "serving__num_servers": 2},  # one device
    {"serving__trigger_size": 9},
    {"serving__trigger_size": -2},
    {"serving__max_wait_ms": -1.0},
    {"serving__max_wait_ms": 1e30},  # no lock can wait so long
    {"schedule__max_staleness": -1},
    {"schedule__window": 0},
    {"schedule__publish_interval": 0},
    {"schedule__publish_interval": 3, "schedule__window": 9},  # S counts, not the bound
    {"schedule__publish_interval": 3},
    {"schedule__overlap_rollout": False, "simulation__num_groups": 3},
    {"schedule": None},
    {"env": None},
    {"env__num_executed": 0},
    {"env__num_executed": 9},
    {"env__name": "nowhere"},
    {"env__tasks": ()},
    {"env__image_size": 8},
    {"env__tasks": ("reach", "reach")},
    {"env__tasks": ("lift", "reach", "lift")},
    {"telemetry__writers": ("wandb", "wandb")},
    {"model__value_widths": (0,)},
    {"model__value_widths": (-1,)},
    {"model__value_widths": (16, 0, 8)},
    {"model__value_widths": (2**31,)},
    {"model__vision_depth": 0},
    {"model__state_dim": -2},
    {"model__vision_heads": 3},
    {"model__num_kv_heads": 3},
    {"model__head_dim": 15},
    {"model__expert_width": 31},
    {"model__log_prob_steps": 9},
    {"algorithm__discount": 1.5},
    {"algorithm__num_minibatches": 3},
    {"algorithm__name": "PPO"},
    {"simulation__num_groups": 0},
    {"simulation__num_groups": 10**9, "serving__max_batch": -1},  # endless default buckets
    {"simulation__envs_per_group": 0},
    {
        "simulation__envs_per_group": 9,
        "serving__max_batch": 9,
        "meshes__layout": "simulation=2 serving=1 learning=1",
    },
    {"checkpoint__keep": 1},
    {"checkpoint__interval": 0},
    {"runtime__kind": "slurm"},
    {"runtime__grace_s": 0.0},
    {"runtime__matmul_precision": "best"},
    {"websocket__port": 65_536},
    {"websocket__host": "0.0.0.0"},
    {"websocket__buckets": (2, 1)},
    {"websocket__token_variable": "A B"},
    {"meshes__layout": "colocated=3"},
    {"meshes__layout": ""},
    {"meshes__layout": "simulation=1 serving=3 learning=1"},
    {"meshes__layout": "simulation=1 serving=1 learning=6:fsdp3"},
    {"warm_start__batch_size": 15, "meshes__layout": "simulation=1 serving=1 learning=2"},
    {"evaluation__num_episodes": -1},
    {"name": "../elsewhere"},
    {"name": ""},
    {"optimizer__trainable": "["},
]


@pytest.mark.fault(29)
@pytest.mark.parametrize("settings", _REFUSED, ids=str)
def test_what_cannot_work_is_refused_by_name(settings: dict[str, Any]):
    config = _debug(**settings)
    with pytest.raises(ConfigError) as raised:
        validate(config)
    error = raised.value
    first = next(iter(settings)).replace("__", ".")
    related = {
        "schedule.overlap_rollout": "learning.trajectories_per_update",
        "simulation.num_groups": "serving.buckets",
    }
    if not first.startswith("meshes."):  # a layout may be at odds with any batch size
        assert error.name in (first, related.get(first))
    value = _get(config, error.name)
    assert str(error).startswith(f"config.{error.name} = {value!r}: ")
    assert ". Fix: --config." in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "settings", [x for x in _REFUSED if not {"schedule", "env"} & set(x)], ids=str
)
def test_following_the_fixes_leads_to_a_config_that_works(settings: dict[str, Any]):
    config = _debug(**settings)
    for _ in range(4):
        try:
            validate(config)
            return
        except ConfigError as error:
            fix = str(error).rpartition(". Fix: ")[2]
            argument = shlex.split(fix.partition(", or ")[0])[0]
            name, _, _ = argument.removeprefix("--config.").partition("=")
            assert name == error.name, fix
            # As the command line would read it.
            arguments = ["jaxvla", f"--config={_DEBUG}", argument]
            _, parsed = main.parse(arguments)
            _set(config, name, _get(parsed, name))
    pytest.fail(f"still refused: {settings}")


def test_the_debug_config_as_changed_by_tests_is_valid_otherwise():
    validate(_debug())
    validate(_debug(schedule__max_staleness=2, schedule__publish_interval=3))
    validate(_debug(serving__max_batch=12, serving__buckets=(8, 16)))
    validate(_debug(optimizer__learning_rate=1))  # an integer is a number
    validate(_debug(env__name="package.module:Env"))
    validate(_debug(seed=2**32 - 1))
    validate(_debug(serving__num_servers=2, serving__assignment="1,0"))
    validate(_debug(serving__num_servers=2, serving__assignment="greedy"))
    validate(_debug(model__value_widths=()))


def test_batches_are_sized_for_the_groups_of_one_server():
    """8 envs in each of 6 groups."""
    for assignment, num_groups in (("round_robin", 3), ("greedy", 3), ("0,1,1,1,1,1", 5)):
        settings = {"serving__assignment": assignment, "serving__num_servers": 2}
        config = _debug(simulation__num_groups=6, serving__max_batch=-1, **settings)
        serving = _resolved_serving(config)
        assert serving.max_batch == 8 * num_groups
        assert serving.buckets == tuple(range(8, 8 * num_groups + 1, 8))


def test_buckets_divide_over_the_devices_of_one_server():
    """Four serving devices: each of two servers has two."""
    settings = {"meshes__layout": "simulation=1 serving=4 learning=1", "serving__num_servers": 2}
    for is_split, multiple in ((False, 4), (True, 2)):
        config = _debug(
            serving__split_devices=is_split, serving__buckets=(8 + multiple,), **settings
        )
        validate(config)
        config.serving.buckets = (8 + multiple // 2,)
        with pytest.raises(ConfigError, match=rf"policy server's data axis, {multiple} "):
            validate(config)


@pytest.mark.parametrize("per_update", [1, 4])
def test_trajectories_of_an_update_divide_together_unless_they_stream(per_update: int):
    """One env a group, four learning devices."""
    settings = {
        "meshes__layout": "simulation=1@0 serving=1@0 learning=4@0:fsdp4",
        "simulation__envs_per_group": 1,
        "serving__max_batch": 1,
        "warm_start__num_steps": 0,
        "warm_start__num_grounding_steps": 0,
        "learning__trajectories_per_update": per_update,
    }
    if per_update == 4:
        validate(_debug(**settings))
        settings |= {"schedule__stream_microbatches": True}
        settings |= {"algorithm__num_epochs": 1, "algorithm__num_minibatches": 1}
    with pytest.raises(ConfigError, match=r"envs_per_group = 1: .*data x fsdp = 4"):
        validate(_debug(**settings))


@pytest.mark.parametrize(("ids", "is_fine"), [((), True), ((3, 0), True), ((0, 3, 0), False)])
def test_a_libero_task_is_named_once(ids: tuple[int, ...], is_fine: bool):
    """Known without LIBERO; empty means all tasks of the suite."""
    config = _debug(env=LiberoHostConfig(task_ids=ids))
    if is_fine:
        validate(config)
        return
    with pytest.raises(ConfigError, match=r"config\.env\.task_ids = \(0, 3, 0\): .*'\(0, 3\)'$"):
        validate(config)


def test_devices_are_counted():
    config = _debug(meshes__layout="simulation=2 serving=2 learning=4")
    validate_devices(config, 8)
    with pytest.raises(ConfigError, match="needs 8 devices, 1 present"):
        validate_devices(config, 1)


# ------------------------------------------------------- one setting at a time, all of them

_TRIED: dict[type, tuple[Any, ...]] = {
    bool: (True, False, 0, None),
    int: (-2, -1, 0, 1, 2, 3, 7, 8, 12, 16, 2**31, 10**12, 1.5, True, "3", None),
    float: (-1.0, 0.0, 1e-9, 0.5, 1.0, 20.0, 1e9, 1e300, float("nan"), float("inf"), True, "x"),
    str: ("", "x", "a/b", "(", "bfloat16", "cps", "colocated=2", "two words", "\n", 3, None),
    tuple: ((), (1,), (0,), (-1,), (8, 16), (8, 8), ("x",), ("reach",) * 2, (1.5,), [8], None),
}


@functools.cache
def _env(tasks: tuple[str, ...], image_size: int) -> Tabletop:
    config = _debug(env__tasks=tasks, env__image_size=image_size).env
    return Tabletop(config)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def _envs_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building the physics for every value would take minutes."""
    resolve = Registry.get

    def get(registry: Registry, name: str) -> Any:
        found = resolve(registry, name)
        if registry is not ENVS:
            return found
        return lambda config: _env(config.tasks, config.image_size)

    monkeypatch.setattr(Registry, "get", get)


@pytest.mark.usefixtures("_envs_made_once")
@pytest.mark.parametrize("name", list(field_names(_loaded())))
def test_any_value_of_a_setting_is_refused_or_resolves(name: str):
    """With no other error than ConfigError, which says how to go on."""
    for value in _TRIED[type(_get(_loaded(), name))]:
        config = _debug()
        _set(config, name, value)
        try:
            validate(config)
            assert json.dumps(to_dict(config), allow_nan=False)
            if not name.endswith(".name"):
                draw_blueprint(config)
        except ConfigError as error:
            assert "Fix: " in str(error)
        else:
            # What a file may say, the command line may say too.
            _, parsed = main.parse(["jaxvla", f"--config={_DEBUG}", f"--config.{name}={value}"])
            assert _get(parsed, name) == value
