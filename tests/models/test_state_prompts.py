"""States told in prompts on a device, against the tokenizer's own prompts."""

import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.models.prompts import encode_state_prompt, pad_prompt
from jaxvla.models.state_prompts import StateText, head_ids, longest_prompt, make_state_text
from jaxvla.models.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

_TOY = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "toy_tokenizer.model"
_TEXTS = ("pick up the red_block", "open the drawer\n")
_OFFSET, _SCALE = np.array([0.5, -2.0, 0.0]), np.array([2.0, 0.25, 1.0])


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer()
    pytest.importorskip("sentencepiece")
    return SentencePieceTokenizer(_TOY)


def _heads(tokenizer: Tokenizer, size: int) -> tuple[np.ndarray, np.ndarray]:
    padded = [pad_prompt(head_ids(tokenizer, x), size, pad_id=tokenizer.pad_id) for x in _TEXTS]
    return np.stack([ids for ids, _ in padded]), np.stack([mask for _, mask in padded])


def _text(tokenizer: Tokenizer) -> StateText:
    return make_state_text(tokenizer, _TEXTS, offset=_OFFSET, scale=_SCALE)


@pytest.mark.parametrize("place", ["host", "device"])
def test_joined_prompts_are_the_tokenizers(tokenizer: Tokenizer, place: str) -> None:
    text, size = _text(tokenizer), longest_prompt(tokenizer, _TEXTS, 3)
    # In bins -1, 0, 255 and what lies between; beyond the range on both sides.
    normalized = np.array([[-5.0, -1.0 + 1e-4, 7.0], [0.3, -0.71, 0.99]])
    state = (normalized * _SCALE + _OFFSET).astype(np.float32)
    arguments = (*_heads(tokenizer, size), state)
    if place == "device":
        tokens, mask = jax.jit(text.append)(*map(jnp.asarray, arguments))
    else:
        tokens, mask = text.append(*arguments)
    for row, instruction in enumerate(_TEXTS):
        encoded = encode_state_prompt(tokenizer, instruction, normalized[row])
        wanted = pad_prompt(encoded, size, pad_id=tokenizer.pad_id)
        np.testing.assert_array_equal(tokens[row], wanted[0])
        np.testing.assert_array_equal(mask[row], wanted[1])
    assert tokens.dtype == np.int32 and mask.dtype == bool


_BYTES = make_state_text(ByteTokenizer(), _TEXTS, offset=np.zeros(3), scale=np.ones(3))


@hypothesis.given(st.lists(st.floats(-1.25, 1.25, width=32), min_size=3, max_size=3))
def test_any_state(values: list[float]) -> None:
    tokenizer, state = ByteTokenizer(), np.asarray([values] * 2, np.float32)
    longest = longest_prompt(tokenizer, _TEXTS, 3)
    tokens, mask = _BYTES.append(*_heads(tokenizer, longest + 2), state)
    for row, instruction in enumerate(_TEXTS):
        encoded = encode_state_prompt(tokenizer, instruction, state[row])
        assert tokens[row][mask[row]].tolist() == encoded
        assert len(encoded) <= longest


def test_longest_prompt_is_reached(tokenizer: Tokenizer) -> None:
    lengths = [
        len(encode_state_prompt(tokenizer, text, np.full(3, 2.0 * bin / 256 - 0.999)))
        for text in _TEXTS
        for bin in range(256)
    ]
    assert max(lengths) == longest_prompt(tokenizer, _TEXTS, 3)


class _Merging(ByteTokenizer):
    """One token for " 1" wherever " 0" stands before it, as a vocabulary with such a piece has."""

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return super().encode(text.replace(" 7 1", "*"), add_bos)


def test_a_tokenizer_that_merges_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="depend on what stands beside it"):
        make_state_text(_Merging(), _TEXTS, offset=np.zeros(40), scale=np.ones(40))
