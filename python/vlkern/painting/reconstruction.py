"""How well an autoencoder gives pictures back."""

from collections.abc import Callable

import torch

from vlkern.data import to_unit
from vlkern.painting.sheet import COLUMNS, to_bytes
from vlkern.recipes.autoencoders import psnr

#: Pictures that are shown beside their reconstructions, and pictures in a batch.
SHOWN, BATCH = 32, 64


def reconstructions(pixels: torch.Tensor, again: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What an autoencoder makes of pictures.

    Args:
        pixels: [n, 3, S, S] uint8.
        again: [b, 3, S, S] in [-1, 1] -> its reconstruction.

    Returns:
        [n, 3, S, S] uint8.
    """
    return torch.cat([to_bytes(again(to_unit(part))).cpu() for part in pixels.split(BATCH)])


def decibels(pixels: torch.Tensor, again: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pictures [n, 3, S, S] uint8: of the mean squared error of all their numbers."""
    error = (pixels.float() - again.float()).square().mean() / 127.5**2
    return psnr(float(error))


def side_by_side(pixels: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
    """Whole rows of originals, each above the row of its reconstructions: for sheets of `COLUMNS` in a row."""
    count = min(SHOWN, len(pixels))
    if count > COLUMNS:
        count -= count % COLUMNS
    rows = zip(pixels[:count].split(COLUMNS), again[:count].split(COLUMNS), strict=True)
    return torch.cat([row for pair in rows for row in pair])
