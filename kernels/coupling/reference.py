"""Affine couplings in plain PyTorch: the definition."""

import math

import torch
import torch.nn.functional as F


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _scale(raw: torch.Tensor, max_scale: float) -> torch.Tensor:
    """A scale below e^-87 would be none that float32 can undo."""
    return max_scale * torch.sigmoid(raw.clamp(min=-87.0))


def part(x: torch.Tensor, tokens: torch.Tensor | None, channels: torch.Tensor | None) -> torch.Tensor:
    """x[:, tokens][:, :, channels], None = all."""
    if tokens is not None:
        x = x.index_select(1, tokens)
    return x if channels is None else x.index_select(2, channels)


def with_part(
    x: torch.Tensor, tokens: torch.Tensor | None, channels: torch.Tensor | None, value: torch.Tensor
) -> torch.Tensor:
    """x with `value` in the place of part(x, tokens, channels)."""
    if tokens is None and channels is None:
        return value.clone(memory_format=torch.contiguous_format)
    if channels is not None:
        rows = x if tokens is None else x.index_select(1, tokens)
        value = rows.index_copy(2, channels.long(), value)
    return (value if tokens is None else x.index_copy(1, tokens.long(), value)).contiguous()


def _sum(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(1).sum(1)


def affine_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, N, K], shift and raw [B, n, k] -> y [B, N, K] in x's dtype, logdet [B] in float32 (float64 for float64)."""
    wide = _wide(raw)
    y2 = (_wide(part(x, tokens, channels)) + _wide(shift)) * _scale(wide, max_scale)
    return with_part(x, tokens, channels, y2.to(x.dtype)), _sum(F.logsigmoid(wide) + math.log(max_scale))


def affine_coupling_part(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As affine_coupling, with the part of y that changed, [B, n, k], for the backward."""
    y, logdet = affine_coupling(x, shift, raw, tokens, channels, max_scale)
    return y, logdet, part(y, tokens, channels)


def affine_coupling_inverse(
    y: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The x of affine_coupling, and minus its logdet."""
    wide = _wide(raw)
    x2 = _wide(part(y, tokens, channels)) / _scale(wide, max_scale) - _wide(shift)
    return with_part(y, tokens, channels, x2.to(y.dtype)), -_sum(F.logsigmoid(wide) + math.log(max_scale))


def affine_coupling_backward(
    grad: torch.Tensor, grad_logdet: torch.Tensor, y: torch.Tensor, raw: torch.Tensor, max_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(y * grad) + sum(logdet * grad_logdet) where all of x changes: dx = dshift, draw [B, ...]."""
    g, wide = _wide(grad), _wide(raw)
    dx = g * _scale(wide, max_scale)
    of_logdet = _wide(grad_logdet).view(-1, *[1] * (raw.dim() - 1))
    draw = (g * _wide(y) + of_logdet) * torch.sigmoid(-wide)
    return dx.to(grad.dtype).contiguous(), draw.to(raw.dtype).contiguous()


def affine_coupling_part_backward(
    grad: torch.Tensor,
    grad_logdet: torch.Tensor,
    y2: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Likewise where a part changes: dx [B, N, K], dshift and draw [B, n, k]."""
    dshift, draw = affine_coupling_backward(part(grad, tokens, channels), grad_logdet, y2, raw, max_scale)
    return with_part(grad, tokens, channels, dshift), dshift, draw
