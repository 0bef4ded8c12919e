"""Decoder blocks as in GIVT and UViM: over whole sequences or on a cache, with cross-attention to something seen.

    x += Attention(N(x));  x += CrossAttention(N(x), seen);  x += MLP(N(x))          N: LayerNorm without bias

The projections of attention have no bias, the MLP has. There is no rotation: positions are added to the tokens.

    T places of all sequences   D width   H heads of C channels   B M things seen, M by each of B sequences
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import ops
from vlkern.caches import Chunk
from vlkern.caches.layer import LayerCache
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.mlp import Mlp


class Memory(Protocol):
    """What queries attend to: the rows themselves, or a cache."""

    def attend(self, q_THC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, scale: float) -> torch.Tensor:
        """-> [T, H, C]."""


class Rows(NamedTuple):
    """Whole sequences: place i sees the places start[i] <= j < stop[i], [T] int32. Differentiable."""

    start: torch.Tensor
    stop: torch.Tensor

    def attend(self, q_THC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, scale: float) -> torch.Tensor:
        """[T, H, C] each -> [T, H, C]; keys and values may be those of other places."""
        return ops.interval_attention(q_THC, k_THC, v_THC, self.start, self.stop, scale=scale)


class Cached(NamedTuple):
    """A cache of one layer, to which the chunk is appended first."""

    cache: LayerCache
    chunk: Chunk

    def attend(self, q_THC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, scale: float) -> torch.Tensor:
        """[T, H, C] each -> [T, H, C]."""
        # Positions are in the tokens already: the cache turns queries and keys by no angle.
        cos = q_THC.new_ones(len(q_THC), q_THC.shape[2] // 2, dtype=torch.promote_types(q_THC.dtype, torch.float32))
        return self.cache.attend(q_THC, k_THC, v_THC, self.chunk, cos, torch.zeros_like(cos), scale=scale)


class Seen(NamedTuple):
    """What one layer sees by cross-attention: keys and values [B M, H, C], and which of them each place sees."""

    k_MHC: torch.Tensor
    v_MHC: torch.Tensor
    rows: Rows


def padded(channels: int) -> int:
    """The next multiple of 8, which the kernels take: heads of other sizes are filled up with zeros."""
    return -(-channels // 8) * 8


class Attention(nn.Module):
    """Softmax attention without biases.

    Args:
        width: D.
        heads: H.

    Raises:
        ValueError: the heads do not share the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of the {heads} heads, got {width}")
        self.heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            dense_(Linear(width, width, bias=False)) for _ in range(4)
        )

    def _split(self, x_TD: torch.Tensor) -> torch.Tensor:
        x_THC, missing = x_TD.unflatten(-1, (self.heads, self.head_dim)), padded(self.head_dim) - self.head_dim
        return F.pad(x_THC, (0, missing)) if missing else x_THC

    def keys(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, D] -> keys and values [T, H, C]."""
        return self._split(self.k_proj(x_TD)), self._split(self.v_proj(x_TD))

    def forward(self, x_TD: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor], memory: Memory) -> torch.Tensor:
        """[T, D] and what `keys` gave -> [T, D]."""
        out_THC = memory.attend(self._split(self.q_proj(x_TD)), *keys, self.head_dim**-0.5)
        return self.out_proj(out_THC[..., : self.head_dim].flatten(1))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=False)


class Block(nn.Module):
    """Self-attention, cross-attention if there is something to see, and MLP, each added to its input.

    Args:
        width: D.
        heads: H.
        mlp: units of the MLP.
        cross: whether there is cross-attention.
        dropout: of what is added.

    Raises:
        ValueError: the heads do not share the width.

    Example:
        >>> block = vlkern.layers.decoder.Block(64, heads=4, mlp=128)
        >>> i = torch.arange(5, dtype=torch.int32)
        >>> block(torch.randn(5, 64), vlkern.layers.decoder.Rows(torch.zeros_like(i), i + 1)).shape  # causal
        torch.Size([5, 64])
    """

    def __init__(self, width: int, heads: int, mlp: int, *, cross: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = _norm(width), Attention(width, heads)
        if cross:
            self.cross_norm, self.cross_attn = _norm(width), Attention(width, heads)
        self.layer_norm2, self.mlp = _norm(width), Mlp(width, mlp)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: torch.Tensor, memory: Memory, seen: Seen | None = None) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        h_TD = self.layer_norm1(x_TD)
        x_TD = x_TD + self.dropout(self.self_attn(h_TD, self.self_attn.keys(h_TD), memory))
        if seen is not None:
            keys = seen.k_MHC, seen.v_MHC
            x_TD = x_TD + self.dropout(self.cross_attn(self.cross_norm(x_TD), keys, seen.rows))
        return x_TD + self.dropout(self.mlp(self.layer_norm2(x_TD)))
