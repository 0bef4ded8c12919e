"""Probabilities as whole numbers: rows of cumulative frequencies, and those of Gaussians of many scales."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlkern import _checks
from vlkern._native import host

#: The scales of the usual Gaussian tables: 64, from 0.11 to 256 in equal steps of their logarithm.
SCALES = tuple(math.exp(math.log(0.11) + i / 63 * (math.log(256) - math.log(0.11))) for i in range(64))

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Tables:
    """R rows of integer cumulative frequencies.

    Bin j of row r stands for the symbol offset[r] + j; its probability is (cdf[r, j + 1] - cdf[r, j]) / 2^precision.

    cdf        [R, W] int32; a row rises strictly from 0 to 2^precision, and what lies behind its end is not read
    size       [R] int32: entries of each row, one more than it has bins
    offset     [R] int32: the symbol of each row's first bin
    escape     whether the last bin of every row stands for all other symbols, which then cost 8 to 40 bits more
    precision  bits of the frequencies, at most 16 for states of 32 bits and at most 30 for those of 64

    All of them stay on the device of cdf.

    Raises:
        TypeError: an argument is no int32 tensor.
        ValueError: shapes do not fit, a size is out of range, or a row does not rise from 0 to 2^precision.

    Example:
        >>> size, offset = torch.tensor([[3], [0]], dtype=torch.int32)
        >>> tables = Tables(torch.tensor([[0, 49152, 65536]], dtype=torch.int32), size, offset, escape=False)
    """

    cdf: torch.Tensor
    size: torch.Tensor
    offset: torch.Tensor
    escape: bool = True
    precision: int = 16

    def __post_init__(self) -> None:
        for name in ("cdf", "size", "offset"):
            if _checks.tensor(name, getattr(self, name)).dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {getattr(self, name).dtype}")
            object.__setattr__(self, name, getattr(self, name).to(self.cdf.device).contiguous())
        if self.cdf.dim() != 2:
            raise ValueError(f"cdf must have shape [R, W], got {list(self.cdf.shape)}")
        for name in ("size", "offset"):
            _checks.shape(name, getattr(self, name), (len(self.cdf),))
        if not 1 <= self.precision <= 30:
            raise ValueError(f"precision must be from 1 to 30, got {self.precision}")
        if not len(self.cdf):
            return
        least = 3 if self.escape else 2
        if bool(((self.size < least) | (self.size > self.cdf.shape[1])).any()):
            raise ValueError(f"size must be from {least} to the {self.cdf.shape[1]} entries of a row")
        inside = torch.arange(1, self.cdf.shape[1], device=self.cdf.device) < self.size[:, None]
        ends = self.cdf.gather(1, self.size[:, None].long() - 1)[:, 0]
        if bool(
            ((self.cdf.diff(dim=1) <= 0) & inside).any() or self.cdf[:, 0].any() or (ends != 1 << self.precision).any()
        ):
            raise ValueError("cdf must have rows that rise strictly from 0 to 2^precision")

    @functools.cached_property
    def native(self) -> Any:
        """As the coder takes them."""
        return host().RansTables(*(part.numpy() for part in self.on(_CPU)), self.escape, self.precision)

    @functools.cached_property
    def _copies(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """cdf, size and offset on a device; what was copied there is kept."""
        if device not in self._copies:
            self._copies[device] = self.cdf.to(device), self.size.to(device), self.offset.to(device)
        return self._copies[device]


def _cumulative(pmf: torch.Tensor, precision: int) -> torch.Tensor:
    """Probabilities [n] float64 -> [n + 1] int64, strictly rising from 0 to 2^precision."""
    total = 1 << precision
    width = (pmf * total).round().long().clamp(min=1)
    # What is too much or too little goes to the widest bins, one by one: there it costs the fewest bits.
    excess = int(width.sum()) - total
    for _ in range(abs(excess)):
        width[width.argmax()] -= 1 if excess > 0 else -1
    return torch.cat([width.new_zeros(1), width.cumsum(0)])


def tables_from_pmfs(
    pmfs: Sequence[Any], offset: Sequence[int] | torch.Tensor, *, escape: bool = True, precision: int = 16
) -> Tables:
    """Tables of given probabilities.

    Args:
        pmfs: for each row the probabilities of its bins, numbers or a tensor; with `escape` the last one is that of all
            other symbols. They are made to sum to 1; a bin whose share is below 2^-precision gets that much.
        offset: the symbol of each row's first bin.
        escape, precision: see `Tables`.

    Raises:
        ValueError: there is no row, a row has a negative probability, none at all, or more bins than 2^precision.

    Example:
        >>> tables_from_pmfs([[0.5, 0.25, 0.125, 0.125]], [0], escape=False).cdf.tolist()
        [[0, 32768, 49152, 57344, 65536]]
    """
    if not len(pmfs):
        raise ValueError("pmfs must hold at least one row, got none")
    rows = []
    for number, given in enumerate(pmfs):
        pmf = torch.as_tensor(given, dtype=torch.float64).cpu()
        if pmf.dim() != 1 or not bool((pmf >= 0).all()) or not 0 < float(pmf.sum()) < math.inf:
            raise ValueError(
                f"pmfs must be rows of probabilities with a sum above 0, got another thing as row {number}"
            )
        if not 1 <= len(pmf) <= 1 << precision:
            raise ValueError(f"pmfs must have at most 2^{precision} bins a row, got {len(pmf)} in row {number}")
        rows.append(_cumulative(pmf / pmf.sum(), precision).int())
    size = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    cdf = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Tables(cdf, size, torch.as_tensor(offset, dtype=torch.int32), escape, precision)


def gaussian_tables(scales: Sequence[float] = SCALES, *, tail_mass: float = 1e-9, precision: int = 16) -> Tables:
    """A row for each of some Gaussians around 0: what hyperprior models look up by `scale_index`.

        p(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s),    |k| <= ceil(s z), where the tails beyond z have `tail_mass`

    and the escape has what lies beyond. The rows follow from float64 error functions; where encoder and decoder may run
    on different machines, keep one copy of the tables with the model.

    Args:
        scales: standard deviations s, above 0.
        tail_mass: probability of both tails.
        precision: see `Tables`.

    Raises:
        ValueError: a scale or tail_mass is out of range.

    Source: Balle et al., Variational Image Compression with a Scale Hyperprior, 2018.

    Example:
        >>> tables = gaussian_tables()
        >>> tables.cdf.shape
        torch.Size([64, 3133])
    """
    if not len(scales) or not all(0 < s < math.inf for s in scales):
        raise ValueError("scales must be positive and finite, and at least one")
    if not 0 < tail_mass < 1:
        raise ValueError(f"tail_mass must lie between 0 and 1, got {tail_mass}")
    reach = -float(torch.special.ndtri(torch.tensor(tail_mass / 2, dtype=torch.float64)))
    pmfs, offsets = [], []
    for s in scales:
        most = math.ceil(s * reach)
        k = torch.arange(-most, most + 1, dtype=torch.float64).abs()
        upper, lower = (torch.special.erfc(-(half - k) / (s * math.sqrt(2))) / 2 for half in (0.5, -0.5))
        pmfs.append(torch.cat([upper - lower, 2 * lower[:1]]))
        offsets.append(-most)
    return tables_from_pmfs(pmfs, offsets, precision=precision)


def scale_index(scale: torch.Tensor, scales: Sequence[float] = SCALES) -> torch.Tensor:
    """The row of `gaussian_tables(scales)` for each scale: the smallest s that is at least as large, or the last one.

    Args:
        scale: any shape, floating point; below scales[0] counts as that.
        scales: rising.

    Returns:
        int32 of the same shape.

    Raises:
        TypeError: scale is no floating-point tensor.

    Example:
        >>> scale_index(torch.tensor([0.01, 1.0, 1e9])).tolist()
        [0, 18, 63]
    """
    table = torch.tensor(scales, dtype=torch.float64, device=_checks.floating("scale", scale).device)
    return torch.bucketize(scale.double(), table[:-1]).int()
