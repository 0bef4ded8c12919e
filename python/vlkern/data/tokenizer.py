"""Tokenizers from files, with the rules of SigLIP 1 and 2: `load_tokenizer` takes what a checkpoint comes with."""

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from vlkern._files import write_file
from vlkern.data.pairs import DataError
from vlkern.data.text import BYTE_PAIRS, ByteTokenizer
from vlkern.errors import UserError

CONFIG = "tokenizer_config.json"
#: What the end and the padding token are called where no tokenizer_config.json says so.
_ENDS = ("<eos>", "</s>", "<|endoftext|>")
_PADS = ("<pad>", "[PAD]")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer(Protocol):
    """Texts to ids of one length, padded on the right. What comes before the first `end` of a row is the text."""

    length: int
    end: int

    @property
    def vocabulary(self) -> int:
        """How many ids there are, V: all are below it."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, L] int64."""

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder, length)` needs."""


class _FileTokenizer(ABC):
    """Lower-cased text -> pieces, end token, pads; a text that is too long keeps its first length - 1 pieces.

    With `canonical` (SigLIP 1) ASCII punctuation is removed and runs of blanks become one.
    """

    def __init__(self, path: Path, length: int, config: dict[str, Any]) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length, self.name, self.config = length, path.name, config
        self.canonical = config.get("tokenizer_class", "").removesuffix("Fast") == "SiglipTokenizer"
        self.content = path.read_bytes()
        try:
            self._load()
        except ImportError as error:
            raise DataError(f"{path}: needs {error.name}: pip install 'vlkern[data]'") from error
        except Exception as error:  # the libraries raise plain Exception and RuntimeError
            raise DataError(f"{path}: not a readable tokenizer ({error})") from error
        self.end = self._special("eos_token", _ENDS)
        self.pad = self._special("pad_token", () if self.canonical else _PADS, self.end)

    @abstractmethod
    def _load(self) -> None:
        """Make the library's object from `content`; it is not pickled."""

    @abstractmethod
    def _id(self, token: str) -> int | None:
        """Of a special token, None if it has none."""

    @abstractmethod
    def _pieces(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many ids there are."""

    def _special(self, name: str, usual: Sequence[str], otherwise: int | None = None) -> int:
        """The id of a special token: that of the config, or of the first usual one that the vocabulary has."""
        given = self.config.get(name)
        given = given.get("content") if isinstance(given, dict) else given
        candidates = [given] if given else list(usual)
        found = next((i for token in candidates if (i := self._id(token)) is not None), otherwise)
        if found is None:
            raise DataError(f"{self.name}: no {name.partition('_')[0]} token ({', '.join(candidates)})")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string")
        ids = torch.full((len(texts), self.length), self.pad, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            text = text.encode("utf-8", "replace").decode("utf-8").lower()
            if self.canonical:
                text = " ".join(text.translate(_NO_PUNCTUATION).split())
            pieces = self._pieces(text)[: self.length - 1]
            row[: len(pieces) + 1] = torch.tensor([*pieces, self.end])
        return ids

    def save(self, folder: str | Path) -> None:
        """Write the file, and a tokenizer_config.json with the rules, which transformers understands as well."""
        write_file(Path(folder) / self.name, self.content)
        write_file(Path(folder) / CONFIG, json.dumps(self.config, indent=2, ensure_ascii=False).encode())


class JsonTokenizer(_FileTokenizer):
    """A tokenizer.json, read by the library `tokenizers`. Made by `load_tokenizer`."""

    def _load(self) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A caption that contains "<eos>" is text, as it is to SentencePiece, with which the models were trained.
        self._tokenizer.encode_special_tokens = True

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _pieces(self, text: str) -> list[int]:
        # One by one: a batch would start threads, and with them a warning in every forked worker.
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def vocabulary(self) -> int:
        """The largest id and one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class SentencePieceTokenizer(_FileTokenizer):
    """A *.model of SentencePiece. Made by `load_tokenizer`."""

    def _load(self) -> None:
        import sentencepiece

        self._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=self.content)

    def _id(self, token: str) -> int | None:
        number = self._tokenizer.piece_to_id(token)
        return None if self._tokenizer.is_unknown(number) else number

    def _pieces(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @property
    def vocabulary(self) -> int:
        """How many pieces there are."""
        return self._tokenizer.vocab_size()


def _find(folder: Path) -> Path:
    """The tokenizer file of a folder."""
    for name in (BYTE_PAIRS, "spiece.model", "tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise DataError(
        f"{folder}: no tokenizer there ({BYTE_PAIRS}, tokenizer.json or one *.model), got {len(models)} models"
    )


def load_tokenizer(source: str | Path, length: int) -> Tokenizer:
    """A tokenizer by the rule of SigLIP 2, or of SigLIP 1 where the files say so.

    SigLIP 2: lower-case, no start token, pieces, end token, pads; a text that is too long keeps its first length - 1
    pieces and the end token. SigLIP 1, where a tokenizer_config.json beside the file has `SiglipTokenizer` as its
    class: also without punctuation, and padded with what that config says, the end token. All ids are read from the
    files.

    Args:
        source: "bytes" (`ByteTokenizer`, no file); a tokenizer.json; a *.model of SentencePiece; a byte_pairs.json, as
            `ByteTokenizer.save` writes; or a folder with one of these.
        length: number of tokens L; 64 for most checkpoints.

    Raises:
        DataError: nothing there, or nothing that can be read. Names the file.
        ValueError: `length` is below 1.

    Example:
        >>> load_tokenizer("bytes", 6)(["Cat"])
        tensor([[ 34, 101,  99, 118,   1,   0]])
    """
    if source == "bytes":
        return ByteTokenizer(length)
    path = Path(source)
    path = _find(path) if path.is_dir() else path
    if not path.is_file():
        raise DataError(f'{path}: no such tokenizer ("bytes", a file or a folder)')
    if path.name == BYTE_PAIRS:
        return ByteTokenizer.load(path, length)
    kinds: dict[str, type[_FileTokenizer]] = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    if path.suffix not in kinds:
        raise DataError(f"{path}: a tokenizer file is called *.json or *.model")
    return kinds[path.suffix](path, length, _config(path.parent / CONFIG))


def _config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json, or nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not readable ({error})") from error
    return config if isinstance(config, dict) else {}


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Make sure that a model with `vocabulary` token embeddings knows every id of the tokenizer.

    Raises:
        UserError: it does not.
    """
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.vocabulary} ids, more than the model's vocabulary of {vocabulary}: "
            "take the tokenizer that belongs to the model"
        )
