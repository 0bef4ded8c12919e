"""Norm and RoPE of new queries and keys, and new keys and values written into a cache, in plain PyTorch."""

import torch

from vlkern.kernels.norm_rope.reference import norm_rope


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] -> int8 [..., C] and scale [...] in float32 (float64 for float64) with x close to int8 * scale.

    scale = max |x| / 127, so that the largest element is exact and the others are off by half a scale at most. Where
    max |x| is below 1e-30, and its scale might leave float32's range, all is zero.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    top = wide.abs().amax(-1)
    top = top.masked_fill(top <= 1e-30, 0.0)
    steps = torch.where(top > 0, 127 / top, 0.0)
    return (wide * steps[..., None]).round().to(torch.int8), top / 127


def _write(cache: torch.Tensor, at: torch.Tensor, x: torch.Tensor, last: torch.Tensor) -> None:
    """Slot at[t] of the cache [B, S, ...] := x[last[t]], x [T, ...]; it keeps what it holds where last[t] < 0."""
    flat = cache.view(-1, *cache.shape[2:])
    keep = (last < 0).view(-1, *(1 for _ in x.shape[1:]))
    flat[at] = torch.where(keep, flat[at], x[last.clamp(min=0)].to(cache.dtype))


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
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    eps: float,
    offset: float,
) -> torch.Tensor:
    """q [T, H, C], k [T, K, C], v [T, K, Cv] -> q [T, H, C] normed and turned; k and v into slots of the caches."""
    slots, tokens = k_cache.shape[1], torch.arange(q.shape[0], device=q.device)
    skip = positions < 0
    at = rows.long() * slots + torch.remainder(positions.long(), slots)
    # Skipped tokens point at a slot that another token may write, so that each token writes what the last of them has.
    last = at.new_full((k_cache.shape[0] * slots,), -1).scatter_reduce(0, at, tokens.masked_fill(skip, -1), "amax")[at]
    q_weight, k_weight = (None if w is None else w.to(cos.dtype) for w in (q_weight, k_weight))
    turned, _ = norm_rope(k.to(cos.dtype), cos, sin, k_weight, eps, offset)  # rounded once, by the cache
    for x, cache, scale in ((turned, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            x, scales = quantise(x)
            _write(scale, at, scales, last)
        _write(cache, at, x, last)
    out, _ = norm_rope(q, cos, sin, q_weight, eps, offset)
    return out.masked_fill(skip[:, None, None], 0.0)
