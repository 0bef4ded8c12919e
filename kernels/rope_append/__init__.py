"""Norm, RoPE and the write into a cache in one pass; the maths is in README.md."""

from typing import Any

import torch

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.norm_rope import check_angles, check_heads, check_weight
from vlkern.kernels.rope_append import reference, samples


def _places(name: str, value: Any, q: torch.Tensor) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    _checks.shape(name, t, (q.shape[0],))
    _checks.on_device(name, t, "q", q)
    return t


def _cache(name: str, value: Any, of_name: str, of: torch.Tensor) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int8, of.dtype):
        raise TypeError(f"{name} must have the dtype of {of_name}, {of.dtype}, or be int8, got {t.dtype}")
    shape, (_, heads, width) = t.shape, of.shape
    if len(shape) != 4 or shape[2] != heads or shape[3] != width or shape[1] == 0:
        raise ValueError(f"{name} must have shape [B, S, {heads}, {width}], S >= 1, got {list(shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())}")
    _checks.on_device(name, t, of_name, of)
    return t


def _scales(name: str, value: Any, of_name: str, of: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if of.dtype != torch.int8:
        if value is not None:
            raise ValueError(f"{name} must be None when {of_name} is {of.dtype}: only int8 has scales")
        return None
    if value is None:
        raise ValueError(f"{name} must be given when {of_name} is int8")
    t = _checks.tensor(name, value)
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    _checks.shape(name, t, tuple(of.shape[:3]))
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())}")
    _checks.on_device(name, t, of_name, of)
    return t


def _bind(
    q: Any,
    k: Any,
    v: Any,
    cos: Any,
    sin: Any,
    rows: Any,
    positions: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    q_weight: Any = None,
    k_weight: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> tuple[Any, ...]:
    q, k, v = check_heads("q", q), check_heads("k", k), check_heads("v", v)
    tokens, _, width = q.shape
    _, heads, _ = k.shape
    _checks.shape("k", k, (tokens, heads, width))
    _checks.shape("v", v, (tokens, heads, v.shape[2]))
    _checks.same("k", k, "q", q)
    _checks.same("v", v, "q", q)
    cos, sin = check_angles("cos", cos, "q", q), check_angles("sin", sin, "q", q)
    rows, positions = _places("rows", rows, q), _places("positions", positions, q)
    k_cache, v_cache = _cache("k_cache", k_cache, "k", k), _cache("v_cache", v_cache, "v", v)
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.dtype != v_cache.dtype:
        came = f"{v_cache.dtype} {list(v_cache.shape)}"
        raise ValueError(f"v_cache must have the rows, slots, heads and dtype of k_cache, got {came}")
    scale_dtype = cos.dtype
    k_scale = _scales("k_scale", k_scale, "k_cache", k_cache, scale_dtype)
    v_scale = _scales("v_scale", v_scale, "v_cache", v_cache, scale_dtype)
    q_weight, k_weight = check_weight("q_weight", q_weight, "q", q), check_weight("k_weight", k_weight, "k", k)
    if rows.shape[0] and _checks.values_may_be_read(rows):
        found = rows.tolist()
        if min(found) < 0 or max(found) >= k_cache.shape[0]:
            raise ValueError(f"rows must be within 0 to {k_cache.shape[0] - 1}, got {min(found)} to {max(found)}")
    eps, offset = _checks.number("eps", eps, positive=True), _checks.number("offset", offset)
    return q, k, v, cos, sin, rows, positions, k_cache, v_cache, q_weight, k_weight, k_scale, v_scale, eps, offset


_op = Op(
    "rope_append",
    public="rope_append",
    schemas={
        "rope_append": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor rows, Tensor positions,"
        " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q_weight, Tensor? k_weight, Tensor(c!)? k_scale,"
        " Tensor(d!)? v_scale, float eps, float offset) -> Tensor",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
    differentiable=False,
)
_forward = _op.raw["rope_append"]


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
    """Norm and RoPE of new queries and keys, and the new keys and values written into a cache, in one pass.

        q', k' = norm_rope(q, q_weight), norm_rope(k, k_weight)
        k_cache[rows_t, positions_t mod S] = k'_t,    v_cache[rows_t, positions_t mod S] = v_t

    An int8 cache stores round(x / scale) with a scale = max |x| / 127 for each head and token. A token at a negative
    position is skipped: nothing is written, and its query is zero. So a row can sit out a step of fixed shape.

    Args:
        q: [T, H, C], float32, bfloat16 or float16 (float64 on the reference); C even.
        k: [T, K, C], same dtype and device.
        v: [T, K, Cv], same dtype and device; Cv even.
        cos: [T, C / 2] float32, of the tokens' angles, as in norm_rope.
        sin: [T, C / 2] float32.
        rows: [T] int32, the row of the cache to which each token belongs.
        positions: [T] int32, its position there. Tokens of one call must not share a slot: of two that do, either
            may stay.
        k_cache: [B, S, K, C], contiguous, in q's dtype or int8. Written in place.
        v_cache: [B, S, K, Cv], likewise.
        q_weight: [C], of the norm of q, or None for no norm.
        k_weight: [C], of the norm of k, or None for no norm.
        k_scale: [B, S, K] float32, with int8 caches only. Written in place.
        v_scale: [B, S, K] float32, likewise.
        eps: of the norms; > 0.
        offset: added to the norms' weights.

    Returns:
        q' [T, H, C] in q's dtype. No gradient: `vlkern.ops.norm_rope` has one.

    Raises:
        TypeError: an argument is no tensor of these dtypes, eps or offset no number.
        ValueError: shapes or devices do not fit; a cache is not contiguous; scales are missing or superfluous; rows
            are outside the cache (looked at on the CPU, elsewhere with `vlkern.validate(True)`); an argument requires
            a gradient. Nothing is written then.

    Source: Gemma 3 (norm, RoPE, cache, in this order).

    Example:
        >>> from vlkern.layers.rope import Rope
        >>> rows, positions = torch.tensor([0, 1]).int(), torch.tensor([5, 9]).int()
        >>> k_cache, v_cache = torch.zeros(2, 2, 16, 1, 64).unbind()
        >>> q, k, v = torch.randn(2, 4, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
        >>> q = vlkern.ops.rope_append(q, k, v, *Rope(64, base=10000.0)(positions), rows, positions, k_cache, v_cache)
    """
    arguments = _bind(
        q, k, v, cos, sin, rows, positions, k_cache, v_cache, q_weight=q_weight, k_weight=k_weight,
        k_scale=k_scale, v_scale=v_scale, eps=eps, offset=offset,
    )  # fmt: skip
    if torch.is_grad_enabled():
        _checks.no_gradient(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
        _checks.no_gradient(q_weight=q_weight, k_weight=k_weight)
    result: torch.Tensor = _forward[_op.choose(*arguments[:9])](*arguments)
    return result
