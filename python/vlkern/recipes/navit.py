"""NaViT as the training loop sees it: two towers, packed pictures of any shape, the sigmoid loss."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vlkern import data, ops
from vlkern.models.navit import Navit
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.siglip import SiglipTask
from vlkern.train.ranks import Ranks


class Objective(nn.Module):
    """The sigmoid loss of packed pairs; over several ranks with `group`, as docs/distributed.md says.

    Example:
        >>> loss = Objective(model)(*images, *texts)
    """

    def __init__(self, model: Navit, group: Any = None) -> None:
        super().__init__()
        self.model, self._group = model, group

    def forward(
        self,
        patches: torch.Tensor,
        cu_seqlens: torch.Tensor,
        yx: torch.Tensor,
        hw: torch.Tensor,
        ids: torch.Tensor,
        cu_texts: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images and texts as `Navit.forward` takes them -> this rank's loss [], from float32 embeddings.

        `valid` [n] bool are the slots that hold a pair, where there are others (`vlkern.data.sequences`).
        """
        image, text = self.model(patches, cu_seqlens, yx, hw, ids, cu_texts)
        with torch.autocast(patches.device.type, enabled=False):
            scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
            return ops.sigmoid_contrastive_loss(image, text, scale, bias, valid=valid, group=self._group)


class NavitTask(SiglipTask):
    """What the loop trains: see vlkern.train.task.Task. Arguments as `SiglipTask`, and how pictures are seen."""

    family = Navit

    def __init__(
        self,
        model: Navit,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        tokenizer: data.Tokenizer,
        views: data.Views,
        *,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__(model, recipe, steps, ranks, pairs, tokenizer, seed=seed, workers=workers, augmented=False)
        self.objective = Objective(model, ranks.group)
        self._views = views

    def stream(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Images (patches uint8) and texts, packed."""
        ranks = self._ranks
        batches = data.native_batches(
            self._pairs,
            self._recipe.batch,
            self._views,
            tokenizer=self._tokenizer,
            seed=self._seed,
            start=start,
            rank=ranks.rank,
            world=ranks.world,
            workers=self._workers,
        )
        return ((*images, *texts) for images, texts in batches)

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """On the device, pixels in [-1, 1]."""
        patches, *rest = (part.to(self._ranks.device, non_blocking=True) for part in batch)
        return data.to_unit(patches), *rest
