"""torch.nn.Linear, computed by vlkern.ops.linear."""

import torch
from torch import nn

from vlkern import _checks, ops
from vlkern.kernels.linear import FEW_ROWS


class Linear(nn.Linear):
    """y = act(x W^T + b), act none or "gelu_tanh"; parameters as torch.nn.Linear."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, activation: str | None = None) -> None:
        super().__init__(inputs, outputs, bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        plain = self.activation is None and x.dtype == torch.float32 and _checks.autocast_dtype(x) is None
        if plain and x.numel() > FEW_ROWS * x.shape[-1]:
            return super().forward(x)  # nothing to fuse: one large matmul is a few percent faster than blocks
        return ops.linear(x, self.weight, self.bias, activation=self.activation)
