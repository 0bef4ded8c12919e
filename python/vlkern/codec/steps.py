"""The transformer as an entropy model: floating-point steps whose results are rounded to whole numbers."""

from typing import Any

import torch

from vlkern.coding import Mixtures, quantize_mixture
from vlkern.models.m2t import M2T, M2TConfig, StepCache


class FloatEntropy:
    """Probabilities from the float network of a model.

    Their rounding hides most differences between machines, not all: where a number lies at the edge between two whole
    numbers, another order of summation gives the other one. Files say so by a checksum.

    Args:
        model: M2T.
    """

    def __init__(self, model: M2T) -> None:
        self._model = model

    @property
    def config(self) -> M2TConfig:
        """Of the model."""
        return self._model.config

    def begin(self, tiles: int, level: int) -> Any:
        """Keys and values for T tiles: see `EntropyModel`."""
        with torch.no_grad():
            return StepCache(self._model.entropy, tiles, self._model.quality(level))

    def step(self, state: Any, tokens: torch.Tensor | None, known: torch.Tensor | None) -> Mixtures:
        """The mixtures of the next group, on the CPU: see `EntropyModel`."""
        device = state.quality.device
        tokens, known = (t if t is None else t.to(device) for t in (tokens, known))
        return quantize_mixture(state.advance(tokens, known).float().cpu())
