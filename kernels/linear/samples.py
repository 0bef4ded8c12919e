"""Shapes on which the linear layer is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """x [*lead, k] times weight [n, k]."""

    name: str
    lead: tuple[int, ...]
    k: int
    n: int
    gelu: bool = True
    bias: bool = True
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 8, 8),
    Sample("one", (1,), 1, 1),
    Sample("vector", (), 5, 7),
    Sample("below_a_tile", (3,), 15, 31, gelu=False),
    Sample("above_a_tile", (2, 9), 33, 65),
    Sample("no_bias", (40,), 24, 48, bias=False),
    Sample("transposed", (33,), 48, 20, contiguous=False),
    Sample("several_chunks", (5, 211), 40, 72),
    Sample("few_rows", (7,), 81, 70),
    Sample("gemma3_270m_head", (1,), 640, 1 << 18, gelu=False, bias=False, bench=True),
    Sample("gemma3_270m_mlp", (4,), 640, 2048, gelu=False, bias=False, bench=True),
    Sample("siglip_tiny_fc1", (512, 16), 192, 768, bench=True),
    Sample("siglip_b16_fc1", (8, 196), 768, 3072, bench=True),
    Sample("siglip_b16_fc2", (8, 196), 3072, 768, gelu=False, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*sample.lead, sample.k, generator=g, dtype=torch.float64)
    weight = torch.randn(sample.n, sample.k, generator=g, dtype=torch.float64) * sample.k**-0.5
    bias = torch.randn(sample.n, generator=g, dtype=torch.float64)
    if not sample.contiguous:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    args = [t.to(device, dtype) for t in ((x, weight, bias) if sample.bias else (x, weight))]
    return tuple(args), {"activation": "gelu_tanh"} if sample.gelu else {}


def work(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> dict[str, int]:
    """The forward: 2 M N K FLOPs; x and weight are read, y is written. The backward does twice as many FLOPs."""
    rows, (n, k) = x.numel() // weight.shape[1], weight.shape
    return {
        "flops": max(2 * rows * n * k, x.numel()),
        "bytes": x.nbytes + weight.nbytes + rows * n * x.element_size(),
    }


def magnitudes(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor | None, ...]:
    """For each gradient the sum of |terms|, to which rounding errors are proportional; GELU's slope is below 1.13."""
    g, wide = 1.13 * grad.double().abs().view(-1, len(weight)), x.double().abs().reshape(-1, weight.shape[1])
    dx = (g @ weight.double().abs()).view(x.shape)
    return (dx, g.T @ wide, g.sum(0)) if bias is not None else (dx, g.T @ wide)
