"""Shapes on which mixture_cdf is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """means, scales, weights [*lead, k, c], rows of `size` symbols."""

    name: str
    lead: tuple[int, ...]
    c: int
    k: int = 3
    size: int = 16
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 5),
    Sample("one", (1,), 1, k=1, size=1),
    Sample("below_a_tile", (3,), 7),
    Sample("above_a_tile", (3,), 23),
    Sample("long_rows", (1,), 3, k=2, size=1024),
    Sample("transposed", (3,), 11, size=31, contiguous=False),
    Sample("m2t_small_step", (24, 21), 192, bench=True),
    Sample("wide_window", (64,), 192, size=128, bench=True),
]


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixtures [..., K, C]: means of a few symbols, all scales, weights of which a third is 0."""
    g = torch.Generator().manual_seed(seed)
    means = (700 * torch.randn(shape, generator=g, dtype=torch.float64)).round().int()
    scales = torch.randint(0, 64, shape, generator=g).to(torch.uint8)
    share = torch.rand(shape, generator=g, dtype=torch.float64) * (torch.rand(shape, generator=g) < 0.67)
    ends = (share.cumsum(-2) / share.sum(-2, keepdim=True).clamp(min=1e-9) * 4096).floor().short()
    ends[..., -1:, :] = 4096
    return means, scales, ends.diff(dim=-2, prepend=torch.zeros_like(ends[..., :1, :]))


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device. They are integers in any dtype."""
    means, scales, weights = draw((*sample.lead, sample.k, sample.c), seed)
    low = ((weights.double() * means).sum(-2) / (256 * 4096)).round().int() - sample.size // 2
    tensors = [t.to(device) for t in (means, scales, weights, low)]
    if not sample.contiguous:
        tensors = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    return (*tensors, sample.size), {}


def work(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, rows: torch.Tensor
) -> dict[str, int]:
    """20 FLOPs a component of an entry; what is read and written once."""
    read = means.nbytes + scales.nbytes + weights.nbytes + low.nbytes
    return {"flops": 20 * rows.numel() * means.shape[-2], "bytes": read + 4 * rows.numel()}
