"""Affine couplings in Triton: one pass over memory each way, with the permutations in the loads and stores.

A program takes a tile of one example's x [N, K]. `slots` says for every token and channel where it stands in the part
that changes, or -1. Each tile leaves its share of the logdet, and these are added in the order of the tiles.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip

_ELEMENTS = 2048


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    rows: int
    """Tokens of a tile."""
    block: int
    """Channels of a tile, a power of two."""
    warps: int


def pick(shape: tuple[int, int, int], on: Chip) -> Config:
    """For x [B, N, K]: 16 elements a thread, or smaller tiles where those would leave SMs without work."""
    b, n, k = shape
    fair = triton.next_power_of_2(triton.cdiv(b * n * k, 8 * on.sms))
    elements = max(512, min(_ELEMENTS, fair))
    block = min(elements, triton.next_power_of_2(k))
    rows = min(elements // block, triton.next_power_of_2(n))
    return Config(rows, block, max(1, rows * block // 512))


@triton.jit
def _place(N, K, p_slot, p_channel_slot, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    # The program's example b, its tile of x, and for each element whether it changes and row and column of the part.
    cols = tl.cdiv(K, BLOCK)
    tile = tl.program_id(0) // cols
    tiles = tl.cdiv(N, ROWS)
    b = (tile // tiles).to(tl.int64)
    i = tile % tiles * ROWS + tl.arange(0, ROWS)  # [ROWS]
    j = tl.program_id(0) % cols * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = (i < N)[:, None] & (j < K)[None, :]
    at = (b * N + i)[:, None] * K + j[None, :]
    s, t = i, j
    if TOKENS:
        s = tl.load(p_slot + i, i < N, other=-1)
    if CHANNELS:
        t = tl.load(p_channel_slot + j, j < K, other=-1)
    changes = m & (s >= 0)[:, None] & (t >= 0)[None, :]
    return b, at, m, changes, s.to(tl.int64)[:, None], t[None, :]


@triton.jit
def _sigmoid(r):
    # of r, of -r, and the logarithm of the first; it stops at e^-87
    e = tl.exp(-tl.minimum(tl.abs(r), 87.0))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    log = tl.minimum(r, 0.0) - tl.log(1.0 + e)
    return tl.where(r < 0.0, small, inverse), tl.where(r < 0.0, inverse, small), log


@triton.jit
def _map(
    p_x, p_u, p_r, p_y, p_y2, p_sums, p_slot, p_channel_slot, N, K, n, k, u_b, u_s, r_b, r_s, S, log_S,
    INVERSE: tl.constexpr, APART: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B ceil(N / ROWS) ceil(K / BLOCK),); u and r [B, n, k] have strides (b, s, 1); y2 only if APART
    b, at, m, changes, s, t = _place(N, K, p_slot, p_channel_slot, TOKENS, CHANNELS, ROWS, BLOCK)
    b_x = tl.load(p_x + at, m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_u = tl.load(p_u + b * u_b + s * u_s + t, changes, other=0.0).to(tl.float32)
    b_r = tl.load(p_r + b * r_b + s * r_s + t, changes, other=0.0).to(tl.float32)
    scale, _, log = _sigmoid(b_r)
    b_y = b_x / (S * scale) - b_u if INVERSE else (b_x + b_u) * (S * scale)
    tl.store(p_y + at, tl.where(changes, b_y, b_x).to(p_y.dtype.element_ty), m)
    if APART:
        tl.store(p_y2 + (b * n + s) * k + t, b_y.to(p_y2.dtype.element_ty), changes)
    total = tl.sum(tl.sum(tl.where(changes, log + log_S, 0.0), 1), 0)
    tl.store(p_sums + tl.program_id(0), -total if INVERSE else total)


@triton.jit
def _bwd(
    p_g, p_dl, p_y, p_r, p_dx, p_du, p_dr, p_slot, p_channel_slot, N, K, n, k, r_b, r_s, S,
    PART: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid as _map; y [B, n, k] is what changed; du only where that is a PART
    b, at, m, changes, s, t = _place(N, K, p_slot, p_channel_slot, TOKENS, CHANNELS, ROWS, BLOCK)
    b_g = tl.load(p_g + at, m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    of_part = (b * n + s) * k + t
    b_y = tl.load(p_y + of_part, changes, other=0.0).to(tl.float32)
    b_r = tl.load(p_r + b * r_b + s * r_s + t, changes, other=0.0).to(tl.float32)
    scale, one_minus, _ = _sigmoid(b_r)
    b_dx = b_g * (S * scale)
    b_dr = (b_g * b_y + tl.load(p_dl + b)) * one_minus
    tl.store(p_dx + at, tl.where(changes, b_dx, b_g).to(p_dx.dtype.element_ty), m)
    tl.store(p_dr + of_part, b_dr.to(p_dr.dtype.element_ty), changes)
    if PART:
        tl.store(p_du + of_part, b_dx.to(p_du.dtype.element_ty), changes)


def _slots(indices: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """[size] int32: where each stands among the indices, or -1."""
    if indices is None:
        return None
    slots = torch.full((size,), -1, dtype=torch.int32, device=indices.device)
    order = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device)
    return slots.scatter_(0, indices.long(), order)


def _rows(t: torch.Tensor, part: tuple[int, int, int]) -> torch.Tensor:
    """`t` as [B, n, k] with its rows in one piece: in place where it is contiguous or half of such a tensor."""
    if t.shape != part or t.stride(2) != 1:
        t = t.contiguous()
    return t.view(part)


class _Launch(NamedTuple):
    shape: tuple[int, int, int]
    """Of x: [B, N, K]; without index vectors [B, 1, K], unless shift or raw_scale has gaps between its rows."""
    part: tuple[int, int, int]
    slots: tuple[torch.Tensor | None, torch.Tensor | None]
    config: Config

    @property
    def grid(self) -> tuple[int]:
        b, n, k = self.shape
        return (b * triton.cdiv(n, self.config.rows) * triton.cdiv(k, self.config.block),)

    @property
    def options(self) -> dict[str, int | bool]:
        tokens, channels = self.slots
        c = self.config
        return {
            "TOKENS": tokens is not None, "CHANNELS": channels is not None,
            "ROWS": c.rows, "BLOCK": c.block, "num_warps": c.warps,
        }  # fmt: skip


def _launch(
    x: torch.Tensor, sides: list[torch.Tensor], tokens: torch.Tensor | None, channels: torch.Tensor | None
) -> _Launch:
    b = x.shape[0]
    if tokens is None and channels is None and (x.dim() != 3 or all(t.is_contiguous() for t in sides)):
        shape = part = (b, 1, x[0].numel() if b else 0)
    else:
        shape = (b, x.shape[1], x.shape[2])
        part = (b, shape[1] if tokens is None else len(tokens), shape[2] if channels is None else len(channels))
    slots = _slots(tokens, shape[1]), _slots(channels, shape[2])
    return _Launch(shape, part, slots, pick(shape, chip(x.device)))


def _both_ways(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
    *,
    inverse: bool = False,
    apart: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    y, logdet = torch.empty_like(x), x.new_zeros(x.shape[0], dtype=torch.float32)
    y2 = torch.empty_like(raw, memory_format=torch.contiguous_format) if apart else y
    if x.numel():
        at = _launch(x, [shift, raw], tokens, channels)
        u, r = _rows(shift, at.part), _rows(raw, at.part)
        sums = logdet.new_empty(at.grid)
        _map[at.grid](
            x, u, r, y, y2, sums, *at.slots, *at.shape[1:], *at.part[1:], *u.stride()[:2], *r.stride()[:2],
            max_scale, math.log(max_scale), inverse, apart, **at.options,
        )  # fmt: skip
        logdet = sums.view(x.shape[0], -1).sum(1)
    return y, logdet, y2


def affine_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    return _both_ways(x, shift, raw, tokens, channels, max_scale)[:2]


def affine_coupling_part(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    return _both_ways(x, shift, raw, tokens, channels, max_scale, apart=True)


def affine_coupling_inverse(
    y: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    return _both_ways(y, shift, raw, tokens, channels, max_scale, inverse=True)[:2]


def affine_coupling_part_backward(
    grad: torch.Tensor,
    grad_logdet: torch.Tensor,
    y2: torch.Tensor,
    raw: torch.Tensor,
    tokens: torch.Tensor | None,
    channels: torch.Tensor | None,
    max_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    grad, grad_logdet, y2 = grad.contiguous(), grad_logdet.contiguous(), y2.contiguous()
    dx, draw = torch.empty_like(grad), torch.empty_like(raw, memory_format=torch.contiguous_format)
    part = tokens is not None or channels is not None
    dshift = torch.empty_like(draw) if part else dx
    if grad.numel():
        at = _launch(grad, [raw], tokens, channels)
        r = _rows(raw, at.part)
        _bwd[at.grid](
            grad, grad_logdet, y2, r, dx, dshift, draw, *at.slots, *at.shape[1:], *at.part[1:], *r.stride()[:2],
            max_scale, part, **at.options,
        )  # fmt: skip
    return dx, dshift, draw


def affine_coupling_backward(
    grad: torch.Tensor, grad_logdet: torch.Tensor, y: torch.Tensor, raw: torch.Tensor, max_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    dx, _, draw = affine_coupling_part_backward(grad, grad_logdet, y, raw, None, None, max_scale)
    return dx, draw
