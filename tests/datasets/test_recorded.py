"""Our own format: what is written is read, and what is damaged is named."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from dataset_files import config

from jaxvla.data.recorded import RecordedEpisode, RecordedEpisodes, read_key, write_episodes

CAMERAS = ("base", "wrist")


def make_episode(seed: int, num_steps: int, *, masks: bool = True, more: int = 2) -> Any:
    random = np.random.default_rng(seed)
    return RecordedEpisode(
        instruction=f"sentence {seed % 2}",
        images=random.integers(0, 256, (num_steps, 2, 4, 4, 3), dtype=np.uint8),
        state=random.normal(size=(num_steps, 3)).astype(np.float32),
        actions=random.normal(size=(num_steps + more, 2)).astype(np.float32),
        target_mask=random.uniform(size=(num_steps, 2, 4, 4)) < 0.5 if masks else None,
    )


@pytest.mark.parametrize("masks", [True, False])
def test_round_trip(masks: bool, tmp_path: pathlib.Path) -> None:
    episodes = [make_episode(i, 2 + i, masks=masks) for i in range(3)]
    directory = tmp_path / "deep" / "data"
    assert read_key(directory) is None
    write_episodes(directory, iter(episodes), cameras=CAMERAS, key="what")
    assert read_key(directory) == "what"
    dataset = RecordedEpisodes(config(directory))
    assert dataset.cameras == CAMERAS and list(dataset.num_steps) == [2, 3, 4]
    assert (dataset.state_dim, dataset.action_dim) == (3, 2)
    assert dataset.instructions == ("sentence 0", "sentence 1")
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(dataset.states(number), episode.state)
        np.testing.assert_array_equal(dataset.actions(number), episode.actions)
        for step in range(len(episode.state)):
            frame = dataset.frame(number, step, ("wrist", "base"))
            np.testing.assert_array_equal(frame.images, episode.images[step, ::-1])
            np.testing.assert_array_equal(frame.state, episode.state[step])
            assert frame.instruction == episode.instruction
            if masks:
                np.testing.assert_array_equal(frame.target_mask, episode.target_mask[step, ::-1])
            else:
                assert frame.target_mask is None
    dataset.close()


def test_a_recording_that_was_interrupted_is_none(tmp_path: pathlib.Path) -> None:
    def interrupted() -> Iterator[RecordedEpisode]:
        yield make_episode(0, 9)
        yield make_episode(1, 9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(tmp_path, interrupted(), cameras=CAMERAS, key="")
    assert read_key(tmp_path) is None
    with pytest.raises(ValueError, match=r"dataset\.json is no index of recorded episodes"):
        RecordedEpisodes(config(tmp_path))
    shorter = [make_episode(2, 3, masks=False)]
    write_episodes(tmp_path, shorter, cameras=CAMERAS, key="")
    dataset = RecordedEpisodes(config(tmp_path))
    assert list(dataset.num_steps) == [3]
    assert dataset.frame(0, 0, CAMERAS).target_mask is None  # that of the first attempt is gone


def test_a_recording_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    write_episodes(tmp_path, [make_episode(0, 2)], cameras=CAMERAS, key="")
    with pytest.raises(ValueError, match="holds a data set already"):
        write_episodes(tmp_path, [make_episode(1, 2)], cameras=CAMERAS, key="")
    with pytest.raises(ValueError, match="there are no episodes to write"):
        write_episodes(tmp_path / "new", [], cameras=CAMERAS, key="")


def test_files_of_others_stay(tmp_path: pathlib.Path) -> None:
    """Even where they are named like ours."""
    note = tmp_path / "episode_000000" / "notes.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no recorded episodes"):
        write_episodes(tmp_path, [make_episode(0, 2)], cameras=CAMERAS, key="")
    assert note.read_text() == "mine"
    with pytest.raises(ValueError, match=r"notes\.txt is no directory"):
        write_episodes(note, [make_episode(0, 2)], cameras=CAMERAS, key="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": [{"instruction": "a"}]}, "episode 0 lacks its instruction or num_steps"),
        ({"episodes": [{"num_steps": 4}]}, "episode 0 lacks its instruction or num_steps"),
        ({"episodes": {}}, "episode 0 lacks its instruction or num_steps"),
        ({"episodes": [3]}, "episode 0 lacks its instruction or num_steps"),
        ({"cameras": 2}, "cameras = 2 are no list of names"),
    ],
)
def test_a_malformed_index(change: Any, message: str, tmp_path: pathlib.Path) -> None:
    write_episodes(tmp_path, [make_episode(0, 4)], cameras=CAMERAS, key="")
    index = tmp_path / "dataset.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        RecordedEpisodes(config(tmp_path))


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    write_episodes(tmp_path, [make_episode(0, 4)], cameras=CAMERAS, key="")
    folder, index = tmp_path / "episode_000000", tmp_path / "dataset.json"
    whole = RecordedEpisodes(config(tmp_path))
    np.save(folder / "images.npy", np.zeros((3, 2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npy is \(3, 2, 4, 4, 3\), the episode has 4"):
        whole.frame(0, 0, CAMERAS)
    np.save(folder / "actions.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"actions\.npy is \(3, 2\), the episode has 4"):
        RecordedEpisodes(config(tmp_path))
    np.save(folder / "state.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"state\.npy cannot be read"):
        RecordedEpisodes(config(tmp_path))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match="is not of format jaxvla-episodes, version 1"):
        RecordedEpisodes(config(tmp_path))
