"""rope_append in Triton: one program for each head of each token. The maths is in README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

import torch
import triton
import triton.language as tl

from vlkern.kernels.norm_rope.triton import turn


@triton.jit
def _scale(top, poison):
    """max |x| of a head -> the factor to codes, and the scale back; below 1e-30 both are 0. NaN and inf give NaN."""
    some = top > 1e-30
    return tl.where(some, 127.0 / tl.where(some, top, 1.0), 0.0), tl.where(some, top / 127.0, 0.0) + poison


@triton.jit
def _codes(x, steps):
    """x steps rounded to the nearest integer: 1.5 * 2^23 shifts the fraction out."""
    return ((x * steps + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _append(
    p_q, p_k, p_v, p_cos, p_sin, p_rows, p_positions, p_qw, p_kw, p_out, p_kc, p_vc, p_ks, p_vs,
    H, K, S, q_t, q_h, k_t, k_h, v_t, v_h, eps, offset,
    HALF: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    # grid (T, H + K + K): the query heads of a token, then its key heads, then its value heads
    t, task = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(p_positions + t)
    there = position >= 0
    slot = tl.load(p_rows + t).to(tl.int64) * S + tl.maximum(position, 0) % S
    one = tl.zeros([1, 1], tl.int64)
    p_c, p_s = p_cos + t * HALF + one, p_sin + t * HALF + one
    j = tl.arange(0, BLOCK)[None, :]
    m = j < HALF
    if task < H:
        at = p_q + t * q_t + task * q_h + one
        y1, y2, _ = turn(at, p_c, p_s, p_qw, eps, offset, one == 0, HALF, BLOCK, Q_NORM)
        to = p_out + (t * H + task) * 2 * HALF + j
        tl.store(to, tl.where(there, y1, 0.0).to(p_out.dtype.element_ty), m)
        tl.store(to + HALF, tl.where(there, y2, 0.0).to(p_out.dtype.element_ty), m)
    elif task < H + K:
        head = task - H
        at = p_k + t * k_t + head * k_h + one
        y1, y2, _ = turn(at, p_c, p_s, p_kw, eps, offset, one == 0, HALF, BLOCK, K_NORM)
        to = p_kc + (slot * K + head) * 2 * HALF + j
        if CODED:
            top = tl.maximum(tl.max(tl.max(tl.abs(y1), 1), 0), tl.max(tl.max(tl.abs(y2), 1), 0))
            steps, scale = _scale(top, tl.sum(tl.sum(y1 * 0.0 + y2 * 0.0, 1), 0))
            tl.store(to, _codes(y1, steps), m & there)
            tl.store(to + HALF, _codes(y2, steps), m & there)
            tl.store(p_ks + slot * K + head, scale, there)
        else:
            tl.store(to, y1.to(p_kc.dtype.element_ty), m & there)
            tl.store(to + HALF, y2.to(p_kc.dtype.element_ty), m & there)
    else:
        head = task - H - K
        c = tl.arange(0, BLOCK_V)
        x = tl.load(p_v + t * v_t + head * v_h + c, c < V, other=0.0)
        v_to = p_vc + (slot * K + head) * V + c
        if CODED:
            wide = x.to(tl.float32)
            steps, scale = _scale(tl.max(tl.abs(wide), 0), tl.sum(wide * 0.0, 0))
            tl.store(v_to, _codes(wide, steps), (c < V) & there)
            tl.store(p_vs + slot * K + head, scale, there)
        else:
            tl.store(v_to, x, (c < V) & there)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


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
    """See reference.py."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    tokens, heads, half, value = q.shape[0], q.shape[1], q.shape[2] // 2, v.shape[2]
    out = q.new_empty(q.shape)
    if tokens:
        block, block_v = triton.next_power_of_2(half), triton.next_power_of_2(value)
        weights = [None if w is None else w.contiguous() for w in (q_weight, k_weight)]
        _append[(tokens, heads + 2 * k.shape[1])](
            q, k, v, cos.contiguous(), sin.contiguous(), rows.contiguous(), positions.contiguous(), *weights, out,
            k_cache, v_cache, k_scale, v_scale, heads, k.shape[1], k_cache.shape[1], q.stride(0), q.stride(1),
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), eps, offset, half, block, value, block_v,
            q_weight is not None, k_weight is not None, k_scale is not None, num_warps=1,
        )  # fmt: skip
    return out
