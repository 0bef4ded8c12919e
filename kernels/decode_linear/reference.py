"""Linear layers of a step of decoding, with what stands around them, in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (offset + weight.to(wide.dtype))).to(x.dtype)


def decode_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    before: torch.Tensor | None,
    geglu: bool,
    after: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    offset: float,
) -> torch.Tensor:
    """x [M, K], weights [N_i, K], before [K], after [N], residual [M, N] -> [M, N]."""
    u = _norm(x, before, eps, offset)
    parts = [F.linear(u, weight) for weight in weights]
    y = F.gelu(parts[0], approximate="tanh") * parts[1] if geglu else torch.cat(parts, -1)
    y = _norm(y, after, eps, offset)
    return y if residual is None else (residual + y).contiguous()
