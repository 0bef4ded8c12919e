"""Multi-head attention pooling (MAP): one learned query reads the whole sequence."""

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import ops
from vlkern.layers.attention import merge_heads, split_heads
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.mlp import Mlp


class ProbeAttention(nn.Module):
    """Attention from the probe to the tokens. Query, key and value projections lie in one matrix, q above k above v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = dense_(Linear(width, width))
        for part in self.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(part)

    def project(self, probe: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., D], [..., D] -> q of the probe, k and v of the tokens, each as it was."""
        (wq, wk, wv), (bq, bk, bv) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return ops.linear(probe, wq, bq), ops.linear(x, wk, bk), ops.linear(x, wv, bv)

    def forward(self, probe_B1D: torch.Tensor, x_BND: torch.Tensor) -> torch.Tensor:
        """[B, 1, D], [B, N, D] -> [B, 1, D]."""
        q, k, v = (split_heads(y, self.heads) for y in self.project(probe_B1D, x_BND))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class MapHead(nn.Module):
    """h = Attention(probe, tokens);  out = h + MLP(LN(h)). There is no residual from the probe."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))
        self.attention = ProbeAttention(width, heads)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, D]."""
        h_B1D = self.attention(self.probe.expand(x_BND.shape[0], -1, -1), x_BND)
        return (h_B1D + self.mlp(self.layernorm(h_B1D)))[:, 0]
