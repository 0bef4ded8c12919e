"""Multi-head self-attention without a mask."""

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import ops
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear


def split_heads(x_BLD: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, K * C] -> [B, K, L, C]: K heads of C channels."""
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BKLC: torch.Tensor) -> torch.Tensor:
    """[B, K, L, C] -> [B, L, K * C]."""
    return x_BKLC.transpose(1, 2).flatten(-2)


def attend(q_BMKC: torch.Tensor, k_BLKC: torch.Tensor, v_BLKC: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(C)) V of each of B sequences -> [B, M, K, C], for M queries (all L tokens, or others).

    On a CPU by `interval_attention`, as B documents side by side: its backward is faster than PyTorch's, and without
    bfloat16 instructions so is its forward in that dtype. On a GPU PyTorch's attention is the one to beat.
    """
    batch, queries, _, channels = q_BMKC.shape
    length = k_BLKC.shape[1]
    if q_BMKC.device.type != "cpu" or q_BMKC.dtype == torch.float64 or channels % 8 or channels > 256:
        q, k, v = (x.transpose(1, 2) for x in (q_BMKC, k_BLKC, v_BLKC))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    first = torch.arange(batch, dtype=torch.int32).mul(length).unsqueeze(1).expand(batch, queries).flatten()
    q, k, v = (x.flatten(0, 1) for x in (q_BMKC, k_BLKC, v_BLKC))
    return ops.interval_attention(q, k, v, first, first + length).unflatten(0, (batch, queries))


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(C)) V over all L tokens, K heads of C = D / K channels, projections with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = dense_(Linear(width, width))
        self.k_proj = dense_(Linear(width, width))
        self.v_proj = dense_(Linear(width, width))
        self.out_proj = dense_(Linear(width, width))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        heads = (self.heads, x_BLD.shape[2] // self.heads)
        q, k, v = (project(x_BLD).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).flatten(-2))
