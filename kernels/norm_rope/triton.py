"""norm_rope in Triton: one pass over memory forward, one backward. The maths is in README.md.

A head is two tiles side by side, its first and its second half, so that a pair (j, j + C / 2) meets in one thread.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip

_ELEMENTS = 2048


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same shape and chip."""

    rows: int
    """Heads of a tile."""
    block: int
    """Columns of a tile, a power of two that holds half a head."""
    warps: int
    parts: int
    """Programs of the backward, each with its own partial dweight: fixed, so that the sum has one order."""


def pick(heads: int, half: int, on: Chip) -> Config:
    """The configuration for `heads` heads of 2 * `half` channels."""
    block = triton.next_power_of_2(half)
    fair = triton.next_power_of_2(triton.cdiv(heads, 4 * on.sms))
    rows = max(1, min(_ELEMENTS // block, max(4, fair)))
    return Config(rows, block, max(1, min(rows * block // 512, 8)), min(2 * on.sms, triton.cdiv(heads, rows)))


@triton.jit
def turn(p_x, p_cos, p_sin, p_w, eps, offset, m, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """Heads at p_x [ROWS, 1] with angles at p_cos and p_sin [ROWS, 1] -> y1, y2 [ROWS, BLOCK], r [ROWS]; m [ROWS, 1]"""
    j = tl.arange(0, BLOCK)
    m_j = j < HALF
    m = m & m_j[None, :]
    a = tl.load(p_x + j[None, :], m, other=0.0).to(tl.float32)
    b = tl.load(p_x + HALF + j[None, :], m, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
    if NORM:
        a = a * r[:, None] * (tl.load(p_w + j, m_j, other=0.0).to(tl.float32) + offset)[None, :]
        b = b * r[:, None] * (tl.load(p_w + HALF + j, m_j, other=0.0).to(tl.float32) + offset)[None, :]
    cos = tl.load(p_cos + j[None, :], m, other=0.0)
    sin = tl.load(p_sin + j[None, :], m, other=0.0)
    return a * cos - b * sin, b * cos + a * sin, r


@triton.jit
def _fwd(
    p_x, p_cos, p_sin, p_w, p_y, p_rstd, N, H, stride_t, stride_h, eps, offset,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    # grid (ceil(N / ROWS),): ROWS of the N = T * H heads each
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_i = i < N
    t, j = i // H, tl.arange(0, BLOCK)
    at = (t * stride_t + i % H * stride_h)[:, None]
    angle = (t * HALF)[:, None]
    y1, y2, r = turn(p_x + at, p_cos + angle, p_sin + angle, p_w, eps, offset, m_i[:, None], HALF, BLOCK, NORM)
    m = m_i[:, None] & (j < HALF)[None, :]
    to = p_y + (i * 2 * HALF)[:, None] + j[None, :]
    tl.store(to, y1.to(p_y.dtype.element_ty), m)
    tl.store(to + HALF, y2.to(p_y.dtype.element_ty), m)
    if NORM:
        tl.store(p_rstd + i, r, m_i)


@triton.jit
def _bwd(
    p_g, p_x, p_cos, p_sin, p_w, p_rstd, p_dx, p_parts, N, H, stride_t, stride_h, offset,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    # grid (PARTS,): every PARTS-th tile of ROWS heads each; the share of dweight stays in registers
    part = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    m_j = j < HALF
    if NORM:
        w1 = tl.load(p_w + j, m_j, other=0.0) + offset
        w2 = tl.load(p_w + HALF + j, m_j, other=0.0) + offset
        dw1 = tl.zeros([ROWS, BLOCK], tl.float32)
        dw2 = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(part, tl.cdiv(N, ROWS), PARTS):
        i = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_i = i < N
        m = m_i[:, None] & m_j[None, :]
        t = i // H
        to = (i * 2 * HALF)[:, None] + j[None, :]
        angle = (t * HALF)[:, None] + j[None, :]
        a = tl.load(p_g + to, m, other=0.0).to(tl.float32)
        b = tl.load(p_g + to + HALF, m, other=0.0).to(tl.float32)
        cos = tl.load(p_cos + angle, m, other=0.0)
        sin = tl.load(p_sin + angle, m, other=0.0)
        u1 = a * cos + b * sin
        u2 = b * cos - a * sin
        if NORM:
            at = (t * stride_t + i % H * stride_h)[:, None] + j[None, :]
            r = tl.load(p_rstd + i, m_i, other=0.0)[:, None]
            h1 = tl.load(p_x + at, m, other=0.0).to(tl.float32) * r
            h2 = tl.load(p_x + at + HALF, m, other=0.0).to(tl.float32) * r
            dw1 += u1 * h1
            dw2 += u2 * h2
            u1 = u1 * w1[None, :]
            u2 = u2 * w2[None, :]
            mean = ((tl.sum(u1 * h1, 1) + tl.sum(u2 * h2, 1)) / (2 * HALF))[:, None]
            u1 = r * (u1 - h1 * mean)
            u2 = r * (u2 - h2 * mean)
        tl.store(p_dx + to, u1.to(p_dx.dtype.element_ty), m)
        tl.store(p_dx + to + HALF, u2.to(p_dx.dtype.element_ty), m)
    if NORM:
        at = p_parts + part.to(tl.int64) * 2 * HALF + j
        tl.store(at, tl.sum(dw1, 0), m_j)
        tl.store(at + HALF, tl.sum(dw2, 0), m_j)


def norm_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = None if weight is None else weight.contiguous()
    norm, heads, half = weight is not None, x.shape[0] * x.shape[1], x.shape[2] // 2
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:2] if norm else (0,), dtype=torch.float32)
    if heads:
        c = pick(heads, half, chip(x.device))
        _fwd[(triton.cdiv(heads, c.rows),)](
            x, cos.contiguous(), sin.contiguous(), weight, y, rstd, heads, x.shape[1],
            x.stride(0), x.stride(1), eps, offset, half, c.block, c.rows, norm, num_warps=c.warps,
        )  # fmt: skip
    return y, rstd


def norm_rope_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = None if weight is None else weight.contiguous()
    norm, heads, half = weight is not None, x.shape[0] * x.shape[1], x.shape[2] // 2
    dx = x.new_empty(x.shape)
    channels = x.shape[2] if norm else 0
    if not heads:
        return dx, x.new_zeros(channels, dtype=torch.float32)
    c = pick(heads, half, chip(x.device))
    parts = x.new_empty(c.parts, channels, dtype=torch.float32)
    _bwd[(c.parts,)](
        grad.contiguous(), x, cos.contiguous(), sin.contiguous(), weight,
        rstd.contiguous(), dx, parts, heads, x.shape[1], x.stride(0), x.stride(1), offset, half, c.block, c.rows,
        c.parts, norm, num_warps=c.warps,
    )  # fmt: skip
    return dx, parts.sum(0)
