"""MaskGIT as the training loop sees it: codes of pictures, some of them masked, and the classes of the pictures."""

import math
from typing import Any

import torch
from torch import nn

from vlkern import data
from vlkern.models.fsq_autoencoder import FsqAutoencoder
from vlkern.models.maskgit import MaskGit
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.pictures import Chance, PictureTask
from vlkern.train.ranks import Ranks

#: The part of the examples whose class is hidden from the model.
DROPPED = 0.1
#: More than this part of a picture's tokens is masked.
LEAST = 0.45


def training_mask(rate: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The masked tokens of each example: ceil(N cos(pi / 2 (1 - r))), r from the one at which that is 0.45 N to 1.

    Args:
        rate: [B], uniform in [0, 1): where r lies in its range.
        order: [B, N], random numbers: the tokens with the smallest are masked.

    Returns:
        [B, N] bool.

    Source: Mentzer et al., Finite Scalar Quantization, 2023.

    Example:
        >>> training_mask(torch.tensor([0.0, 1.0]), torch.rand(2, 100)).sum(1)
        tensor([ 45, 100])
    """
    lowest = 1 - math.acos(LEAST) * 2 / math.pi
    r = lowest + (1 - lowest) * rate.double()
    count = (order.shape[1] * torch.cos(math.pi / 2 * (1 - r)) - 1e-9).ceil()
    return order.argsort(1).argsort(1) < count[:, None]


class Objective(nn.Module):
    """The cross-entropy of masked tokens, with label smoothing: `MaskGit.loss`.

    Args:
        model: the MaskGIT.

    Example:
        >>> objective = Objective(vlkern.models.create("maskgit-tiny"))
        >>> loss = objective(torch.randint(240, (4, 64)), torch.tensor([3, 0, 1, 16]), torch.rand(4, 64) < 0.6)
    """

    def __init__(self, model: MaskGit) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Codes [b, N], labels [b] and masked [b, N] bool -> loss []."""
        return self.model.loss(ids, labels, masked)


class MaskGitTask(PictureTask):
    """What the loop trains: see vlkern.train.task.Task. Arguments as `PictureTask`; the autoencoder is an FSQ's."""

    family = MaskGit
    autoencoder: FsqAutoencoder

    def __init__(
        self,
        model: MaskGit,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        words: data.Classes,
        autoencoder: FsqAutoencoder,
        **more: Any,
    ) -> None:
        super().__init__(
            model,
            Objective(model),
            recipe,
            steps,
            ranks,
            pairs,
            words,
            autoencoder=autoencoder.to(ranks.device),
            **more,
        )

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Codes [b, N] and labels [b], of which one in ten is none; which codes are masked [b, N] bool."""
        c = self.model.config
        codes = self.autoencoder.encode(pixels).flatten(1)
        labels = torch.where(chance.uniform() < DROPPED, c.classes, ids[:, 0])
        return codes, labels, training_mask(chance.uniform(), chance.uniform(c.tokens))
