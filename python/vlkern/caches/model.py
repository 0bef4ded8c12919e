"""The caches of a model's layers, and how many tokens each row has."""

from collections.abc import Iterable, Sequence

import torch

from vlkern import _checks
from vlkern.caches import chunk as chunks
from vlkern.caches.chunk import Chunk
from vlkern.caches.layer import LayerCache
from vlkern.caches.ring import RingCache

Rows = torch.Tensor | Sequence[int] | int


class Caches:
    """A model's caches, one for each layer, and the number of tokens of each row.

    One forward: `chunk = caches.chunk(cu_seqlens)`, each layer calls `caches.layers[i].attend(..., chunk, ...)`, then
    `caches.advance(chunk)`. All state is in tensors that are changed in place; `step`, `attend`, `advance` and
    `rollback` never wait for a device, so that a step of decoding can be compiled or captured in a CUDA graph.

    layers  the LayerCaches, in the order of the model's layers
    length  [B] int32: tokens of each row
    high    [B] int32: the most tokens that each row has had since it was empty: what a ring has overwritten

    Args:
        layers: LinearCaches and RingCaches with as many rows on one device.

    Raises:
        ValueError: there is no layer, or rows or devices differ.

    Example:
        >>> caches = Caches([RingCache(2, 512, 1, 64), LinearCache(2, 4096, 1, 64)])
        >>> chunk = caches.chunk(torch.tensor([0, 3, 10], dtype=torch.int32))  # 3 and 7 tokens
        >>> caches.advance(chunk)
        >>> caches.length.tolist()
        [3, 7]
    """

    def __init__(self, layers: Iterable[LayerCache]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers must hold at least one cache, got none")
        first = self.layers[0]
        for layer in self.layers[1:]:
            if layer.batch != first.batch or layer.k.device != first.k.device:
                raise ValueError("layers must have as many rows and lie on one device")
        self.length = torch.zeros(first.batch, dtype=torch.int32, device=first.k.device)
        self.high = torch.zeros_like(self.length)

    @property
    def batch(self) -> int:
        """B, rows."""
        return self.length.shape[0]

    @property
    def capacity(self) -> int | None:
        """The most tokens that a row can have; None when all layers are rings."""
        return min((layer.slots for layer in self.layers if not layer.wraps), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers) + self.length.nbytes + self.high.nbytes

    def chunk(
        self,
        cu_seqlens: torch.Tensor,
        until: torch.Tensor | None = None,
        *,
        tokens: int | None = None,
        longest: int | None = None,
    ) -> Chunk:
        """New tokens for some or all rows, any number each: a prompt, a part of one, a few tokens to verify.

        Args:
            cu_seqlens: [B + 1] int32: row b gets cu_seqlens[b + 1] - cu_seqlens[b] tokens, which may be 0.
            until: [T] int32, the last position of its row that each token sees, where that is later than its own
                (image blocks, prefixes), or None. It must lie inside the chunk.
            tokens: T, the last of cu_seqlens; read from there when None, which waits for a GPU.
            longest: the most tokens of a row, or more; likewise.

        Raises:
            TypeError: cu_seqlens or until are no integer tensors.
            ValueError: shapes or devices do not fit. On the CPU, and elsewhere with `vlkern.validate(True)`: cu_seqlens
                decreases; a row would have more tokens than its linear caches have slots; a block that `until`
                describes ends behind the chunk.
        """
        chunk = chunks.ragged(self.length, cu_seqlens, until, tokens, longest)
        self._check_capacity(chunk)
        return chunk

    def step(self, tokens: int = 1, active: torch.Tensor | None = None) -> Chunk:
        """The same few tokens for every row, as in a step of decoding: made on the device, without waiting for it.

        Args:
            tokens: of each row.
            active: [B] bool; rows where it is False sit out: nothing of theirs is written, attention gives them zeros.
                Their tokens are still part of the batch.

        Raises:
            TypeError, ValueError: no such number of tokens or mask; a row would overflow, as in `chunk`.
        """
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
        if active is not None:
            if _checks.tensor("active", active).dtype != torch.bool:
                raise TypeError(f"active must be bool, got {active.dtype}")
            _checks.shape("active", active, (self.batch,))
            _checks.on_device("active", active, "the caches", self.length)
        chunk = chunks.uniform(self.length, tokens, active)
        self._check_capacity(chunk)
        return chunk

    def _check_capacity(self, chunk: Chunk) -> None:
        if not _checks.values_may_be_read(self.length) or self.capacity is None:
            return
        for row, (old, new) in enumerate(zip(chunk.before.tolist(), chunk.length.tolist(), strict=True)):
            if new > self.capacity:
                raise ValueError(
                    f"the chunk must fit the capacity of {self.capacity} tokens: "
                    f"row {row} has {old} and would get {new - old} more"
                )

    def advance(self, chunk: Chunk) -> None:
        """Count the chunk's tokens, once all layers have appended them.

        Raises:
            ValueError: the lengths have changed since the chunk was made (on the CPU, elsewhere with
                `vlkern.validate(True)`).
        """
        if _checks.values_may_be_read(self.length) and not torch.equal(self.length, chunk.before):
            now, then = self.length.tolist(), chunk.before.tolist()
            raise ValueError(f"chunk must be made for the present lengths {now}, got one for {then}")
        self.length.copy_(torch.where(chunk.length > 0, chunk.length, self.length))
        self.high.copy_(torch.maximum(self.high, self.length))

    def rollback(self, tokens: torch.Tensor | int) -> None:
        """Forget the last tokens of each row, for instance those that speculative decoding has rejected.

        A ring has overwritten what lies a window and more behind the row's latest token. So from the longest that a row
        has been it can go back by slack + 1 tokens and still have a full window, and by any number while the ring
        is not full.

        Args:
            tokens: how many, for all rows or [B] integers.

        Raises:
            ValueError: a row has fewer, or its ring does not have the window of the new last token any more: the
                message says what slack would do. Nothing is changed then. (On the CPU, elsewhere with
                `vlkern.validate(True)`.)
        """
        if isinstance(tokens, torch.Tensor):
            _checks.shape("tokens", tokens, (self.batch,))
            _checks.on_device("tokens", tokens, "the caches", self.length)
        after = (self.length - tokens).int()
        if _checks.values_may_be_read(self.length):
            self._check_rollback(after)
        self.length.copy_(after)
        self.high.copy_(torch.where(after > 0, self.high, 0))

    def _check_rollback(self, after: torch.Tensor) -> None:
        rings = [layer for layer in self.layers if isinstance(layer, RingCache) and layer.window > 1]
        for row, (now, then, high) in enumerate(
            zip(self.length.tolist(), after.tolist(), self.high.tolist(), strict=True)
        ):
            if not 0 <= then <= now:
                raise ValueError(f"tokens must be 0 to {now}, what row {row} has, got {now - then}")
            for ring in rings:
                needed = high - max(ring.window, then + 1)
                if then and needed > ring.slack:
                    raise ValueError(
                        f"tokens must leave row {row} a full window: going back to {then} tokens after {high} needs "
                        f"slack >= {needed}, the ring of window {ring.window} has slack {ring.slack}"
                    )

    def reset(self, rows: Rows | None = None) -> None:
        """Empty these rows, all by default."""
        which = None if rows is None else self._rows("rows", rows)
        for layer in self.layers:
            layer.clear(which)
        for t in (self.length, self.high):
            if which is None:
                t.zero_()
            else:
                t.index_fill_(0, which, 0)

    def fork(self, rows: Rows) -> "Caches":
        """New caches that start as copies of these rows, in this order; a row may occur several times.

        `fork([0] * 8)` lets eight continuations share a prompt, `fork([2, 0])` drops and reorders rows.
        """
        which = self._rows("rows", rows)
        forked = Caches([layer.like(len(which)) for layer in self.layers])
        forked.copy_(self, source_rows=which)
        return forked

    def copy_(self, source: "Caches", rows: Rows | None = None, source_rows: Rows | None = None) -> None:
        """Rows of these caches become rows of others: a prefix computed once starts many contexts.

        The others may have more or fewer slots, or linear caches where these have rings with the same window.

        Args:
            source: caches of the same model and dtype.
            rows: which rows are replaced; all by default.
            source_rows: by which; all by default. As many, or one for all.

        Raises:
            ValueError: layers differ, no such rows, or a prefix longer than the capacity (on the CPU, elsewhere with
                `vlkern.validate(True)`).
        """
        to = self._rows("rows", range(self.batch) if rows is None else rows)
        of = source._rows("source_rows", range(source.batch) if source_rows is None else source_rows)
        of = of.expand(len(to)) if len(of) == 1 else of
        if len(of) != len(to):
            raise ValueError(f"source_rows must be one or as many as rows, {len(to)}, got {len(of)}")
        if len(source.layers) != len(self.layers):
            raise ValueError(f"source must have {len(self.layers)} layers, got {len(source.layers)}")
        for i, (mine, its) in enumerate(zip(self.layers, source.layers, strict=True)):
            for a, b in ((mine.k, its.k), (mine.v, its.v)):
                if (a.dtype, a.shape[2:], a.device, mine.window) != (b.dtype, b.shape[2:], b.device, its.window):
                    raise ValueError(f"layer {i} of source must have heads, window, dtype and device of layer {i} here")
            if its.wraps and not mine.wraps:
                raise ValueError(f"layer {i} of source must not be a ring, as layer {i} here is linear")
        length, had = source.length[of], source.high[of]
        high = had
        if self.capacity is not None and len(to) and _checks.values_may_be_read(length):
            longest = int(length.max())
            if longest > self.capacity:
                raise ValueError(f"source must fit the capacity of {self.capacity} tokens, got {longest}")
        for mine, its in zip(self.layers, source.layers, strict=True):
            mine.copy_rows(to, its, of, length)
            if mine.wraps:
                # Lost is what the other ring had lost, and what does not fit into this one.
                lost = length - mine.slots
                lost = torch.maximum(lost, had - its.slots) if its.wraps else lost
                high = torch.maximum(high, lost + mine.slots)
        self.length.index_copy_(0, to, length)
        self.high.index_copy_(0, to, high)

    def _rows(self, name: str, rows: Rows) -> torch.Tensor:
        """int64 [R] on the caches' device."""
        if not isinstance(rows, torch.Tensor):
            some = [rows] if isinstance(rows, int) else list(rows)
            rows = torch.tensor(some, dtype=None if some else torch.int64)
        which = rows.to(self.length.device)
        if which.dim() != 1 or which.is_floating_point() or which.dtype == torch.bool:
            raise ValueError(f"{name} must be row numbers, got {which.dtype} of shape {list(which.shape)}")
        if which.numel() and _checks.values_may_be_read(which):
            low, high = int(which.min()), int(which.max())
            if low < 0 or high >= self.batch:
                raise ValueError(f"{name} must be within 0 to {self.batch - 1}, got {low} to {high}")
        return which.long()
