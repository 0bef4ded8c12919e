"""Random changes to pictures that leave their captions true, drawn from a generator."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def _uniform(shape: tuple[int, ...], span: float, generator: torch.Generator) -> torch.Tensor:
    """Between -span and span."""
    return (2 * torch.rand(shape, generator=generator) - 1) * span


class Changes(NamedTuple):
    """What happens to each of B pictures: maps from places of the new picture to places of the old one, and colours."""

    affine: torch.Tensor  # [B, 2, 3]
    contrast: torch.Tensor  # [B, 1, 1, 1]
    tint: torch.Tensor  # [B, 3, 1, 1]

    def rows(self, part: slice) -> "Changes":
        """Those of some of the pictures."""
        return Changes(*(t[part] for t in self))


def draw(count: int, generator: torch.Generator) -> Changes:
    """Mirror half of the pictures; turn, zoom, stretch and shift all of them; vary contrast and colour.

    Args:
        count: number of pictures B.
        generator: of the CPU.
    """
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    angle, zoom, stretch = (_uniform((count,), span, generator) for span in (0.2, 0.15, 0.15))
    x, y = (0.95 + zoom) * (1 + stretch), (0.95 + zoom) / (1 + stretch)
    affine = torch.stack(
        [
            torch.stack([mirror * x * angle.cos(), -mirror * y * angle.sin()], -1),
            torch.stack([x * angle.sin(), y * angle.cos()], -1),
        ],
        dim=1,
    )
    shift = _uniform((count, 2, 1), 0.15, generator)
    contrast = 1 + 0.2 * torch.randn(count, 1, 1, 1, generator=generator)
    tint = 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
    return Changes(torch.cat([affine, shift], dim=2), contrast, tint)


def change(pixels: torch.Tensor, changes: Changes) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], changed; white is 1 and fills what comes in from outside.

    Returns:
        [B, 3, H, W], a little beyond [-1, 1] in places.
    """
    affine, contrast, tint = (t.to(pixels.device) for t in changes)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # Outside the picture grid_sample puts zeros, so white has to be zero while it runs.
    moved = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)
    return moved * contrast + tint


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`change` with what `draw` gives for as many pictures.

    Args:
        pixels: [B, 3, H, W] float in [-1, 1]; white is 1 and fills what comes in from outside.
        generator: of the CPU.

    Returns:
        [B, 3, H, W], a little beyond [-1, 1] in places.
    """
    return change(pixels, draw(len(pixels), generator))
