"""Text to token ids without a vocabulary file: UTF-8 bytes, and pairs of tokens merged as learned from sample texts."""

import functools
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vlkern._files import write_file
from vlkern.data.pairs import DataError

Merges = Sequence[tuple[int, int]]

PAD, END, FIRST_BYTE = 0, 1, 2
FIRST_MERGE = FIRST_BYTE + 256
#: The file in which a ByteTokenizer keeps its merges.
BYTE_PAIRS = "byte_pairs.json"
#: A word takes the blank before it along; merges never cross words.
_WORD = re.compile(r"\s?[^\W_]+|\s?[^\w\s]+|\s+|_+")


def words(text: str) -> list[tuple[int, ...]]:
    """The lower-cased text as words of byte tokens. Lone surrogates, which have no UTF-8 form, become a "?"."""
    return [tuple(b + FIRST_BYTE for b in w.encode("utf-8", "replace")) for w in _WORD.findall(text.lower())]


def _words(text: str) -> list[tuple[int, ...]]:
    """With a blank before the first word as before the others."""
    return words(" " + text)


def _merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """`word` with every `pair`, from the left, replaced by `new`."""
    out: list[int] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[int, int]]:
    """Byte-pair encoding: again and again give the most frequent pair of neighbouring tokens a token of its own.

    Args:
        texts: what the tokenizer should be good at.
        count: how many merges, at most; pairs that occur once are left alone.

    Returns:
        The pairs in the order in which they were merged; merge i makes token 258 + i. Of equally frequent pairs the one
        with the smaller ids comes first, so the same texts give the same merges everywhere.

    Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016.
    """
    words = list(Counter(word for text in texts for word in _words(text)).items())
    frequency: Counter[tuple[int, int]] = Counter()
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)

    def add(i: int, sign: int) -> None:
        word, times = words[i]
        for pair in itertools.pairwise(word):
            frequency[pair] += sign * times
            places[pair].add(i)

    for i in range(len(words)):
        add(i, 1)
    merges: list[tuple[int, int]] = []
    while len(merges) < count and frequency:
        pair = min(frequency, key=lambda p: (-frequency[p], p))
        if frequency[pair] < 2:
            break
        for i in places.pop(pair):
            add(i, -1)
            word, times = words[i]
            words[i] = _merge(word, pair, FIRST_MERGE + len(merges)), times
            add(i, 1)
        frequency = +frequency
        merges.append(pair)
    return merges


class ByteTokenizer:
    """pad = 0, end of text = 1, byte b = b + 2, merge i = 258 + i; lower-cased, padded on the right to `length`.

    A text gets a blank in front, so that its first word is the same token as inside a sentence; `decode` removes it.

    The end token is always there: a text of more than length - 1 tokens keeps its first length - 1 (SigLIP 2's rule).
    The models pool the last position, which is thus a pad for most texts; they see pads as ordinary tokens.

    Args:
        length: number of tokens L.
        merges: from `learn_merges`; without them every byte is a token.

    Raises:
        ValueError: `length` is below 1.

    Example:
        >>> ByteTokenizer(6)(["Cat"])
        tensor([[ 34, 101,  99, 118,   1,   0]])
        >>> ByteTokenizer(6, learn_merges(["cat", "the cat"], 3))(["Cat"])
        tensor([[260,   1,   0,   0,   0,   0]])
    """

    end = END

    def __init__(self, length: int, merges: Merges = ()) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length, self.merges = length, list(merges)
        self._rank = {pair: i for i, pair in enumerate(merges)}
        self._bytes = {b + FIRST_BYTE: bytes([b]) for b in range(256)}
        for i, (left, right) in enumerate(merges):
            self._bytes[FIRST_MERGE + i] = self._bytes[left] + self._bytes[right]
        self.split = functools.lru_cache(maxsize=1 << 16)(self._split_word)

    @property
    def vocabulary(self) -> int:
        """How many ids there are, V."""
        return FIRST_MERGE + len(self._rank)

    def _split_word(self, word: tuple[int, ...]) -> tuple[int, ...]:
        """Merge in the order in which the merges were learned."""
        while pairs := [p for p in itertools.pairwise(word) if p in self._rank]:
            pair = min(pairs, key=self._rank.__getitem__)
            word = _merge(word, pair, FIRST_MERGE + self._rank[pair])
        return word

    def __getstate__(self) -> tuple[int, Merges]:
        return self.length, self.merges  # the cache of words cannot be pickled

    def __setstate__(self, state: tuple[int, Merges]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, L] int64."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string")
        ids = torch.full((len(texts), self.length), PAD, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            tokens = [t for word in _words(text) for t in self.split(word)][: self.length - 1]
            row[: len(tokens) + 1] = torch.tensor([*tokens, END])
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of one token; b"" for pad, end and what is no token."""
        return self._bytes.get(token, b"")

    def decode(self, ids: torch.Tensor) -> list[str]:
        """[B, L] -> what stands before the end token of each row; a character cut in two becomes U+FFFD."""
        texts = []
        for row in ids.tolist():
            tokens = row[: row.index(END)] if END in row else row
            texts.append(b"".join(map(self.piece, tokens)).decode("utf-8", "replace").removeprefix(" "))
        return texts

    def save(self, folder: str | Path) -> None:
        """Write the merges to byte_pairs.json in an existing folder."""
        write_file(Path(folder) / BYTE_PAIRS, json.dumps({"merges": self.merges}).encode())

    @classmethod
    def load(cls, path: Path, length: int) -> "ByteTokenizer":
        """The tokenizer of a byte_pairs.json. Raises DataError if it holds anything else."""
        try:
            merges = [(left, right) for left, right in json.loads(path.read_bytes())["merges"]]
            if any(t not in range(FIRST_BYTE, FIRST_MERGE + i) for i, pair in enumerate(merges) for t in pair):
                raise ValueError("a merge of tokens that are not there yet")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: no merges of a byte tokenizer ({error})") from error
        return cls(length, merges)
