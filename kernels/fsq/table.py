"""What a list of levels means: thresholds of digits, codes, strides of the index, the bound's slope."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

VARIANTS = ("official", "symmetric")
EPS = 1e-3
#: The official bound, tanh times (L - 1) (1 - EPS) / 2, no longer reaches its outermost levels beyond this L.
MOST_LEVELS = 1000
MOST_CODES = 1 << 62


def check_levels(levels: Any) -> tuple[int, ...]:
    """`levels` as a tuple. Raises TypeError or ValueError when a quantizer cannot have them."""
    if isinstance(levels, (str, torch.Tensor)) or not hasattr(levels, "__len__"):
        raise TypeError(f"levels must be a sequence of ints, got {type(levels).__name__}")
    if not len(levels):
        raise ValueError("levels must name at least one channel, got []")
    if any(isinstance(level, bool) or not isinstance(level, int) for level in levels):
        raise TypeError(f"levels must be a sequence of ints, got {list(levels)}")
    if not all(2 <= level <= MOST_LEVELS for level in levels):
        raise ValueError(f"levels must be between 2 and {MOST_LEVELS}, got {list(levels)}")
    found = tuple(len(range(level)) for level in levels)  # int() would leave symbols to a compiler with dynamic shapes
    if math.prod(found) > MOST_CODES:
        raise ValueError(f"levels must have a product of at most 2^62, got {math.prod(found)} for {list(found)}")
    return found


def check_variant(variant: Any) -> bool:
    """Whether `variant` is the symmetric one. Raises ValueError for an unknown name."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be 'official' or 'symmetric', got {variant!r}")
    return bool(variant == "symmetric")


def _up_to_float32(x: float) -> float:
    """The smallest float32 number >= x: a float32 z reaches one as soon as the other."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.ceil(math.ldexp(mantissa, 24)), exponent - 24)


def _bound(level: int, symmetric: bool) -> tuple[float, float, float]:
    """half, shift, offset of the bound tanh(z + shift) half - offset, whose rounded value counts from -(level // 2)."""
    offset = 0.0 if level % 2 else 0.5
    if symmetric:
        return (level - 1) / 2, 0.0, offset
    half = (level - 1) * (1 - EPS) / 2
    return half, math.tan(offset / half), offset


def code_fraction(level: int, symmetric: bool) -> tuple[int, int, int]:
    """(a, b, c): the code of a digit is (a digit - b) / c."""
    return (2, level - 1, level - 1) if symmetric else (1, level // 2, level // 2)


def _thresholds(levels: tuple[int, ...], symmetric: bool) -> list[float]:
    """Channel after channel the L - 1 inputs at which the bound is half-way between two integers."""
    found = []
    for level in levels:
        half, shift, offset = _bound(level, symmetric)
        for k in range(1, level):
            middle = k - level // 2 - 0.5
            found.append(_up_to_float32(math.atanh((middle + offset) / half) - shift))
    return found


def _slopes(levels: tuple[int, ...], symmetric: bool) -> list[list[float]]:
    """shift and gain of every channel: the code's slope at z is gain (1 - tanh^2(z + shift))."""
    bounds = [_bound(level, symmetric) for level in levels]
    fractions = [code_fraction(level, symmetric) for level in levels]
    return [[b[1] for b in bounds], [b[0] * f[0] / f[2] for b, f in zip(bounds, fractions, strict=True)]]


def _codes(levels: tuple[int, ...], symmetric: bool) -> list[float]:
    """Channel after channel the L codes."""
    fractions = [(level, *code_fraction(level, symmetric)) for level in levels]
    return [(a * digit - b) / c for level, a, b, c in fractions for digit in range(level)]


def _columns(levels: tuple[int, ...], symmetric: bool) -> list[list[int]]:
    """For every channel its levels, the place of its first threshold, and the stride of its digit in the index."""
    firsts = [sum(levels[:c]) - c for c in range(len(levels))]
    return [list(levels), firsts, [math.prod(levels[:c]) for c in range(len(levels))]]


_MAKERS: dict[str, Callable[..., Any]] = {
    "thresholds": _thresholds,
    "slopes": _slopes,
    "codes": _codes,
    "columns": _columns,
}


def _numbers(name: str, levels: tuple[int, ...], symmetric: bool) -> Any:
    return _MAKERS[name](levels, symmetric)


# What torch.compiler.assume_constant_result does, which would import the compiler: the loops above are not traced.
_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make(name: str, levels: tuple[int, ...], symmetric: bool, dtype: torch.dtype, device: torch.device) -> Any:
    return torch.tensor(_numbers(name, levels, symmetric), dtype=dtype, device=device)


_kept = lru_cache(_make)


def constant(
    name: str, levels: tuple[int, ...], symmetric: bool, dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """The "thresholds" [sum of L - 1], "slopes" [2, d], "codes" [sum of L] or "columns" [3, d] on `like`'s device.

    Made once and kept, except inside a graph or for tensors without data, where they belong to the tracer.
    """
    traced = torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor)
    made: torch.Tensor
    if traced:
        made = _make(name, levels, symmetric, dtype, like.device)
    else:
        with torch.inference_mode(False):  # else autograd could not keep them
            made = _kept(name, levels, symmetric, dtype, like.device)
    return made
