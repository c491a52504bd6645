"""Tokenizers: bytes by hand, files of both libraries, and where PaliGemma's is looked for."""

import hashlib
import json
import pathlib
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxvla.models.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    paligemma_tokenizer_path,
)

TOY_PATH = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "toy_tokenizer.model"


@hypothesis.given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(i - 4 for i in ids).decode() == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(text, add_bos=True) == [2, *ids]


# ------------------------------------------------------------------------ sentencepiece


@pytest.fixture(scope="module")
def toy() -> SentencePieceTokenizer:
    pytest.importorskip("sentencepiece")
    return SentencePieceTokenizer(TOY_PATH)


def test_sentencepiece_reads_gemmas_special_ids(toy) -> None:
    assert (toy.pad_id, toy.eos_id, toy.bos_id, toy.vocab_size) == (0, 1, 2, 360)
    # Ids that openpi gave for this text, see tokenizer_cases.json.
    assert toy.encode("pick up the black bowl") == [319, 314, 263, 267, 318, 327]
    assert toy.encode("pick", add_bos=True)[0] == 2 not in toy.encode("pick")


def test_sentencepiece_fingerprint_is_that_of_the_file(toy, tmp_path: pathlib.Path) -> None:
    digest = hashlib.sha256(TOY_PATH.read_bytes()).hexdigest()
    assert toy.fingerprint == f"sentencepiece-{digest}"
    copy = tmp_path / "other_name.model"
    copy.write_bytes(TOY_PATH.read_bytes())
    assert SentencePieceTokenizer(str(copy)).fingerprint == toy.fingerprint


@pytest.mark.parametrize(
    ("content", "message"), [(b"garbage", "no sentencepiece model"), (b"", "is empty")]
)
def test_no_sentencepiece_model(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    pytest.importorskip("sentencepiece")
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.model.*{message}"):
        SentencePieceTokenizer(path)
    with pytest.raises(ValueError, match=r"absent\.model cannot be read"):
        SentencePieceTokenizer(tmp_path / "absent.model")


def test_sentencepiece_without_padding_is_refused(tmp_path: pathlib.Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("pick up the black bowl\n" * 20)
    sentencepiece.SentencePieceTrainer.train(  # its default: no padding
        input=str(corpus),
        model_prefix=str(tmp_path / "unpadded"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="has no pad id"):
        SentencePieceTokenizer(tmp_path / "unpadded.model")


# --------------------------------------------------------------------------- tokenizers

_WORDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "pick": 4, "up": 5, "bowl": 6}


def write_words(path: pathlib.Path) -> pathlib.Path:
    """A word-level tokenizer.json that asks for padding, truncation and added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(_WORDS, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    model.enable_padding(length=8)
    model.enable_truncation(max_length=2)
    content = json.loads(model.to_str())
    content["added_tokens"] = [
        {
            "id": 40,
            "content": "<loc>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    content["model"]["vocab"]["<loc>"] = 40
    path.write_text(json.dumps(content))
    return path


def test_hf_gives_the_text_and_nothing_else(tmp_path: pathlib.Path) -> None:
    tokenizer = HFTokenizer(write_words(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("pick up bowl") == [4, 5, 6]
    assert tokenizer.encode("pick cup", add_bos=True) == [2, 4, 3]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 41  # ids 7 to 39 are unused


def test_hf_fingerprint_holds_file_and_special_ids(tmp_path: pathlib.Path) -> None:
    path = write_words(tmp_path / "tokenizer.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert HFTokenizer(path).fingerprint == f"hf-{digest}-0-1-2"
    other = HFTokenizer(path, bos="pick")
    assert other.encode("up", add_bos=True) == [4, 5]
    assert other.fingerprint == f"hf-{digest}-0-1-4"


def test_hf_refuses_what_it_cannot_use(tmp_path: pathlib.Path) -> None:
    path = write_words(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no token '<s>'; name its own with bos="):
        HFTokenizer(path, bos="<s>")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        HFTokenizer(path)
    with pytest.raises(ValueError, match="cannot be read"):
        HFTokenizer(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("tokenizer", "package"),
    [(SentencePieceTokenizer, "sentencepiece"), (HFTokenizer, "tokenizers")],
)
def test_missing_package_names_the_extra(monkeypatch, tokenizer, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}: pip install 'jaxvla\[openpi\]'"):
        tokenizer(TOY_PATH)


# --------------------------------------------------------------------- PaliGemma's file


@pytest.fixture
def places(tmp_path: pathlib.Path, monkeypatch) -> dict[str, pathlib.Path]:
    """A file in each place that is searched; the variables are not set."""
    for name in ("JAXVLA_TOKENIZER", "OPENPI_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {
        "given": tmp_path / "given.model",
        "variable": tmp_path / "variable.model",
        "home": tmp_path / "warm" / "big_vision" / "paligemma_tokenizer.model",
        "cache": tmp_path / ".cache" / "openpi" / "big_vision" / "paligemma_tokenizer.model",
    }
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return files


def test_first_place_that_is_given_is_used(places, monkeypatch) -> None:
    assert paligemma_tokenizer_path() == places["cache"]
    monkeypatch.setenv("OPENPI_DATA_HOME", str(places["home"].parents[1]))
    assert paligemma_tokenizer_path() == places["home"]
    monkeypatch.setenv("JAXVLA_TOKENIZER", "~/variable.model")
    assert paligemma_tokenizer_path() == places["variable"]
    assert paligemma_tokenizer_path(places["given"]) == places["given"]


def test_a_given_place_without_a_file_is_not_passed_over(places, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"the given path /nowhere"):
        paligemma_tokenizer_path("/nowhere")
    monkeypatch.setenv("JAXVLA_TOKENIZER", "/nowhere")
    with pytest.raises(ValueError, match=r"no path was given; \$JAXVLA_TOKENIZER = /nowhere"):
        paligemma_tokenizer_path()


def test_no_file_anywhere_lists_what_was_tried(places) -> None:
    places["cache"].unlink()
    tried = r"no path was given; \$JAXVLA_TOKENIZER is not set; \$OPENPI_DATA_HOME is not set: "
    with pytest.raises(ValueError, match=tried + r"~/\.cache/openpi/big_vision/paligemma_tok"):
        paligemma_tokenizer_path()
