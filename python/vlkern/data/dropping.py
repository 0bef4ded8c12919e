"""Continuous token dropping: every picture of a packed batch loses patches at a rate of its own.

Rates come from a `Dropping`; `keep` then draws which tokens stay. Both depend on nothing but their arguments and the
generator. Texts lose nothing, and neither does a picture in evaluation.

Source: Dehghani et al., Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution, 2023.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vlkern.data.resolution import between


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


class Dropping(Protocol):
    """A way to choose how much of each picture is dropped."""

    def rates(self, lengths: torch.Tensor, seen: int, generator: torch.Generator) -> torch.Tensor:
        """Drop rates of pictures.

        Args:
            lengths: [n] tokens of each picture.
            seen: pictures that the run has seen before.
            generator: of the CPU.

        Returns:
            [n] float64, 0 <= d < 1.
        """


@dataclass(frozen=True)
class Constant:
    """The same `rate` for all pictures.

    Raises:
        ValueError: not 0 <= rate < 1.
    """

    rate: float

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)

    def rates(self, lengths: torch.Tensor, seen: int, generator: torch.Generator) -> torch.Tensor:
        """See `Dropping.rates`."""
        return torch.full((len(lengths),), self.rate, dtype=torch.float64)


@dataclass(frozen=True)
class Beta:
    """d = most * u with u ~ Beta(a, b), of mean m = mean / most and variance 0.3 m (1 - m).

    That is a = m (1 / 0.3 - 1), b = (1 - m) (1 / 0.3 - 1).

    Raises:
        ValueError: not 0 < mean < most < 1.
    """

    mean: float
    most: float

    def __post_init__(self) -> None:
        if not 0 < self.mean < self.most < 1:
            raise ValueError(f"rates must be 0 < mean < most < 1, got mean {self.mean} and most {self.most}")

    def rates(self, lengths: torch.Tensor, seen: int, generator: torch.Generator) -> torch.Tensor:
        """See `Dropping.rates`."""
        mean = self.mean / self.most
        concentration = 1 / 0.3 - 1
        return self.most * _beta(len(lengths), mean * concentration, (1 - mean) * concentration, generator)


def _beta(count: int, a: float, b: float, generator: torch.Generator) -> torch.Tensor:
    """Jöhnk: x = U^(1/a), y = V^(1/b), drawn until x + y <= 1; then x / (x + y) is Beta(a, b). [count] float64.

    With a + b = 7/3 at least four draws in ten are taken.
    """
    result = torch.empty(count, dtype=torch.float64)
    left = torch.arange(count)
    while len(left):
        u, v = torch.rand(2, len(left), generator=generator, dtype=torch.float64)
        x, y = u ** (1 / a), v ** (1 / b)
        taken = (x + y <= 1) & (x + y > 0)
        result[left[taken]] = (x / (x + y))[taken]
        left = left[~taken]
    return result


@dataclass(frozen=True)
class ByLength:
    """More of the longer sequences: d ~ N(mu, std^2) cut at two standard deviations.

    mu is linear in the length, from `low` at `shortest` tokens to `high` at `longest`, and constant beyond. The paper
    gives 0.02 as the second argument of N; here it is the standard deviation.

    Raises:
        ValueError: a rate that is not in [0, 1), a `std` below 0, rates whose two standard deviations leave [0, 1), or
            not 0 < shortest < longest.
    """

    low: float
    high: float
    shortest: int
    longest: int
    std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be at least 0, got {self.std}")
        for name, value in (("low", self.low), ("high", self.high)):
            if not (2 * self.std <= value < 1 - 2 * self.std):
                raise ValueError(
                    f"{name} must be at least {2 * self.std:g} and below {1 - 2 * self.std:g}, two standard deviations "
                    f"within [0, 1), got {value}"
                )
        if not 0 < self.shortest < self.longest:
            raise ValueError(f"lengths must be 0 < shortest < longest, got {self.shortest} and {self.longest}")

    def rates(self, lengths: torch.Tensor, seen: int, generator: torch.Generator) -> torch.Tensor:
        """See `Dropping.rates`."""
        place = (lengths.double() - self.shortest) / (self.longest - self.shortest)
        mu = self.low + (self.high - self.low) * place.clamp(0, 1)
        uniform = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        return mu + self.std * between(uniform, -2.0, 2.0, 0.0, 1.0)


@dataclass(frozen=True)
class BySeen:
    """The same rate for all pictures, that changes with the number of pictures seen.

        d = low + (high - low) sigmoid((seen - middle) / tau)

    A negative `tau` starts at `high` and ends at `low`, which helps; a rising rate hurts.

    Raises:
        ValueError: not 0 <= low <= high < 1, or tau is 0 or not finite.
    """

    middle: float
    tau: float
    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"rates must be 0 <= low <= high < 1, got low {self.low} and high {self.high}")
        if not self.tau or not math.isfinite(self.tau) or not math.isfinite(self.middle):
            raise ValueError(f"middle and tau must be finite and tau not 0, got {self.middle} and {self.tau}")

    def rates(self, lengths: torch.Tensor, seen: int, generator: torch.Generator) -> torch.Tensor:
        """See `Dropping.rates`."""
        place = torch.tensor((seen - self.middle) / self.tau, dtype=torch.float64).sigmoid()
        return (self.low + (self.high - self.low) * place).expand(len(lengths))


class Kept(NamedTuple):
    """What is left of n pictures that lie side by side.

    numbers     [K] int64, the tokens that stay, rising
    cu_seqlens  [n + 1] int32, where each picture now begins, and the end
    """

    numbers: torch.Tensor
    cu_seqlens: torch.Tensor


def keep(lengths: torch.Tensor, rates: torch.Tensor, generator: torch.Generator) -> Kept:
    """Drop round(d N) of the N tokens of each picture, any as likely as any other; one stays at least.

    Args:
        lengths: [n] integers, tokens of each picture, which lie side by side.
        rates: [n] floating point, 0 <= d < 1.
        generator: of the CPU.

    Raises:
        ValueError: shapes differ, a length is below 1 or a rate outside of [0, 1).
        TypeError: lengths are no integers.

    Example:
        >>> kept = keep(torch.tensor([4, 6]), torch.tensor([0.5, 0.0]), torch.Generator().manual_seed(0))
        >>> kept.numbers.tolist(), kept.cu_seqlens.tolist()
        ([1, 2, 4, 5, 6, 7, 8, 9], [0, 2, 8])
    """
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape != rates.shape:
        raise ValueError(f"lengths and rates must have shape [n], got {list(lengths.shape)} and {list(rates.shape)}")
    if bool((lengths < 1).any()):
        raise ValueError(f"lengths must be at least 1, got {int(lengths.min())}")
    if not bool(((rates >= 0) & (rates < 1)).all()):
        raise ValueError(f"rates must be at least 0 and below 1, got {rates[~((rates >= 0) & (rates < 1))][0].item()}")
    lengths = lengths.long()
    dropped = torch.floor(rates.double() * lengths + 0.5).long()
    stay = (lengths - dropped).clamp(min=1)
    starts = lengths.cumsum(0) - lengths
    picture = torch.arange(len(lengths)).repeat_interleave(lengths)
    # Shuffled inside of each picture: a stable sort by picture of tokens in random order.
    shuffled = torch.rand(len(picture), generator=generator, dtype=torch.float64).argsort()
    shuffled = shuffled[picture[shuffled].argsort(stable=True)]
    first = torch.arange(len(picture)) - starts[picture] < stay[picture]
    cu_seqlens = torch.cat([stay.new_zeros(1), stay.cumsum(0)]).int()
    return Kept(shuffled[first].sort().values, cu_seqlens)
