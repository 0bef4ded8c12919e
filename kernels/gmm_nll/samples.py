"""Shapes on which gmm_nll is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch

from vlkern.kernels.gmm_nll import reference


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
    Sample("below_a_vector", (2, 2), 5, 7),
    Sample("strided", (2,), 6, 8, contiguous=False),
    Sample("several_blocks", (2,), 200, 32),
    Sample("per_channel_below_a_vector", (3,), 1, 5, "per_channel"),
    Sample("per_channel", (5,), 11, 24, "per_channel"),
    Sample("above_a_vector", (3,), 17, 33),
    Sample("jetformer", (64,), 1024, 128, bench=True),
    Sample("givt", (4096,), 16, 32, bench=True),
    Sample("givt_per_channel", (4096,), 16, 32, "per_channel", bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device.

    As a trained model's: the target lies near some components and far from others, scales are around one.
    """
    g = torch.Generator().manual_seed(seed)
    width = sample.k * ((1 + 2 * sample.d) if sample.layout == "joint" else 3 * sample.d)
    wide = torch.float64 if width < 1 << 16 else torch.float32
    params = torch.randn(*sample.shape, width, generator=g, dtype=wide)
    target = 2 * torch.randn(*sample.shape, sample.d, generator=g, dtype=wide)
    if not sample.contiguous:
        params, target = params.t().contiguous().t(), target.t().contiguous().t()
    kwargs = {} if sample.layout == "joint" else {"layout": sample.layout}
    return (params.to(device, dtype), target.to(device, dtype)), kwargs


def work(params: torch.Tensor, target: torch.Tensor) -> dict[str, int]:
    """The forward: about 10 FLOPs a parameter, which is read once. The backward reads it again, writes its gradient."""
    return {"flops": 10 * params.numel(), "bytes": params.nbytes + target.nbytes + 4 * params.shape[0]}


def magnitudes(
    grad: torch.Tensor, params: torch.Tensor, target: torch.Tensor, *, layout: str = "joint", min_scale: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each gradient what its rounding errors are proportional to.

    A share is the exponential of a difference of log weights: it has as many roundings as these have units.
    """
    d = target.shape[-1]
    rows, points, joint = params.reshape(-1, params.shape[-1]).double(), target.reshape(-1, d), layout == "joint"
    t = reference.Terms(rows, points, joint, min_scale)
    share, prior = t.log_weights.softmax(-1), t.logits.softmax(-1)
    terms = t.logits.abs() + (t.u.square() + t.inverse.log().abs() + 1).sum(-1)
    terms = 1 + terms + (share * terms).sum(-1, keepdim=True)
    g = grad.double().abs().reshape(share.shape[:-1])[..., None]
    pull = (g * share * terms)[..., None] * t.u.abs() * t.inverse
    raw = (g * share * terms)[..., None] * (1 + t.u.square()) / t.h
    of_logits = g * (prior + share * terms)
    if joint:
        parts, of_target = [of_logits, torch.stack([pull, raw], 2).flatten(1)], pull.sum(1)
    else:
        parts, of_target = [part.flatten(1) for part in (of_logits, pull, raw)], pull.sum((-2, -1))
    return torch.cat(parts, 1).reshape(params.shape), of_target.reshape(target.shape)
