"""The two-layer perceptron of a transformer block."""

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.layers.init import dense_


class Mlp(nn.Module):
    """x -> fc2(gelu(fc1(x))), with the tanh approximation of GELU that the original code uses everywhere."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = dense_(nn.Linear(width, hidden), bias_std=1e-6)
        self.fc2 = dense_(nn.Linear(hidden, width), bias_std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
