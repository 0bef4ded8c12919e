"""The gated perceptron of a transformer block."""

import torch
from torch import nn

from vlkern import ops
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear


class GatedMlp(nn.Module):
    """GeGLU: x -> W_down(gelu_tanh(W_gate x) * (W_up x)), without biases; parameters named as in Hugging Face's models.

    Args:
        width: D.
        hidden: F, units of one of the two branches.

    Example:
        >>> vlkern.layers.gated_mlp.GatedMlp(64, 256)(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = dense_(Linear(width, hidden, bias=False), lecun=True)
        self.up_proj = dense_(Linear(width, hidden, bias=False), lecun=True)
        self.down_proj = dense_(Linear(hidden, width, bias=False), lecun=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))
