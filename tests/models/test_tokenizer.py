"""Byte tokens by hand, and the prompt form."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.models.tokenizer import ByteTokenizer, encode_prompt, tokenize_prompt


@hypothesis.given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(i - 4 for i in ids).decode() == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(text, add_bos=True) == [2, *ids]


def test_prompt_by_hand() -> None:
    ids, mask = tokenize_prompt(ByteTokenizer(), "  ab_c\n", 8)
    # BOS, "ab c" in bytes + 4, "\n" = 10 + 4, padding
    assert ids.tolist() == [2, 101, 102, 36, 103, 14, 0, 0]
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_line_breaks_inside_become_spaces() -> None:
    tokenizer = ByteTokenizer()
    expected = encode_prompt(tokenizer, "put the bowl on the plate")
    assert encode_prompt(tokenizer, " put_the bowl\non the_plate ") == expected


def test_over_length_names_the_text_and_the_limit() -> None:
    tokenize_prompt(ByteTokenizer(), "abc", 5)
    with pytest.raises(ValueError, match=r"'abcd' has 6 tokens.*max_tokens is 5"):
        tokenize_prompt(ByteTokenizer(), "abcd", 5)
