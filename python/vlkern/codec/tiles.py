"""The grid of latents as tiles of tokens, in the order in which these are coded.

C channels   h, w sides of the grid   T tiles, row after row   N tokens of a tile
"""

from dataclasses import dataclass

import torch

from vlkern.codec.entropy import EntropyConfig


@dataclass(frozen=True)
class Tiling:
    """How a grid is cut. Tiles at the right and the lower edge may reach over it.

    height, width  h and w
    side           of a tile in tokens
    order          [N] of the tokens of a tile

    Example:
        >>> tiling = Tiling(3, 4, 2, (0, 3, 1, 2))
        >>> tiling.tiles, tiling.valid(2, 4).int().tolist()
        (4, [[1, 0, 1, 0], [1, 0, 1, 0]])
    """

    height: int
    width: int
    side: int
    order: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of tiles."""
        return -(-self.height // self.side)

    @property
    def columns(self) -> int:
        """Of tiles."""
        return -(-self.width // self.side)

    @property
    def tiles(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def _places(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of every token in the grid, each [T, N], for the tiles from first to before last."""
        tile, token = torch.arange(first, last)[:, None], torch.tensor(self.order)
        y = tile // self.columns * self.side + token // self.side
        x = tile % self.columns * self.side + token % self.side
        return y, x

    def valid(self, first: int, last: int) -> torch.Tensor:
        """[T, N] bool: which tokens of these tiles lie in the grid."""
        y, x = self._places(first, last)
        return (y < self.height) & (x < self.width)

    def tokens(self, first: int, last: int) -> int:
        """How many of these tiles' tokens lie in the grid."""
        return self._before(last) - self._before(first)

    def _before(self, tile: int) -> int:
        """Tokens of all tiles before this one."""
        rows, columns = divmod(tile, self.columns)
        above = min(rows * self.side, self.height)
        beside = min((rows + 1) * self.side, self.height) - above
        return above * self.width + beside * min(columns * self.side, self.width)

    def take(self, grid: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The tokens of these tiles from a grid [C, h, w]: [T, N, C]; zeros where there are none."""
        (y, x), inside = self._places(first, last), self.valid(first, last)
        found = grid.permute(1, 2, 0)[y.clamp(max=self.height - 1), x.clamp(max=self.width - 1)]
        return found.masked_fill(~inside[..., None], 0)

    def put(self, grid: torch.Tensor, tokens: torch.Tensor, first: int, last: int) -> None:
        """Write tokens [T, N, C] to their places in a grid [C, h, w]."""
        (y, x), inside = self._places(first, last), self.valid(first, last)
        grid.permute(1, 2, 0)[y[inside], x[inside]] = tokens[inside]


def tiling_of(config: EntropyConfig, height: int, width: int) -> Tiling:
    """The tiles of a grid of h x w latents."""
    return Tiling(height, width, config.tile, config.order)
