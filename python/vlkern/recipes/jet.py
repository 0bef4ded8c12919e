"""Jet as the training loop sees it: pictures with noise of one level on them, and the bits that they cost."""

import torch
from torch import nn

from vlkern.models.jet import Jet
from vlkern.recipes.pictures import Chance, PictureTask


class Objective(nn.Module):
    """Bits per dimension, the mean over pictures: `vlkern.flows.bits_per_dim`.

    Example:
        >>> model = vlkern.models.create("jet-tiny")
        >>> loss = Objective(model)(vlkern.flows.dequantise(torch.zeros(4, 3, 32, 32, dtype=torch.uint8)))
    """

    def __init__(self, model: Jet) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [b, C, S, S] in [-1, 1] with their noise -> loss []."""
        return self.model.bits(self.model.tokens(pixels)).mean()


class JetTask(PictureTask):
    """What the loop trains: see vlkern.train.task.Task."""

    family = Jet

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Pictures with uniform noise of one of 256 levels."""
        return (pixels + chance.uniform(*pixels.shape[1:]) / 127.5,)
