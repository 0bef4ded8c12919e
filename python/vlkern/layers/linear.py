"""torch.nn.Linear, computed by vlkern.ops.linear."""

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks, ops
from vlkern.kernels.linear import FEW_ROWS


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None = None
) -> torch.Tensor:
    """act(x W^T + b): x [..., K], W [N, K], b [N] -> [..., N]; act none or "gelu_tanh"."""
    plain = activation is None and x.dtype == torch.float32 and _checks.autocast_dtype(x) is None
    if plain and x.numel() > FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)  # nothing to fuse: one large matmul is a few percent faster than blocks
    return ops.linear(x, weight, bias, activation=activation)


class Linear(nn.Linear):
    """y = act(x W^T + b), act none or "gelu_tanh"; parameters as torch.nn.Linear."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, activation: str | None = None) -> None:
        super().__init__(inputs, outputs, bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, self.bias, self.activation)
