"""Attention of a few query tokens against a cache, in plain PyTorch: the definition."""

import torch


def visible_slots(length: torch.Tensor, tokens: int, slots: int, window: int | None) -> torch.Tensor:
    """length [B] -> [B, L, S]: which slots the last L tokens of each row see.

    Of the positions p with p mod S = s the slot s holds the last one below the row's length.
    """
    last = length.long()[:, None] - 1  # [B, 1]
    held = last - torch.remainder(last - torch.arange(slots, device=length.device), slots)  # [B, S]
    at = last + torch.arange(1 - tokens, 1, device=length.device)  # [B, L]
    held, at = held[:, None], at[..., None]
    seen = (held >= 0) & (held <= at)
    return seen if window is None else seen & (held > at - window)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """q [B, L, H, C], k [B, S, K, C], v [B, S, K, Cv], length [B], scales [B, S, K] -> out [B, L, H, Cv]."""
    visible = visible_slots(length, q.shape[1], k.shape[1], window)
    unread = ~visible.any(1)[..., None, None]  # whatever lies there, NaN for instance, must not matter
    dtype = torch.promote_types(q.dtype, torch.float32)

    def read(t: torch.Tensor, t_scale: torch.Tensor | None) -> torch.Tensor:
        wide = t.to(dtype) if t_scale is None else t.to(dtype) * t_scale[..., None]
        return wide.masked_fill(unread, 0.0)

    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    s = torch.einsum("blkgc,bskc->bkgls", grouped, read(k, k_scale)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = visible[:, None, None]
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    out = torch.einsum("bkgls,bskc->blkgc", p, read(v, v_scale))
    return out.flatten(2, 3).to(q.dtype).contiguous()
