"""SigLIP as the training loop sees it: two towers, image-text pairs, the sigmoid loss."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlkern import data
from vlkern.data.augment import change, draw
from vlkern.models.siglip import Siglip
from vlkern.recipes import contrastive
from vlkern.recipes.contrastive import Objective, Recipe
from vlkern.recipes.reading import announced
from vlkern.recipes.saving import save
from vlkern.train.ranks import Ranks
from vlkern.train.updates import whole


class SiglipTask:
    """What the loop trains: see vlkern.train.task.Task.

    Args:
        model: on the device of `ranks`.
        recipe: hyper-parameters.
        steps: of the whole run, for the learning rate.
        pairs, tokenizer: the data.
        seed: of order and augmentation.
        workers: processes that read, for this rank.
        augmented: whether pictures are changed at random.
    """

    #: What is saved; the class of `model` itself changes under FSDP.
    family: Callable[[Any], Any] = Siglip

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        tokenizer: Any,
        *,
        seed: int,
        workers: int,
        augmented: bool,
    ) -> None:
        self.model: Any = model
        self.objective: nn.Module = Objective(model, ranks.group)
        self._recipe, self._steps, self._ranks, self._pairs, self._tokenizer = recipe, steps, ranks, pairs, tokenizer
        self._seed, self._workers, self._augmented = seed, workers, augmented

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of both towers."""
        towers = self.model.vision_model, self.model.text_model
        return [block for tower in towers for block in tower.encoder.layers]

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return contrastive.optimizer(self.model, self._recipe)

    def rate(self, number: int) -> float:
        """Warm-up and cosine."""
        return contrastive.learning_rate(self._recipe, number, number / self._steps)

    def batches(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """What `stream` gives. Says which samples cannot be read, when it meets them."""
        return announced(self.stream(start), self._pairs, self._ranks.first)

    def stream(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """(pixels [b, 3, H, W] uint8, ids [b, L] int64)."""
        ranks = self._ranks
        return data.batches(
            self._pairs,
            self._recipe.batch,
            tokenizer=self._tokenizer,
            seed=self._seed,
            start=start,
            rank=ranks.rank,
            world=ranks.world,
            workers=self._workers,
        )

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """Pixels in [-1, 1]. The changes are drawn for the global batch, so they do not depend on the ranks."""
        device = self._ranks.device
        pixels = data.to_unit(batch[0].to(device, non_blocking=True))
        if self._augmented:
            generator = torch.Generator().manual_seed((self._seed * 0x9E3779B97F4A7C15 + number) % 2**64)
            changes = draw(self._recipe.batch, generator)
            pixels = change(pixels, changes.rows(self._ranks.part(self._recipe.batch)))
        return pixels, batch[1].to(device, non_blocking=True)

    def numbers(self) -> dict[str, float]:
        """Temperature factor and bias of the loss."""
        return {
            "scale": whole(self.model.logit_scale.detach()).exp().item(),
            "bias": whole(self.model.logit_bias.detach()).item(),
        }

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Model and tokenizer, as `load_pretrained` and `load_tokenizer` read them."""
        save(self.family, self.model.config, weights, self._tokenizer, folder)
