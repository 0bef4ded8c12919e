"""SigLIP 2 NaFlex as the training loop sees it: two towers, packed pictures of any shape, the sigmoid loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlkern import data
from vlkern.models.naflex import Naflex
from vlkern.recipes.siglip import SiglipTask


class NaflexTask(SiglipTask):
    """What the loop trains: see vlkern.train.task.Task.

    Args:
        task: as SiglipTask.
        max_patches: of a picture; of several numbers one is drawn for each step.
        augmented: whether pictures are changed at random.
        options: as SiglipTask.
    """

    family = Naflex

    def __init__(self, *task: Any, max_patches: Sequence[int], augmented: bool, **options: Any) -> None:
        super().__init__(*task, augmented=False, **options)
        self._max_patches, self._changed = max_patches, augmented

    def stream(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """(patches [T, P P 3] uint8, shapes [b, 2] int32, ids [b, L] int64)."""
        ranks = self._ranks
        return data.naflex_batches(
            self._pairs,
            self._recipe.batch,
            self.model.config.vision.patch,
            self._max_patches,
            tokenizer=self._tokenizer,
            augmented=self._changed,
            seed=self._seed,
            start=start,
            rank=ranks.rank,
            world=ranks.world,
            workers=self._workers,
        )

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """On the device, pixels in [-1, 1]."""
        patches, *rest = (part.to(self._ranks.device, non_blocking=True) for part in batch)
        return data.to_unit(patches), *rest
