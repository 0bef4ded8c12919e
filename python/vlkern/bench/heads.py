"""What model files do between the projections and the attention, op by op: rivals of norm_rope and rope_append."""

import torch


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> torch.Tensor:
    """RMS norm in float32, rounded; then x cos + rotate_half(x) sin in x's dtype."""
    if weight is not None:
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = (y * (offset + weight.float())).to(x.dtype)
    first, second = x.chunk(2, -1)
    cos, sin = (torch.cat([t, t], -1).to(x.dtype)[:, None] for t in (cos, sin))
    return x * cos + torch.cat([-second, first], -1) * sin


def _int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8), scale


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> torch.Tensor:
    """As above for queries and keys, then keys and values into their slots by index."""
    q = norm_rope(q, cos, sin, q_weight, eps=eps, offset=offset)
    k = norm_rope(k, cos, sin, k_weight, eps=eps, offset=offset)
    at = rows.long(), positions.long() % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cache[at] = x
        else:
            cache[at], scale[at] = _int8(x)
    return q
