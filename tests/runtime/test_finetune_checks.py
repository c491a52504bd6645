"""What a supervised run refuses before anything is written, and the data as a policy reads them."""

import copy
import dataclasses
import functools
import io
import pathlib
import shutil
import sys
import threading
from typing import Any, ClassVar

import numpy as np
import pytest

from jaxvla import main
from jaxvla.config import ConfigError, ExperimentConfig, OptimizerConfig
from jaxvla.data.normalization import FieldStats, NormStats, save_norm_stats
from jaxvla.data.recorded import RecordedEpisode, write_episodes
from jaxvla.data.transforms import to_delta
from jaxvla.models.prompts import encode_state_prompt
from jaxvla.runtime import finetune
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


def test_prompts_that_tell_the_state(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blueprint = blueprint_of(**on(data, model__state_input="prompt"))
    dataset = open_data(blueprint, tmp_path)
    batch = make_samples(blueprint, dataset).read(np.array([0, 7]))
    offset, scale = blueprint.stats.state_affine()
    for row, text in enumerate(TEXTS):
        state = np.asarray(batch.observation.state, np.float64)[row]
        wanted = encode_state_prompt(blueprint.tokenizer, text, (state - offset) / scale)
        mask = np.asarray(batch.observation.token_mask)[row]
        assert np.asarray(batch.observation.tokens)[row][mask].tolist() == wanted


def test_recordings_of_other_settings_are_not_used(tmp_path: pathlib.Path) -> None:
    blueprint = blueprint_of()
    config = blueprint.config.finetune.dataset
    where = recording(config, tmp_path)
    assert where == tmp_path / "demonstrations"
    write(where, map(make_episode, range(4)), key=_key(blueprint))
    check_finetune(blueprint, tmp_path)
    assert not record_expert(blueprint, tmp_path, lambda: False)
    for change in (
        {"seed": 5},
        {"env__tasks": ("reach",)},
        {"finetune__dataset__noise_std": 0.1},
        {"finetune__dataset__num_episodes": 7},
        {"model__action_horizon": 16},
    ):
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
