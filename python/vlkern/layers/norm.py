"""RMS normalisation as Gemma has it."""

import torch
from torch import nn

from vlkern import ops


class RMSNorm(nn.Module):
    """x -> x / sqrt(mean(x^2) + 1e-6) * (1 + weight): the weight starts at zero, and is stored without the one.

    Args:
        width: N, the number of channels that are normalised together.

    Example:
        >>> vlkern.layers.norm.RMSNorm(4)(torch.tensor([[2.0, -2.0, 2.0, 2.0]]))
        tensor([[ 1., -1.,  1.,  1.]], grad_fn=...)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] -> [..., N] in x's dtype; sums and the product with the weight run in float32."""
        return ops.rms_norm(x, self.weight, offset=1.0)
