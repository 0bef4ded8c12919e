"""The rival of mixture_cdf: the definition in lines of PyTorch, on whole numbers of 64 bits."""

import functools
import math

import torch


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi from -513 to 513 steps of 1/64 in 2^-30, flat at both ends, and 64 scales in 2^-8."""
    steps = torch.arange(-513, 514, dtype=torch.float64).clamp(-512, 512) / 64
    phi = (torch.special.ndtr(steps) * 2**30).round().long()
    sigma = (torch.linspace(math.log(0.11), math.log(256), 64, dtype=torch.float64).exp() * 256).round().long()
    return phi.to(device), sigma.to(device)


def mixture_cdf(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, size: int
) -> torch.Tensor:
    """All components of all entries at once."""
    phi, sigma = _tables(means.device)
    j = torch.arange(size + 1, device=means.device)
    k = low.long()[..., None] + j - 1  # [..., C, size + 1]
    num, den = 64 * (256 * k[..., None, :, :] + 128 - means.long()[..., None]), sigma[scales.long()][..., None]
    q = num // den
    at = q.clamp(-513, 512) + 513
    share = torch.where(q.abs() > 512, 0, num - q * den)
    part = phi[at] + (phi[(at + 1).clamp(max=1026)] - phi[at]) * share // den
    below = (weights.long()[..., None] * part).sum(-3) >> 12
    row = ((below - below[..., :1]) * (65535 - size) >> 30) + j
    return torch.nn.functional.pad(row, (0, 1), value=65536).int()
