"""The entropy model in floating point: fast anywhere, and exact only between equal machines and builds."""

import torch

from vlkern.coding import Mixtures, quantize_mixture
from vlkern.models.m2t import M2T, M2TConfig, StepCache


class FloatEntropy:
    """The transformer of a codec as `EntropyModel`; its parameters are rounded to integers after the network.

    Two machines may round differently what lies between two integers, so a file is read with certainty only where it
    was written. The checksums in the file tell.

    Args:
        model: the codec.
    """

    def __init__(self, model: M2T) -> None:
        self._model = model

    @property
    def config(self) -> M2TConfig:
        """That of the codec."""
        return self._model.config

    @torch.no_grad()
    def begin(self, tiles: int, level: int) -> StepCache:
        """Keys and values of no slot yet. See `EntropyModel`."""
        return StepCache(self._model.entropy, tiles, self._model.quality(level))

    def step(self, state: StepCache, tokens: torch.Tensor | None, known: torch.Tensor | None) -> Mixtures:
        """The next group's mixtures. See `EntropyModel`."""
        return quantize_mixture(state.advance(tokens, known).float())
