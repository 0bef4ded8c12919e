"""Tokens of language models: text to ids of any number, and every id back to the bytes that it stands for.

`vlkern.data.tokenizer` has what the text towers of SigLIP need: lower-cased, padded to one length. Here a text keeps
its case, and special pieces in it (`<loc0512>`, `<start_of_turn>`) are the tokens of that name.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vlkern._files import write_file
from vlkern.data.pairs import DataError
from vlkern.data.text import FIRST_BYTE, ByteTokenizer, Merges, words

#: The file in which `BytePieces` keeps itself.
PIECES = "pieces.json"
#: Special pieces that are part of an answer all the same: places and masks.
_SHOWN = re.compile(r"<(?:loc\d{4}|seg\d{3})>")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOCATION = re.compile(r"<loc(\d{4})>")
#: Where SentencePiece writes a blank.
_BLANK = "▁"


class Vocabulary(Protocol):
    """Text to tokens and back."""

    @property
    def size(self) -> int:
        """All ids are below it."""

    @property
    def start(self) -> int | None:
        """The token before a text; None if there is none."""

    @property
    def end(self) -> int:
        """The token after a text."""

    @property
    def blank(self) -> bool:
        """Whether `encode` puts a blank before a text, which is not part of it."""

    def encode(self, text: str) -> list[int]:
        """Its tokens, without start and end."""

    def piece(self, token: int) -> bytes:
        """UTF-8 of one token, perhaps a part of a character; b"" for start, end and others that are no text."""

    def token(self, name: str) -> int | None:
        """The id of a special piece; None if there is none of this name."""

    def save(self, folder: str | Path) -> None:
        """Write what `load_vocabulary(folder)` needs."""


class BytePieces:
    """pad 0, end 1, start 2, byte b = 3 + b, merge i = 259 + i, then <loc0000> ... <loc1023>; text is lower-cased.

    Args:
        merges: from `vlkern.data.learn_merges`; without them every byte is a token.

    Example:
        >>> pieces = BytePieces()
        >>> pieces.encode("<loc0003> a")
        [262, 35, 100]
        >>> b"".join(map(pieces.piece, [262, 35, 100]))
        b'<loc0003> a'
    """

    LOCATIONS = 1024
    #: How many ids there are besides those of merges.
    FIXED = 3 + 256 + LOCATIONS
    start, end, blank = 2, 1, True
    _SHIFT = 3 - FIRST_BYTE

    def __init__(self, merges: Merges = ()) -> None:
        self.merges = list(merges)
        self.size = self.FIXED + len(self.merges)
        self._text = ByteTokenizer(1, self.merges)

    @property
    def _first_location(self) -> int:
        return self.size - self.LOCATIONS

    def encode(self, text: str) -> list[int]:
        """A blank comes first, so that the first word is the token that it is in a sentence; not before a place or a
        new line."""
        ids: list[int] = []
        parts = _LOCATION.split(text if text.startswith(("<loc", "\n")) else " " + text)
        for i, part in enumerate(parts):
            if i % 2 and int(part) < self.LOCATIONS:
                ids.append(self._first_location + int(part))
            else:
                found = (self._text.split(word) for word in words(f"<loc{part}>" if i % 2 else part))
                ids += [token + self._SHIFT for word in found for token in word]
        return ids

    def piece(self, token: int) -> bytes:
        """See `Vocabulary.piece`."""
        if token >= self._first_location:
            return f"<loc{token - self._first_location:04}>".encode()
        return self._text.piece(token - self._SHIFT)

    def token(self, name: str) -> int | None:
        """Of a place."""
        match = _LOCATION.fullmatch(name)
        return self._first_location + int(match[1]) if match and int(match[1]) < self.LOCATIONS else None

    def save(self, folder: str | Path) -> None:
        """Write the merges to pieces.json in an existing folder."""
        write_file(Path(folder) / PIECES, json.dumps({"merges": self.merges}).encode())

    @classmethod
    def load(cls, path: Path) -> "BytePieces":
        """Of a pieces.json. Raises DataError if it holds anything else."""
        return cls(ByteTokenizer.load(path, 1).merges)


class _File(ABC):
    """A tokenizer in a file, with SentencePiece's pieces."""

    def __init__(self, path: Path) -> None:
        self.name, self.content = path.name, path.read_bytes()
        try:
            self._load()
        except DataError:
            raise
        except ImportError as error:
            raise DataError(f"{path}: needs {error.name}: pip install 'vlkern[data]'") from error
        except Exception as error:  # the libraries raise plain Exception and RuntimeError
            raise DataError(f"{path}: not a readable tokenizer ({error})") from error
        self.start = self.token("<bos>")
        end = next((i for name in ("<eos>", "</s>") if (i := self.token(name)) is not None), None)
        if end is None:
            raise DataError(f"{path}: no end token (<eos>, </s>)")
        self.end = end
        first = self.encode("a")[:1]
        self.blank = bool(first) and self.piece(first[0]).startswith(b" ")

    size: int

    @abstractmethod
    def _load(self) -> None:
        """Make the library's object from `content`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """See `Vocabulary.encode`."""

    @abstractmethod
    def token(self, name: str) -> int | None:
        """See `Vocabulary.token`."""

    @abstractmethod
    def _spelling(self, token: int) -> tuple[str, bool]:
        """What a piece is called, and whether it is text at all."""

    def piece(self, token: int) -> bytes:
        """See `Vocabulary.piece`."""
        name, is_text = self._spelling(token)
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(_BLANK, " ").encode() if is_text or _SHOWN.fullmatch(name) else b""

    def save(self, folder: str | Path) -> None:
        """Write the file."""
        write_file(Path(folder) / self.name, self.content)


class JsonPieces(_File):
    """A tokenizer.json of Hugging Face whose pieces are SentencePiece's. Made by `load_vocabulary`."""

    def _load(self) -> None:
        import tokenizers

        content = json.loads(self.content)
        if "ByteLevel" in json.dumps([content.get("decoder"), content.get("pre_tokenizer")]):
            raise DataError(f"{self.name}: expected pieces of SentencePiece, as Gemma has, got bytes in GPT-2's code")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._special = {i for i, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary.encode`."""
        return self._tokenizer.encode(_valid(text), add_special_tokens=False).ids

    def token(self, name: str) -> int | None:
        """See `Vocabulary.token`."""
        return self._tokenizer.token_to_id(name)

    def _spelling(self, token: int) -> tuple[str, bool]:
        return self._tokenizer.id_to_token(token) or "", token not in self._special


class SentencePieces(_File):
    """A *.model of SentencePiece. Made by `load_vocabulary`."""

    def _load(self) -> None:
        import sentencepiece

        self._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        self.size = self._tokenizer.vocab_size()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary.encode`."""
        return self._tokenizer.encode(_valid(text))

    def token(self, name: str) -> int | None:
        """See `Vocabulary.token`."""
        number = self._tokenizer.piece_to_id(name)
        return None if self._tokenizer.is_unknown(number) else number

    def _spelling(self, token: int) -> tuple[str, bool]:
        if token >= self.size:
            return "", False
        hidden = self._tokenizer.is_control(token) or self._tokenizer.is_unused(token)
        return self._tokenizer.id_to_piece(token), not hidden


def _valid(text: str) -> str:
    """Lone surrogates, which have no UTF-8 form, become question marks."""
    return text.encode("utf-8", "replace").decode()


def load_vocabulary(source: str | Path) -> Vocabulary:
    """The tokens of a language model.

    Args:
        source: "bytes" (`BytePieces` without merges, no file), a tokenizer.json, a *.model of SentencePiece, a
            pieces.json as `BytePieces.save` writes, or a folder with one of these.

    Raises:
        DataError: a UserError: nothing there, or nothing that can be read. Names the file.

    Example:
        >>> load_vocabulary("bytes").encode("Cat")
        [35, 102, 100, 119]
    """
    if source == "bytes":
        return BytePieces()
    path = _find(Path(source))
    if path.name == PIECES:
        return BytePieces.load(path)
    kinds: dict[str, Any] = {".json": JsonPieces, ".model": SentencePieces}
    if path.suffix not in kinds:
        raise DataError(f"{path}: a tokenizer file is called *.json or *.model")
    return kinds[path.suffix](path)


def _find(path: Path) -> Path:
    """The tokenizer file of a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f'{path}: no such tokenizer ("bytes", a file or a folder)')
    names: Sequence[Path] = [path / name for name in (PIECES, "tokenizer.json", "tokenizer.model")]
    found = [name for name in names if name.is_file()] or sorted(path.glob("*.model"))
    if not found:
        raise DataError(f"{path}: no tokenizer there ({PIECES}, tokenizer.json or *.model)")
    return found[0]
