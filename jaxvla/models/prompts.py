"""Instructions as pi0 and pi0.5 read them: text, token ids, padding.

Both forms are openpi's (commit 15a9616). pi0 reads the instruction and a line break that
starts the answer; the state is a token of its own. pi0.5 reads the state as text: numbers of
bins, after the instruction.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxvla.models.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

NUM_STATE_BINS = 256
"""Bins of a state dimension in pi0.5's prompt."""


def clean(text: str) -> str:
    """An instruction as prompts have it: no blanks around it, spaces for underscores and line
    breaks."""
    return text.strip().replace("_", " ").replace("\n", " ")


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an instruction in pi0's prompt form, unpadded.

    Surrounding blanks are stripped, underscores and line breaks become spaces; then the
    beginning of sequence, the text, and a line break that marks the start of the answer.
    """
    # The line break is encoded apart: within the text it could become part of another piece.
    return tokenizer.encode(clean(text), add_bos=True) + tokenizer.encode("\n")


def encode_state_prompt(tokenizer: Tokenizer, text: str, state: ArrayLike) -> list[int]:
    """Ids of an instruction and a state in pi0.5's prompt form, unpadded.

    Args:
      tokenizer: text to ids.
      text: instruction, cleaned as by `encode_prompt`.
      state: [S], normalised, without the padding to the model's width.

    Raises:
      ValueError: as `state_bins`.
    """
    numbers = " ".join(str(index) for index in state_bins(state))
    prompt = f"Task: {clean(text)}, State: {numbers};\nAction: "
    return tokenizer.encode(prompt, add_bos=True)


def state_bins(state: ArrayLike) -> np.ndarray:
    """Bin of each dimension: floor(128 (x + 1)) in exact arithmetic, at least -1, at most 255.

    The bins are 256 equal parts of [-1, 1), closed below. What lies under -1 is in bin -1,
    what lies above the last bin's left edge 0.9921875 is in bin 255.

    Args:
      state: [S], normalised.

    Returns:
      int64 [S].

    Raises:
      ValueError: state is no vector, or not finite.
    """
    values = np.asarray(state)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"state = {values}: pass one vector [S] of finite, normalised values")
    left_edges = np.linspace(-1.0, 1.0, NUM_STATE_BINS + 1)[:-1]
    return np.searchsorted(left_edges, values, side="right") - 1


def pad_prompt(
    ids: Sequence[int], max_tokens: int, *, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads ids to a fixed length. What is longer is cut at the end, and a warning is logged.

    Args:
      ids: token ids.
      max_tokens: length N of the result, >= 1.
      pad_id: id of the padding.

    Returns:
      ids int32 [N] and mask bool [N], True where `ids` holds a token.

    Raises:
      ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} holds no prompt; it must be >= 1")
    if len(ids) > max_tokens:
        _LOG.warning(
            "a prompt of %d tokens is cut to max_tokens = %d; raise it", len(ids), max_tokens
        )
    kept = list(ids[:max_tokens])
    padded = np.full(max_tokens, pad_id, np.int32)
    padded[: len(kept)] = kept
    return padded, np.arange(max_tokens) < len(kept)


def tokenize_prompt(
    tokenizer: Tokenizer, text: str, max_tokens: int, state: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes an instruction in pi0's form, or with a state in pi0.5's, and pads it.

    Args:
      tokenizer: text to ids.
      text: instruction in natural language.
      max_tokens: length N of the result.
      state: [S], normalised; None: it is not told.

    Returns:
      ids int32 [N] and mask bool [N], True where `ids` holds a token.

    Raises:
      ValueError: the prompt has more than `max_tokens` tokens; or as `state_bins`.
    """
    if state is None:
        encoded = encode_prompt(tokenizer, text)
    else:
        encoded = encode_state_prompt(tokenizer, text, state)
    if len(encoded) > max_tokens:
        raise ValueError(
            f"instruction {text!r} has {len(encoded)} tokens, the limit max_tokens is {max_tokens}"
        )
    return pad_prompt(encoded, max_tokens, pad_id=tokenizer.pad_id)
