"""RMS normalisation in plain PyTorch: the definition."""

import torch


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N], weight [N] -> y [..., N] in x's dtype, rstd [...] in float32 (float64 for float64)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1) * (offset + weight)
    return y.to(x.dtype).contiguous(), rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(y * grad): dx [..., N] in x's dtype, dweight [N] in weight's."""
    g, r = _wide(grad), rstd.unsqueeze(-1)
    h = _wide(x) * r
    u = g * (offset + weight)
    dx = r * (u - h * (u * h).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), (g * h).reshape(-1, x.shape[-1]).sum(0)
