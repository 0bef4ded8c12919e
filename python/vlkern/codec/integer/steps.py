"""The functions of arithmetic.py by name, or their C++ twins on a CPU: the same integers, faster."""

from dataclasses import dataclass
from typing import Any

import torch

from vlkern._native import LIBRARIES
from vlkern.codec.integer import arithmetic

_LIBRARY = torch.library.Library("vlkern", "FRAGMENT")
_LIBRARY.define(
    "integer_linear(Tensor x, Tensor panels, Tensor bias, Tensor multiplier, int shift, int limit, Tensor? table,"
    " int level) -> Tensor"
)
_LIBRARY.define(
    "integer_norm(Tensor x, Tensor gain, Tensor bias, int shift, int limit, int epsilon, int level) -> Tensor"
)
_LIBRARY.define(
    "integer_attention(Tensor qkv, int start, int stop, int heads, int shift, Tensor powers, int multiplier,"
    " int out_shift, int limit, int level) -> Tensor"
)
_LIBRARY.define("integer_mixture(Tensor raw, Tensor powers) -> (Tensor, Tensor, Tensor)")

#: Columns of a panel of weights.
_PANEL = 16


def panels(weight_NK: torch.Tensor) -> torch.Tensor:
    """Weights as `integer_linear` reads them: int16 [panels, words, 16, 2], two neighbours along K side by side."""
    n, k = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK.to(torch.int16), (0, k % 2, 0, -n % _PANEL))
    return padded.view(-1, _PANEL, (k + 1) // 2, 2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Reference:
    """arithmetic.py, on the device of the tensors."""

    def prepare(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """A matrix as `linear` takes it."""
        return weight_NK

    linear = staticmethod(arithmetic.linear)
    norm = staticmethod(arithmetic.norm)
    attention = staticmethod(arithmetic.attention)
    mixture = staticmethod(arithmetic.mixture)


@dataclass(frozen=True)
class Native:
    """csrc/cpu/integer.cpp.

    level  0: the best instruction set of this machine; for tests 1: none, 2: at most AVX2
    """

    level: int = 0

    def prepare(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """A matrix as `linear` takes it."""
        return panels(weight_NK)

    def linear(self, *args: Any, table: torch.Tensor | None = None) -> torch.Tensor:
        """See arithmetic.py."""
        y: torch.Tensor = torch.ops.vlkern.integer_linear(*args, table, self.level)
        return y

    def norm(self, *args: Any) -> torch.Tensor:
        """See arithmetic.py."""
        y: torch.Tensor = torch.ops.vlkern.integer_norm(*args, self.level)
        return y

    def attention(self, *args: Any) -> torch.Tensor:
        """See arithmetic.py."""
        y: torch.Tensor = torch.ops.vlkern.integer_attention(*args, self.level)
        return y

    def mixture(self, raw: torch.Tensor, powers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See arithmetic.py."""
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.vlkern.integer_mixture(raw, powers)
        return result


Steps = Reference | Native


def choose(device: torch.device, backend: str = "auto") -> Steps:
    """Who computes: "cpu" (C++), "reference" (PyTorch), or "auto": C++ on a CPU, if it was built.

    Raises:
        ValueError: another name.
        RuntimeError: C++ was asked for and cannot run.
    """
    if backend not in ("auto", "cpu", "reference"):
        raise ValueError(f"backend must be auto, cpu or reference, got {backend!r}")
    why = LIBRARIES["_C"] or (None if device.type == "cpu" else f"the tensors are on {device.type}")
    if backend == "cpu" and why:
        raise RuntimeError(f"backend 'cpu' was chosen and cannot run: {why}")
    return Reference() if backend == "reference" or why else Native()
