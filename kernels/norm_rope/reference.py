"""RMS norm of every head, then rotary position embedding, in plain PyTorch: the definition."""

import torch


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _turn(h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (j, j + C / 2) of every head; minus sin turns back. h [T, H, C], cos and sin [T, C / 2]."""
    a, b = h.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def norm_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H, C], cos and sin [T, C / 2], weight [C] -> y [T, H, C] in x's dtype, rstd [T, H] ([0] without weight)."""
    wide = _wide(x)
    if weight is None:
        return _turn(wide, cos, sin).to(x.dtype), wide.new_empty(0)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    h = wide * rstd[..., None] * (offset + weight)
    return _turn(h, cos, sin).to(x.dtype), rstd


def norm_rope_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(y * grad): dx [T, H, C] in x's dtype, dweight [C] in weight's ([0] without weight)."""
    g = _turn(_wide(grad), cos, -sin)
    if weight is None:
        return g.to(x.dtype), g.new_empty(0)
    r = rstd[..., None]
    h = _wide(x) * r
    u = g * (offset + weight)
    dx = r * (u - h * (u * h).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * h).sum((0, 1))


def angle_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of cos and sin, [T, C / 2] each: for models that learn their frequencies. On every backend this one."""
    g, h = _wide(grad), _wide(x)
    if weight is not None:
        h = h * rstd[..., None] * (offset + weight)
    (g1, g2), (h1, h2) = g.chunk(2, -1), h.chunk(2, -1)
    return (g1 * h1 + g2 * h2).sum(1), (g2 * h1 - g1 * h2).sum(1)
