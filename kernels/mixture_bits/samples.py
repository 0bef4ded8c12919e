"""Shapes on which mixture_bits is tested, measured and tuned; names say where they come from."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from vlkern.kernels.mixture_bits import reference


@dataclass(frozen=True)
class Sample:
    """Mixtures of k components for `shape` tokens of `channels` symbols."""

    name: str
    shape: tuple[int, ...]
    k: int
    channels: int
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), 3, 8),
    Sample("one", (1,), 1, 1),
    Sample("below_a_vector", (2, 2), 3, 5),
    Sample("strided", (3,), 2, 24, contiguous=False),
    Sample("above_a_vector", (2,), 3, 33),
    Sample("above_a_block", (4,), 3, 67),
    Sample("m2t_four_tiles", (2304,), 3, 192, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device.

    As a trained model's: noisy symbols within four scales of some component, most scales around one.
    """
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if math.prod(sample.shape) < 64 else torch.float32
    shape = (*sample.shape, sample.k, sample.channels)
    logits, means, raw, noise = torch.randn(4, *shape, generator=g, dtype=wide).unbind()
    params = torch.stack([logits, 3 * means, (1.2 * raw).clamp(-2.1, 5.4)], -3).to(dtype)
    noise = noise[..., 0, :].clamp(-4, 4) * params[..., 2, 0, :].to(wide).exp() + torch.rand(1, generator=g, dtype=wide)
    symbols = (params[..., 1, 0, :].to(wide) + noise).to(dtype)
    if not sample.contiguous:
        symbols, params = symbols.mT.contiguous().mT, params.mT.contiguous().mT
    return (symbols.to(device), params.to(device)), {}


def work(symbols: torch.Tensor, params: torch.Tensor) -> dict[str, int]:
    """The forward: about 40 FLOPs a parameter, which is read once. The backward reads it again, writes its gradient."""
    return {"flops": 40 * params.numel(), "bytes": params.nbytes + symbols.nbytes + 4 * symbols.numel()}


def magnitudes(grad: torch.Tensor, symbols: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each gradient what its rounding errors are proportional to.

    A share is the exponential of a difference of log weights: it has as many roundings as these have units.
    """
    c = symbols.shape[-1]
    t = reference.Terms(symbols.reshape(-1, c).double(), params.reshape(-1, *params.shape[-3:]).double())
    share = t.log_shares.softmax(1)
    terms = 1 + t.log_weights.abs() + t.b.square()
    terms = terms + (share * terms).sum(1, keepdim=True)
    g = 1.5 * grad.double().abs().reshape(-1, 1, c)
    pull = g * share * terms * (1 + t.b) * t.inverse
    of_params = torch.stack(
        [g * (t.log_weights.exp() + share * terms), pull, g * share * terms * (1 + t.b.square())], 1
    )
    return pull.sum(1).reshape(symbols.shape), of_params.reshape(params.shape)
