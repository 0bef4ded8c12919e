"""Shapes on which rms_norm is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """x [*lead, n]."""

    name: str
    lead: tuple[int, ...]
    n: int
    offset: float = 0.0
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 8),
    Sample("one", (1,), 1),
    Sample("below_a_vector", (3,), 15),
    Sample("above_a_vector", (2, 5), 17, offset=1.0),
    Sample("below_a_block", (63,), 127),
    Sample("above_a_block", (65,), 129),
    Sample("transposed", (33,), 48, contiguous=False),
    Sample("gemma3_270m_qk_norm", (7, 4), 256, offset=1.0),
    Sample("gemma3_270m", (2048,), 640, offset=1.0, bench=True),
    Sample("so400m_wide", (8192,), 1152, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*sample.lead, sample.n, generator=g, dtype=torch.float64)
    if not sample.contiguous:
        x = x.t().contiguous().t()
    weight = torch.randn(sample.n, generator=g, dtype=torch.float64)
    return (x.to(device, dtype), weight.to(device, dtype)), {"offset": sample.offset}


def work(x: torch.Tensor, weight: torch.Tensor) -> dict[str, int]:
    """The forward: 4 FLOPs an element; x is read and y written once. The backward moves half as much again."""
    return {"flops": 4 * x.numel(), "bytes": 2 * x.numel() * x.element_size() + weight.numel() * 4}
