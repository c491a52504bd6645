"""Prompt forms against openpi's tokenizer (recorded), and by hand."""

import json
import logging
import pathlib
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.models.prompts import (
    encode_prompt,
    encode_state_prompt,
    pad_prompt,
    state_bins,
    tokenize_prompt,
)
from jaxvla.models.tokenizer import ByteTokenizer, SentencePieceTokenizer

ORACLE_DIR = pathlib.Path(__file__).parents[1] / "data" / "oracle"
CASES = json.loads((ORACLE_DIR / "tokenizer_cases.json").read_text())


def case_name(case: dict[str, Any]) -> str:
    """pi0 or pi0.5, the length limit and the beginning of the text."""
    form = "pi0" if case["state"] is None else "pi05"
    return f"{form}-{case['max_len']}-{case['prompt'].strip()[:6]}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_prompts_match_recorded(case, caplog) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = SentencePieceTokenizer(ORACLE_DIR / "toy_tokenizer.model")
    if case["state"] is None:
        encoded = encode_prompt(tokenizer, case["prompt"])
    else:
        encoded = encode_state_prompt(tokenizer, case["prompt"], case["state"])
    with caplog.at_level(logging.WARNING):
        ids, mask = pad_prompt(encoded, case["max_len"], pad_id=tokenizer.pad_id)
    assert ids.tolist() == case["tokens"]
    assert mask.tolist() == [bool(x) for x in case["mask"]]
    assert ids.dtype == np.int32 and mask.dtype == bool
    is_cut = len(encoded) > case["max_len"]
    assert bool(caplog.records) == is_cut


def test_recorded_cases_reach_every_branch() -> None:
    assert len(CASES) == 12
    assert {case["state"] is None for case in CASES} == {True, False}
    assert any(0 not in case["mask"] for case in CASES)  # cut
    states = [case["state"] for case in CASES if case["state"] is not None]
    assert min(map(min, states)) < -1.0 and max(map(max, states)) > 1.0


def test_bins_at_their_edges_match_recorded() -> None:
    with np.load(ORACLE_DIR / "transforms.npz") as cases:
        np.testing.assert_array_equal(state_bins(cases["edge_state"]), cases["edge_bins"])


@hypothesis.given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=8))
def test_bins_by_arithmetic(state: list[float]) -> None:
    # 128 (x + 1) is rounded for tiny negative x, hence the comparison of edges.
    for x, index in zip(state, state_bins(state), strict=True):
        low = index / 128 - 1.0 if index >= 0 else -np.inf
        high = (index + 1) / 128 - 1.0 if index < 255 else np.inf
        assert -1 <= index <= 255 and low <= x < high


def test_state_prompt_by_hand() -> None:
    ids = encode_state_prompt(ByteTokenizer(), " lift_it\n", np.array([-2.0, 0.0, 1.0]))
    assert ids[0] == 2
    assert bytes(i - 4 for i in ids[1:]) == b"Task: lift it, State: -1 128 255;\nAction: "


@pytest.mark.parametrize("state", [[np.nan], [[0.0]], 0.0])
def test_bad_states_are_refused(state) -> None:
    with pytest.raises(ValueError, match=r"state = .*one vector \[S\] of finite"):
        encode_state_prompt(ByteTokenizer(), "lift", state)


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


def test_the_answers_line_break_is_a_piece_of_its_own() -> None:
    class Merging(ByteTokenizer):
        """Has a piece for a letter before a line break, as large vocabularies do."""

        def encode(self, text: str, add_bos: bool = False) -> list[int]:
            return super().encode(text.replace("t\n", "~"), add_bos)

    tokenizer = Merging()
    line_break = ByteTokenizer().encode("\n")
    assert encode_prompt(tokenizer, "lift") == tokenizer.encode("lift", add_bos=True) + line_break


def test_over_length_names_the_text_and_the_limit() -> None:
    tokenize_prompt(ByteTokenizer(), "abc", 5)
    with pytest.raises(ValueError, match=r"'abcd' has 6 tokens.*max_tokens is 5"):
        tokenize_prompt(ByteTokenizer(), "abcd", 5)


def test_padding_by_hand(caplog) -> None:
    ids, mask = pad_prompt([5, 6], 4, pad_id=9)
    assert ids.tolist() == [5, 6, 9, 9] and mask.tolist() == [True, True, False, False]
    ids, mask = pad_prompt([5, 6], 2, pad_id=9)
    assert ids.tolist() == [5, 6] and mask.all() and not caplog.records
    ids, mask = pad_prompt([5, 6, 7], 2, pad_id=9)
    assert ids.tolist() == [5, 6] and mask.all()
    assert caplog.messages == ["a prompt of 3 tokens is cut to max_tokens = 2; raise it"]
    with pytest.raises(ValueError, match="max_tokens = 0"):
        pad_prompt([], 0, pad_id=0)
