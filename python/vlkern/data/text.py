"""Text to token ids without a vocabulary file: one token per UTF-8 byte."""

from collections.abc import Sequence

import torch


class ByteTokenizer:
    """pad = 0, end of text = 1, byte b = b + 2; lower-cased, no start token, padded on the right to `length`.

    The end token is always there: a text of more than length - 1 bytes keeps its first length - 1 (SigLIP 2's rule).
    The models pool the last position, which is thus a pad for most texts; they see pads as ordinary tokens.

    Example:
        >>> ByteTokenizer(6)(["Cat"])
        tensor([[101,  99, 118,   1,   0,   0]])
    """

    pad, end, vocabulary = 0, 1, 258

    def __init__(self, length: int) -> None:
        """Raises ValueError when `length`, the number of tokens L, is below 1."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, L] int64. Lone surrogates, which have no UTF-8 form, become question marks."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string")
        ids = torch.full((len(texts), self.length), self.pad, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            data = text.lower().encode("utf-8", "replace")[: self.length - 1]
            row[: len(data)] = torch.tensor(list(data), dtype=torch.int64) + 2
            row[len(data)] = self.end
        return ids

    def decode(self, ids: torch.Tensor) -> list[str]:
        """[B, L] -> what stands before the end token of each row; a character cut in two becomes U+FFFD."""
        texts = []
        for row in ids.tolist():
            data = row[: row.index(self.end)] if self.end in row else row
            texts.append(bytes(i - 2 for i in data if i >= 2).decode("utf-8", "replace"))
        return texts
