"""Attention with interval masks; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.interval_attention import reference, samples

LARGEST_HEAD = 256


def _heads(name: str, value: Any) -> torch.Tensor:
    t = _checks.floating(name, value)
    if t.dim() != 3:
        raise ValueError(f"{name} must have shape [tokens, heads, head dim], got {list(t.shape)}")
    if not 0 < t.shape[2] <= LARGEST_HEAD or t.shape[2] % 8:
        raise ValueError(f"{name} must have a head dim that is a multiple of 8 up to {LARGEST_HEAD}, got {t.shape[2]}")
    return t


def _bounds(name: str, value: Any, q: torch.Tensor) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    _checks.shape(name, t, (q.shape[0],))
    _checks.on_device(name, t, "q", q)
    return t


def _bind(q: Any, k: Any, v: Any, start: Any, stop: Any, *, scale: Any = None, softcap: Any = None) -> tuple[Any, ...]:
    q, k, v = _heads("q", q), _heads("k", k), _heads("v", v)
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have q's head dim {q.shape[2]}, got {k.shape[2]}")
    _checks.shape("v", v, (*k.shape[:2], v.shape[2]))
    start, stop = _bounds("start", start, q), _bounds("stop", stop, q)
    scale = q.shape[2] ** -0.5 if scale is None else _checks.number("scale", scale)
    softcap = None if softcap is None else _checks.number("softcap", softcap, positive=True)
    if (dtype := _checks.autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _checks.same("k", k, "q", q)
    _checks.same("v", v, "q", q)
    return q, k, v, start, stop, scale, softcap


_op = Op(
    "interval_attention",
    public="interval_attention",
    schemas={
        "interval_attention": "(Tensor q, Tensor k, Tensor v, Tensor start, Tensor stop, float scale, float? softcap)"
        " -> (Tensor, Tensor)",
        "interval_attention_backward": "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
        " Tensor lse, Tensor start, Tensor stop, float scale, float? softcap) -> (Tensor, Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["interval_attention"], _op.raw["interval_attention_backward"]


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start: torch.Tensor,
        stop: torch.Tensor,
        scale: float,
        softcap: float | None,
        backend: str,
    ) -> Any:
        out, lse = _forward[backend](q, k, v, start, stop, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse, start, stop)
        ctx.options, ctx.backend = (scale, softcap), backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors
        grad = torch.zeros_like(saved[3]) if grad is None else grad
        dq, dk, dv = _backward[ctx.backend](grad, grad_lse, *saved, *ctx.options)
        return dq, dk, dv, None, None, None, None, None


def interval_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`interval_attention` and the logarithm of its softmax's denominator, by which two calls can be merged.

        lse_i = log sum_j exp(s_ij)        over the visible keys j; s as in interval_attention

    Two calls over disjoint keys give the attention over both: with m = logaddexp(lse_1, lse_2),
    out = exp(lse_1 - m) out_1 + exp(lse_2 - m) out_2.

    Args:
        q: [Nq, Hq, D].
        k: [Nk, Hkv, D].
        v: [Nk, Hkv, Dv].
        start: [Nq] int32.
        stop: [Nq] int32.
        scale: as in interval_attention.
        softcap: as in interval_attention.

    Returns:
        out [Nq, Hq, Dv] and lse [Nq, Hq] in float32 (float64 for float64), natural logarithm, -inf for a query
        that sees no key. Both are differentiable once in q, k and v.

    Raises:
        TypeError, ValueError: as interval_attention.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.

    Example:
        >>> q, k, v = torch.randn(3, 10, 2, 16)
        >>> start, stop = torch.zeros(10, dtype=torch.int32), torch.arange(1, 11, dtype=torch.int32)  # causal
        >>> out, lse = vlkern.ops.interval_attention_lse(q, k, v, start, stop)
    """
    arguments = _bind(q, k, v, start, stop, scale=scale, softcap=softcap)
    tensors = arguments[:3]
    backend = _op.choose(*arguments[:5])
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out, lse = _IntervalAttention.apply(*arguments, backend)
    else:
        out, lse = _forward[backend](*arguments)
    return out, lse


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention in which query i sees the keys start[i] <= j < stop[i], and no others.

        s_ij = scale q_i . k_j              with softcap c:  s_ij = c tanh(scale q_i . k_j / c)
        out_i = sum_j softmax_j(s_ij) v_j   over start[i] <= j < stop[i]

    Packed documents, causal and sliding-window attention, prefixes, image blocks and any intersection of them are
    such intervals; `vlkern.masks` makes them. Nothing of size Nq x Nk is built, and keys that no query of a block sees
    are not read.

    Args:
        q: [Nq, Hq, D], float32, bfloat16 or float16 (float64 on the reference); D a multiple of 8 up to 256.
        k: [Nk, Hkv, D], same dtype and device; Hq is a multiple of Hkv, and query head h reads key head
            h // (Hq / Hkv).
        v: [Nk, Hkv, Dv], same dtype and device; Dv a multiple of 8 up to 256.
        start: [Nq] int32, first visible key of each query.
        stop: [Nq] int32, one past the last. Intervals are clipped to [0, Nk]; an empty one gives a row of zeros.
        scale: of the dot products; D ** -0.5 by default.
        softcap: the bound c > 0 of the scores (Gemma 2), or None.

    Returns:
        [Nq, Hq, Dv] in q's dtype; under autocast in autocast's. Scores, softmax and sums in float32. Differentiable
        once in q, k and v; the backward recomputes the scores from q, k and the LSE.

    Raises:
        TypeError: an argument is no tensor of these dtypes, dtypes differ, scale or softcap is no number.
        ValueError: shapes or devices do not fit, a head dim is no multiple of 8 up to 256, scale is not finite,
            softcap is not positive.

    Source: Dao et al., FlashAttention, 2022; Dehghani et al., Patch n' Pack: NaViT, 2023 (packed images);
    Gemma 2 and 3 (softcap, windows, image blocks).

    Example:
        >>> q, k, v = torch.randn(3, 10, 2, 16)
        >>> from vlkern import masks
        >>> start, stop = masks.documents(torch.tensor([0, 4, 10], dtype=torch.int32)).bounds(10)
        >>> out = vlkern.ops.interval_attention(q, k, v, start, stop)
    """
    return interval_attention_lse(q, k, v, start, stop, scale=scale, softcap=softcap)[0]
