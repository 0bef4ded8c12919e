"""What attention with RoPE, and perhaps a norm of queries and keys, reads: whole rows, or a cache.

T tokens of all rows   H query heads   K key heads   C channels of a head
"""

from typing import NamedTuple, Protocol

import torch

from vlkern import ops
from vlkern.caches import Chunk


class Memory(Protocol):
    """What a layer attends to: the chunk itself (`Rows`), or a cache, which appends the chunk first."""

    def attend(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: Chunk | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Normalise q and k by head if there are weights, rotate them, and attend -> [T, H, C]."""


class Rows(NamedTuple):
    """Whole rows without a cache: token i sees the tokens start[i] <= j < stop[i], [T] int32. Differentiable."""

    start: torch.Tensor
    stop: torch.Tensor

    def attend(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """[T, H, C], [T, K, C], [T, K, C] -> [T, H, C]."""
        q_THC, k_TKC = ops.norm_rope(q_THC, cos, sin, q_weight), ops.norm_rope(k_TKC, cos, sin, k_weight)
        return ops.interval_attention(q_THC, k_TKC, v_TKC, self.start, self.stop, scale=scale, softcap=softcap)
