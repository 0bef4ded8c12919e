"""Factorised position embeddings: a vector for the row of a patch plus one for its column.

    vector(y, x) = phi_y(y) + phi_x(x)

What phi sees are the coordinates of the patch at row i of h and column j of w:

    "absolute"     y = i, x = j
    "fractional"   y = i / h, x = j / w                      the aspect ratio of the image is hidden
    "aspect"       y = i / max(h, w), x = j / max(h, w)      and here it is kept

Fractions are in [0, 1); they are stretched to the table of G entries, (G - 1) times, for every family. And phi is

    "learned"      a table [G, D] for each axis; between its entries, linear
    "sinusoidal"   fixed: sines and cosines of y in the first half of the channels, of x in the other, with wave lengths
                   from 2 pi to 10,000 times that. Each axis is silent in the other's half, so that (1, 2) is not (2, 1)
    "fourier"      sin and cos of W (y, x) with a learned matrix W [D / 2, 2]: here the phases of the axes are added

Source: Dehghani et al., Patch n' Pack: NaViT, 2023. How its learned tables are read at fractions it does not say.
"""

import math

import torch
from torch import nn

FAMILIES = ("learned", "sinusoidal", "fourier")
COORDINATES = ("absolute", "fractional", "aspect")


class Positions(nn.Module):
    """The vector of each patch's position.

    Args:
        width: D; a multiple of 4.
        grid: G, entries of a table; with absolute coordinates of learned tables also the most rows and columns.
        family: one of FAMILIES.
        coordinates: one of COORDINATES.

    Raises:
        ValueError: the width is no multiple of 4.

    Example:
        >>> positions = Positions(64, 16, "learned", "fractional")
        >>> positions(torch.tensor([[0, 0], [2, 5]]), torch.tensor([[4, 8], [4, 8]])).shape
        torch.Size([2, 64])
    """

    def __init__(self, width: int, grid: int, family: str, coordinates: str) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        self.width, self.grid, self.family, self.coordinates = width, grid, family, coordinates
        if family == "learned":
            self.row_embedding = nn.Parameter(torch.empty(grid, width))
            self.column_embedding = nn.Parameter(torch.empty(grid, width))
            for table in (self.row_embedding, self.column_embedding):
                nn.init.normal_(table, std=1 / math.sqrt(width))
        elif family == "fourier":
            # A step of one patch turns a phase by about a radian.
            self.frequencies = nn.Parameter(nn.init.normal_(torch.empty(width // 2, 2)))

    def _stretched(self, yx: torch.Tensor, hw: torch.Tensor) -> torch.Tensor:
        """Coordinates [T, 2] float32, in entries of a table."""
        if self.coordinates == "absolute":
            return yx.float()
        sides = hw if self.coordinates == "fractional" else hw.amax(1, keepdim=True)
        return yx.float() / sides * (self.grid - 1)

    def forward(self, yx_T2: torch.Tensor, hw_T2: torch.Tensor) -> torch.Tensor:
        """Row and column of each patch, rows and columns of its image, [T, 2] integers each -> [T, D]."""
        if self.family == "learned" and self.coordinates == "absolute":
            y, x = yx_T2.unbind(1)
            return self.row_embedding[y] + self.column_embedding[x]
        place_T2 = self._stretched(yx_T2, hw_T2)
        if self.family == "learned":
            y, x = place_T2.unbind(1)
            return _between(self.row_embedding, y) + _between(self.column_embedding, x)
        if self.family == "fourier":
            phase = place_T2 @ self.frequencies.float().T
            return torch.cat([phase.sin(), phase.cos()], -1)
        k = torch.arange(self.width // 4, device=yx_T2.device, dtype=torch.float32)
        phase = place_T2[:, :, None] * 10_000.0 ** (-k / (self.width // 4))
        return torch.cat([phase.sin(), phase.cos()], -1).flatten(1)


def _between(table: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Linear between the two entries beside each place, [G, D] and [T] -> [T, D]."""
    low = place.floor().long()
    part = (place - low).to(table.dtype)[:, None]
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], part)
