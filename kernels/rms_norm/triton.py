"""rms_norm in Triton: one pass over memory forward, one backward. The maths is in README.md.

Bound by memory, so what counts is bytes in flight: about 30 KB per SM hide the latency of an H200's memory. A program
therefore takes as many rows as fill 8192 elements, 32 a thread: four 16-byte loads of bfloat16 before the first use.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip

_WIDEST = 16384
_ELEMENTS = 8192


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same shape, dtype and chip."""

    rows: int
    """Rows of a tile."""
    block: int
    """Columns of a tile, a power of two. Fewer than N where a row is too wide for the registers of one program."""
    warps: int
    parts: int
    """Programs of the backward, each with its own partial dweight: fixed, so that the sum has one order."""


def pick(shape: tuple[int, int], dtype: torch.dtype, on: Chip) -> Config:
    """The configuration for x [M, N]. dtype plays no part: registers hold float32 whatever memory holds."""
    m, n = shape
    block = min(triton.next_power_of_2(n), _WIDEST)
    # Few rows: rather one each for four programs on every SM than full tiles for some of the SMs.
    fair = triton.next_power_of_2(triton.cdiv(m, 4 * on.sms))
    rows = max(1, min(_ELEMENTS // block, fair))
    warps = max(1, min(rows * block // 1024, 16))
    # Two programs an SM: while one reduces, the other loads.
    parts = min(2 * on.sms, triton.cdiv(m, rows))
    return Config(rows, block, warps, parts)


@triton.jit
def _fwd(p_x, p_w, p_y, p_rstd, M, eps, offset, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # grid (ceil(M / ROWS),): ROWS rows of x [M, N] each
    WIDE: tl.constexpr = BLOCK < N
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    j = tl.arange(0, BLOCK)  # [BLOCK]
    m_i = i < M
    at = i.to(tl.int64)[:, None] * N  # [ROWS, 1]
    if WIDE:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            m = m_i[:, None] & (start + j < N)[None, :]
            b_x = tl.load(p_x + at + (start + j)[None, :], m, other=0.0).to(tl.float32)
            squares += b_x * b_x
        rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)
        for start in range(0, N, BLOCK):  # x comes from the L2 cache this time
            m_j = start + j < N
            m = m_i[:, None] & m_j[None, :]
            b_x = tl.load(p_x + at + (start + j)[None, :], m, other=0.0).to(tl.float32)
            b_w = tl.load(p_w + start + j, m_j, other=0.0) + offset
            b_y = b_x * rstd[:, None] * b_w[None, :]
            tl.store(p_y + at + (start + j)[None, :], b_y.to(p_y.dtype.element_ty), m)
    else:
        m_j = j < N
        m = m_i[:, None] & m_j[None, :]
        b_x = tl.load(p_x + at + j[None, :], m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        b_w = tl.load(p_w + j, m_j, other=0.0) + offset  # [BLOCK]
        rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / N + eps)  # [ROWS]
        b_y = b_x * rstd[:, None] * b_w[None, :]
        tl.store(p_y + at + j[None, :], b_y.to(p_y.dtype.element_ty), m)
    tl.store(p_rstd + i, rstd, m_i)


@triton.jit
def _row_means(p_g, p_x, p_w, p_rstd, p_mean, offset, N: tl.constexpr, BLOCK: tl.constexpr):
    # grid (M,): mean_j(u_j h_j) of one row, for rows wider than a tile of _bwd
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        b_g = tl.load(p_g + i * N + j, j < N, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + i * N + j, j < N, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + j, j < N, other=0.0) + offset
        total += b_g * b_w * b_x
    tl.store(p_mean + i, tl.sum(total, 0) * tl.load(p_rstd + i) / N)


@triton.jit
def _bwd(
    p_g, p_x, p_w, p_rstd, p_mean, p_dx, p_parts, M, offset,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # grid (PARTS, ceil(N / BLOCK)): every PARTS-th tile of ROWS rows each; the share of dweight stays in registers
    WIDE: tl.constexpr = BLOCK < N
    part = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_j = j < N
    b_w = tl.load(p_w + j, m_j, other=0.0) + offset  # [BLOCK]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(part, tl.cdiv(M, ROWS), PARTS, num_stages=2):
        i = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
        m_i = i < M
        m = m_i[:, None] & m_j[None, :]
        at = i.to(tl.int64)[:, None] * N + j[None, :]  # [ROWS, BLOCK]
        b_g = tl.load(p_g + at, m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + at, m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + i, m_i, other=0.0)  # [ROWS]
        h = b_x * rstd[:, None]
        u = b_g * b_w[None, :]
        mean = tl.load(p_mean + i, m_i, other=0.0) if WIDE else tl.sum(u * h, 1) / N  # [ROWS]
        dw += b_g * h
        b_dx = rstd[:, None] * (u - h * mean[:, None])
        tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), m)
    tl.store(p_parts + part.to(tl.int64) * N + j, tl.sum(dw, 0), m_j)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    x, weight = x.contiguous(), weight.contiguous()
    n, m = x.shape[-1], x.numel() // x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if m:
        c = pick((m, n), x.dtype, chip(x.device))
        grid = (triton.cdiv(m, c.rows),)
        _fwd[grid](x, weight, y, rstd, m, eps, offset, n, c.rows, c.block, num_warps=c.warps)
    return y, rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    grad, x, weight, rstd = grad.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    n, m = x.shape[-1], x.numel() // x.shape[-1]
    dx = torch.empty_like(x)
    if not m:
        return dx, torch.zeros_like(weight)
    c = pick((m, n), x.dtype, chip(x.device))
    wide = c.block < n
    mean = torch.empty_like(rstd) if wide else None
    parts = weight.new_empty(c.parts, n)
    if wide:
        _row_means[(m,)](grad, x, weight, rstd, mean, offset, n, c.block, num_warps=c.warps)
    _bwd[(c.parts, triton.cdiv(n, c.block))](
        grad, x, weight, rstd, mean, dx, parts, m, offset, n, c.rows, c.block, c.parts, num_warps=c.warps
    )
    return dx, parts.sum(0)
