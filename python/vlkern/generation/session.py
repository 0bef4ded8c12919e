"""A batch of rows of any lengths on a model's key/value caches: prefill in chunks, then one token a row and step.

The model is one that generates: Gemma, PaliGemma or Gemma3, with `embed`, `new_caches`, `extend` and `logits`.

    B rows   T tokens of a chunk, of all rows   V vocabulary   D width
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch


class Piece(NamedTuple):
    """Positions `start` to `stop` - 1 of a row."""

    row: int
    start: int
    stop: int


def _stop(start: int, length: int, room: int, until: Sequence[int] | None) -> int:
    """Where a chunk of about `room` tokens that begins at `start` may end: no token sees one behind that.

    The last such place within `room`, or the first one behind it.
    """
    if until is None:
        return min(start + room, length)
    best, sees = start, -1
    for stop in range(start + 1, length + 1):
        sees = max(sees, until[stop - 1])
        if stop - start > room and best > start:
            break
        if sees < stop:
            best = stop
            if stop - start >= room:
                break
    return best


def chunks(lengths: Sequence[int], room: int, untils: Sequence[Sequence[int]] | None = None) -> Iterator[list[Piece]]:
    """Cut rows into chunks of about `room` tokens, one row after the other.

    Args:
        lengths: tokens of each row.
        room: tokens of a chunk. A block whose tokens see each other is not cut, even where it is larger.
        untils: of each row and token, the last position that it sees; None: its own.

    Yields:
        The pieces of a chunk, at most one of a row, in the order of the rows.

    Example:
        >>> [[tuple(piece) for piece in chunk] for chunk in chunks([3, 4], 5)]
        [[(0, 0, 3), (1, 0, 2)], [(1, 2, 4)]]
        >>> [[tuple(piece) for piece in chunk] for chunk in chunks([3, 4], 5, [[0, 1, 2], [3, 3, 3, 3]])]
        [[(0, 0, 3)], [(1, 0, 4)]]
    """
    chunk: list[Piece] = []
    left = room
    for row, length in enumerate(lengths):
        start, until = 0, untils[row] if untils is not None else None
        while start < length:
            stop = _stop(start, length, left, until)
            if chunk and stop - start > left:
                yield chunk
                chunk, left = [], room
                continue
            chunk.append(Piece(row, start, stop))
            start, left = stop, left - (stop - start)
            if left <= 0:
                yield chunk
                chunk, left = [], room
    if chunk:
        yield chunk


class Session:
    """The caches of B rows.

    Args:
        model: on the device where everything runs.
        rows: tokens of each prompt, at least one.
        pixels: [N, 3, H, W], the pictures of all rows in the order of their places in the prompts, or None.
        capacity: tokens that a row may have in all.
        room: tokens of a chunk of the prefill.
        cache_dtype: None is that of the model.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Sequence[int]],
        pixels: torch.Tensor | None,
        *,
        capacity: int,
        room: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._rows, self._room = model, rows, room
        self._device = next(model.parameters()).device
        self._pixels = None if pixels is None else pixels.to(self._device)
        self._caches = model.new_caches(len(rows), capacity, dtype=cache_dtype)

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self._rows))

    def prefill(self) -> torch.Tensor:
        """Run the prompts: logits [B, V] after the last token of each."""
        lengths = [len(row) for row in self._rows]
        first = list(accumulate(lengths, initial=0))
        ids = torch.tensor([token for row in self._rows for token in row], device=self._device)
        cu_seqlens = torch.tensor(first, dtype=torch.int32, device=self._device)
        until = self._until(ids, cu_seqlens)
        x_TD = self._embed(ids)
        untils = None
        if until is not None:
            seen = until.tolist()
            untils = [seen[a:b] for a, b in pairwise(first)]
        last: list[torch.Tensor | None] = [None] * len(lengths)
        for chunk in chunks(lengths, self._room, untils):
            places = torch.cat([torch.arange(first[r] + a, first[r] + b) for r, a, b in chunk]).to(self._device)
            counts = [0] * len(lengths)
            for row, start, stop in chunk:
                counts[row] = stop - start
            ends = list(accumulate(counts, initial=0))
            cu = torch.tensor(ends, dtype=torch.int32, device=self._device)
            now = self._caches.chunk(cu, None if until is None else until[places])
            hidden_TD = self._model.extend(x_TD[places], now, self._caches)
            for row, _, stop in chunk:
                if stop == lengths[row]:
                    last[row] = hidden_TD[ends[row + 1] - 1]
        return self._model.logits(torch.stack([h for h in last if h is not None]))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token [B] of each row: logits [B, V] after it."""
        chunk = self._caches.step()
        return self._model.logits(self._model.extend(self._model.embed(tokens), chunk, self._caches))

    def _until(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor | None:
        until = getattr(self._model, "until", None)
        return None if until is None else until(ids, cu_seqlens)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model.embed(ids) if self._pixels is None else self._model.embed(ids, self._pixels)
