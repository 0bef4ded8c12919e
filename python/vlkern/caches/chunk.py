"""New tokens of some rows: where they belong and what they see. Built once per forward, shared by all layers."""

from itertools import pairwise
from typing import NamedTuple

import torch

from vlkern import _checks

#: The most tokens of a row for which `ops.decode_attention` is made.
MOST_STEP_TOKENS = 16


class Chunk(NamedTuple):
    """What the layers of one forward need to know about its tokens; made by `Caches.chunk` and `Caches.step`.

    cu_seqlens  [B + 1] int32: row b has the tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of the chunk
    rows        [T] int32: the row of each token
    positions   [T] int32: its position in the row; -1 in rows that sit out
    until       [T] int32: the last position that each token sees where that is not its own (image blocks, prefixes),
                or None: causal
    before      [B] int32: tokens of each row before the chunk
    length      [B] int32: and with it; 0 in rows that sit out
    longest     the most tokens of a row in this chunk
    partial     some rows may sit out
    whole       what the first token of a row sees is the row's prefix, which its tokens see as a whole in layers with a
                window, too
    """

    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    until: torch.Tensor | None
    before: torch.Tensor
    length: torch.Tensor
    longest: int
    partial: bool = False
    whole: bool = False

    @property
    def batch(self) -> int:
        """B."""
        return self.before.shape[0]

    @property
    def is_step(self) -> bool:
        """Every row has the same few tokens and is causal: `ops.decode_attention` applies."""
        few = 0 < self.longest <= MOST_STEP_TOKENS
        return few and self.until is None and self.positions.shape[0] == self.batch * self.longest

    def bounds(self, window: int | None, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """start, stop [T] int32 for `ops.interval_attention`, where position p of row b is key first[b] + p."""
        low = torch.zeros_like(self.positions) if window is None else (self.positions - (window - 1)).clamp(min=0)
        if self.whole and self.until is not None and self.until.shape[0]:
            first_token = self.cu_seqlens[:-1].clamp(max=self.until.shape[0] - 1)
            prefix = self.until[first_token].masked_fill(self.before > 0, -1)
            low = torch.where(self.positions <= prefix[self.rows], 0, low)
        high = self.positions if self.until is None else torch.maximum(self.positions, self.until)
        at = first[self.rows]
        start, stop = at + low, at + high + 1
        if self.partial:
            stop = torch.where(self.positions < 0, start, stop)
        return start, stop


def ragged(
    before: torch.Tensor, cu_seqlens: torch.Tensor, until: torch.Tensor | None, tokens: int | None, longest: int | None
) -> Chunk:
    """The chunk in which row b has cu_seqlens[b + 1] - cu_seqlens[b] new tokens behind its before[b] old ones."""
    t = _checks.tensor("cu_seqlens", cu_seqlens)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32, got {t.dtype}")
    _checks.shape("cu_seqlens", t, (before.shape[0] + 1,))
    _checks.on_device("cu_seqlens", t, "the caches", before)
    cu_seqlens = t.int()
    counts = cu_seqlens.diff()
    tokens = int(cu_seqlens[-1]) if tokens is None else tokens
    longest = (int(counts.max()) if counts.numel() else 0) if longest is None else longest
    if _checks.values_may_be_read(cu_seqlens):
        _check_counts(cu_seqlens.tolist(), tokens, longest)
    index = torch.arange(tokens, dtype=torch.int32, device=before.device)
    rows = torch.searchsorted(cu_seqlens[1:], index, right=True, out_int32=True)
    positions = index + (before - cu_seqlens[:-1])[rows]
    length = before + counts
    chunk = Chunk(cu_seqlens, rows, positions, until, before.clone(), length, longest)
    if until is not None:
        _check_until(until, chunk)
    return chunk


def uniform(before: torch.Tensor, tokens: int, active: torch.Tensor | None) -> Chunk:
    """The chunk of `tokens` tokens for every row; rows that are not `active` sit out. Never waits for a device."""
    batch, device = before.shape[0], before.device
    index = torch.arange(batch * tokens, dtype=torch.int32, device=device)
    rows, positions, length = index, before.clone(), before + tokens
    if tokens > 1:
        rows = index // tokens
        positions = before[rows] + index % tokens
    if active is not None:
        positions, length = torch.where(active[rows], positions, -1), torch.where(active, length, 0)
    cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    return Chunk(cu_seqlens, rows, positions, None, before.clone(), length, tokens, active is not None)


def _check_counts(cu_seqlens: list[int], tokens: int, longest: int) -> None:
    counts = [b - a for a, b in pairwise(cu_seqlens)]
    if cu_seqlens[0] != 0 or min(counts, default=0) < 0:
        raise ValueError(f"cu_seqlens must start with 0 and not decrease, got {cu_seqlens}")
    if cu_seqlens[-1] != tokens:
        raise ValueError(f"tokens must be the last of cu_seqlens, {cu_seqlens[-1]}, got {tokens}")
    if max(counts, default=0) > longest:
        raise ValueError(f"longest must be at least {max(counts)}, the most tokens of a row, got {longest}")


def _check_until(until: torch.Tensor, chunk: Chunk) -> None:
    t = _checks.tensor("until", until)
    if t.dtype != torch.int32:
        raise TypeError(f"until must be int32, got {t.dtype}")
    _checks.shape("until", t, tuple(chunk.positions.shape))
    _checks.on_device("until", t, "cu_seqlens", chunk.cu_seqlens)
    if not _checks.values_may_be_read(t):
        return
    last = chunk.length[chunk.rows] - 1
    outside = t > last
    if bool(outside.any()):
        i = int(outside.int().argmax())
        raise ValueError(
            f"until must lie inside the chunk: the block around position {int(chunk.positions[i])} of row "
            f"{int(chunk.rows[i])} ends at {int(t[i])}, the row's part of the chunk at {int(last[i])}; append a block "
            "as a whole"
        )
