"""mixture_cdf in Triton: tiles of [symbols, entries], a loop over components. The maths is in README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

import torch
import triton
import triton.language as tl

from vlkern.kernels.mixture_cdf.table import HALVES, ONE, REACH, STEPS, TOTAL, constant

#: Entries of a tile.
TILE = 1024
STEPS_, LAST_, TOTAL_ = tl.constexpr(STEPS), tl.constexpr(2 * STEPS * REACH), tl.constexpr(TOTAL)
REACH_, UNIT_, MOST_ = tl.constexpr(REACH), tl.constexpr(1.0 / ONE), tl.constexpr(HALVES[-1])


@triton.jit
def _divide(t, inverse):
    """floor(t / d) with inverse = 1 / d, as in csrc/mixture_cdf.h: exact."""
    return ((t + 0.5) * inverse).to(tl.int32)


@triton.jit
def _below(p_phi, p_sigma, p_means, p_scales, p_weights, at, m, k, C, K):
    """F(k) for symbols whose components lie at `at`, C apart."""
    total = tl.zeros(k.shape, tl.float64)
    for i in range(K):
        den = tl.load(p_sigma + (tl.load(p_scales + at + i * C, m, other=0).to(tl.int32) & 63))
        weight = tl.load(p_weights + at + i * C, m, other=0).to(tl.float64)
        end = REACH_ * den
        num = 256 * k + 128 - tl.load(p_means + at + i * C, m, other=0)
        t = STEPS_ * (tl.minimum(tl.maximum(num, -end), end) + end)
        inverse = 1.0 / den.to(tl.float64)
        q = tl.minimum(_divide(t.to(tl.float64), inverse), LAST_ - 1)
        base = tl.load(p_phi + q)
        step = (tl.load(p_phi + q + 1) - base).to(tl.float64)
        total += weight * (base + _divide(step * (t - q * den).to(tl.float64), inverse)).to(tl.float64)
    return (total * (1.0 / 4096)).to(tl.int32)


@triton.jit
def _rows(
    p_phi,
    p_sigma,
    p_means,
    p_scales,
    p_weights,
    p_low,
    p_out,
    N,
    C,
    K,
    SIZE,
    SYMBOLS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * SYMBOLS + tl.arange(0, SYMBOLS)[:, None]  # [SYMBOLS, 1]
    j = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)[None, :]  # [1, ENTRIES]
    m = s < N
    at = s // C * (K * C) + s % C
    low = tl.load(p_low + s, m, other=0)
    start = _below(p_phi, p_sigma, p_means, p_scales, p_weights, at, m, low - 1, C, K)
    below = _below(p_phi, p_sigma, p_means, p_scales, p_weights, at, m, low + (j - 1), C, K)
    share = (below - start).to(tl.float64) * (TOTAL_ - 1 - SIZE)
    row = tl.where(j > SIZE, TOTAL_, (share * UNIT_).to(tl.int32) + j)
    tl.store(p_out + s * (SIZE + 2) + j, row, m & (j < SIZE + 2))


@triton.jit
def _window(p_sigma, p_means, p_scales, p_weights, p_low, p_half, N, C, K, SYMBOLS: tl.constexpr):
    s = tl.program_id(0).to(tl.int64) * SYMBOLS + tl.arange(0, SYMBOLS)  # [SYMBOLS]
    m = s < N
    at = s // C * (K * C) + s % C
    total = tl.zeros(s.shape, tl.int64)
    for i in range(K):
        weight = tl.load(p_weights + at + i * C, m, other=0).to(tl.int64)
        total += weight * tl.load(p_means + at + i * C, m, other=0)
    centre = ((total + (1 << 19)) >> 20).to(tl.int32)
    reach = tl.zeros(s.shape, tl.int32)
    for i in range(K):
        den = tl.load(p_sigma + (tl.load(p_scales + at + i * C, m, other=0).to(tl.int32) & 63))
        needed = tl.abs(tl.load(p_means + at + i * C, m, other=0) - 256 * centre) + 6 * den
        reach = tl.maximum(reach, tl.where(tl.load(p_weights + at + i * C, m, other=0) > 0, needed, 0))
    half = tl.full(s.shape, 8, tl.int32)
    for _ in range(6):
        half = tl.where((half < MOST_) & (256 * half < reach), 2 * half, half)
    tl.store(p_low + s, centre - half, m)
    tl.store(p_half + s, half, m)


def _tables(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return constant("phi", torch.int32, like), constant("sigma", torch.int32, like)


def mixture_cdf(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, size: int
) -> torch.Tensor:
    """See reference.py."""
    means, scales, weights, low = (t.contiguous() for t in (means, scales, weights, low))
    out = torch.empty((*low.shape, size + 2), dtype=torch.int32, device=low.device)
    if n := low.numel():
        entries = min(TILE, triton.next_power_of_2(size + 2))
        symbols = TILE // entries
        grid = triton.cdiv(n, symbols), triton.cdiv(size + 2, entries)
        sizes = n, means.shape[-1], means.shape[-2], size, symbols, entries
        _rows[grid](*_tables(means), means, scales, weights, low, out, *sizes, num_warps=4)
    return out


def mixture_window(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    means, scales, weights = (t.contiguous() for t in (means, scales, weights))
    low = torch.empty((*means.shape[:-2], means.shape[-1]), dtype=torch.int32, device=means.device)
    half = torch.empty_like(low)
    if n := low.numel():
        sizes = n, means.shape[-1], means.shape[-2], 128
        _window[(triton.cdiv(n, 128),)](_tables(means)[1], means, scales, weights, low, half, *sizes, num_warps=4)
    return low, half
