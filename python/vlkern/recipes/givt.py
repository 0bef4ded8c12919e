"""GIVT as the training loop sees it: latents of pictures, drawn anew in every step, and their classes."""

from typing import Any

import torch
from torch import nn

from vlkern import data
from vlkern.generation.masked_givt import training_mask
from vlkern.models.givt import Givt
from vlkern.models.vae import Vae, with_noise
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.pictures import Chance, PictureTask
from vlkern.train.ranks import Ranks

#: The part of the examples whose label is hidden from the model.
DROPPED = 0.1
#: Of masked models as much as this is shown, in units of the cosine's quarter: at least 45 % of the tokens are hidden.
MOST_SHOWN = 0.7


class Objective(nn.Module):
    """The mean negative log-likelihood of a token, in nats; through the adaptor, if there is one.

    Args:
        model: the GIVT.

    Example:
        >>> objective = Objective(vlkern.models.create("givt-tiny"))
        >>> loss = objective(torch.randn(4, 64, 4), torch.tensor([3, 0, 1, 1]))
    """

    def __init__(self, model: Givt) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor,
        drop: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents [b, L, d], labels [b], and whatever `Givt.loss` takes -> loss []."""
        return self.model.loss(self.model.tokens_of(latents), labels, drop=drop, mask=mask, count=count)


class GivtTask(PictureTask):
    """What the loop trains: see vlkern.train.task.Task. Arguments as `PictureTask`; the autoencoder is a Vae."""

    family = Givt
    autoencoder: Vae

    def __init__(
        self,
        model: Givt,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        words: data.Classes,
        autoencoder: Vae,
        **more: Any,
    ) -> None:
        objective = Objective(model)
        super().__init__(
            model, objective, recipe, steps, ranks, pairs, words, autoencoder=autoencoder.to(ranks.device), **more
        )

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Latents [b, L, d], labels [b] and which are hidden; of masked models also which tokens are, and how many."""
        c = self.model.config
        mean, logvar = self.autoencoder.encode(pixels)
        latents = with_noise(mean, logvar, chance.normal(c.length, c.channels))
        given = latents, ids[:, 0], chance.uniform() < DROPPED
        if not c.masked:
            return given
        mask = training_mask(chance.uniform() * MOST_SHOWN, chance.uniform(c.length))
        return *given, mask, self._ranks.mean(mask.sum().float())
