"""pi0.5's prompt of a state that an env computes on a device.

The prompt tells the state as numbers, `prompts.encode_state_prompt`. A tokenizer is a program of
the host, but a number's tokens do not depend on the numbers around it, so the tokens of all
numbers are looked up in a table and joined where the state is. That this holds for a tokenizer
is checked when the table is made.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from jaxvla.models.prompts import (
    NUM_STATE_BINS,
    clean,
    encode_state_prompt,
)
from jaxvla.models.tokenizer import Tokenizer
from jaxvla.types import stand_in

_NUM_CHECKS = NUM_STATE_BINS + 1
"""States per instruction on which the joined prompt is compared with the tokenizer's: every number
comes once in every dimension."""


@flax.struct.dataclass(kw_only=True)
class StateText:
    """Tokens of every number, and of what follows the last one."""

    numbers: jax.Array
    """int32 [257, W], of the bins -1 to 255."""
    number_mask: jax.Array
    """bool [257, W], True where `numbers` holds a token."""
    tail: jax.Array
    """int32 [V]."""
    offset: jax.Array
    """float32 [S], of the normalisation (state - offset) / scale."""
    scale: jax.Array
    """float32 [S]."""
    pad_id: int = flax.struct.field(pytree_node=False)

    def append(self, tokens: Any, mask: Any, state: Any) -> tuple[Any, Any]:
        """Appends the state to heads of prompts. All arguments are jax arrays, or all numpy's.

        Args:
          tokens: int32 [..., N], `head_ids` padded to the length of the whole prompt.
          mask: bool [..., N], True where `tokens` holds a token.
          state: float32 [..., S], in the env's units.

        Returns:
          tokens int32 [..., N] and mask bool [..., N] of the whole prompts. What exceeds N is
          cut.
        """
        xp = state.__array_namespace__()
        edges = np.linspace(-1.0, 1.0, NUM_STATE_BINS + 1, dtype=np.float32)[:-1]
        index = xp.searchsorted(xp.asarray(edges), (state - self.offset) / self.scale, side="right")
        shape, size = tokens.shape[:-1], tokens.shape[-1]
        numbers = xp.asarray(self.numbers)[index].reshape(*shape, -1)
        number_mask = xp.asarray(self.number_mask)[index].reshape(*shape, -1)
        tail = xp.broadcast_to(xp.asarray(self.tail), (*shape, len(self.tail)))
        ids = xp.concatenate([tokens, numbers, tail], axis=-1)
        holds = xp.concatenate([mask, number_mask, xp.ones(tail.shape, bool)], axis=-1)
        # A stable sort by "holds no token" closes the gaps and keeps the order.
        order = xp.argsort(~holds, axis=-1, stable=True)[..., :size]
        holds = xp.take_along_axis(holds, order, axis=-1)
        return xp.where(holds, xp.take_along_axis(ids, order, axis=-1), self.pad_id), holds


def head_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the prompt before its first number."""
    return tokenizer.encode(f"Task: {clean(text)}, State:", add_bos=True)


def longest_prompt(tokenizer: Tokenizer, instructions: Sequence[str], state_dim: int) -> int:
    """Tokens of the longest prompt that any state can give.

    Raises:
      ValueError: see `make_state_text`.
    """
    numbers, tail = _number_ids(tokenizer)
    head = max(len(head_ids(tokenizer, text)) for text in instructions)
    return head + state_dim * max(len(ids) for ids in numbers) + len(tail)


def make_state_text(
    tokenizer: Tokenizer, instructions: Sequence[str], *, offset: np.ndarray, scale: np.ndarray
) -> StateText:
    """The table for a tokenizer, compared with the tokenizer's own prompts.

    Args:
      tokenizer: text to ids.
      instructions: all that can be given.
      offset: float [S], of the normalisation (state - offset) / scale.
      scale: float [S].

    Raises:
      ValueError: a number's tokens depend on what stands beside it.
    """
    numbers, tail = _number_ids(tokenizer)
    width = max(len(ids) for ids in numbers)
    table = np.zeros((len(numbers), width), np.int32)
    mask = np.zeros(table.shape, bool)
    for row, ids in enumerate(numbers):
        table[row, : len(ids)], mask[row, : len(ids)] = ids, True
    text = StateText(
        numbers=stand_in(table),
        number_mask=stand_in(mask),
        tail=stand_in(np.asarray(tail, np.int32)),
        offset=stand_in(offset.astype(np.float32)),
        scale=stand_in(scale.astype(np.float32)),
        pad_id=tokenizer.pad_id,
    )
    _require_equal(tokenizer, instructions, text)
    return text


def _number_ids(tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """Ids of " n" for n = -1 to 255, and of what follows the last number."""
    # Found as what a longer text has more: alone, a leading blank could be tokenised otherwise.
    base = "State: 0"
    start = tokenizer.encode(base)

    def following(text: str) -> list[int]:
        ids = tokenizer.encode(base + text)
        if ids[: len(start)] != start:
            raise ValueError(f"the tokens of {base!r} change when {text!r} follows")
        return ids[len(start) :]

    return [following(f" {n}") for n in range(-1, NUM_STATE_BINS)], following(";\nAction: ")


def _require_equal(tokenizer: Tokenizer, instructions: Sequence[str], text: StateText) -> None:
    random, every = np.random.default_rng(0), np.arange(-1, NUM_STATE_BINS)
    size = longest_prompt(tokenizer, instructions, len(text.offset))
    for instruction in instructions:
        head = head_ids(tokenizer, instruction)
        tokens = np.zeros((_NUM_CHECKS, size), np.int32)
        tokens[:, : len(head)] = head
        mask = np.broadcast_to(np.arange(size) < len(head), tokens.shape)
        # float32 values around the middles of bins, for which no rounding decides.
        bins = random.permuted(np.tile(every[:, None], len(text.offset)), axis=0)
        normalized = (bins + 0.5) * 2.0 / NUM_STATE_BINS - 1.0
        state = (normalized * text.scale + text.offset).astype(np.float32)
        joined, holds = text.append(tokens, mask, state)
        for row, own in enumerate(normalized):
            wanted = encode_state_prompt(tokenizer, instruction, own)
            if joined[row][holds[row]].tolist() != wanted:
                raise ValueError(
                    f"the tokens of a number depend on what stands beside it, as in {own} of "
                    f"{instruction!r}"
                )
