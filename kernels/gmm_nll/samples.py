"""Shapes on which gmm_nll is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """A mixture of k components and d dimensions for each of `shape` tokens."""

    name: str
    shape: tuple[int, ...]
    k: int
    d: int
    layout: str = "joint"
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 3, 4),
    Sample("one", (1,), 1, 1),
    Sample("below_a_vector", (2, 3), 5, 7),
    Sample("per_channel_below_a_vector", (3,), 1, 5, "per_channel"),
    Sample("strided", (12,), 6, 8, contiguous=False),
    Sample("several_blocks", (2,), 300, 16),
    Sample("per_channel", (5,), 11, 24, "per_channel"),
    Sample("above_a_vector", (9,), 17, 33),
    Sample("jetformer", (64,), 1024, 128, bench=True),
    Sample("givt", (4096,), 16, 32, bench=True),
    Sample("givt_per_channel", (4096,), 16, 32, "per_channel", bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device.

    As a trained model's: the target lies near some components and far from others, scales are around a half.
    """
    g = torch.Generator().manual_seed(seed)
    width = sample.k * ((1 + 2 * sample.d) if sample.layout == "joint" else 3 * sample.d)
    wide = torch.float64 if width < 1 << 16 else torch.float32
    params = torch.randn(*sample.shape, width, generator=g, dtype=wide)
    target = 0.7 * torch.randn(*sample.shape, sample.d, generator=g, dtype=wide)
    if not sample.contiguous:
        params, target = params.t().contiguous().t(), target.t().contiguous().t()
    kwargs = {} if sample.layout == "joint" else {"layout": sample.layout}
    return (params.to(device, dtype), target.to(device, dtype)), kwargs


def work(params: torch.Tensor, target: torch.Tensor) -> dict[str, int]:
    """The forward: about 10 FLOPs a parameter, which is read once. The backward reads it again, writes its gradient."""
    return {"flops": 10 * params.numel(), "bytes": params.nbytes + target.nbytes + 4 * params.shape[0]}
