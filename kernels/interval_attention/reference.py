"""Attention in which each query sees one interval of keys, in plain PyTorch: the definition."""

import torch


def _scores(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the softmax sees, [Hkv, G, Nq, Nk] with -inf where a key is not visible, and d(score) / d(scale q.k)."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    s = torch.einsum("qhgd,khd->hgqk", grouped, k) * scale
    slope = torch.ones_like(s)
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    j = torch.arange(k.shape[0], device=q.device)
    visible = (j >= start[:, None]) & (j < stop[:, None])
    return s.masked_fill(~visible, -torch.inf), slope


def _probabilities(s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(s - lse), and 0 in rows without a key, whose lse is -inf."""
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Nq, Hq, D], k [Nk, Hkv, D], v [Nk, Hkv, Dv] -> out [Nq, Hq, Dv], lse [Nq, Hq]."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    s, _ = _scores(wide_q, wide_k, start, stop, scale, softcap)
    lse = torch.logsumexp(s, -1)
    out = torch.einsum("hgqk,khd->qhgd", _probabilities(s, lse), wide_v)
    return out.flatten(1, 2).to(q.dtype).contiguous(), lse.permute(2, 0, 1).flatten(1).contiguous()


def interval_attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    g, wide_q, wide_k, wide_v = _wide(grad, q, k, v)
    s, slope = _scores(wide_q, wide_k, start, stop, scale, softcap)
    groups = s.shape[:2]
    p = _probabilities(s, lse.to(s.dtype).unflatten(1, groups).permute(1, 2, 0))
    g = g.unflatten(1, groups)
    dp = torch.einsum("qhgd,khd->hgqk", g, wide_v)
    shift = (p * dp).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift = shift - grad_lse.to(s.dtype).unflatten(1, groups).permute(1, 2, 0)[..., None]
    ds = p * (dp - shift) * slope * scale
    dq = torch.einsum("hgqk,khd->qhgd", ds, wide_k).flatten(1, 2)
    dk = torch.einsum("hgqk,qhgd->khd", ds, wide_q.unflatten(1, groups))
    dv = torch.einsum("hgqk,qhgd->khd", p, g)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
