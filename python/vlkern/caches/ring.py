"""A window's worth of slots, used again and again."""

from typing import Any

import torch

from vlkern import ops
from vlkern.caches.chunk import Chunk
from vlkern.caches.layer import LayerCache, as_read, as_stored, longest_row


class RingCache(LayerCache):
    """One layer's keys and values in window + slack slots: for local layers, whose queries see `window` positions.

    Position p lies in slot p mod S, so a new token overwrites the one that no query will see any more. Memory does not
    grow with the context, and the results are those of a LinearCache with the same window.

    Args:
        batch: rows B.
        window: how many positions a query sees, its own included.
        kv_heads: K.
        head_dim: C.
        slack: slots beyond the window: as many tokens can be rolled back exactly, plus one, and steps of slack + 1
            tokens take the fast path.
        value_dim: Cv, C by default.
        dtype: float32, bfloat16, float16 or int8 (with a scale for each head and token).
        device: of the storage.

    Raises:
        TypeError, ValueError: no such sizes or dtype.

    Example:
        >>> caches = Caches([RingCache(2, 512, kv_heads=1, head_dim=64, slack=8, dtype=torch.bfloat16)])
    """

    window: int

    def __init__(
        self,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        *,
        slack: int = 0,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a positive integer, got {window!r}")
        if not isinstance(slack, int) or slack < 0:
            raise ValueError(f"slack must be an integer that is not negative, got {slack!r}")
        super().__init__(
            batch, window + slack, kv_heads, head_dim, window=window, value_dim=value_dim, dtype=dtype, device=device
        )

    @property
    def wraps(self) -> bool:
        """Do positions share slots? Yes."""
        return True

    @property
    def slack(self) -> int:
        """Slots beyond the window."""
        return self.slots - self.window

    def like(self, batch: int) -> "RingCache":
        """An empty cache of this kind for another number of rows."""
        k, v = self.k, self.v
        return RingCache(
            batch, self.window, k.shape[2], k.shape[3], slack=self.slack, value_dim=v.shape[3], dtype=k.dtype,
            device=k.device,
        )  # fmt: skip

    def _attend_chunk(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: Chunk,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        offset: float,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Written last: the chunk would overwrite what its first tokens see. Keys are [old | chunk], row by row."""
        q = ops.norm_rope(q_THC, cos, sin, q_weight, eps=eps, offset=offset)
        k = k_TKC.to(cos.dtype) if self.dtype == torch.int8 else k_TKC  # no rounding before that to int8
        k = ops.norm_rope(k, cos, sin, k_weight, eps=eps, offset=offset)
        new = [as_stored(x, self.dtype) for x in (k, v_TKC)]
        # A query sees the chunk as it is stored: what comes out does not depend on how the tokens are cut into chunks.
        k, v = (as_read(x, s, q.dtype) for x, s in new)
        old = longest_row(chunk.before, self.window - 1)
        oldest = chunk.before - old  # [B]: position of the first old key of each row, negative where there are fewer
        first = torch.arange(self.batch, dtype=torch.int32, device=q.device) * old + chunk.cu_seqlens[:-1]
        if old:
            k = self._behind_old(k, self.k, self.k_scale, old, oldest, first, chunk)
            v = self._behind_old(v, self.v, self.v_scale, old, oldest, first, chunk)
        start, stop = chunk.bounds(self.window, first - oldest)
        out = ops.interval_attention(q, k, v, start, stop, scale=scale, softcap=softcap)
        self._write(new, chunk)
        return out

    def _behind_old(
        self,
        new: torch.Tensor,
        cache: torch.Tensor,
        scale: torch.Tensor | None,
        old: int,
        oldest: torch.Tensor,
        first: torch.Tensor,
        chunk: Chunk,
    ) -> torch.Tensor:
        """[B * old + T, K, C]: from first[b] on the `old` last elements of row b, in order, then its part of `new`."""
        i = torch.arange(old, dtype=torch.int32, device=new.device)
        slots = torch.remainder(oldest[:, None] + i, self.slots)  # [B, old]
        b = torch.arange(self.batch, device=new.device)[:, None]
        kept = as_read(cache[b, slots], None if scale is None else scale[b, slots], new.dtype)
        joint = new.new_empty(self.batch * old + new.shape[0], *new.shape[1:])
        joint[(first[:, None] + i).flatten()] = kept.flatten(0, 1)
        joint[torch.arange(new.shape[0], device=new.device) + (chunk.rows + 1) * old] = new
        return joint

    def _write(self, new: list[Any], chunk: Chunk) -> None:
        """Keys and values of the chunk into their slots; of a chunk longer than the ring its last S tokens stay."""
        behind = chunk.length[chunk.rows] - 1 - chunk.positions
        # Tokens that share a slot all write the last of them, so the order of the writes does not matter.
        source = torch.arange(behind.shape[0], device=behind.device) + behind // self.slots * self.slots
        at = chunk.rows * self.slots + torch.remainder(chunk.positions, self.slots)
        if chunk.partial:
            source = source.masked_fill(chunk.positions < 0, 0)
        stored = ((self.k, new[0][0]), (self.v, new[1][0]), (self.k_scale, new[0][1]), (self.v_scale, new[1][1]))
        for cache, x in stored:
            if cache is None:
                continue
            flat, values = cache.view(-1, *cache.shape[2:]), x[source]
            if chunk.partial:  # rows that sit out write back what they hold
                sits_out = (chunk.positions < 0).view(-1, *(1 for _ in values.shape[1:]))
                values = torch.where(sits_out, flat[at], values)
            flat[at] = values
