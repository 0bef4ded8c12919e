"""The transforms of large pictures, block by block, so that their memory does not grow with the picture.

A block is computed with all that it can depend on around it: the results are those of the whole picture, to rounding.

    C channels   H, W sides in pixels   h, w sides of the grid of latents, ceil(H / 16) and ceil(W / 16)
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from vlkern.errors import UserError
from vlkern.models.elic import DOWNSAMPLING, margin
from vlkern.models.m2t import M2T

#: Latents along the side of a block at most, without what lies around it: 1024 pixels.
SIDE = 64


class _Block(NamedTuple):
    """Latents y0 <= y < y1, x0 <= x < x1, and the larger region around them from which they are computed."""

    inner: tuple[slice, slice]
    outer: tuple[slice, slice]

    @property
    def within(self) -> tuple[slice, slice]:
        """The inner region, counted in the outer one."""
        a, b = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(self.inner, self.outer, strict=True))
        return a, b


def _pixels(region: tuple[slice, slice]) -> tuple[slice, slice]:
    a, b = (slice(part.start * DOWNSAMPLING, part.stop * DOWNSAMPLING) for part in region)
    return a, b


def _spans(length: int, side: int) -> list[slice]:
    """As few parts as the side allows, of about the same length."""
    count = -(-length // side)
    cuts = [length * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _blocks(grid: tuple[int, int], around: int, side: int) -> Iterator[_Block]:
    def wider(part: slice, length: int) -> slice:
        return slice(max(part.start - around, 0), min(part.stop + around, length))

    for rows in _spans(grid[0], side):
        for columns in _spans(grid[1], side):
            yield _Block((rows, columns), (wider(rows, grid[0]), wider(columns, grid[1])))


def _cut(grid: torch.Tensor, region: tuple[slice, slice]) -> torch.Tensor:
    rows, columns = region
    return grid[:, rows, columns]


def _progress(block: _Block, grid: tuple[int, int]) -> float:
    """The part of the picture that is done after this block."""
    (rows, columns), (h, w) = block.inner, grid
    return (rows.start * w + (rows.stop - rows.start) * columns.stop) / (h * w)


def analyse(
    model: M2T, pixels: torch.Tensor, level: int, show: Callable[[float], None], *, side: int = SIDE
) -> torch.Tensor:
    """The symbols of a picture. A side that 16 does not divide is continued with its last pixels.

    Args:
        model: of the codec.
        pixels: [3, H, W] uint8.
        level: of quality.
        show: told which part is done, after each block.
        side: of a block in latents.

    Returns:
        [C, h, w] int32, on the CPU.

    Raises:
        UserError: the model gives no finite numbers.
    """
    _, height, width = pixels.shape
    grid = -(-height // DOWNSAMPLING), -(-width // DOWNSAMPLING)
    symbols = torch.empty(model.config.channels, *grid, dtype=torch.int32)
    device = next(model.parameters()).device
    for block in _blocks(grid, margin(model.encoder), side):
        region = _pixels(block.outer)
        piece = _cut(pixels, region).numpy()
        missing = [part.stop - min(part.stop, length) for part, length in zip(region, (height, width), strict=True)]
        piece = np.pad(piece, [(0, 0), (0, missing[0]), (0, missing[1])], "edge")
        y = model.analysis(torch.from_numpy(piece).to(device)[None] / 127.5 - 1, level)[0]
        if not bool(y.isfinite().all()):
            raise UserError("the model gives latents that are not finite")
        _cut(symbols, block.inner).copy_(_cut(y, block.within).round())
        show(_progress(block, grid))
    return symbols


def synthesize(
    model: M2T,
    symbols: torch.Tensor,
    level: int,
    height: int,
    width: int,
    show: Callable[[float], None],
    *,
    side: int = SIDE,
) -> torch.Tensor:
    """The picture of symbols.

    Args:
        model, level, show, side: as `analyse`.
        symbols: [C, h, w] int32.
        height: H of the picture, at most 16 h.
        width: W, at most 16 w.

    Returns:
        [3, H, W] uint8, on the CPU.
    """
    grid = symbols.shape[1], symbols.shape[2]
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    device = next(model.parameters()).device
    for block in _blocks(grid, margin(model.decoder), side):
        x = model.synthesis(_cut(symbols, block.outer)[None].to(device).float(), level)[0]
        target = _cut(pixels, _pixels(block.inner))
        x = _cut(x, _pixels(block.within))[:, : target.shape[1], : target.shape[2]]
        target.copy_(((x + 1) * 127.5).round().clamp(0, 255))
        show(_progress(block, grid))
    return pixels
