"""What the evaluate job reads of a checkpoint: the parameters, whatever else the run had."""

import copy
import dataclasses
import functools
import pathlib
from typing import Any

import chex
import jax
import pytest

from jaxvla import main
from jaxvla.checkpoint import CheckpointMismatchError
from jaxvla.config import ConfigError, ExperimentConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.runtime.build import Parts, draw_blueprint
from jaxvla.runtime.checks import check_checkpoint
from jaxvla.runtime.evaluate import draw_judge, restore_evaluated
from jaxvla.runtime.groups import Groups
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.types import Params

_DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"


@functools.cache
def _loaded() -> ExperimentConfig:
    return main.load_config(str(_DEBUG))


def _parts(**settings: Any) -> Parts:
    """Of the debug config with settings changed: `a__b=c` sets a.b."""
    config = copy.deepcopy(_loaded())
    for name, value in settings.items():
        section, _, last = name.partition("__")
        setattr(getattr(config, section), last, value)
    return Parts(draw_blueprint(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Params]:
    """A work directory with a checkpoint at update 3, and the parameters in it."""
    workdir = tmp_path_factory.mktemp("run")
    parts = _parts()
    training = parts.training(parts.config.optimizer)
    state = training.init(parts.fresh_params(training))
    params = jax.device_get(state.params)
    checkpointer = parts.blueprint.checkpointer(workdir)
    groups = Groups(parts, log_dir=workdir, recorder=MetricRecorder()).targets(["group_0"])
    checkpointer.save(3, {"state": state, "groups": groups}, {"segments": {"group_0": 1}})
    checkpointer.close()
    return workdir, params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"simulation__envs_per_group": 4, "serving__max_batch": 4},
        {"optimizer__trainable": "value_head", "optimizer__clip_norm": 3.0},
        {"meshes__layout": "simulation=2 serving=2 learning=4:data2,fsdp2"},
    ],
    ids=["same", "other groups", "other optimizer", "other meshes"],
)
def test_a_run_with_other_settings_evaluates_the_same_parameters(
    saved: tuple[pathlib.Path, Params], changes: dict[str, Any]
) -> None:
    workdir, params = saved
    parts = _parts(**changes)
    check_checkpoint(parts.blueprint, workdir, "evaluate")
    restored = restore_evaluated(parts, workdir)
    assert restored is not None and restored.step == 3
    found = restored.arrays["state"]["params"]
    chex.assert_trees_all_equal(jax.device_get(found), params)
    serving = set(parts.meshes["serving"].devices.flat)
    assert all(leaf.sharding.device_set == serving for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("changes", "leaf"),
    [
        ({"optimizer__trainable": "value_head"}, "state/opt_state/"),
        ({"simulation__envs_per_group": 4, "serving__max_batch": 4}, "groups/group_0/"),
    ],
)
def test_training_goes_on_with_the_same_settings_only(
    saved: tuple[pathlib.Path, Params], changes: dict[str, Any], leaf: str
) -> None:
    workdir, _ = saved
    check_checkpoint(_parts().blueprint, workdir, "train")
    with pytest.raises(CheckpointMismatchError, match=leaf):
        check_checkpoint(_parts(**changes).blueprint, workdir, "train")


def test_parameters_of_another_model_are_refused(saved: tuple[pathlib.Path, Params]) -> None:
    workdir, _ = saved
    parts = _parts(model__value_widths=(8,))
    with pytest.raises(CheckpointMismatchError, match="state/params/value_head/"):
        check_checkpoint(parts.blueprint, workdir, "evaluate")
    with pytest.raises(CheckpointMismatchError, match="state/params/value_head/"):
        restore_evaluated(parts, workdir)


def test_a_work_directory_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    assert restore_evaluated(_parts(), tmp_path) is None


# --------------------------------------------------------------------------- the judge


def test_an_env_without_a_judge_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="has no judge"):
        draw_judge(_parts().blueprint, tmp_path)


def test_the_judge_evaluates_the_same_policy_in_its_own_env(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(config: TabletopConfig) -> TabletopConfig:
        return dataclasses.replace(config, tasks=config.tasks[:2])

    monkeypatch.setattr(TabletopConfig, "judge", judge)
    blueprint = _parts(evaluation__num_judge_envs=3).blueprint
    judging = draw_judge(blueprint, pathlib.Path("run"))
    assert judging.config.simulation.envs_per_group == 3
    assert judging.spec.tasks == blueprint.spec.tasks[:2]
    assert blueprint.config.simulation.envs_per_group == 8
    chex.assert_trees_all_equal_shapes(judging.params_struct(), blueprint.params_struct())
