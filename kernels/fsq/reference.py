"""Finite scalar quantization in plain PyTorch: the definition."""

import torch

from vlkern.kernels.fsq.table import code_fraction


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def fsq_quantize(
    z: torch.Tensor, thresholds: torch.Tensor, levels: list[int], symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [..., d], thresholds [sum of L - 1] -> codes [..., d] in z's dtype, indices [...] int64."""
    wide = _wide(z)
    codes, index, stride = [], torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device), 1
    for c, (level, reach) in enumerate(zip(levels, thresholds.split([n - 1 for n in levels]), strict=True)):
        x = wide[..., c].contiguous()
        digit = torch.bucketize(x, reach.to(x.dtype), right=True)
        a, b, divisor = code_fraction(level, symmetric)
        codes.append(torch.where(x.isnan(), x, (a * digit - b).to(x.dtype) / divisor))
        index, stride = index + stride * digit, stride * level
    return torch.stack(codes, -1).to(z.dtype), index.masked_fill(z.isnan().any(-1), -1)


def fsq_quantize_backward(grad: torch.Tensor, z: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Gradient of sum(codes * grad), past the rounding: dz [..., d] in z's dtype. slopes [2, d]: shift and gain."""
    shift, gain = slopes
    decay = torch.exp(-2 * (_wide(z) + shift).abs())  # 1 - tanh^2 would cancel
    return (_wide(grad) * gain * (4 * decay / (1 + decay).square())).to(z.dtype).contiguous()


def fsq_dequantize(codes: torch.Tensor, indices: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """codes [sum of L] of every channel's digits, indices [...] int64 -> [..., d] in codes' dtype; NaN out of range."""
    found, rest = [], indices
    for level, table in zip(levels, codes.split(levels), strict=True):
        found.append(table[rest % level])
        rest = torch.div(rest, level, rounding_mode="floor")
    return torch.stack(found, -1).masked_fill((rest != 0)[..., None], torch.nan)
