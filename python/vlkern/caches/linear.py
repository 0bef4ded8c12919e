"""A slot for every position."""

from typing import Any

import torch

from vlkern import ops
from vlkern.caches.chunk import Chunk
from vlkern.caches.layer import LayerCache, as_read, longest_row


class LinearCache(LayerCache):
    """One layer's keys and values with a slot for every position: for global layers, and short contexts.

    Args:
        batch: rows B.
        capacity: slots of a row S, the most tokens that it can have.
        kv_heads: K.
        head_dim: C.
        value_dim: Cv, C by default.
        window: for a local layer whose context is no longer than its window: how many positions a query sees.
        dtype: float32, bfloat16, float16 or int8 (with a scale for each head and token).
        device: of the storage.

    Raises:
        TypeError, ValueError: no such sizes or dtype.

    Example:
        >>> caches = Caches([LinearCache(2, 100, kv_heads=1, head_dim=64, dtype=torch.bfloat16)])
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("capacity", capacity), ("window", 1 if window is None else window)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        super().__init__(
            batch, capacity, kv_heads, head_dim, window=window, value_dim=value_dim, dtype=dtype, device=device
        )

    @property
    def wraps(self) -> bool:
        """Do positions share slots? No."""
        return False

    def like(self, batch: int) -> "LinearCache":
        """An empty cache of this kind for another number of rows."""
        k, v = self.k, self.v
        return LinearCache(
            batch, k.shape[1], k.shape[2], k.shape[3], value_dim=v.shape[3], window=self.window, dtype=k.dtype,
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
        scale: float | None,
        softcap: float | None,
        **norms: Any,
    ) -> torch.Tensor:
        """The chunk is written first; then its keys lie in the cache like all others, in one interval."""
        q = ops.rope_append(
            q_THC, k_TKC, v_TKC, cos, sin, chunk.rows, chunk.positions, self.k, self.v, k_scale=self.k_scale,
            v_scale=self.v_scale, **norms,
        )  # fmt: skip
        k, v, used = self.k, self.v, self.slots
        if self.k_scale is not None and self.v_scale is not None:
            used = longest_row(chunk.length, self.slots)  # only what rows hold is widened
            k, v = (
                as_read(t[:, :used], s[:, :used], q.dtype) for t, s in ((self.k, self.k_scale), (self.v, self.v_scale))
            )
        first = torch.arange(self.batch, dtype=torch.int32, device=q.device) * used
        start, stop = chunk.bounds(self.window, first)
        return ops.interval_attention(q, k.flatten(0, 1), v.flatten(0, 1), start, stop, scale=scale, softcap=softcap)
