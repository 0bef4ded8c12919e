"""mixture_bits in Triton: one pass over the parameters forward, two backward. The maths is in README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip

# log 0.11, log 256 and -1 / log 2; what every logit is above and every exponent below
_LOWEST, _HIGHEST = tl.constexpr(-2.20727491), tl.constexpr(5.54517746)
_BITS = tl.constexpr(-1.44269504)
_FIRST = tl.constexpr(3.0e38)


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    block: int
    """Symbols of a program."""
    warps: int


def pick(numel: int, on: Chip) -> Config:
    """Two symbols a thread hide the latency of loads; fewer where SMs would be without work."""
    fair = triton.next_power_of_2(triton.cdiv(numel, 8 * on.sms))
    block = max(64, min(256, fair))
    return Config(block, max(1, block // 64))


@triton.jit
def _tail_ratio(t):
    """R(x) = exp(x^2 / 2) Q(x) from t = 1 / (1 + 0.32 x), to 4e-7 of itself."""
    p = -0.0210781749 * t + 0.0954072773
    p = p * t - 0.14670749
    p = p * t + 0.065328046
    p = p * t - 0.00937757920
    p = p * t + 0.0586539693
    p = p * t + 0.0878290981
    p = p * t + 0.114622362
    p = p * t + 0.127660945
    p = p * t + 0.127661526
    return p * t


@triton.jit
def _interval(away, raw):
    """Of one component: P = density exp(-exponent), d log P / dy and d log P / d log s. See README.md."""
    raw = tl.where(raw < _LOWEST, _LOWEST, raw)  # NaN stays NaN
    raw = tl.where(raw > _HIGHEST, _HIGHEST, raw)
    inverse = tl.exp(-raw)
    far = tl.abs(away) * inverse
    d = tl.where(far > 128.0, 128.0, far)
    far = tl.where(far > 1.0e9, 1.0e9, far)
    h = 0.5 * inverse
    a = d - h
    b = d + h
    u = d * h
    root = tl.exp(-u)
    fall = root * root
    inside = a < 0.0
    ratio = _tail_ratio(1.0 / (1.0 + 0.32 * tl.abs(a)))
    tail = fall * _tail_ratio(1.0 / (1.0 + 0.32 * b))
    within = tl.where(inside, tl.exp(-0.5 * a * a), 1.0)
    density = tl.where(inside, 1.0 - within * (ratio + tail), ratio - tail)
    # A short interval: series in w = (d h)^2 and v = h^2 / 2.
    short = (h < 0.25) & (u < 0.25)
    w = u * u
    v = 0.5 * h * h
    series = 1.0 + v * (0.666666667 + v * (0.266666667 + v * 0.0761904762))
    series += w * (0.166666667 + v * (0.0666666667 + v * 0.0190476190))
    series += w * w * (0.00833333333 + v * 0.00238095238 + w * 0.000198412698)
    by_w = 0.166666667 + v * (0.0666666667 + v * 0.0190476190)
    by_w += w * (0.0166666667 + v * 0.00476190476 + w * 0.000595238095)
    by_v = 0.666666667 + v * (0.533333333 + v * 0.228571429)
    by_v += w * (0.0666666667 + v * 0.0380952381 + w * 0.00238095238)
    density = tl.where(short, within * (0.797884561 * h * root * series), density)
    edge = 0.398942280 * within / density
    slope = tl.where(short, d * (4.0 * v * by_w / series - 1.0), (fall - 1.0) * edge) * inverse
    slow = d * d - 1.0 + 2.0 * v - (4.0 * w * by_w + 2.0 * v * by_v) / series
    of_scale = tl.where(short, slow, (a - fall * b) * edge)
    exponent = tl.where(inside, 0.0, 0.5 * (far - h) * (far - h))
    return density, exponent, tl.where(away < 0.0, -slope, slope), of_scale


@triton.jit
def _sums(p_params, at, m, y, K, C):
    """Over components: the largest logit, sum of exp(logit - it); the least exponent, sum of densities beyond it."""
    most = tl.full(y.shape, -_FIRST, tl.float32)
    for k in range(K):
        most = tl.maximum(most, tl.load(p_params + at + k * C, m, other=0.0).to(tl.float32))
    prior = tl.zeros(y.shape, tl.float32)
    least = tl.full(y.shape, _FIRST, tl.float32)
    mass = tl.zeros(y.shape, tl.float32)
    for k in range(K):
        below = tl.load(p_params + at + k * C, m, other=0.0).to(tl.float32) - most
        mean = tl.load(p_params + at + (K + k) * C, m, other=0.0).to(tl.float32)
        raw = tl.load(p_params + at + (2 * K + k) * C, m, other=0.0).to(tl.float32)
        density, exponent, _, _ = _interval(y - mean, raw)
        prior += tl.exp(below)
        exponent -= below
        low = tl.minimum(least, exponent)
        mass = mass * tl.exp(low - least) + density * tl.exp(low - exponent)
        least = low
    return most, prior, least, mass


@triton.jit
def _places(N, K, C, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    return i, i < N, (i // C) * (3 * K * C) + i % C


@triton.jit
def _fwd(p_y, p_params, p_bits, N, K, C, BLOCK: tl.constexpr):
    # grid (ceil(N / BLOCK),): BLOCK of N symbols
    i, m, at = _places(N, K, C, BLOCK)
    y = tl.load(p_y + i, m, other=0.0).to(tl.float32)
    _, prior, least, mass = _sums(p_params, at, m, y, K, C)
    bits = (least + tl.log(prior / mass)) * -_BITS
    bits = tl.where(bits < 0.0, 0.0, bits)
    tl.store(p_bits + i, tl.where(bits > 29.8973529, 29.8973529, bits), m)


@triton.jit
def _bwd(p_g, p_y, p_params, p_dy, p_dparams, N, K, C, BLOCK: tl.constexpr):
    # grid (ceil(N / BLOCK),): all gradients of BLOCK symbols
    i, m, at = _places(N, K, C, BLOCK)
    y = tl.load(p_y + i, m, other=0.0).to(tl.float32)
    g = tl.load(p_g + i, m, other=0.0) * _BITS
    most, prior, least, mass = _sums(p_params, at, m, y, K, C)
    dy = tl.zeros([BLOCK], tl.float32)
    to = p_dparams.dtype.element_ty
    for k in range(K):
        below = tl.load(p_params + at + k * C, m, other=0.0).to(tl.float32) - most
        mean = tl.load(p_params + at + (K + k) * C, m, other=0.0).to(tl.float32)
        raw = tl.load(p_params + at + (2 * K + k) * C, m, other=0.0).to(tl.float32)
        density, exponent, of_symbol, of_scale = _interval(y - mean, raw)
        share = g * density * tl.exp(least - (exponent - below)) / mass
        pull = share * of_symbol
        dy += pull
        scale = share * of_scale
        outward = ((raw < _LOWEST) & (scale >= 0.0)) | ((raw > _HIGHEST) & (scale <= 0.0))
        tl.store(p_dparams + at + k * C, (share - g * tl.exp(below) / prior).to(to), m)
        tl.store(p_dparams + at + (K + k) * C, (-pull).to(to), m)
        tl.store(p_dparams + at + (2 * K + k) * C, tl.where(outward, 0.0, scale).to(to), m)
    tl.store(p_dy + i, dy.to(p_dy.dtype.element_ty), m)


def mixture_bits(symbols: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    symbols, params = symbols.contiguous(), params.contiguous()
    bits, n = symbols.new_empty(symbols.shape, dtype=torch.float32), symbols.numel()
    if n:
        c = pick(n, chip(symbols.device))
        _fwd[(triton.cdiv(n, c.block),)](symbols, params, bits, n, *params.shape[2:], c.block, num_warps=c.warps)
    return bits


def mixture_bits_backward(
    grad: torch.Tensor, symbols: torch.Tensor, params: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    grad, symbols, params = grad.contiguous(), symbols.contiguous(), params.contiguous()
    d_symbols, d_params, n = torch.empty_like(symbols), torch.empty_like(params), symbols.numel()
    if n:
        c = pick(n, chip(symbols.device))
        _bwd[(triton.cdiv(n, c.block),)](
            grad, symbols, params, d_symbols, d_params, n, *params.shape[2:], c.block, num_warps=c.warps
        )
    return d_symbols, d_params
