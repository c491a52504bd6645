"""The data of a supervised run: checked before anything is written, recorded if need be."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxvla.config import ConfigError, DatasetConfig, override, to_dict
from jaxvla.data import DATASETS
from jaxvla.data.episodes import EpisodeDataset, EpisodeSamples, Prompt, select_cameras
from jaxvla.data.normalization import NormStats
from jaxvla.data.recorded import (
    RecordedEpisode,
    RecordedEpisodes,
    read_key,
    require_free,
    write_episodes,
)
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
    """Opens what is there, reads all states and actions and one sample, and closes it again. Writes
    nothing.

    Raises:
      ConfigError: the data cannot be read, or do not fit the env or the model.
    """
    config = blueprint.config.finetune
    _check_settings(config.dataset)
    if config.dataset.kind == EXPERT and not device_scenes(blueprint.env):
        raise ConfigError(
            "finetune.dataset.kind",
            EXPERT,
            f"env {blueprint.config.env.name!r} has no scripted expert",
            override("finetune.dataset.kind", "recorded"),
        )
    if must_record(blueprint, workdir):
        return
    dataset = open_data(blueprint, workdir)
    try:
        with _readable(config.dataset):
            _check_vectors(dataset)
            make_samples(blueprint, dataset).read(np.zeros(1, np.int64))
        if config.compute_norm_stats and not has_checkpoint(blueprint, workdir):
            statistics_of(blueprint, dataset)
    finally:
        dataset.close()


def must_record(blueprint: Blueprint, workdir: pathlib.Path) -> bool:
    """Whether the expert's episodes are wanted and not there yet.

    Raises:
      ConfigError: something else is there.
    """
    is_expert = blueprint.config.finetune.dataset.kind == EXPERT
    return is_expert and not _is_recorded(blueprint, workdir)


def open_data(blueprint: Blueprint, workdir: pathlib.Path) -> EpisodeDataset:
    """The data set that the config names; of the expert, its recording.

    Raises:
      ConfigError: it cannot be read, or does not fit the env or the model.
    """
    config = blueprint.config.finetune.dataset
    factory: Any = RecordedEpisodes
    if config.kind == EXPERT:
        path = recording(config, workdir)
        found = DatasetConfig(path=str(path), cameras=config.cameras)
    else:
        factory = _find_format(config)
        path = pathlib.Path(config.path).expanduser()
        found = dataclasses.replace(config, path=str(path))
    with _readable(config):
        dataset = factory(found)
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
        # 0 is the pi family's way to say so; what another model wants is not known.
        with_masks=getattr(config.model, "grounding_coef", 1.0) > 0.0,
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
    return pathlib.Path(config.path).expanduser() if config.path else workdir / RECORDINGS


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
      ConfigError: others are there, or files that are no episodes.
    """
    config = blueprint.config.finetune.dataset
    where = recording(config, workdir)
    try:
        key = read_key(where)
        if key is None:
            require_free(where)
    except (ValueError, OSError) as error:
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


@contextlib.contextmanager
def _readable(config: DatasetConfig) -> Iterator[None]:
    """Makes what reading damaged files raises a ConfigError: readers index what they parsed."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        message = str(error) if isinstance(error, ValueError) else f"cannot be read: {error!r}"
        fix = override("finetune.dataset.path", "PATH")
        raise ConfigError("finetune.dataset.path", config.path, message, fix) from error


def _find_format(config: DatasetConfig) -> Any:
    """The class that reads it, else ConfigError."""
    try:
        return DATASETS.get(config.kind)
    except ValueError as error:
        fix = override("finetune.dataset.kind", "KIND")
        raise ConfigError("finetune.dataset.kind", config.kind, str(error), fix) from error


def _check_vectors(dataset: EpisodeDataset) -> None:
    """Raises ValueError unless the states and actions of every episode can be learned from."""
    for episode, num_steps in enumerate(dataset.num_steps):
        for name, values, size in (
            ("states", dataset.states(episode), dataset.state_dim),
            ("actions", dataset.actions(episode), dataset.action_dim),
        ):
            # There may be more actions than steps, see `EpisodeDataset.actions`.
            fits = len(values) >= num_steps if name == "actions" else len(values) == num_steps
            if values.shape[1:] != (size,) or not fits:
                raise ValueError(
                    f"{name} of episode {episode} are {values.shape}, not [{num_steps}, {size}]"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of episode {episode} are not all finite")


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
    """Prompts of frames. Those that tell the state are openpi's to the last bit."""
    model, texts = blueprint.config.model, dataset.instructions
    if model.tells_state():
        return blueprint.tokenize
    table = make_table(model, texts, blueprint.tokenizer, blueprint.stats)
    row_of = {text: row for row, text in enumerate(texts)}
    tokens, mask = np.asarray(table.tokens), np.asarray(table.mask)

    def prompt(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = row_of[text]
        return tokens[row], mask[row]

    return prompt
