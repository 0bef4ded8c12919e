"""Attention of a few query tokens against a key/value cache; the maths is in README.md."""

from typing import Any

import torch

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.decode_attention import reference, samples

LARGEST_HEAD = 256
MOST_TOKENS = 16


def _four(name: str, t: torch.Tensor, letters: str) -> None:
    shape = t.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have shape {letters}, got {list(shape)}")
    if not 0 < shape[3] <= LARGEST_HEAD or shape[3] % 8:
        raise ValueError(f"{name} must have a head dim that is a multiple of 8 up to {LARGEST_HEAD}, got {shape[3]}")


def _stored(name: str, value: Any, q: torch.Tensor) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int8, q.dtype):
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, or be int8, got {t.dtype}")
    _checks.on_device(name, t, "q", q)
    return t


def _scales(name: str, value: Any, of_name: str, of: torch.Tensor, q: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        if of.dtype == torch.int8:
            raise ValueError(f"{name} must be given when {of_name} is int8")
        return None
    t = _checks.tensor(name, value)
    if of.dtype != torch.int8:
        raise ValueError(f"{name} must be None when {of_name} is {of.dtype}: only int8 has scales")
    if t.dtype != torch.float32 and not t.dtype == q.dtype == torch.float64:
        raise TypeError(f"{name} must be float32, got {t.dtype}")
    _checks.shape(name, t, tuple(of.shape[:3]))
    _checks.on_device(name, t, of_name, of)
    return t


def _check_lengths(length: torch.Tensor, tokens: int, slots: int, window: int | None) -> None:
    if not _checks.values_may_be_read(length):
        return
    found = length.tolist()
    if min(found, default=0) < 0:
        raise ValueError(f"length must not be negative, got {min(found)}")
    if max(found, default=0) > slots and (window is None or window + tokens - 1 > slots):
        seen = "all positions" if window is None else f"window + L - 1 = {window + tokens - 1} positions"
        raise ValueError(f"length must be at most the {slots} slots where {seen} are needed, got {max(found)}")


def _bind(
    q: Any,
    k: Any,
    v: Any,
    length: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    window: Any = None,
    scale: Any = None,
    softcap: Any = None,
) -> tuple[Any, ...]:
    q = _checks.floating("q", q)
    if (dtype := _checks.autocast_dtype(q)) is not None:  # a cache is never cast: its dtype was its owner's choice
        q = q.to(k.dtype if isinstance(k, torch.Tensor) and k.is_floating_point() else dtype)
    k, v, length = _stored("k", k, q), _stored("v", v, q), _checks.tensor("length", length)
    _four("q", q, "[B, L, H, C]")
    _four("k", k, "[B, S, K, C]")
    _four("v", v, "[B, S, K, Cv]")
    batch, tokens, heads, width = q.shape
    if not 0 < tokens <= MOST_TOKENS:
        raise ValueError(f"q must have 1 to {MOST_TOKENS} tokens a row, got {tokens}")
    rows, slots, key_heads, key_width = k.shape
    if rows != batch or key_width != width:
        raise ValueError(f"k must have shape [{batch}, S, K, {width}], got {list(k.shape)}")
    if slots == 0:
        raise ValueError("k must have at least one slot, got 0")
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"q must have a multiple of k's {key_heads} heads, got {heads}")
    _checks.shape("v", v, (batch, slots, key_heads, v.shape[3]))
    if v.dtype != k.dtype:
        raise TypeError(f"v must have the dtype of k, {k.dtype}, got {v.dtype}")
    if length.dtype != torch.int32:
        raise TypeError(f"length must be int32, got {length.dtype}")
    _checks.shape("length", length, (batch,))
    _checks.on_device("length", length, "q", q)
    k_scale, v_scale = _scales("k_scale", k_scale, "k", k, q), _scales("v_scale", v_scale, "v", v, q)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be an int or None, got {type(window).__name__}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    _check_lengths(length, tokens, slots, window)
    scale = width**-0.5 if scale is None else _checks.number("scale", scale)
    softcap = None if softcap is None else _checks.number("softcap", softcap, positive=True)
    return q, k, v, length, k_scale, v_scale, window, scale, softcap


_op = Op(
    "decode_attention",
    public="decode_attention",
    schemas={
        "decode_attention": "(Tensor q, Tensor k, Tensor v, Tensor length, Tensor? k_scale, Tensor? v_scale,"
        " int? window, float scale, float? softcap) -> Tensor",
    },
    reference=reference,
    backends=("cpu", "cuda", "triton"),
    bind=_bind,
    work=samples.work,
    differentiable=False,
)
_forward = _op.raw["decode_attention"]


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of the last few tokens of each row against the row's cache of keys and values.

    The cache holds position p of a row in slot p mod S, so a linear cache (S >= length: slot = position) and a ring
    are read alike. With S slots, query i of row b stands at p = length[b] - L + i and sees the positions

        max(0, p - window + 1) <= j <= p            (without a window: 0 <= j <= p)

        s_j = scale q_i . k_j                with softcap c:  s_j = c tanh(scale q_i . k_j / c)
        out_i = sum_j softmax_j(s_j) v_j

    Each key and value is read once, for all query heads and all L tokens; slots that no token sees are not read, so
    whatever lies there (a rolled back token, NaN) does not matter. A query at a negative position (a row with fewer
    than L tokens) gets a row of zeros.

    Args:
        q: [B, L, H, C], float32, bfloat16 or float16 (float64 on the reference); 1 <= L <= 16 tokens a row, C a
            multiple of 8 up to 256.
        k: [B, S, K, C] on the same device, in q's dtype or int8; H is a multiple of K, and query head h reads key
            head h // (H / K). The keys of the L tokens themselves are there already.
        v: [B, S, K, Cv], in k's dtype; Cv a multiple of 8 up to 256.
        length: [B] int32, tokens of each row, these L included. At most S, unless window + L - 1 <= S.
        k_scale: [B, S, K] float32, with int8 keys only: key = int8 * scale.
        v_scale: [B, S, K] float32, likewise for values.
        window: how many positions a query sees at most, its own included; None for all.
        scale: of the dot products; C ** -0.5 by default.
        softcap: the bound c > 0 of the scores (Gemma 2), or None.

    Returns:
        [B, L, H, Cv] in q's dtype; under autocast in the cache's dtype (autocast's, if that is int8). Scores, softmax
        and sums in float32. No gradient: `vlkern.ops.interval_attention` has one.

    Raises:
        TypeError: an argument is no tensor of these dtypes, window is no int, scale or softcap no number.
        ValueError: shapes or devices do not fit; a head dim is no multiple of 8 up to 256; L is not 1 to 16; scales are
            missing or superfluous; window is below 1, scale not finite, softcap not positive; a length is negative
            or larger than the cache can serve (looked at on the CPU, elsewhere with `vlkern.validate(True)`); an
            argument requires a gradient.

    Source: Dao et al., Flash-Decoding for long-context inference, 2023 (split over keys); Ainslie et al., GQA, 2023;
    Gemma 2 and 3 (softcap, windows).

    Example:
        >>> q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 100, 4, 64), torch.randn(2, 100, 4, 64)
        >>> out = vlkern.ops.decode_attention(q, k, v, torch.tensor([100, 37], dtype=torch.int32))
    """
    arguments = _bind(q, k, v, length, k_scale=k_scale, v_scale=v_scale, window=window, scale=scale, softcap=softcap)
    _checks.no_gradient(q=q, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    result: torch.Tensor = _forward[_op.choose(*arguments[:4])](*arguments)
    return result
