"""Shuffled batches of labelled observations."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from jaxvla.data.demonstrations import concatenate, num_samples, shuffled_batches
from jaxvla.types import Observation, SupervisedBatch


def labelled(first: int, last: int) -> SupervisedBatch:
    """Samples first to last - 1; every leaf of a sample holds its number."""
    number: Any = np.arange(first, last)
    mask: Any = np.ones((len(number), 1), bool)
    return SupervisedBatch(
        observation=Observation(
            images=number[:, None].astype(np.uint8),
            image_mask=mask,
            state=number[:, None].astype(np.float32),
            tokens=number[:, None].astype(np.int32),
            token_mask=mask,
        ),
        actions=number[:, None, None].astype(np.float32),
        target_mask=None,
    )


def numbers(batch: SupervisedBatch) -> list[int]:
    """The samples of a batch, after a check that its leaves belong together."""
    assert batch.actions is not None
    found = batch.actions.ravel().astype(int).tolist()
    for leaf in (batch.observation.images, batch.observation.state, batch.observation.tokens):
        assert leaf.ravel().astype(int).tolist() == found
    return found


def draw(total: int, batch_size: int, num_batches: int, seed: int = 0) -> list[list[int]]:
    batches = shuffled_batches(
        labelled(0, total), batch_size=batch_size, num_batches=num_batches, seed=seed
    )
    return [numbers(batch) for batch in batches]


def test_concatenate() -> None:
    joined = concatenate([labelled(0, 3), labelled(3, 4), labelled(4, 9)])
    assert numbers(joined) == list(range(9)) and num_samples(joined) == 9
    assert joined.target_mask is None
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(joined))


def test_an_epoch_holds_every_sample_once() -> None:
    batches = draw(total=12, batch_size=4, num_batches=9)
    assert [len(batch) for batch in batches] == [4] * 9
    epochs = [np.concatenate(batches[start : start + 3]).tolist() for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert all(a != b for a, b in itertools.combinations([*epochs, list(range(12))], 2))


def test_samples_that_fill_no_batch_get_their_turn() -> None:
    """10 samples in batches of 4: two are left out of each epoch, others in every epoch."""
    batches = draw(total=10, batch_size=4, num_batches=60)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len({*first, *second}) == 8
    counts = np.bincount(np.ravel(batches), minlength=10)
    assert counts.sum() == 240 and counts.min() > 12


def test_the_order_depends_on_the_seed_alone() -> None:
    assert draw(12, 4, 6, seed=1) == draw(12, 4, 6, seed=1) != draw(12, 4, 6, seed=2)


def test_a_batch_may_hold_every_sample() -> None:
    assert sorted(draw(total=5, batch_size=5, num_batches=1)[0]) == list(range(5))


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="3 samples, a batch needs 4"):
        draw(total=3, batch_size=4, num_batches=1)
