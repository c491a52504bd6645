"""Samples of episodes: the index, chunks at the end of an episode, cameras, order."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvla.config import DatasetConfig
from jaxvla.data.demonstrations import ShuffledOrder
from jaxvla.data.episodes import EpisodeSamples, Frame, select_cameras
from jaxvla.data.images import resize_with_pad_on_host

H, SIZE, NUM_TOKENS = 3, 4, 5


class CountedEpisodes:
    """A frame says which episode and step it is; actions go on `more` steps beyond the end."""

    cameras = ("a", "b")
    state_dim = action_dim = 2
    instructions = ("even", "odd")

    def __init__(self, num_steps: Sequence[int], *, more: int = 0, masks: bool = False):
        self.num_steps = num_steps
        self._more = more
        self._masks = masks

    def _vectors(self, episode: int, count: int) -> np.ndarray:
        steps = np.arange(count)
        return np.stack([np.full(count, episode), steps], axis=1).astype(np.float32)

    def states(self, episode: int) -> np.ndarray:
        return self._vectors(episode, self.num_steps[episode])

    def actions(self, episode: int) -> np.ndarray:
        return self._vectors(episode, self.num_steps[episode] + self._more)

    def frame(self, episode: int, step: int, cameras: Sequence[str]) -> Frame:
        size = {"a": (6, 8), "b": (SIZE, SIZE)}
        mask = np.zeros((len(cameras), SIZE, SIZE), bool)
        mask[:, step % SIZE] = True
        return Frame(
            images=tuple(picture(name, episode, step, *size[name]) for name in cameras),
            state=self.states(episode)[step],
            instruction=self.instructions[episode % 2],
            target_mask=mask if self._masks else None,
        )

    def close(self) -> None:
        pass


def picture(camera: str, episode: int, step: int, height: int, width: int) -> np.ndarray:
    seed = hashlib.sha256(f"{camera} {episode} {step}".encode()).digest()[0]
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompt(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tells the instruction and the state."""
    mask = np.arange(NUM_TOKENS) < len(text)
    return np.where(mask, ord(text[0]) + int(state.sum()), 0).astype(np.int32), mask


def samples(dataset: Any, cameras: Sequence[str] = ("a", "b")) -> EpisodeSamples:
    return EpisodeSamples(
        dataset, cameras=cameras, image_size=SIZE, action_horizon=H, prompt=prompt
    )


def test_a_sample_is_a_frame_with_the_chunk_that_follows() -> None:
    lengths = (2, 1, 4)
    made = samples(CountedEpisodes(lengths))
    assert made.num_samples == 7
    order = [(e, s) for e, length in enumerate(lengths) for s in range(length)]
    rows = np.array([5, 0, 2, 6, 1])
    batch = made.read(rows)
    seen = batch.observation
    assert batch.actions is not None and batch.target_mask is None
    for place, row in enumerate(rows):
        episode, step = order[row]
        assert made.where(row) == (episode, step)
        assert seen.state[place].tolist() == [episode, step]
        last = lengths[episode] - 1
        chunk = [[episode, min(step + k, last)] for k in range(H)]
        assert batch.actions[place].tolist() == chunk
        tokens, mask = prompt(("even", "odd")[episode % 2], np.array([episode, step]))
        assert seen.tokens[place].tolist() == tokens.tolist()
        assert seen.token_mask[place].tolist() == mask.tolist()
        wide = resize_with_pad_on_host(picture("a", episode, step, 6, 8), SIZE, SIZE)
        np.testing.assert_array_equal(seen.images[place, 0], wide)
        square = picture("b", episode, step, SIZE, SIZE)
        np.testing.assert_array_equal(seen.images[place, 1], square)
    assert seen.images.shape == (5, 2, SIZE, SIZE, 3) and seen.images.dtype == np.uint8
    assert seen.image_mask.all() and seen.image_mask.shape == (5, 2)
    assert batch.actions.dtype == seen.state.dtype == np.float32


def test_actions_beyond_the_end_are_used_before_any_is_repeated() -> None:
    batch = samples(CountedEpisodes([2, 3], more=1)).read(np.array([1, 4]))
    assert batch.actions is not None
    assert batch.actions[:, :, 1].tolist() == [[1, 2, 2], [2, 3, 3]]


def test_a_missing_camera_is_black_and_masked() -> None:
    seen = samples(CountedEpisodes([2]), ("-", "b", "-")).read(np.array([1])).observation
    assert seen.image_mask.tolist() == [[False, True, False]]
    assert not seen.images[0, [0, 2]].any()
    np.testing.assert_array_equal(seen.images[0, 1], picture("b", 0, 1, SIZE, SIZE))


def test_masks_of_objects_belong_to_images_of_their_size() -> None:
    mask = samples(CountedEpisodes([6], masks=True)).read(np.array([1, 5])).target_mask
    assert mask is not None and mask.shape == (2, 2, SIZE, SIZE)
    assert mask[0, 0, 1].all() and not mask[0, 0, 2].any() and mask[1, 1, 1].all()
    with pytest.raises(ValueError, match=r"masks of the named objects are \(1, 4, 4\)"):
        samples(CountedEpisodes([6], masks=True), ("a", "-")).read(np.array([0]))


@pytest.mark.parametrize(
    ("given_names", "count", "expected"),
    [
        ((), 2, ["a", "b"]),
        (("b", "a"), 2, ["b", "a"]),
        (("b",), 1, ["b"]),
        (("a", "-", "b"), 3, ["a", "-", "b"]),
    ],
)
def test_cameras(given_names: tuple[str, ...], count: int, expected: list[str]) -> None:
    config = DatasetConfig(cameras=given_names)
    assert select_cameras(config, CountedEpisodes([1]), count) == expected  # pyright: ignore


@pytest.mark.parametrize(
    ("given_names", "count", "message"),
    [
        ((), 3, "the env has 3 cameras, 2 are given: a, b; the data set has a, b"),
        (("a",), 2, "the env has 2 cameras, 1 are given: a"),
        (("a", "c"), 2, "the data set has no camera 'c'; it has a, b"),
    ],
)
def test_cameras_that_do_not_fit(given_names: tuple[str, ...], count: int, message: str) -> None:
    config = DatasetConfig(cameras=given_names)
    with pytest.raises(ValueError, match=message):
        select_cameras(config, CountedEpisodes([1]), count)  # pyright: ignore


@given(
    total=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 3),
    batches=st.lists(st.integers(0, 30), min_size=1, max_size=8),
)
def test_a_batch_is_a_function_of_its_number(
    total: int, batch_size: int, seed: int, batches: list[int]
) -> None:
    """Whatever was read before: a resumed run reads on where it stopped."""
    if total < batch_size:
        with pytest.raises(ValueError, match=f"{total} samples, a batch needs {batch_size}"):
            ShuffledOrder(total, batch_size=batch_size, seed=seed)
        return
    used = ShuffledOrder(total, batch_size=batch_size, seed=seed)
    for batch in batches:
        fresh = ShuffledOrder(total, batch_size=batch_size, seed=seed)
        assert used.rows(batch).tolist() == fresh.rows(batch).tolist()
    epoch, per_epoch = max(batches) // (total // batch_size), total // batch_size
    rows = [used.rows(epoch * per_epoch + i) for i in range(per_epoch)]
    assert len(set(np.concatenate(rows).tolist())) == per_epoch * batch_size
