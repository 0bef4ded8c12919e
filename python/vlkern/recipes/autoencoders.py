"""What the recipes of autoencoders have in common: pictures without a word, and how well they come back."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlkern.recipes.pictures import Chance, PictureTask


class NoWords:
    """The tokenizer of a model that takes no text: every caption has no token."""

    length, end, vocabulary = 0, -1, 0

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B texts -> [B, 0] int64."""
        return torch.zeros(len(texts), 0, dtype=torch.int64)

    def save(self, folder: str | Path) -> None:
        """Write nothing."""


class AutoencoderTask(PictureTask):
    """What the loop trains: see vlkern.train.task.Task. The objective says in `latest` [m] how the last batch went."""

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """The pictures alone."""
        return (pixels,)

    def latest(self) -> list[float]:
        """`objective.latest`, the mean over ranks."""
        latest: Any = self.objective.latest
        found: list[float] = self._ranks.mean(latest).tolist()
        return found


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in decibels of pixels in [-1, 1] with this mean squared error; at most 99.

    Example:
        >>> psnr(0.04)
        20.0
    """
    return min(99.0, 10 * math.log10(4 / max(squared_error, 1e-12)))
