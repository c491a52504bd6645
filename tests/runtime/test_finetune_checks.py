"""What a supervised run refuses before anything is written, and the data as a policy reads them."""

import copy
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from jaxvla import main
from jaxvla.config import ConfigError, ExperimentConfig, OptimizerConfig
from jaxvla.data.normalization import FieldStats, NormStats, save_norm_stats
from jaxvla.data.recorded import RecordedEpisode, write_episodes
from jaxvla.data.transforms import to_delta
from jaxvla.envs.tabletop import Tabletop
from jaxvla.models.prompts import encode_state_prompt
from jaxvla.runtime import finetune, jobs
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.finetune_data import _key, make_samples, open_data, record_expert, recording
from jaxvla.runtime.finetune_training import check_finetune
from jaxvla.telemetry.progress import Screen
from jaxvla.validation import validate

DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"
SIZE, STATE_DIM, ACTION_DIM = 32, 4, 4
TEXTS = ("reach the red block", "wipe the table")


@functools.cache
def _loaded() -> ExperimentConfig:
    return main.load_config(str(DEBUG))


def blueprint_of(workdir: pathlib.Path | None = None, **settings: Any) -> Blueprint:
    """Of the debug config with settings changed: `a__b=c` sets a.b."""
    config = copy.deepcopy(_loaded())
    config.finetune.batch_size = 8
    for name, value in settings.items():
        holder: Any = config
        *sections, last = name.split("__")
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, last, value)
    validate(config)
    return draw_blueprint(config, workdir)


def make_episode(
    seed: int, *, size: int = SIZE, state_dim: int = STATE_DIM, action_dim: int = ACTION_DIM
) -> RecordedEpisode:
    random = np.random.default_rng(seed)
    return RecordedEpisode(
        instruction=TEXTS[seed % 2],
        images=random.integers(0, 256, (6, 2, size, size, 3), dtype=np.uint8),
        state=random.uniform(0.0, 0.05, (6, state_dim)).astype(np.float32),
        actions=random.uniform(-1, 1, (9, action_dim)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("data")
    write(directory, map(make_episode, range(4)))
    return directory


def write(directory: pathlib.Path, episodes: Any, key: str = "") -> None:
    write_episodes(directory, episodes, cameras=("base", "wrist"), key=key)


def on(data: pathlib.Path, **settings: Any) -> dict[str, Any]:
    """Settings of a run on recorded data."""
    return {
        "finetune__dataset__kind": "recorded",
        "finetune__dataset__path": str(data),
        **settings,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetune__accumulation_steps": 3}, r"finetune\.batch_size = 8: must be a multiple of 3"),
        (
            {"finetune__batch_size": 12, "meshes__layout": "colocated=8:data4,fsdp2"},
            r"finetune\.batch_size = 12: must be a multiple of 8: .*Fix: .*batch_size=8$",
        ),
        (
            {"finetune__optimizer": OptimizerConfig(trainable="nothing")},
            r"finetune\.optimizer\.trainable = 'nothing': matches no parameter",
        ),
        (
            {"finetune__dataset__kind": "tapes"},
            r"dataset\.kind = 'tapes': known: expert, recorded, libero_hdf5, lerobot",
        ),
        (
            {"finetune__dataset__kind": "lerobot"},
            r"dataset\.path = '': the data must lie somewhere",
        ),
        (
            {"finetune__dataset__state_key": "state"},
            r"dataset\.state_key = 'state': is a setting of lerobot, the kind is 'expert'",
        ),
        (
            {"finetune__dataset__kind": "libero_hdf5", "finetune__dataset__path": "/nowhere"},
            r"dataset\.path = '/nowhere': /nowhere is no file, and no directory",
        ),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"finetune__dataset__cameras": ("wrist",)},
            r"dataset\.cameras = \('wrist',\): the env has 2 cameras",
        ),
        ({"finetune__batch_size": 32}, r"batch_size = 32: the data set has 24 samples"),
        ({"model__max_tokens": 64}, None),
        ({"model__state_input": "prompt"}, None),
    ],
)
def test_data_against_the_run(
    settings: dict[str, Any], message: str | None, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    blueprint = blueprint_of(**on(data, **settings))
    if message is None:
        check_finetune(blueprint, tmp_path)
        return
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint, tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes"), [("state", {"state_dim": 3}), ("actions", {"action_dim": 7})]
)
def test_data_of_another_robot(name: str, sizes: dict[str, int], tmp_path: pathlib.Path) -> None:
    write(tmp_path / "data", [make_episode(0, **sizes), make_episode(1, **sizes)])
    size = next(iter(sizes.values()))
    message = rf"its {name} have {size} dimensions, those of env 'tabletop' 4"
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**on(tmp_path / "data")), tmp_path)


def test_an_instruction_that_is_too_long(tmp_path: pathlib.Path) -> None:
    episode = dataclasses.replace(make_episode(0), instruction="a very long story " * 9)
    write(tmp_path / "data", [episode, episode])
    message = r"model\.max_tokens = \d+: the data set's longest prompt has 163 tokens"
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**on(tmp_path / "data")), tmp_path)
    check_finetune(blueprint_of(**on(tmp_path / "data", model__max_tokens=163)), tmp_path)


def test_a_missing_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    settings = on(tmp_path, finetune__dataset__kind="lerobot")
    with pytest.raises(ConfigError, match=r"pip install 'jaxvla\[data\]'"):
        check_finetune(blueprint_of(**settings), tmp_path)


def test_samples_are_made_for_the_policy(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blueprint = blueprint_of(**on(data, env__image_size=16))
    dataset = open_data(blueprint, tmp_path)
    batch = make_samples(blueprint, dataset).read(np.arange(3))
    struct = blueprint.observation_struct(3)
    for name in ("images", "image_mask", "state", "tokens", "token_mask"):
        made, wanted = getattr(batch.observation, name), getattr(struct, name)
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype), name
    assert batch.actions is not None and batch.actions.shape == (3, 8, ACTION_DIM)
    ids = np.asarray(batch.observation.tokens)[0][np.asarray(batch.observation.token_mask)[0]]
    assert blueprint.tokenizer.encode(TEXTS[0], add_bos=True) == ids.tolist()[:-1]
    # The env's own prompt of the same sentence.
    row = blueprint.spec.instructions.index(TEXTS[0])
    np.testing.assert_array_equal(batch.observation.tokens[0], blueprint.table.tokens[row])


def test_prompts_that_tell_the_state(tmp_path: pathlib.Path) -> None:
    """States at the edges of the bins, where one rounding decides: in float64, as openpi has it."""
    low, high = blueprint_of().stats.state.quantiles()
    edges = np.linspace(-1, 1, 257)[1:-1]
    states = low + (edges[:, None] + 1.0) / 2.0 * (high - low + 1e-6)
    episode = RecordedEpisode(
        instruction=TEXTS[0],
        images=np.zeros((255, 2, SIZE, SIZE, 3), np.uint8),
        state=states.astype(np.float32),
        actions=np.zeros((255, ACTION_DIM), np.float32),
    )
    write(tmp_path / "data", [episode])
    blueprint = blueprint_of(**on(tmp_path / "data", model__state_input="prompt"))
    batch = make_samples(blueprint, open_data(blueprint, tmp_path)).read(np.arange(255))
    told = (episode.state - low) / (high - low + 1e-6) * 2.0 - 1.0
    assert told.dtype == np.float64
    for row in range(255):
        wanted = encode_state_prompt(blueprint.tokenizer, TEXTS[0], told[row])
        mask = np.asarray(batch.observation.token_mask)[row]
        assert np.asarray(batch.observation.tokens)[row][mask].tolist() == wanted


def break_array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    def damage(data: pathlib.Path) -> None:
        path = data / "episode_000002" / f"{name}.npy"
        np.save(path, change(np.load(path)))

    return damage


def break_index(data: pathlib.Path) -> None:
    index = json.loads((data / "dataset.json").read_text())
    del index["episodes"][1]["num_steps"]
    (data / "dataset.json").write_text(json.dumps(index))


def stick(actions: np.ndarray) -> np.ndarray:
    """A gripper that moves once."""
    return np.concatenate([actions[:, :3], np.arange(len(actions))[:, None] == 3], axis=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_array("actions", lambda x: x * np.nan), "actions of episode 2 are not all finite"),
        (break_array("state", lambda x: x + np.inf), "states of episode 2 are not all finite"),
        (break_array("state", lambda x: x[:, :3]), r"states of episode 2 are \(6, 3\), not"),
        (break_array("actions", lambda x: x[:, :3]), r"actions of episode 2 are \(9, 3\), not"),
        (break_index, "episode 1 lacks its instruction or num_steps"),
        (lambda data: shutil.rmtree(data / "episode_000003"), r"state\.npy cannot be read"),
    ],
)
def test_damaged_data(damage: Any, message: str, tmp_path: pathlib.Path) -> None:
    data, workdir = tmp_path / "data", tmp_path / "run"
    write(data, map(make_episode, range(4)))
    damage(data)
    with pytest.raises(ConfigError, match=r"finetune\.dataset\.path = .*" + message):
        check_finetune(blueprint_of(**on(data)), workdir)
    assert not workdir.exists()


def test_a_malformed_index_of_lerobot(tmp_path: pathlib.Path) -> None:
    (tmp_path / "meta").mkdir()
    info = {"codebase_version": "v2.1", "fps": 10, "features": {"state": {}}, "data_path": "x"}
    (tmp_path / "meta" / "info.json").write_text(json.dumps(info))
    settings = on(tmp_path, finetune__dataset__kind="lerobot")
    message = r"finetune\.dataset\.path = .*cannot be read: KeyError\('dtype'\)"
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**settings), tmp_path)


def test_actions_that_cannot_be_normalised_so(tmp_path: pathlib.Path) -> None:
    actions = np.zeros((1000, ACTION_DIM), np.float32)
    actions[500, 1] = 1.0
    state = np.random.default_rng(0).uniform(0, 0.05, (1000, STATE_DIM)).astype(np.float32)
    images = np.zeros((1000, 2, 4, 4, 3), np.uint8)
    episode = RecordedEpisode(instruction=TEXTS[0], images=images, state=state, actions=actions)
    write(tmp_path / "data", [episode])
    settings = on(tmp_path / "data", finetune__compute_norm_stats=True)
    message = r"model\.normalization = 'quantile': dimension 1 of actions .*Fix: .*=zscore"
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**settings), tmp_path)
    check_finetune(blueprint_of(**settings, model__normalization="zscore"), tmp_path)


def test_masks_of_another_size(tmp_path: pathlib.Path) -> None:
    mask = np.zeros((6, 2, SIZE, SIZE), bool)
    episodes = [dataclasses.replace(make_episode(i), target_mask=mask) for i in range(4)]
    write(tmp_path / "data", episodes)
    settings = on(tmp_path / "data", env__image_size=16)
    blueprint = blueprint_of(**settings, model__grounding_coef=0.0)
    check_finetune(blueprint, tmp_path)
    dataset = open_data(blueprint, tmp_path)
    assert make_samples(blueprint, dataset).read(np.arange(2)).target_mask is None
    message = r"finetune\.dataset\.path = .*masks of the named objects are \(2, 32, 32\)"
    with pytest.raises(ConfigError, match=message):
        check_finetune(blueprint_of(**settings, model__grounding_coef=1.0), tmp_path)


def test_a_path_below_home(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    check_finetune(blueprint_of(**on(pathlib.Path("~") / data.name)), tmp_path)
    config = blueprint_of(finetune__dataset__path="~/new").config.finetune.dataset
    assert recording(config, tmp_path) == data.parent / "new"


def test_the_expert_does_not_write_into_files_of_others(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine" / "notes.txt"
    file.parent.mkdir()
    file.write_text("mine")
    for path, message in ((file, "is no directory"), (file.parent, "holds files that are no rec")):
        with pytest.raises(ConfigError, match=rf"finetune\.dataset\.path = .*{message}"):
            check_finetune(blueprint_of(finetune__dataset__path=str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists() and file.read_text() == "mine"


def test_tasks_that_the_expert_cannot_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(env: Any, state: Any) -> Any:
        raise ValueError("no plan for a goal of kind Folded")

    monkeypatch.setattr(Tabletop, "expert_action", refuse)
    blueprint = blueprint_of()
    run = functools.partial(
        jobs.run,
        job="finetune",
        config=blueprint.config,
        workdir=tmp_path,
        is_dry_run=True,
        may_resume=True,
        command="",
    )
    message = r"finetune\.dataset\.kind = 'expert': no plan .*Fix: .*kind=recorded"
    with pytest.raises(ConfigError, match=message):
        run()
    # What has been recorded already needs no expert.
    write(tmp_path / "demonstrations", map(make_episode, range(4)), key=_key(blueprint))
    assert run() == 0


def test_recordings_of_other_settings_are_not_used(tmp_path: pathlib.Path) -> None:
    blueprint = blueprint_of()
    config = blueprint.config.finetune.dataset
    where = recording(config, tmp_path)
    assert where == tmp_path / "demonstrations"
    write(where, map(make_episode, range(4)), key=_key(blueprint))
    check_finetune(blueprint, tmp_path)
    assert not record_expert(blueprint, tmp_path, lambda: False)
    changes: tuple[dict[str, Any], ...] = (
        {"seed": 5},
        {"env__tasks": ("reach",)},
        {"finetune__dataset__noise_std": 0.1},
        {"finetune__dataset__num_episodes": 7},
        {"model__action_horizon": 16},
    )
    for change in changes:
        other = blueprint_of(**change)
        with pytest.raises(ConfigError, match="demonstrations recorded with other settings"):
            check_finetune(other, tmp_path)
    (where / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match="no index of recorded episodes"):
        check_finetune(blueprint, tmp_path)
    shutil.rmtree(where)
    check_finetune(blueprint, tmp_path)  # they are to be recorded


def test_the_statistics_of_the_work_directory_count(tmp_path: pathlib.Path) -> None:
    """Whatever job asks for them."""
    ones = np.ones(4)
    field = FieldStats.from_bounds(-2 * ones, 2 * ones)
    stats = NormStats(state=field, actions=field)
    save_norm_stats(stats, tmp_path / "norm_stats.json")
    found = blueprint_of(tmp_path, finetune__compute_norm_stats=True)
    assert found.stats.fingerprint == stats.fingerprint
    assert blueprint_of(tmp_path).identity["norm_stats"] == stats.fingerprint


class Drawn:
    """Stands where the run would begin, and keeps the blueprint."""

    def __init__(self, blueprint: Blueprint, samples: Any, **others: Any):
        self.last.append(blueprint)

    last: ClassVar[list[Blueprint]] = []

    def run(self) -> int:
        return 0


def start(
    blueprint: Blueprint, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Blueprint:
    """What `finetune` would run in a work directory; norm_stats.json lies there then."""
    monkeypatch.setattr(finetune, "Finetuning", Drawn)
    code = finetune.finetune(
        blueprint,
        workdir=workdir,
        screen=Screen(io.StringIO(), num_updates=1),
        stop_requested=threading.Event(),
        command="",
        write_config=lambda x: save_norm_stats(x.stats, workdir / "norm_stats.json"),
    )
    assert code == 0
    return Drawn.last.pop()


def test_statistics_without_a_checkpoint_are_computed_anew(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended before they were computed left the env's bounds."""
    bounds = blueprint_of(**on(data)).stats
    save_norm_stats(bounds, tmp_path / "norm_stats.json")
    settings = on(data, finetune__compute_norm_stats=True)
    started = start(blueprint_of(tmp_path, **settings), tmp_path, monkeypatch)
    states = np.concatenate([make_episode(i).state for i in range(4)])
    actions = np.concatenate([make_episode(i).actions[:6] for i in range(4)])
    np.testing.assert_allclose(started.stats.state.mean, states.mean(0), rtol=1e-5)
    np.testing.assert_allclose(started.stats.actions.mean, actions.mean(0), rtol=1e-5, atol=1e-6)
    assert blueprint_of(tmp_path).identity == started.identity
    # A checkpoint means what its statistics say: now they stay.
    save_norm_stats(bounds, tmp_path / "norm_stats.json")
    checkpointer = blueprint_of(tmp_path).checkpointer(tmp_path)
    checkpointer.save(0, {"x": np.ones(1)}, {})
    checkpointer.close()
    again = start(blueprint_of(tmp_path, **settings), tmp_path, monkeypatch)
    assert again.stats.fingerprint == bounds.fingerprint


def test_relative_actions_have_statistics_of_their_own(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = on(data, finetune__compute_norm_stats=True, model__delta_dims=3)
    blueprint = blueprint_of(tmp_path, **settings)
    started = start(blueprint, tmp_path, monkeypatch)
    samples = make_samples(blueprint, open_data(blueprint, tmp_path))
    batch = samples.read(np.arange(samples.num_samples))
    learned = to_delta(np.asarray(batch.actions), np.asarray(batch.observation.state), (True,) * 3)
    mean = learned.mean(axis=(0, 1), dtype=np.float64)
    np.testing.assert_allclose(started.stats.actions.mean, mean, rtol=1e-5, atol=1e-6)


def test_named_statistics_stand_in_until_some_are_computed(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = on(data, finetune__compute_norm_stats=True, model__norm_stats="bounds")
    blueprint = blueprint_of(tmp_path, **settings)
    check_finetune(blueprint, tmp_path)
    started = start(blueprint, tmp_path, monkeypatch)
    assert started.stats.fingerprint != blueprint.stats.fingerprint
    # The same command line, for another job or to go on.
    assert blueprint_of(tmp_path, **settings).identity == started.identity
