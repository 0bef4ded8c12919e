"""Draws from mixtures of Gaussians in Triton: a program chooses the components of a token and draws from them."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern.kernels.gmm_sample.reference import NARROW, REACH


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    components: int
    """Logits of a tile, a power of two: all k."""
    channels: int
    """Dimensions of a program: all d of a joint mixture, which have one component; otherwise as many as 2048 logits."""
    warps: int


def pick(k: int, d: int, joint: bool) -> Config:
    """For k components of d dimensions."""
    components, channels = triton.next_power_of_2(k), triton.next_power_of_2(d)
    if not joint:
        channels = min(channels, max(1, 2048 // components))
    tile = components + channels if joint else components * channels
    return Config(components, channels, max(1, min(8, tile // 256)))


@triton.jit
def _choose(p_logits, at, u, m_at, k, temperature, K: tl.constexpr):
    # at, u, m_at [I] -> component [I]: the first whose cumulated weight exceeds u
    j = tl.arange(0, K)
    b_l = tl.load(p_logits + at[:, None] + j[None, :], m_at[:, None] & (j < k)[None, :], other=float("-inf"))
    b_l = tl.where(m_at[:, None], b_l.to(tl.float32), 0.0)  # [I, K]
    weights = tl.exp((b_l - tl.max(b_l, 1)[:, None]) * temperature)
    below = tl.cumsum(weights, 1)
    total = tl.max(below, 1)[:, None]
    return tl.sum(((below <= u[:, None] * total) & (below < total)).to(tl.int32), 1)


@triton.jit
def _scale(raw, least, temperature):
    # beyond 2^13 the 4 is below rounding, and raw^2 may overflow
    a = tl.abs(raw)
    large = 0.5 * a + 0.5 * tl.where(a > 8192.0, a, tl.sqrt(a * a + 4.0))
    return tl.maximum(tl.where(raw < 0.0, 1.0 / large, large), least) * temperature


@triton.jit
def _gauss(p_params, at, gap, m, least, temperature):
    loc = tl.load(p_params + at, m, other=0.0).to(tl.float32)
    return loc, _scale(tl.load(p_params + at + gap, m, other=0.0).to(tl.float32), least, temperature)


@triton.jit
def _draw(
    p_params, p_without, p_u, p_eps, p_tries, p_chances, p_z, N, rounds, w, temperature, mixture_temperature, least,
    k: tl.constexpr, D: tl.constexpr, JOINT: tl.constexpr, GUIDED: tl.constexpr, REACH: tl.constexpr,
    NARROW: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    # grid (N, ceil(D / J)): channels j of token i
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * J + tl.arange(0, J)  # [J]
    m = j < D
    if JOINT:
        row = i * (k * (1 + 2 * D))
        one = tl.zeros([1], tl.int64)
        b_u = tl.load(p_u + i + one)
        component = tl.sum(_choose(p_params, row + one, b_u, one == 0, k, mixture_temperature, K), 0)
        at, gap = row + k + component.to(tl.int64) * (2 * D) + j, D
    else:
        row = i * (3 * k * D)
        b_u = tl.load(p_u + i * D + j, m, other=0.0)
        component = _choose(p_params, row + j * k, b_u, m, k, mixture_temperature, K)
        at, gap = row + (D + j) * k + component, D * k
    loc, scale = _gauss(p_params, at, gap, m, least, temperature)
    delta = scale * tl.load(p_eps + i * D + j, m, other=0.0)
    if GUIDED:
        # As in reference.py: log p~ = c delta - a delta^2 / 2, a proposal around the conditional mean or p~ itself.
        loc_u, scale_u = _gauss(p_without, at, gap, m, least, temperature)
        scale, scale_u = tl.where(m, scale, 1.0), tl.where(m, scale_u, 1.0)
        precision = 1.0 / (scale_u * scale_u)
        a = (1.0 + w) / (scale * scale) - w * precision
        c = w * (loc - loc_u) * precision
        proposal = 2.0 * tl.maximum(scale, scale_u)
        peaked = (a > 0.0) & (tl.abs(c) <= REACH * a)
        narrow = peaked & (a * proposal * proposal > NARROW * NARROW)
        a_safe = tl.where(peaked, a, 1.0)
        mean = tl.where(peaked, c / a_safe, 0.0)
        spread = tl.where(narrow, 1.0 / tl.sqrt(a_safe), proposal)
        todo = m
        for r in range(rounds):
            from_r = (r * N + i) * D + j
            proposed = tl.where(narrow, mean, 0.0) + tl.load(p_tries + from_r, m, other=0.0) * spread
            far, off = proposed / proposal, proposed - mean
            beyond = proposed * (c - 0.5 * a * proposed) - REACH * (tl.abs(c) - 0.5 * REACH * a)
            log_ratio = tl.where(peaked, -0.5 * a * off * off, beyond) + 0.5 * far * far
            chance = tl.log(tl.load(p_chances + from_r, m, other=1.0))
            accepted = todo & (chance < tl.where(narrow, -log_ratio, log_ratio))
            delta = tl.where(accepted, proposed, delta)
            todo = todo & ~accepted
    tl.store(p_z + i * D + j, loc + delta, m)


def gmm_sample(
    params: torch.Tensor,
    uniform: torch.Tensor,
    eps: torch.Tensor,
    dims: int,
    joint: bool,
    temperature: float,
    mixture_temperature: float,
    min_scale: float,
    guided: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """See reference.py; guided: unconditional, tries, chances and guidance of the other op."""
    params, uniform, eps = params.contiguous(), uniform.contiguous(), eps.contiguous()
    n, width = params.shape
    k = width // (1 + 2 * dims if joint else 3 * dims)
    z = torch.empty_like(eps)
    if n:
        c = pick(k, dims, joint)
        without, tries, chances, w = guided or (params, eps, eps, 0.0)
        rounds = tries.shape[0] if guided else 0
        _draw[(n, triton.cdiv(dims, c.channels))](
            params, without.contiguous(), uniform, eps, tries.contiguous(), chances.contiguous(), z, n, rounds, w,
            temperature, mixture_temperature, min_scale, k, dims, joint, guided is not None, REACH, NARROW,
            c.components, c.channels, num_warps=c.warps,
        )  # fmt: skip
    return z


def gmm_guided_sample(
    params: torch.Tensor,
    unconditional: torch.Tensor,
    uniform: torch.Tensor,
    eps: torch.Tensor,
    tries: torch.Tensor,
    chances: torch.Tensor,
    dims: int,
    joint: bool,
    guidance: float,
    temperature: float,
    mixture_temperature: float,
    min_scale: float,
) -> torch.Tensor:
    """See reference.py."""
    guided = unconditional, tries, chances, guidance
    return gmm_sample(params, uniform, eps, dims, joint, temperature, mixture_temperature, min_scale, guided)
