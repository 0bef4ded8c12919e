"""The constants of csrc/mixture_cdf.h, computed again, exactly: the normal distribution function and the scales."""

from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import torch

#: Steps of the table a standard deviation, and how many of these it has on either side.
STEPS, REACH = 64, 8
ONE, TOTAL, WEIGHTS, MOST_MEAN = 1 << 30, 1 << 16, 1 << 12, 1 << 23
#: Half a window.
HALVES = tuple(1 << n for n in range(3, 10))
#: The longest row, and the symbols that may be in one.
MOST_SIZE, MOST_SYMBOL = 4096, 1 << 16
_BITS = 200
#: 1 / sqrt(2 pi) to 60 digits
_DENSITY = Decimal("0.398942280401432677939946059934381868475858631164934657665926")


def _phi(i: int) -> int:
    """round(2^30 Phi(i / 64)) by the series x sum_n (-x^2 / 2)^n / (n! (2n + 1)), in whole numbers of 2^-200."""
    power, total, n = (i << _BITS) // STEPS, 0, 0
    while power:
        term = power // (2 * n + 1)
        total += -term if n % 2 else term
        n += 1
        power = power * i * i // (2 * n * STEPS**2)
    with localcontext() as context:
        context.prec = 80
        phi = Decimal("0.5") + _DENSITY * Decimal(total) / (1 << _BITS)
        return int((phi * ONE).to_integral_value())


def _sigma() -> list[int]:
    """round(256 s) for 64 scales s from 0.11 to 256 in equal steps of their logarithms."""
    with localcontext() as context:
        context.prec = 50
        first, last = Decimal("0.11").ln(), Decimal(256).ln()
        return [int((256 * (first + i * (last - first) / 63).exp()).to_integral_value()) for i in range(64)]


@lru_cache
def _numbers(name: str) -> list[int]:
    if name == "sigma":
        return _sigma()
    upper = [_phi(i) for i in range(STEPS * REACH + 1)]
    return [ONE - p for p in upper[:0:-1]] + upper


# What torch.compiler.assume_constant_result does, which would import the compiler: the loops above are not traced.
_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    return torch.tensor(_numbers(name), dtype=dtype, device=device)


_kept = lru_cache(_make)


def constant(name: str, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """ "phi" [1025], Phi(-8) to Phi(8) in 2^-30, or "sigma" [64], scales in 2^-8, on `like`'s device.

    Made once and kept, except inside a graph or for tensors without data, where they belong to the tracer.
    """
    traced = torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor)
    made: torch.Tensor = _make(name, dtype, like.device) if traced else _kept(name, dtype, like.device)
    return made
