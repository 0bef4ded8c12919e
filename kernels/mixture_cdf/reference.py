"""Cumulative probabilities of mixtures in whole numbers, in plain PyTorch: the definition."""

import torch

from vlkern.kernels.mixture_cdf.table import HALVES, ONE, REACH, STEPS, TOTAL, constant


def mixture_window(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """means int32, scales uint8, weights int16 [..., K, C] -> low, half int32 [..., C].

    The symbols low ... low + 2 half - 1 end half a symbol short of 256 half right of the centre: see README.md.
    """
    mean, weight = means.long(), weights.long()
    sigma = constant("sigma", torch.int64, means)[scales.long()]
    centre = (((weight * mean).sum(-2) >> 12) + 128) >> 8
    reach = ((mean - 256 * centre[..., None, :]).abs() + 6 * sigma).masked_fill(weight == 0, 0).amax(-2)
    half = torch.full_like(centre, HALVES[0])
    for h in HALVES[:-1]:
        half = torch.where(reach > 256 * h, 2 * h, half)
    return (centre - half).int(), half.int()


def _phi(num: torch.Tensor, den: torch.Tensor) -> torch.Tensor:
    """2^30 Phi(num / den), between the 64 steps of a standard deviation by straight lines, rounded down."""
    table = constant("phi", torch.int64, num)
    q = torch.div(STEPS * num, den, rounding_mode="floor")
    r = STEPS * num - q * den
    last = STEPS * REACH
    at = q.clamp(-last, last - 1) + last
    inside = table[at] + (table[at + 1] - table[at]) * r // den
    return inside.masked_fill(q < -last, 0).masked_fill(q >= last, ONE)


def mixture_cdf(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, size: int
) -> torch.Tensor:
    """The same, low int32 [..., C] -> rows of size bins and an escape, int32 [..., C, size + 2]."""
    sigma = constant("sigma", torch.int64, means)[scales.long()]
    j = torch.arange(size + 1, device=means.device)
    edge = 256 * (low[..., None].long() + j - 1) + 128
    total = torch.zeros_like(edge)
    for mean, den, weight in zip(means.unbind(-2), sigma.unbind(-2), weights.unbind(-2), strict=True):
        total += weight[..., None] * _phi(edge - mean[..., None], den[..., None])
    below = total >> 12
    row = ((below - below[..., :1]) * (TOTAL - (size + 1)) >> 30) + j
    return torch.cat([row, torch.full_like(row[..., :1], TOTAL)], -1).int()
