"""gmm_nll in Triton, and the steps that linear_gmm_nll takes of it. The maths is in README.md.

Joint mixtures take a kernel over all parameters (`_weights`, `_slopes`), whose programs hold a block of components of
one token, and a small one over [N, k] numbers (`_sums`, `_shares`). Every sum has a fixed order: no atomics.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    components: int
    """Of a tile."""
    dims: int
    """Of a tile; a program goes through all of them."""
    tokens: int
    """Whose components the small kernels reduce together."""
    row: int
    """Components that they take at a time."""
    channels: int
    """Mixtures of one dimension in a program."""
    warps: int


def pick(k: int, d: int) -> Config:
    """For k components of d dimensions: tiles of 2048 parameters, 16 for each thread of four warps."""
    dims = min(128, triton.next_power_of_2(d))
    components = min(triton.next_power_of_2(k), max(1, 2048 // dims))
    row = min(1024, triton.next_power_of_2(k))
    warps = max(1, min(4, components * dims // 512))
    return Config(components, dims, max(1, 512 // row), row, max(1, 512 // triton.next_power_of_2(k)), warps)


@triton.jit
def _scale(x, least):
    """s = max(squareplus(x), least), 1 / s, and d log(s) / dx: 1 / h, or 0 below least."""
    size = tl.abs(x)
    near = tl.where(size > 1.0e18, 1.0e18, size)  # beyond, h is |x|
    square = near * near + 4.0
    y = tl.rsqrt(square)
    h = square * y
    h += 0.5 * y * (square - h * h)
    large = 0.5 * (near + h)
    large = tl.where(size > large, size, large)
    small = 1.0 / large
    free = tl.where(x < 0.0, small, large)
    low = free < least
    inverse = tl.where(x < 0.0, large, small)
    slope = tl.where(low, 0.0, tl.where(y > small, small, y))
    return tl.where(low, least, free), tl.where(low, 1.0 / least, inverse), slope


@triton.jit
def _distance(z, loc, inverse):
    """u within its bounds; NaN stays."""
    u = (z - loc) * inverse
    u = tl.where(u > 1.0e18, 1.0e18, u)
    return tl.where(u < -1.0e18, -1.0e18, u)


@triton.jit
def _weights(
    p_logits, p_parts, p_z, p_w, logit_row, part_row, w_row, K, D, least, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    # grid (N, ceil(K / BK)): w [BK] = logit + log N of some components of token n
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BK + tl.arange(0, BK)  # [BK]
    m = i < K
    total = tl.zeros([BK, BD], tl.float32)
    for start in range(0, D, BD):
        j = start + tl.arange(0, BD)  # [BD]
        mask = m[:, None] & (j < D)[None, :]
        at = p_parts + n * part_row + i[:, None] * (2 * D) + j[None, :]
        z = tl.load(p_z + n * D + j, j < D, other=0.0).to(tl.float32)
        loc = tl.load(at, mask, other=0.0).to(tl.float32)
        s, inverse, _ = _scale(tl.load(at + D, mask, other=0.0).to(tl.float32), least)
        u = _distance(z[None, :], loc, inverse)
        total += tl.where(mask, tl.log(s) + 0.5 * u * u + 0.918938533, 0.0)
    logits = tl.load(p_logits + n * logit_row + i, m, other=0.0).to(tl.float32)
    tl.store(p_w + n * w_row + i, logits - tl.sum(total, 1), m)


@triton.jit
def _sum(p_x, row, n, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """Of rows n [BN] of x [N, K]: the largest number and the sum of exp(x - largest)."""
    most = tl.full([BN], _LOWEST, tl.float32)
    exps = tl.zeros([BN], tl.float32)
    for start in range(0, K, BK):
        i = start + tl.arange(0, BK)  # [BK]
        mask = (n < N)[:, None] & (i < K)[None, :]
        x = tl.load(p_x + n[:, None] * row + i[None, :], mask, other=_LOWEST).to(tl.float32)
        top = tl.maximum(most, tl.max(x, 1))
        each = tl.where((i < K)[None, :], tl.exp(x - top[:, None]), 0.0)
        exps = exps * tl.exp(most - top) + tl.sum(each, 1)
        most = top
    return most, exps


@triton.jit
def _sums(p_logits, p_w, p_nll, logit_row, N, K, BN: tl.constexpr, BK: tl.constexpr):
    # grid (ceil(N / BN),): nll of BN tokens
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    most, exps = _sum(p_w, K, n, N, K, BN, BK)
    prior, prior_exps = _sum(p_logits, logit_row, n, N, K, BN, BK)
    tl.store(p_nll + n, (prior - most) + (tl.log(prior_exps) - tl.log(exps)), n < N)


@triton.jit
def _shares(
    p_grad, p_logits, p_w, p_share, p_dlogits, logit_row, d_row, N, K, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    # grid (ceil(N / BN),): g softmax(w) and dL/dlogits of BN tokens
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    most, exps = _sum(p_w, K, n, N, K, BN, BK)
    prior, prior_exps = _sum(p_logits, logit_row, n, N, K, BN, BK)
    g = tl.load(p_grad + n, n < N, other=0.0)
    for start in range(0, K, BK):
        i = start + tl.arange(0, BK)  # [BK]
        mask = (n < N)[:, None] & (i < K)[None, :]
        w = tl.load(p_w + n[:, None] * K + i[None, :], mask, other=_LOWEST)
        logits = tl.load(p_logits + n[:, None] * logit_row + i[None, :], mask, other=_LOWEST).to(tl.float32)
        x = w - most[:, None]
        share = tl.where(x < -87.0, 0.0, tl.exp(x)) * (g / exps)[:, None]
        d = tl.exp(logits - prior[:, None]) * (g / prior_exps)[:, None] - share
        tl.store(p_share + n[:, None] * K + i[None, :], share, mask)
        tl.store(p_dlogits + n[:, None] * d_row + i[None, :], d.to(p_dlogits.dtype.element_ty), mask)


@triton.jit
def _slopes(
    p_share, p_parts, p_z, p_dparts, p_dz, share_row, part_row, d_row, K, D, least, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    # grid (N, B = ceil(K / BK)): gradients of some components of token n, and theirs of the target, dz [N, B, D]
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BK + tl.arange(0, BK)  # [BK]
    m = i < K
    share = tl.load(p_share + n * share_row + i, m, other=0.0)
    for start in range(0, D, BD):
        j = start + tl.arange(0, BD)  # [BD]
        mask = m[:, None] & (j < D)[None, :]
        # What has no share is not even read: of most components the gradient is zero.
        wanted = mask & (share != 0.0)[:, None]
        inside = i[:, None] * (2 * D) + j[None, :]
        at = p_parts + n * part_row + inside
        z = tl.load(p_z + n * D + j, j < D, other=0.0).to(tl.float32)
        loc = tl.load(at, wanted, other=0.0).to(tl.float32)
        _, inverse, slope = _scale(tl.load(at + D, wanted, other=0.0).to(tl.float32), least)
        u = _distance(z[None, :], loc, inverse)
        pull = tl.where(wanted, share[:, None] * u * inverse, 0.0)
        raw = tl.where(wanted, share[:, None] * (1.0 - u * u) * slope, 0.0)
        to = p_dparts + n * d_row + inside
        tl.store(to, (-pull).to(p_dparts.dtype.element_ty), mask)
        tl.store(to + D, raw.to(p_dparts.dtype.element_ty), mask)
        tl.store(p_dz + (n * tl.num_programs(1) + tl.program_id(1)) * D + j, tl.sum(pull, 0), j < D)


@triton.jit
def _channel_weights(p_logits, p_loc, p_raw, p_z, row, z_row, least, R, D, K, BR: tl.constexpr, BK: tl.constexpr):
    """Of BR mixtures of one dimension: places in the parameters and masks, then the numbers that both passes need."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    i = tl.arange(0, BK)  # [BK]
    mask = (r < R)[:, None] & (i < K)[None, :]
    at = (r // D * row + r % D * K)[:, None] + i[None, :]
    logits = tl.load(p_logits + at, mask, other=0.0).to(tl.float32)
    loc = tl.load(p_loc + at, mask, other=0.0).to(tl.float32)
    s, inverse, slope = _scale(tl.load(p_raw + at, mask, other=0.0).to(tl.float32), least)
    z = tl.load(p_z + r // D * z_row + r % D, r < R, other=0.0).to(tl.float32)
    u = _distance(z[:, None], loc, inverse)
    w = tl.where(mask, logits - (tl.log(s) + 0.5 * u * u + 0.918938533), _LOWEST)
    logits = tl.where(mask, logits, _LOWEST)
    most, prior = tl.max(w, 1), tl.max(logits, 1)
    w = tl.where(mask, tl.exp(w - most[:, None]), 0.0)
    logits = tl.where(mask, tl.exp(logits - prior[:, None]), 0.0)
    return r, at, mask, logits, prior, w, most, u, inverse, slope


@triton.jit
def _channels(
    p_logits, p_loc, p_raw, p_z, p_nll, row, z_row, R, D, K, least, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    # grid (ceil(R / BR),): nll of BR of the R = N D mixtures, z and nll with row stride z_row
    r, _, _, logits, prior, w, most, _, _, _ = _channel_weights(
        p_logits, p_loc, p_raw, p_z, row, z_row, least, R, D, K, BR, BK
    )
    nll = (prior - most) + (tl.log(tl.sum(logits, 1)) - tl.log(tl.sum(w, 1)))
    tl.store(p_nll + r // D * z_row + r % D, nll, r < R)


@triton.jit
def _channel_slopes(
    p_grad, p_logits, p_loc, p_raw, p_z, p_dlogits, p_dloc, p_draw, p_dz, row, z_row, d_row, R, D, K, least,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # grid (ceil(R / BR),): all gradients of BR mixtures; grad, z and dz with row stride z_row
    r, _, mask, logits, _, w, _, u, inverse, slope = _channel_weights(
        p_logits, p_loc, p_raw, p_z, row, z_row, least, R, D, K, BR, BK
    )
    g = tl.load(p_grad + r // D * z_row + r % D, r < R, other=0.0)
    share = w * (g / tl.sum(w, 1))[:, None]
    d = logits * (g / tl.sum(logits, 1))[:, None] - share
    pull = share * u * inverse
    to = (r // D * d_row + r % D * K)[:, None] + tl.arange(0, BK)[None, :]
    tl.store(p_dlogits + to, d.to(p_dlogits.dtype.element_ty), mask)
    tl.store(p_dloc + to, (-pull).to(p_dloc.dtype.element_ty), mask)
    tl.store(p_draw + to, (share * (1.0 - u * u) * slope).to(p_draw.dtype.element_ty), mask)
    tl.store(p_dz + r // D * z_row + r % D, tl.sum(tl.where(mask, pull, 0.0), 1).to(p_dz.dtype.element_ty), r < R)


def weights(
    logits: torch.Tensor, parts: torch.Tensor, target: torch.Tensor, out: torch.Tensor, min_scale: float
) -> None:
    """out [N, k] = logits [N, k] + log-densities of the components in parts [N, k 2 d]. Rows may have any stride."""
    (n, k), d = logits.shape, target.shape[1]
    c = pick(k, d)
    _weights[(n, triton.cdiv(k, c.components))](
        logits, parts, target, out, logits.stride(0), parts.stride(0), out.stride(0), k, d, min_scale,
        c.components, c.dims, num_warps=c.warps,
    )  # fmt: skip


def sums(logits: torch.Tensor, log_weights: torch.Tensor, dims: int) -> torch.Tensor:
    """nll [N] from logits and log weights [N, k]."""
    n, k = log_weights.shape
    nll, c = log_weights.new_empty(n), pick(k, dims)
    _sums[(triton.cdiv(n, c.tokens),)](logits, log_weights, nll, logits.stride(0), n, k, c.tokens, c.row)
    return nll


def shares(
    grad: torch.Tensor, logits: torch.Tensor, log_weights: torch.Tensor, d_logits: torch.Tensor, dims: int
) -> torch.Tensor:
    """grad softmax(log_weights) [N, k]; d_logits, which may be logits, is written."""
    n, k = log_weights.shape
    result, c = torch.empty_like(log_weights), pick(k, dims)
    _shares[(triton.cdiv(n, c.tokens),)](
        grad, logits, log_weights, result, d_logits, logits.stride(0), d_logits.stride(0), n, k, c.tokens, c.row
    )
    return result


def slopes(
    share: torch.Tensor, parts: torch.Tensor, target: torch.Tensor, d_parts: torch.Tensor, min_scale: float
) -> torch.Tensor:
    """Gradients of components with these shares, into d_parts, which may be parts. Returns the target's, float32."""
    (n, k), d = share.shape, target.shape[1]
    c = pick(k, d)
    blocks = triton.cdiv(k, c.components)
    of_target = torch.empty(n, blocks, d, dtype=torch.float32, device=share.device)
    _slopes[(n, blocks)](
        share, parts, target, d_parts, of_target, share.stride(0), parts.stride(0), d_parts.stride(0), k, d,
        min_scale, c.components, c.dims, num_warps=c.warps,
    )  # fmt: skip
    return of_target[:, 0] if blocks == 1 else of_target.sum(1)


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def channels(parts: Three, target: torch.Tensor, nll: torch.Tensor, k: int, min_scale: float) -> None:
    """nll [N, d] of mixtures of one dimension; parts: logits, loc, raw [N, d k] with one stride; nll as target."""
    n, d = target.shape
    c = pick(k, d)
    _channels[(triton.cdiv(n * d, c.channels),)](
        *parts, target, nll, parts[0].stride(0), target.stride(0), n * d, d, k, min_scale,
        c.channels, triton.next_power_of_2(k),
    )  # fmt: skip


def channel_slopes(
    grad: torch.Tensor, parts: Three, target: torch.Tensor, d_parts: Three, d_target: torch.Tensor, k: int,
    min_scale: float,
) -> None:  # fmt: skip
    """Their gradients; grad, target and d_target [N, d] have one stride; d_parts may be parts' places elsewhere."""
    n, d = target.shape
    c = pick(k, d)
    _channel_slopes[(triton.cdiv(n * d, c.channels),)](
        grad, *parts, target, *d_parts, d_target, parts[0].stride(0), target.stride(0), d_parts[0].stride(0),
        n * d, d, k, min_scale, c.channels, triton.next_power_of_2(k),
    )  # fmt: skip


def gmm_nll(
    params: torch.Tensor, target: torch.Tensor, joint: bool, min_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    params, target = params.contiguous(), target.contiguous()
    (n, p), d = params.shape, target.shape[1]
    k = p // (1 + 2 * d) if joint else p // (3 * d)
    log_weights = params.new_empty(n, k if joint else 0, dtype=torch.float32)
    nll = params.new_empty((n,) if joint else (n, d), dtype=torch.float32)
    if not n:
        return nll, log_weights
    if not joint:
        logits, loc, raw = params.chunk(3, 1)
        channels((logits, loc, raw), target, nll, k, min_scale)
        return nll, log_weights
    weights(params[:, :k], params[:, k:], target, log_weights, min_scale)
    return sums(params[:, :k], log_weights, d), log_weights


def gmm_nll_backward(
    grad: torch.Tensor,
    params: torch.Tensor,
    target: torch.Tensor,
    log_weights: torch.Tensor,
    joint: bool,
    min_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    grad, params, target = grad.contiguous(), params.contiguous(), target.contiguous()
    d_params, d_target, d = torch.empty_like(params), torch.empty_like(target), target.shape[1]
    if not params.shape[0]:
        return d_params, d_target
    if not joint:
        (logits, loc, raw), (d_logits, d_loc, d_raw) = params.chunk(3, 1), d_params.chunk(3, 1)
        k = logits.shape[1] // d
        channel_slopes(grad, (logits, loc, raw), target, (d_logits, d_loc, d_raw), d_target, k, min_scale)
        return d_params, d_target
    k = log_weights.shape[1]
    share = shares(grad, params[:, :k], log_weights.contiguous(), d_params[:, :k], d)
    of_target = slopes(share, params[:, k:], target, d_params[:, k:], min_scale)
    return d_params, of_target.to(target.dtype, copy=True).contiguous()
