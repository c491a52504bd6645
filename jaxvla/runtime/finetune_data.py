"""The data of a supervised run: checked before anything is written, recorded if need be."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxvla.config import ConfigError, DatasetConfig, override, to_dict
from jaxvla.data import DATASETS
from jaxvla.data.episodes import EpisodeDataset, EpisodeSamples, Prompt, select_cameras
from jaxvla.data.normalization import NormStats
from jaxvla.data.recorded import RecordedEpisode, RecordedEpisodes, read_key, write_episodes
from jaxvla.data.statistics import compute_norm_stats
from jaxvla.envs.base import device_scenes
from jaxvla.models.prompts import encode_prompt
from jaxvla.models.state_prompts import longest_prompt
from jaxvla.runtime.build import Blueprint, Parts, make_table
from jaxvla.runtime.groups import Groups
from jaxvla.telemetry.metrics import MetricRecorder

EXPERT = "expert"
RECORDINGS = "demonstrations"
"""Where the expert's episodes lie in a work directory."""
_ONLY_LEROBOT = ("state_key", "action_key", "rotate_images")


class StoppedError(Exception):
    """A signal asked to stop while episodes were recorded."""


def check_data(blueprint: Blueprint, workdir: pathlib.Path) -> None:
    """Opens what is there, and closes it again. Writes nothing.

    Raises:
      ConfigError: the data cannot be read, or do not fit the env or the model.
    """
    config = blueprint.config.finetune.dataset
    _check_settings(config)
    if config.kind == EXPERT:
        if not device_scenes(blueprint.env):
            raise ConfigError(
                "finetune.dataset.kind",
                EXPERT,
                f"env {blueprint.config.env.name!r} has no scripted expert",
                override("finetune.dataset.kind", "recorded"),
            )
        if not _is_recorded(blueprint, workdir):
            return
    open_data(blueprint, workdir).close()


def open_data(blueprint: Blueprint, workdir: pathlib.Path) -> EpisodeDataset:
    """The data set that the config names; of the expert, its recording.

    Raises:
      ConfigError: it cannot be read, or does not fit the env or the model.
    """
    config = blueprint.config.finetune.dataset
    try:
        if config.kind == EXPERT:
            dataset: Any = RecordedEpisodes(
                DatasetConfig(path=str(recording(config, workdir)), cameras=config.cameras)
            )
        else:
            dataset = DATASETS.get(config.kind)(config)
    except ValueError as error:
        name, value = ("path", config.path) if config.kind in DATASETS else ("kind", config.kind)
        fix = override(f"finetune.dataset.{name}", name.upper())
        raise ConfigError(f"finetune.dataset.{name}", value, str(error), fix) from error
    try:
        _check_sizes(blueprint, dataset)
        _check_prompts(blueprint, dataset)
    except ConfigError:
        dataset.close()
        raise
    return dataset


def make_samples(blueprint: Blueprint, dataset: EpisodeDataset) -> EpisodeSamples:
    """Samples as the policy reads them."""
    config, spec = blueprint.config, blueprint.spec
    return EpisodeSamples(
        dataset,
        cameras=select_cameras(config.finetune.dataset, dataset, len(spec.cameras)),
        image_size=spec.image_size,
        action_horizon=config.model.action_horizon,
        prompt=_make_prompt(blueprint, dataset),
    )


def has_checkpoint(blueprint: Blueprint, workdir: pathlib.Path) -> bool:
    """Whether a run of the work directory has written a complete checkpoint. Writes nothing."""
    checkpointer = blueprint.checkpointer(workdir)
    try:
        return bool(checkpointer.steps())
    finally:
        checkpointer.close()


def statistics_of(blueprint: Blueprint, dataset: EpisodeDataset) -> NormStats:
    """What the data set's states and actions are to be normalised by.

    Raises:
      ConfigError: the kind of normalisation does not fit the data.
    """
    model = blueprint.config.model
    try:
        return compute_norm_stats(
            dataset,
            model.normalization,
            delta_dims=getattr(model, "delta_dims", 0),  # a setting of the pi family
            action_horizon=model.action_horizon,
        )
    except ValueError as error:
        fix = f"{override('model.normalization', 'zscore')}, or other data"
        raise ConfigError("model.normalization", model.normalization, str(error), fix) from error


def recording(config: DatasetConfig, workdir: pathlib.Path) -> pathlib.Path:
    """Directory of the expert's episodes."""
    return pathlib.Path(config.path) if config.path else workdir / RECORDINGS


def record_expert(
    blueprint: Blueprint, workdir: pathlib.Path, should_stop: Callable[[], bool]
) -> bool:
    """Records the expert's episodes unless they have been already.

    Args:
      blueprint: of the run.
      workdir: of the run.
      should_stop: polled between episodes.

    Returns:
      Whether there was something to record.

    Raises:
      StoppedError: asked to stop. What was recorded so far is no data set.
    """
    if _is_recorded(blueprint, workdir):
        return False
    config, parts = blueprint.config.finetune.dataset, Parts(blueprint)
    groups = Groups(parts, log_dir=workdir / "logs", recorder=MetricRecorder())
    demonstrators = groups.make_demonstrators(config.noise_std)
    share = -(-config.num_episodes // len(demonstrators))

    def episodes() -> Iterator[RecordedEpisode]:
        for demonstrator in demonstrators:
            demonstrator.compile()
            for episode in demonstrator.episodes(share, parts.root):
                if should_stop():
                    raise StoppedError
                yield episode

    where, cameras = recording(config, workdir), blueprint.spec.cameras
    write_episodes(where, episodes(), cameras=cameras, key=_key(blueprint))
    return True


def _is_recorded(blueprint: Blueprint, workdir: pathlib.Path) -> bool:
    """Whether the expert's episodes are there, as the config wants them.

    Raises:
      ConfigError: others are there.
    """
    config = blueprint.config.finetune.dataset
    where = recording(config, workdir)
    try:
        key = read_key(where)
    except ValueError as error:
        message, key = str(error), ""
    else:
        message = f"{where} holds demonstrations recorded with other settings"
    if key not in (None, _key(blueprint)):
        fix = override("finetune.dataset.path", "NEW_DIR")
        raise ConfigError("finetune.dataset.path", config.path, message, fix)
    return key is not None


def _key(blueprint: Blueprint) -> str:
    """All that the expert's episodes depend on, as text."""
    config = blueprint.config
    dataset = config.finetune.dataset
    return json.dumps(
        {
            "env": to_dict(config.env),
            "seed": config.seed,
            "num_episodes": dataset.num_episodes,
            "noise_std": dataset.noise_std,
            "action_horizon": config.model.action_horizon,
            "envs_per_group": config.simulation.envs_per_group,
        },
        sort_keys=True,
    )


def _check_settings(config: DatasetConfig) -> None:
    """Settings that fit the kind, else ConfigError."""
    if config.kind != EXPERT and config.kind not in DATASETS:
        known = ", ".join((EXPERT, *DATASETS))
        fix = override("finetune.dataset.kind", EXPERT)
        raise ConfigError("finetune.dataset.kind", config.kind, f"known: {known}", fix)
    if config.kind != EXPERT and not config.path:
        fix = override("finetune.dataset.path", "DIR")
        raise ConfigError("finetune.dataset.path", "", "the data must lie somewhere", fix)
    for name in _ONLY_LEROBOT:
        value = getattr(config, name)
        if value and config.kind != "lerobot" and ":" not in config.kind:
            raise ConfigError(
                f"finetune.dataset.{name}",
                value,
                f"is a setting of lerobot, the kind is {config.kind!r}",
                override(f"finetune.dataset.{name}", type(value)()),
            )


def _check_sizes(blueprint: Blueprint, dataset: EpisodeDataset) -> None:
    config, spec = blueprint.config, blueprint.spec
    path = config.finetune.dataset.path
    for name, own, size in (
        ("state", dataset.state_dim, spec.state_dim),
        ("actions", dataset.action_dim, spec.action_dim),
    ):
        if own != size:
            raise ConfigError(
                "finetune.dataset.path",
                path,
                f"its {name} have {own} dimensions, those of env {config.env.name!r} {size}",
                "another data set, or the --config of a run with its env",
            )
    try:
        select_cameras(config.finetune.dataset, dataset, len(spec.cameras))
    except ValueError as error:
        cameras = config.finetune.dataset.cameras
        fix = override("finetune.dataset.cameras", dataset.cameras)
        raise ConfigError("finetune.dataset.cameras", cameras, str(error), fix) from error
    num_samples, batch_size = sum(dataset.num_steps), config.finetune.batch_size
    if num_samples < batch_size:
        raise ConfigError(
            "finetune.batch_size",
            batch_size,
            f"the data set has {num_samples} samples",
            override("finetune.batch_size", num_samples),
        )


def _check_prompts(blueprint: Blueprint, dataset: EpisodeDataset) -> None:
    """Every prompt fits, else ConfigError."""
    model, tokenizer = blueprint.config.model, blueprint.tokenizer
    texts = dataset.instructions
    if model.tells_state():
        longest = longest_prompt(tokenizer, texts, blueprint.spec.state_dim)
    else:
        longest = max(len(encode_prompt(tokenizer, text)) for text in texts)
    if longest > model.max_tokens:
        raise ConfigError(
            "model.max_tokens",
            model.max_tokens,
            f"the data set's longest prompt has {longest} tokens",
            override("model.max_tokens", longest),
        )


def _make_prompt(blueprint: Blueprint, dataset: EpisodeDataset) -> Prompt:
    """Prompts just as env groups make them."""
    texts = dataset.instructions
    table = make_table(blueprint.config.model, texts, blueprint.tokenizer, blueprint.stats)
    row_of = {text: row for row, text in enumerate(texts)}
    tokens, mask = np.asarray(table.tokens), np.asarray(table.mask)

    def prompt(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = row_of[text]
        if table.state_text is None:
            return tokens[row], mask[row]
        return table.state_text.append(tokens[row], mask[row], np.asarray(state, np.float32))

    return prompt
