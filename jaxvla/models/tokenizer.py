"""Text to token ids: bytes, and the vocabularies of published models.

Nothing here falls back to another tokenizer. Ids of one tokenizer mean other words to a model
that was trained with another one, which no shape or range check can notice.
"""

import hashlib
import os
import pathlib
from typing import Any, Protocol

_NUM_SPECIAL = 4
_PATH_VARIABLE = "JAXVLA_TOKENIZER"
CACHE_VARIABLE = "OPENPI_DATA_HOME"
"""Environment variable of the directory that openpi caches files in."""
CACHE_DEFAULT = "~/.cache/openpi"
_CACHED_NAME = pathlib.Path("big_vision", "paligemma_tokenizer.model")


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


class SentencePieceTokenizer:
    """A sentencepiece model file, such as PaliGemma's. Needs the `openpi` extra."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the file.

        Raises:
          ValueError: sentencepiece is not installed, the file cannot be read or is no
            sentencepiece model, or it lacks a pad, eos or bos id.
        """
        try:
            import sentencepiece  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("sentencepiece") from error
        model = _read(path)
        if not model:  # sentencepiece takes no bytes for a vocabulary without pieces
            raise ValueError(f"tokenizer {path} is empty")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path} is no sentencepiece model: {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        ids = {
            "pad": self._model.pad_id(),
            "eos": self._model.eos_id(),
            "bos": self._model.bos_id(),
        }
        absent = [name for name, token_id in ids.items() if token_id < 0]
        if absent:
            raise ValueError(
                f"tokenizer {path} has no {', '.join(absent)} id; a model needs one for padding and"
                " for the ends of a text: train or export it with all of pad, eos and bos"
            )
        self.pad_id, self.eos_id, self.bos_id = ids["pad"], ids["eos"], ids["bos"]
        self.fingerprint = f"sentencepiece-{_digest(model)}"

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`; pieces that the vocabulary lacks are its bytes or its unknown id."""
        ids = self._model.encode(text)
        return [self.bos_id, *ids] if add_bos else ids


class HFTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. Needs the `openpi` extra.

    The file does not tell which of its tokens begin, end and pad a text, so they are named.
    Padding, truncation and added tokens that the file asks for are switched off.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pad: str = "<pad>",
        eos: str = "<eos>",
        bos: str = "<bos>",
    ):
        """Reads the file.

        Args:
          path: the file.
          pad: token that fills up a prompt; the defaults are Gemma's.
          eos: token at the end of a text.
          bos: token at the beginning of a text.

        Raises:
          ValueError: tokenizers is not installed, the file cannot be read or is no
            tokenizer.json, or it lacks a special token.
        """
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("tokenizers") from error
        model = _read(path)
        try:
            self._model: Any = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"tokenizer {path} is no tokenizer.json: {error}") from error
        self._model.no_padding()
        self._model.no_truncation()
        named = {"pad": pad, "eos": eos, "bos": bos}
        ids = [self._special_id(path, name, text) for name, text in named.items()]
        self.pad_id, self.eos_id, self.bos_id = ids
        # Not the number of entries: added tokens may leave ids unused.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        specials = "-".join(str(token_id) for token_id in ids)
        self.fingerprint = f"hf-{_digest(model)}-{specials}"

    def _special_id(self, path: str | os.PathLike[str], name: str, text: str) -> int:
        token_id = self._model.token_to_id(text)
        if token_id is None:
            raise ValueError(f"tokenizer {path} has no token {text!r}; name its own with {name}=")
        return token_id

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text` without the special tokens that the file would add."""
        ids = self._model.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos else ids


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `model.tokenizer` names.

    Args:
      name: "byte", "paligemma" (see `paligemma_tokenizer_path`), or the path of a sentencepiece
        model or, where it ends in ".json", of a tokenizer.json.

    Raises:
      ValueError: there is no such file, it cannot be read, or its package is not installed.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "paligemma":
        return SentencePieceTokenizer(paligemma_tokenizer_path())
    return HFTokenizer(name) if name.endswith(".json") else SentencePieceTokenizer(name)


def paligemma_tokenizer_path(path: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """File of PaliGemma's sentencepiece model, which pi0 and pi0.5 were trained with.

    The first of these that is given is the one that is used, whether or not it exists: `path`,
    $JAXVLA_TOKENIZER, openpi's cache, which is big_vision/paligemma_tokenizer.model in
    $OPENPI_DATA_HOME or in ~/.cache/openpi. Nothing is downloaded.

    Raises:
      ValueError: there is no such file; the message lists what was tried.
    """
    variable, home = os.environ.get(_PATH_VARIABLE), os.environ.get(CACHE_VARIABLE)
    if path is not None:
        found, tried = path, f"the given path {path}"
    elif variable:
        found, tried = variable, f"no path was given; ${_PATH_VARIABLE} = {variable}"
    else:
        found = pathlib.Path(home or CACHE_DEFAULT) / _CACHED_NAME
        cache = f"${CACHE_VARIABLE} is {'set' if home else 'not set'}: {found}"
        tried = f"no path was given; ${_PATH_VARIABLE} is not set; {cache}"
    expanded = pathlib.Path(found).expanduser()
    if not expanded.is_file():
        raise ValueError(
            f"PaliGemma's tokenizer was not found. Tried: {tried}. Copy"
            f" gs://big_vision/paligemma_tokenizer.model and set {_PATH_VARIABLE} to its path"
        )
    return expanded


def _missing(package: str) -> ValueError:
    return ValueError(f"this tokenizer needs the package {package}: pip install 'jaxvla[openpi]'")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
