"""The two-layer perceptron of a transformer block."""

import torch
from torch import nn

from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear


class Mlp(nn.Module):
    """x -> fc2(fc1(x)), fc1 with GELU in its tanh form, which the original code uses everywhere."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = dense_(Linear(width, hidden, activation="gelu_tanh"), bias_std=1e-6)
        self.fc2 = dense_(Linear(hidden, width), bias_std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.fc1(x))
