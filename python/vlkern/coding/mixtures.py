"""Mixtures of Gaussians as whole numbers: what a coder is told of each symbol."""

from typing import NamedTuple

import torch

from vlkern import _checks
from vlkern._native import host


class Mixtures(NamedTuple):
    """A mixture of K Gaussians for each of the symbols [..., C], as `vlkern.ops.mixture_cdf` takes it.

    means    [..., K, C] int32, in 1/256, at most 2^23 in size
    scales   [..., K, C] uint8, of 64 standard deviations from 0.11 to 256 in equal steps of their logarithms (`SCALES`)
    weights  [..., K, C] int16, at least 0, their sum over K 4096
    """

    means: torch.Tensor
    scales: torch.Tensor
    weights: torch.Tensor


def quantize_mixture(params: torch.Tensor, *, threads: int | None = None) -> Mixtures:
    """What a network says of mixtures, rounded to whole numbers.

    Weights are softmax(logits) 4096, rounded by largest remainders (of equal ones the first component's), means are
    rounded to 1/256 and clamped to +-2^15, scales to the nearest of 64 by their logarithms. The nearest, not the next
    larger one: half a step off costs a quarter of the bits that a step costs, and the narrow Gaussians of nearly sure
    symbols, of which there are most, would all be made wider.

    The same parameters give the same integers on every machine, but parameters seldom are: where encoder and decoder
    may differ in a single rounding of the network, its output has to be integers itself.

    Args:
        params: [..., 3, K, C], floating point (rounded to float32): logits, means, and the logarithms of the scales,
            which are clamped to log 0.11 and log 256. On a GPU, they are copied from there.
        threads: at most so many; None is PyTorch's number.

    Returns:
        Tensors [..., K, C] on the CPU.

    Raises:
        TypeError: params is no floating-point tensor.
        ValueError: it has another shape, K is 0, a parameter is NaN or infinite, or threads is below 1.

    Example:
        >>> params = torch.tensor([[[0.0], [0.0], [-40.0]], [[0.5], [-1.0], [0.0]], [[0.0], [1.0], [9.0]]])
        >>> mixtures = vlkern.coding.quantize_mixture(params)
        >>> [part.flatten().tolist() for part in mixtures]
        [[128, -256, 0], [18, 26, 63], [2048, 2048, 0]]
    """
    if _checks.floating("params", params).dim() < 3 or params.shape[-3] != 3 or params.shape[-2] == 0:
        raise ValueError(f"params must have shape [..., 3, K, C] with at least one component, got {list(params.shape)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    shape = (*params.shape[:-3], *params.shape[-2:])
    given = params.detach().to("cpu", torch.float32).contiguous()
    found = Mixtures(*(torch.empty(shape, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.int16)))
    if not given.numel():
        return found
    points = given.view(-1, *given.shape[-3:])
    arrays = (part.view(-1, *shape[-2:]).numpy() for part in found)
    if not host().quantize_mixture(points.numpy(), *arrays, threads or torch.get_num_threads()):
        raise ValueError("params must be finite, got NaN or infinity")
    return found
