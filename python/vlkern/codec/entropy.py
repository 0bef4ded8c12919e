"""What the codec asks of a model of tokens: for each step, how probable the symbols of the step's tokens are."""

from typing import Any, Protocol

import torch

from vlkern.coding import Mixtures


class EntropyConfig(Protocol):
    """Of the tokens of a tile.

    tile      side of a tile in tokens; N = tile^2
    channels  C, symbols of a token
    levels    how many levels of quality there are
    order     [N] the tokens of a tile, row after row from 0, in the order in which they are coded
    groups    [S] how many of them each step codes; they do not decrease
    """

    @property
    def tile(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def order(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> tuple[int, ...]: ...


class EntropyModel(Protocol):
    """Gives the mixtures of one group of tokens after the other, from those that came before.

    T tiles are coded at a time, each by itself. Encoder and decoder make the same calls, of the same shapes.
    """

    @property
    def config(self) -> EntropyConfig: ...

    def begin(self, tiles: int, level: int) -> Any:
        """What `step` needs to know of the steps before, such as keys and values.

        Args:
            tiles: T.
            level: of quality.
        """
        ...

    def step(self, state: Any, tokens: torch.Tensor | None, known: torch.Tensor | None) -> Mixtures:
        """The mixtures of the next group, n tokens of each tile.

        Args:
            state: from `begin`; it is changed.
            tokens: [T, m, C] int32, those of the group before; None at the first step.
            known: [T, m] bool, false for tokens outside of the picture, whose symbols are 0 and mean nothing.

        Returns:
            of [T, n] tokens with C symbols each: means and weights [T, n, K, C] and so on.
        """
        ...
