"""What the codec asks of a model of tokens: for each step, how probable the symbols of the step's tokens are."""

from typing import Any, Protocol

import torch

from vlkern.coding import Mixtures


class EntropyConfig(Protocol):
    """Of the tokens of a tile."""

    @property
    def tile(self) -> int:
        """Side of a tile in tokens, of which it has N = tile^2."""
        ...

    @property
    def channels(self) -> int:
        """C, symbols of a token."""
        ...

    @property
    def levels(self) -> int:
        """How many levels of quality there are."""
        ...

    @property
    def order(self) -> tuple[int, ...]:
        """The N tokens of a tile, numbered row after row, in the order in which they are coded."""
        ...

    @property
    def groups(self) -> tuple[int, ...]:
        """How many tokens each step codes; the numbers do not decrease."""
        ...


class EntropyModel(Protocol):
    """Gives the mixtures of one group of tokens after the other, from those that came before.

    T tiles are coded at a time, each by itself. Encoder and decoder make the same calls, of the same shapes.
    """

    @property
    def config(self) -> EntropyConfig:
        """Sizes, order and groups."""
        ...

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
