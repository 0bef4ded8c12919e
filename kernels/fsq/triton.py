"""fsq in Triton: one pass over memory each way, tiles of [rows, channels]. The maths is in README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip
from vlkern.kernels.fsq.table import constant

#: More thresholds than this are searched, fewer are counted.
MOST_COUNTED = 63


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    rows: int
    width: int
    """Channels, and what is missing to a power of two."""
    warps: int


def pick(rows: int, channels: int, on: Chip) -> Config:
    """2048 elements a program, or fewer where that would leave SMs without work."""
    width = triton.next_power_of_2(channels)
    fair = triton.next_power_of_2(triton.cdiv(rows * width, 8 * on.sms))
    block = max(256, min(2048, fair))
    return Config(max(1, block // width), width, max(1, block // 512))


@triton.jit
def _counted(z, p_t, first, count, K):
    digit = tl.zeros(z.shape, tl.int32)
    for k in range(K):
        t = tl.load(p_t + first + k, k < count, other=float("nan"))  # nothing reaches NaN
        digit += (z >= t).to(tl.int32)
    return digit


@triton.jit
def _searched(z, p_t, first, count, STEPS: tl.constexpr):
    low = tl.zeros(z.shape, tl.int32)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        inside = low < high
        reached = inside & (z >= tl.load(p_t + first + middle, inside, other=0.0))
        low = tl.where(reached, middle + 1, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _fwd(
    p_z,
    p_t,
    p_columns,
    p_codes,
    p_index,
    N,
    D,
    K,
    SYMMETRIC: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    c = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    levels = tl.load(p_columns + c, c < D, other=2).to(tl.int32)
    first = tl.load(p_columns + D + c, c < D, other=0)
    stride = tl.load(p_columns + 2 * D + c, c < D, other=0)
    at = row[:, None] * D + c  # [BLOCK, WIDTH]
    m = (row < N)[:, None] & (c < D)
    z = tl.load(p_z + at, m, other=0.0).to(tl.float32)
    if STEPS:
        digit = _searched(z, p_t, first, tl.where(c < D, levels - 1, 0), STEPS)
    else:
        digit = _counted(z, p_t, first, tl.where(c < D, levels - 1, 0), K)
    if SYMMETRIC:
        divisor = levels - 1
        code = tl.div_rn((2 * digit - divisor).to(tl.float32), divisor.to(tl.float32))
    else:
        divisor = levels // 2
        code = tl.div_rn((digit - divisor).to(tl.float32), divisor.to(tl.float32))
    nan = z != z
    tl.store(p_codes + at, tl.where(nan, z, code).to(p_codes.dtype.element_ty), m)
    index = tl.sum(digit.to(tl.int64) * stride, 1)
    lost = tl.max(nan.to(tl.int32), 1)
    tl.store(p_index + row, tl.where(lost > 0, -1, index), row < N)


@triton.jit
def _bwd(p_g, p_z, p_slopes, p_dz, N, D, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    c = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    shift = tl.load(p_slopes + c, c < D, other=0.0)
    gain = tl.load(p_slopes + D + c, c < D, other=0.0)
    at = row[:, None] * D + c  # [BLOCK, WIDTH]
    m = (row < N)[:, None] & (c < D)
    g = tl.load(p_g + at, m, other=0.0).to(tl.float32)
    e = tl.exp(-2.0 * tl.abs(tl.load(p_z + at, m, other=0.0).to(tl.float32) + shift))
    dz = g * (4.0 * gain * e / ((1.0 + e) * (1.0 + e)))
    tl.store(p_dz + at, dz.to(p_dz.dtype.element_ty), m)


@triton.jit
def _decode(p_codes, p_index, p_columns, p_out, N, D, TOTAL, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    c = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    levels = tl.load(p_columns + c, c < D, other=2)
    first = tl.load(p_columns + D + c, c < D, other=0) + c  # a channel has one code more than thresholds
    stride = tl.load(p_columns + 2 * D + c, c < D, other=1)
    index = tl.load(p_index + row, row < N, other=-1)[:, None]
    m = (row < N)[:, None] & (c < D)
    inside = m & (index >= 0) & (index < TOTAL)
    code = tl.load(p_codes + first + index // stride % levels, inside, other=float("nan"))
    tl.store(p_out + row[:, None] * D + c, code, m)


def fsq_quantize(
    z: torch.Tensor, thresholds: torch.Tensor, levels: list[int], symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    z, d, most = z.contiguous(), len(levels), max(levels) - 1
    codes, index = torch.empty_like(z), torch.empty(z.shape[:-1], dtype=torch.int64, device=z.device)
    if n := index.numel():
        c, columns = pick(n, d, chip(z.device)), constant("columns", tuple(levels), symmetric, torch.int64, z)
        steps = most.bit_length() if most > MOST_COUNTED else 0
        grid, sizes = (triton.cdiv(n, c.rows),), (n, d, most, symmetric, steps, c.rows, c.width)
        _fwd[grid](z, thresholds, columns, codes, index, *sizes, num_warps=c.warps)
    return codes, index


def fsq_quantize_backward(grad: torch.Tensor, z: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    grad, z, d = grad.contiguous(), z.contiguous(), z.shape[-1]
    dz = torch.empty_like(z)
    if n := z.numel() // d:
        c = pick(n, d, chip(z.device))
        _bwd[(triton.cdiv(n, c.rows),)](grad, z, slopes, dz, n, d, c.rows, c.width, num_warps=c.warps)
    return dz


def fsq_dequantize(codes: torch.Tensor, indices: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """See reference.py."""
    indices, d = indices.contiguous(), len(levels)
    out = torch.empty((*indices.shape, d), dtype=codes.dtype, device=codes.device)
    if n := indices.numel():
        c, columns = pick(n, d, chip(codes.device)), constant("columns", tuple(levels), False, torch.int64, codes)
        grid, sizes = (triton.cdiv(n, c.rows),), (n, d, prod(levels), c.rows, c.width)
        _decode[grid](codes, indices, columns, out, *sizes, num_warps=c.warps)
    return out
