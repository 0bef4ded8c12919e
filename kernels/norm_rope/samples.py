"""Shapes on which norm_rope is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """x [t, h, c]; contiguous=False: as a fused projection leaves it."""

    name: str
    t: int
    h: int
    c: int
    norm: bool = True
    offset: float = 1.0
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", 0, 2, 8),
    Sample("one", 1, 1, 2, offset=0.0),
    Sample("below_a_vector", 3, 2, 30),
    Sample("above_a_tile", 33, 2, 34, norm=False),
    Sample("part_of_a_projection", 7, 3, 24, contiguous=False),
    Sample("gemma3_270m", 5, 4, 256),
    Sample("gemma3_270m_2k", 2048, 4, 256, bench=True),
    Sample("gemma3_4b_2k", 2048, 8, 256, bench=True),
    Sample("gemma2_2b_2k", 2048, 8, 256, norm=False, bench=True),
]


def angles(positions: torch.Tensor, c: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, c / 2] for heads of this dtype, base 10000."""
    theta = 10000.0 ** (torch.arange(0, c, 2, dtype=torch.float64) / -c)
    turned = positions.double()[:, None] * theta
    wide = torch.promote_types(dtype, torch.float32)
    return turned.cos().to(wide), turned.sin().to(wide)


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sample.t, sample.h + (0 if sample.contiguous else 2), sample.c, generator=g)
    x = x.to(device, dtype)[:, : sample.h]
    weight = torch.randn(sample.c, generator=g).to(device, dtype) if sample.norm else None
    cos, sin = angles(torch.arange(sample.t), sample.c, dtype)
    # By name: benchmarks ask for the gradients of positional arguments, and angles seldom need one.
    return (x,), {"cos": cos.to(device), "sin": sin.to(device), "weight": weight, "offset": sample.offset}


def work(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weight: torch.Tensor) -> dict[str, int]:
    """The forward: 3 FLOPs an element for the rotation, 4 for the norm; x is read and y written once."""
    return {
        "flops": (7 if weight else 3) * x.numel(),
        "bytes": 2 * x.numel() * x.element_size() + (cos.numel() + sin.numel() + sum(w.numel() for w in weight)) * 4,
    }
