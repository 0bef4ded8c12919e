"""Random changes to pictures that leave their captions true, drawn from a generator."""

import torch
import torch.nn.functional as F


def _uniform(shape: tuple[int, ...], span: float, generator: torch.Generator) -> torch.Tensor:
    """Between -span and span."""
    return (2 * torch.rand(shape, generator=generator) - 1) * span


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the pictures; turn, zoom, stretch and shift all of them; vary contrast and colour.

    Args:
        pixels: [B, 3, S, S] float in [-1, 1] on the CPU; white is 1 and fills what comes in from outside.
        generator: of the CPU.

    Returns:
        [B, 3, S, S], a little beyond [-1, 1] in places.
    """
    b = pixels.shape[0]
    mirror = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    angle, zoom, stretch = (_uniform((b,), span, generator) for span in (0.2, 0.15, 0.15))
    x, y = (0.95 + zoom) * (1 + stretch), (0.95 + zoom) / (1 + stretch)
    affine = torch.stack(
        [
            torch.stack([mirror * x * angle.cos(), -mirror * y * angle.sin()], -1),
            torch.stack([x * angle.sin(), y * angle.cos()], -1),
        ],
        dim=1,
    )
    theta = torch.cat([affine, _uniform((b, 2, 1), 0.15, generator)], dim=2)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # Outside the picture grid_sample puts zeros, so white has to be zero while it runs.
    moved = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)
    contrast = 1 + 0.2 * torch.randn(b, 1, 1, 1, generator=generator)
    return moved * contrast + 0.1 * torch.randn(b, 3, 1, 1, generator=generator)
