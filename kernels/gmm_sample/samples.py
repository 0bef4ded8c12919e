"""Shapes on which gmm_sample is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """Parameters of `k` components of `d` dimensions for tokens [*lead]."""

    name: str
    lead: tuple[int, ...]
    k: int
    d: int
    joint: bool = True
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 2, 3),
    Sample("one", (1,), 1, 1),
    Sample("below_a_vector", (3,), 7, 5),
    Sample("above_a_vector", (2, 5), 17, 9),
    Sample("above_a_tile", (3,), 130, 33),
    Sample("per_channel", (5,), 3, 4, joint=False),
    Sample("more_per_channel", (9,), 19, 6, joint=False),
    Sample("transposed", (6,), 4, 3, contiguous=False),
    Sample("another_size", (6,), 9, 5),
    Sample("givt_default", (1, 256), 16, 16, bench=True),
    Sample("givt_32_images", (32, 256), 16, 16, bench=True),
    Sample("jetformer_step", (64,), 1024, 128, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call, with the noise in hand; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    k, d = sample.k, sample.d
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = torch.randn(*sample.lead, k * (1 + 2 * d) if sample.joint else 3 * k * d, generator=g, dtype=torch.float64)
    if not sample.contiguous:
        params = params.t().contiguous().t()
    uniform = torch.rand(*sample.lead, *[d] * (not sample.joint), generator=g)
    eps = torch.randn(*sample.lead, d, generator=g)
    options = {"dims": d} if sample.joint else {"dims": d, "layout": "per_channel"}
    return (params.to(device, dtype),), {**options, "noise": (uniform.to(device, wide), eps.to(device, wide))}


def work(params: torch.Tensor, uniform: torch.Tensor, eps: torch.Tensor) -> dict[str, int]:
    """About 15 FLOPs a logit, 20 an element of z. Of the parameters a draw reads the logits and one component."""
    n, d = eps.shape
    logits = params.numel() // (3 if uniform.dim() == 2 else 1 + 2 * d)
    read = (logits + 2 * n * d) * params.element_size() + uniform.nbytes
    return {"flops": 15 * logits + 20 * n * d, "bytes": read + 2 * eps.nbytes}
