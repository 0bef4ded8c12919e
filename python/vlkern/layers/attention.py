"""Multi-head self-attention without a mask."""

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear


def split_heads(x_BLD: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, K * C] -> [B, K, L, C]: K heads of C channels."""
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BKLC: torch.Tensor) -> torch.Tensor:
    """[B, K, L, C] -> [B, L, K * C]."""
    return x_BKLC.transpose(1, 2).flatten(-2)


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
        q, k, v = (split_heads(project(x_BLD), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
