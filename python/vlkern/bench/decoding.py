"""What a user would write instead of decode_attention: PyTorch's attention, or matmuls, on the filled part of a cache;
and instead of decode_linear: its parts.

They take the arguments of the public op. A cache in int8 is first taken back to the dtype of the query.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vlkern.kernels.decode_attention.reference import visible_slots

Function = Callable[..., torch.Tensor]


def _filled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, and the slots in use of k and v, with heads before tokens; the mask [B, 1, L, S], or None if all is seen."""
    n = min(int(length.max()), k.shape[1])
    k, v = k[:, :n], v[:, :n]
    if k_scale is not None and v_scale is not None:
        k, v = (t.to(q.dtype) * s[:, :n, :, None].to(q.dtype) for t, s in ((k, k_scale), (v, v_scale)))
    mask = None
    if q.shape[1] > 1 or window is not None or int(length.min()) < n:
        mask = visible_slots(length, q.shape[1], n, window)[:, None]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One call of PyTorch's attention, with a mask where rows differ."""
    if softcap is not None:
        raise ValueError("it has no softcap")
    q, k, v, mask = _filled(q, k, v, length, k_scale, v_scale, window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def matmuls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Matmul, softmax, matmul in the cache's dtype, the heads of a group as rows of one matrix."""
    q, k, v, mask = _filled(q, k, v, length, k_scale, v_scale, window)
    tokens = q.shape[2]
    q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, K, G L, C]
    s = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = s.unflatten(2, (-1, tokens)).masked_fill(~mask[:, None], -torch.inf).flatten(2, 3)
    out = torch.softmax(s, -1, dtype=torch.float32).to(v.dtype) @ v
    return out.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2)


def flex(attend: Function) -> Function:
    """FlexAttention (`attend`, compiled); its block mask is built once per case."""
    from torch.nn.attention.flex_attention import create_block_mask

    masks: dict[int, Any] = {}

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        length: torch.Tensor,
        *,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        if softcap is not None or window is not None or int(length.max()) > k.shape[1]:
            raise ValueError("it is set up for whole linear caches")
        tokens = q.shape[1]
        # Detached: on the CPU it refuses views of tensors that want gradients.
        q, k, v, _ = _filled(q.detach(), k.detach(), v.detach(), length, k_scale, v_scale, window)
        if id(length) not in masks:

            def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
                return j <= length[b] - tokens + i

            masks[id(length)] = create_block_mask(visible, q.shape[0], None, tokens, k.shape[2], device=str(q.device))
        out = attend(q, k, v, block_mask=masks[id(length)], enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def linear_parts(
    x: torch.Tensor,
    *weights: torch.Tensor,
    before: torch.Tensor | None = None,
    geglu: bool = False,
    after: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> torch.Tensor:
    """The lines found in model files: norm, a product for each weight, gate, norm, sum."""

    def norm(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = t.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (y * (offset + weight.float())).to(t.dtype)

    u = x if before is None else norm(x, before)
    parts = [F.linear(u, weight) for weight in weights]
    y = F.gelu(parts[0], approximate="tanh") * parts[1] if geglu else torch.cat(parts, -1)
    y = y if after is None else norm(y, after)
    return y if residual is None else residual + y
