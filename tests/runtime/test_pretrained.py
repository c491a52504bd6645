"""Tokenizer, statistics and first weights of a run, from the files that the config names."""

import copy
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jaxvla import main
from jaxvla.config import ConfigError, ExperimentConfig
from jaxvla.data.normalization import FieldStats, NormStats, save_norm_stats
from jaxvla.models.openpi_format import load_stats, save_checkpoint
from jaxvla.models.openpi_tree import flatten
from jaxvla.runtime.build import Blueprint, Parts, draw_blueprint
from jaxvla.runtime.pretrained import check_initial_weights
from jaxvla.types import Params

_DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"
_TOY = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "toy_tokenizer.model"


@functools.cache
def _loaded() -> ExperimentConfig:
    return main.load_config(str(_DEBUG))


def _config(**model: Any) -> ExperimentConfig:
    """The debug config with settings of the model changed."""
    config = copy.deepcopy(_loaded())
    config.model = dataclasses.replace(config.model, **model)
    return config


def _draw(workdir: pathlib.Path | None = None, **model: Any) -> Blueprint:
    return draw_blueprint(_config(**model), workdir)


def _stats(state_dim: int, action_dim: int, *, shift: float = 0.0) -> NormStats:
    def field(size: int) -> FieldStats:
        mean, std = np.arange(size) + shift, np.arange(size) + 1.0
        return FieldStats(mean=mean, std=std, q01=mean - 2.0 * std, q99=mean + 2.0 * std)

    return NormStats(state=field(state_dim), actions=field(action_dim))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Params]:
    """A checkpoint of openpi that fits the debug model, and the parameters in it."""
    blueprint = _draw()
    params = blueprint.policy.init(jax.random.key(5))
    directory = tmp_path_factory.mktemp("openpi") / "checkpoint"
    spec = blueprint.spec
    stats = _stats(spec.state_dim + 3, spec.action_dim)
    save_checkpoint(directory, params, stats=stats, asset_id="org/robot")
    return directory, params


# ---------------------------------------------------------------------------- statistics


def test_statistics_come_from_the_first_place_that_has_them(
    exported: tuple[pathlib.Path, Params], tmp_path: pathlib.Path
) -> None:
    directory, spec = str(exported[0]), _draw().spec
    named, workdir = tmp_path / "named.json", tmp_path / "run"
    workdir.mkdir()
    save_norm_stats(_stats(spec.state_dim, spec.action_dim, shift=1.0), named)
    save_norm_stats(_stats(spec.state_dim, spec.action_dim, shift=2.0), workdir / "norm_stats.json")

    def mean(workdir: pathlib.Path | None = None, **model: Any) -> float:
        return float(_draw(workdir, **model).stats.state.mean[0])

    everything = {"initial_weights": directory}
    assert mean(workdir, norm_stats=str(named), **everything) == 1.0
    assert mean(workdir, norm_stats="org/robot", **everything) == 0.0
    assert mean(workdir, **everything) == 2.0
    assert mean(**everything) == 0.0
    bounds = (spec.state_low[0] + spec.state_high[0]) / 2.0
    assert mean(norm_stats="bounds", **everything) == mean() == bounds


def test_statistics_are_cut_to_the_env(exported: tuple[pathlib.Path, Params]) -> None:
    blueprint = _draw(initial_weights=str(exported[0]))
    assert load_stats(exported[0], "org/robot", "quantile").state_dim > blueprint.spec.state_dim
    assert blueprint.stats.state_dim == blueprint.spec.state_dim


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm_stats": "nowhere.json"}, r"there is no file nowhere\.json"),
        ({"norm_stats": "org/other"}, r"has no norm_stats\.json for it.*org/robot"),
        ({"norm_stats": "small.json"}, r"statistics of state have 1 dimensions, the env has"),
        ({"norm_stats": "broken.json"}, r"is no norm_stats\.json"),
        ({"norm_stats": "list.json"}, r"is no norm_stats\.json"),
        ({"norm_stats": "nan.json"}, r"must be finite"),
    ],
)
def test_bad_statistics_are_refused(
    exported: tuple[pathlib.Path, Params],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_norm_stats(_stats(1, 7), pathlib.Path("small.json"))
    pathlib.Path("broken.json").write_text("{}")
    pathlib.Path("list.json").write_text('{"norm_stats": {"state": [1]}}')
    bad = json.loads(pathlib.Path("small.json").read_text())
    bad["norm_stats"]["state"]["mean"] = [float("nan")]
    pathlib.Path("nan.json").write_text(json.dumps(bad))
    if model["norm_stats"] == "org/other":
        model = {**model, "initial_weights": str(exported[0])}
    with pytest.raises(ConfigError, match=rf"config\.model\.norm_stats = .*{message}"):
        _draw(**model)


def test_weights_with_several_statistics_need_a_name(
    exported: tuple[pathlib.Path, Params], tmp_path: pathlib.Path
) -> None:
    blueprint = _draw()
    directory = tmp_path / "two"
    save_checkpoint(directory, exported[1], stats=blueprint.stats, asset_id="a")
    save_norm_stats(blueprint.stats, _made(directory / "assets" / "b") / "norm_stats.json")
    with pytest.raises(ConfigError, match="statistics of a, b; name one of them"):
        _draw(initial_weights=str(directory))
    assert _draw(initial_weights=str(directory), norm_stats="b").stats.state_dim


def _made(directory: pathlib.Path) -> pathlib.Path:
    directory.mkdir(parents=True)
    return directory


def test_normalization_kind_is_that_of_the_config(exported: tuple[pathlib.Path, Params]) -> None:
    blueprint = _draw(initial_weights=str(exported[0]), normalization="zscore")
    state = np.arange(blueprint.spec.state_dim, dtype=np.float32)[None] + 0.5
    wanted = 0.5 / (np.arange(blueprint.spec.state_dim) + 1.0 + 1e-6)
    np.testing.assert_allclose(blueprint.stats.normalize_state(state)[0], wanted, rtol=1e-6)


# ------------------------------------------------------------------------------- weights


def test_a_run_begins_with_openpis_weights(exported: tuple[pathlib.Path, Params]) -> None:
    directory, params = exported
    parts = Parts(_draw(initial_weights=str(directory)))
    training = parts.training(parts.config.optimizer)
    found = flatten(jax.device_get(parts.fresh_params(training)))
    stored = {path for path in found if "_head/" not in path}
    for path, leaf in flatten(jax.device_get(params)).items():
        if path in stored:
            chex.assert_trees_all_equal(found[path], leaf)
    # What openpi has not begins as in a run without its weights.
    fresh = Parts(_draw())
    random = flatten(jax.device_get(fresh.fresh_params(fresh.training(fresh.config.optimizer))))
    heads = set(found) - stored
    assert heads
    for path in heads:
        np.testing.assert_allclose(found[path], random[path], rtol=1e-6)


def test_a_run_begins_with_the_policy_of_another(tmp_path: pathlib.Path) -> None:
    parts = Parts(_draw())
    params = parts.blueprint.policy.init(jax.random.key(9))
    _save_workdir(parts.blueprint, tmp_path, params)
    other = Parts(_draw(initial_weights=str(tmp_path)))
    check_initial_weights(
        other.blueprint.policy, other.blueprint.config.model, other.blueprint.identity
    )
    found = other.fresh_params(other.training(other.config.optimizer))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(params))


def _save_workdir(blueprint: Blueprint, workdir: pathlib.Path, params: Params) -> None:
    checkpointer = blueprint.checkpointer(workdir)
    checkpointer.save(7, {"state": {"params": params}}, {})
    checkpointer.close()
    save_norm_stats(blueprint.stats, workdir / "norm_stats.json")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"initial_weights": "missing"}, "there is no checkpoint at"),
        ({"initial_weights": "empty"}, "holds no weights of openpi"),
        ({"initial_weights": "gs://openpi-assets/pi0"}, "is not in openpi's cache"),
        ({"initial_weights": "EXPORTED", "vlm_mlp_width": 48}, "of another shape.*mlp"),
        ({"initial_weights": "EXPORTED", "depth": 3}, "of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    exported: tuple[pathlib.Path, Params],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    overrides = [
        f"--config.model.{name}={value}".replace("EXPORTED", str(exported[0]))
        for name, value in model.items()
    ]
    command = ["jaxvla", f"--config={_DEBUG}", "--workdir=run", "--config.model.norm_stats=bounds"]
    assert main.main([*command, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config.model.initial_weights = ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not pathlib.Path("run").exists()


def test_weights_of_another_tokenizer_are_refused(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("sentencepiece")
    blueprint = _draw()
    _save_workdir(blueprint, tmp_path, blueprint.policy.init(jax.random.key(9)))
    other = _draw(initial_weights=str(tmp_path), tokenizer=str(_TOY), vocab_size=512)
    with pytest.raises(ConfigError, match="made with another tokenizer: 'byte-260' in it"):
        check_initial_weights(other.policy, other.config.model, other.identity)


# ----------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("nowhere.model", "cannot be read"), ("nowhere.json", "cannot be read")],
)
def test_a_tokenizer_that_is_not_there_is_refused(tokenizer: str, message: str) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(ConfigError, match=rf"config\.model\.tokenizer = .*{message}"):
        _draw(tokenizer=tokenizer)


def test_prompts_are_those_of_the_tokenizer() -> None:
    pytest.importorskip("sentencepiece")
    blueprint = _draw(tokenizer=str(_TOY), vocab_size=512)
    text = blueprint.spec.instructions[0]
    ids = np.asarray(blueprint.table.tokens[0])[np.asarray(blueprint.table.mask[0])]
    assert ids.tolist() == blueprint.tokenizer.encode(text, add_bos=True) + (
        blueprint.tokenizer.encode("\n")
    )
    assert ids.max() > 260


# -------------------------------------------------------------------------------- export


def test_export_gives_back_what_a_run_began_with(
    exported: tuple[pathlib.Path, Params],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir, out = tmp_path / "run", tmp_path / "out"
    blueprint = _draw()
    _save_workdir(blueprint, workdir, exported[1])
    command = ["jaxvla", f"--config={_DEBUG}", f"--workdir={workdir}", "--job=export"]
    assert main.main([*command, f"--export_dir={out}", "--asset_id=org/x"]) == 0
    again = Parts(_draw(initial_weights=str(out)))
    found = flatten(jax.device_get(again.fresh_params(again.training(again.config.optimizer))))
    for path, leaf in flatten(jax.device_get(exported[1])).items():
        if "_head/" not in path:
            chex.assert_trees_all_equal(found[path], leaf)
    stats = json.loads((out / "assets" / "org" / "x" / "norm_stats.json").read_text())
    assert stats["norm_stats"]["state"]["mean"] == blueprint.stats.state.mean.tolist()
    assert main.main([*command, f"--export_dir={out}"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main.main([*command, f"--export_dir={tmp_path / 'new'}", "--asset_id=../x"]) == 2
    assert "must be a relative path" in capsys.readouterr().err


def test_flags_of_the_export_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["jaxvla", f"--config={_DEBUG}", "--dry_run", "--asset_id=x"]) == 2
    assert "Fix: --job=export" in capsys.readouterr().err


def test_training_does_not_go_on_in_the_directory_of_another_job(
    exported: tuple[pathlib.Path, Params],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their checkpoints hold other things; what both have is the policy."""
    _save_workdir(_draw(), tmp_path, exported[1])
    assert main.main(["jaxvla", f"--config={_DEBUG}", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "is one of --job=finetune. Fix: --workdir=NEW_DIR --config.model.initial" in error
    assert not (tmp_path / "config.json").exists()
