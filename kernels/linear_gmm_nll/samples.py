"""Shapes on which linear_gmm_nll is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch

from vlkern.kernels.gmm_nll import samples as mixture


@dataclass(frozen=True)
class Sample:
    """N tokens of the given width and mixtures of k components, d dimensions; `huge` is measured on request only."""

    name: str
    n: int
    width: int
    k: int
    d: int
    layout: str = "joint"
    bias: bool = True
    contiguous: bool = True
    bench: bool = False
    huge: bool = False


SAMPLES = [
    Sample("empty", 0, 4, 3, 2),
    Sample("one", 1, 1, 1, 1),
    Sample("no_bias", 2, 24, 4, 9, bias=False),
    Sample("tiny", 2, 8, 3, 4),
    Sample("per_channel", 9, 12, 5, 6, "per_channel"),
    Sample("strided", 2, 16, 3, 5, contiguous=False),
    Sample("below_a_tile", 3, 15, 5, 7),
    Sample("above_a_tile", 261, 160, 19, 33),
    Sample("givt", 1024, 1024, 16, 16, bench=True),
    Sample("jetformer_an_eighth", 256, 1024, 128, 128, bench=True),
    Sample("jetformer", 1024, 1024, 1024, 128, bench=True, huge=True),
    Sample("jetformer_4096_tokens", 4096, 1024, 1024, 128, bench=True, huge=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    rows = sample.k * ((1 + 2 * sample.d) if sample.layout == "joint" else 3 * sample.d)
    wide = torch.float64 if rows * sample.width < 1 << 20 else torch.float32
    weight = torch.randn(rows, sample.width, generator=g, dtype=wide) * sample.width**-0.5
    hidden = torch.randn(sample.n, sample.width, generator=g, dtype=wide)
    target = 2 * torch.randn(sample.n, sample.d, generator=g, dtype=wide)
    bias = torch.randn(rows, generator=g, dtype=wide).to(device, dtype) if sample.bias else None
    if not sample.contiguous:
        hidden, weight = hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, : sample.width]
    kwargs = {} if sample.layout == "joint" else {"layout": sample.layout}
    return (hidden.to(device, dtype), weight.to(device, dtype), bias, target.to(device, dtype)), kwargs


def work(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> dict[str, int]:
    """Forward and backward: three matmuls of 2 N P D FLOPs; hidden and weight are read, their gradients written."""
    n, (p, width) = hidden.shape[0], weight.shape
    return {"flops": 6 * n * p * width, "bytes": 2 * (hidden.nbytes + weight.nbytes)}


def magnitudes(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    layout: str = "joint",
    min_scale: float = 1e-6,
) -> tuple[torch.Tensor, ...]:
    """For each gradient what its rounding errors are proportional to: the sums of those of the parameters."""
    x, w = hidden.double(), weight.double()
    params = x @ w.T if bias is None else x @ w.T + bias.double()
    g, of_target = mixture.magnitudes(grad, params, target, layout=layout, min_scale=min_scale)
    sums = g @ w.abs(), g.T @ x.abs(), g.sum(0), of_target
    return sums if bias is not None else (*sums[:2], sums[3])
