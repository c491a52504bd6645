"""Text to token ids."""

from typing import Protocol

import numpy as np

_NUM_SPECIAL = 4


class Tokenizer(Protocol):
    """What a policy needs of a tokenizer. Its identity belongs to a checkpoint."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    pad_id: int
    eos_id: int
    bos_id: int
    fingerprint: str
    """Equal for two tokenizers exactly when they give the same ids for every text."""

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`, after the beginning-of-sequence id if asked for."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, above Gemma's special ids (pad 0, eos 1, bos 2, unknown 3)."""

    vocab_size = _NUM_SPECIAL + 256
    pad_id = 0
    eos_id = 1
    bos_id = 2
    unk_id = 3
    fingerprint = "byte-260"

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of the UTF-8 bytes of `text`: byte b is id b + 4."""
        ids = [_NUM_SPECIAL + byte for byte in text.encode()]
        return [self.bos_id, *ids] if add_bos else ids


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an instruction in pi0's prompt form, unpadded.

    Surrounding blanks are stripped, underscores and line breaks become spaces; then the
    beginning of sequence, the text, and a line break that marks the start of the answer.
    """
    cleaned = text.strip().replace("_", " ").replace("\n", " ")
    return tokenizer.encode(cleaned, add_bos=True) + tokenizer.encode("\n")


def tokenize_prompt(
    tokenizer: Tokenizer, text: str, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes an instruction and pads it to a fixed length.

    Args:
      tokenizer: text to ids.
      text: instruction in natural language.
      max_tokens: length N of the result.

    Returns:
      ids int32 [N] and mask bool [N], True where `ids` holds a token.

    Raises:
      ValueError: the prompt has more than `max_tokens` tokens.
    """
    encoded = encode_prompt(tokenizer, text)
    if len(encoded) > max_tokens:
        raise ValueError(
            f"instruction {text!r} has {len(encoded)} tokens, the limit max_tokens is {max_tokens}"
        )
    ids = np.full(max_tokens, tokenizer.pad_id, np.int32)
    ids[: len(encoded)] = encoded
    return ids, np.arange(max_tokens) < len(encoded)
