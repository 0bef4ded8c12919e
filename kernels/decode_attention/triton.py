"""Decode attention in Triton: a program for each part of a row's keys, then one kernel that adds the parts up.

What counts is bytes in flight: about 30 KB per SM hide the latency of an H200's memory. Two programs an SM with three
stages of about 32 KB each have twice that. The queries that share a key head are the rows of one tile, at least 16
of them, so that every key and value is read once (for each 64 queries) and multiplied on the tensor cores.

The parts are added up by a kernel of its own, not by the program that is done last: for that a counter would have to be
cleared before each call, which is a kernel as well. A cache so short that a row is one part needs no second kernel.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip
from vlkern._triton_math import tanh

_LOG2_E = 1.4426950408889634
_STAGE = 32 << 10
_EVERYTHING = 1 << 30
#: Parts and columns of a tile of _add_up.
_PARTS, _COLUMNS = 64, 64


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same shapes, dtypes and chip, whatever the lengths."""

    bm: int
    """Queries of a tile."""
    bn: int
    """Keys of a tile."""
    splits: int
    """Parts of a row at most; a short row has fewer."""
    warps: int
    stages: int


def pick(
    batch: int, key_heads: int, queries: int, span: int, widths: tuple[int, int], itemsize: int, on: Chip
) -> Config:
    """The configuration for `queries` that share each key head and see up to `span` keys of widths C and Cv."""
    bm = min(64, max(16, triton.next_power_of_2(queries)))
    columns = sum(triton.next_power_of_2(max(16, w)) for w in widths)
    bn = max(16, min(128, triton.next_power_of_2(_STAGE // (columns * itemsize))))
    stages = max(1, min(3, on.shared // 2 // (bn * columns * itemsize)))
    # At most two programs an SM, all at work at the same time; none with less than four tiles.
    fair = 2 * on.sms // max(1, batch * key_heads * triton.cdiv(queries, bm))
    splits = max(1, min(fair, triton.cdiv(span, 4 * bn)))
    return Config(bm, bn, splits, 4 if bm < 64 else 8, stages)


@triton.jit
def _load(p_x, slot, pitch, m_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `slot`, `pitch` elements apart, of WIDTH columns; zeros elsewhere."""
    d = tl.arange(0, BLOCK)
    mask = m_rows[:, None] if WIDTH == BLOCK else m_rows[:, None] & (d < WIDTH)[None, :]
    return tl.load(p_x + slot.to(tl.int64)[:, None] * pitch + d[None, :], mask, other=0)


@triton.jit(do_not_specialize=["S", "L", "group", "window"])
def _attend(
    p_q, p_k, p_v, p_length, p_ks, p_vs, p_out, p_lse, S, L, group, window, k_row, k_slot, k_head, v_row, v_slot,
    v_head, factor, cap, C: tl.constexpr, BC: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, CAPPED: tl.constexpr,
    CODED: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # grid (SPLITS, K blocks of queries, B): out [B, SPLITS, L, H, E] and lse [B, SPLITS, L, H] in units of log2
    part, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(group * L, BM)
    head, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    K = tl.num_programs(1) // blocks
    length = tl.maximum(tl.load(p_length + b), 0)
    low = tl.maximum(tl.maximum(length - L - window + 1, length - S), 0)
    chunk = tl.cdiv(tl.cdiv(length - low, SPLITS), BN) * BN
    chunk = tl.maximum(chunk, 2 * BN)
    begin = tl.minimum(low + part * chunk, length)
    end = tl.minimum(begin + chunk, length)
    if SPLITS > 1 and part > 0 and begin >= end:  # nothing left for this part: the others' sums do without it
        r = tl.arange(0, BM) + block * BM
        row = (b * SPLITS + part) * L * K * group + r // group * K * group + head * group + r % group
        tl.store(p_lse + row, tl.full([BM], float("-inf"), tl.float32), r < group * L)
        return

    # Queries of a tile: all tokens and heads that read this key head.
    r = tl.arange(0, BM) + block * BM
    m_r = r < group * L
    token = r // group
    column = head * group + r % group
    position = length - L + token
    q = _load(p_q, (b * L + token) * K * group + column, C, m_r, C, BC)  # [BM, BC]

    first = begin % S
    p_k += b * k_row + head.to(tl.int64) * k_head
    p_v += b * v_row + head.to(tl.int64) * v_head
    n = tl.arange(0, BN)
    acc = tl.zeros([BM, BE], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in range(0, tl.cdiv(end - begin, BN)):
        j = tile * BN + n
        m_j = j < end - begin
        slot = first + j
        slot = tl.where(slot < S, slot, slot - S)
        k = _load(p_k, slot, k_slot, m_j, C, BC).to(q.dtype)  # [BN, BC]
        v = _load(p_v, slot, v_slot, m_j, E, BE).to(q.dtype)  # [BN, BE]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if CODED:
            at = (b * S + slot) * K + head
            s *= tl.load(p_ks + at, m_j, other=0.0)[None, :]
        s *= factor
        if CAPPED:
            s = tanh(s) * cap
        seen = m_j[None, :] & (begin + j <= position[:, None]) & (begin + j > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        if CODED:
            p *= tl.load(p_vs + at, m_j, other=0.0)[None, :]
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = higher

    some = total > 0.0
    acc *= tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    row = ((b * SPLITS + part) * L + token) * K * group + column
    e = tl.arange(0, BE)
    tl.store(p_out + row[:, None] * E + e[None, :], acc.to(p_out.dtype.element_ty), m_r[:, None] & (e < E)[None, :])
    if SPLITS > 1:
        tl.store(p_lse + row, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf")), m_r)


@triton.jit(do_not_specialize=["rows", "splits"])
def _add_up(p_parts, p_lse, p_out, rows, splits, E: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    # grid (B L H, ceil(E / COLUMNS)): parts [B, splits, rows, E], lse [B, splits, rows] -> out [B, rows, E]
    at = tl.program_id(0).to(tl.int64)
    b, row = at // rows, at % rows
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_e = e < E
    i = tl.arange(0, PARTS)
    highest = tl.full([PARTS], float("-inf"), tl.float32)
    for start in range(0, splits, PARTS):
        part = (b * splits + start + i) * rows + row
        highest = tl.maximum(highest, tl.load(p_lse + part, start + i < splits, other=float("-inf")))
    top = tl.max(highest, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    out = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, splits, PARTS):
        part = (b * splits + start + i) * rows + row
        weight = tl.exp2(tl.load(p_lse + part, start + i < splits, other=float("-inf")) - shift)
        mask = (weight > 0.0)[:, None] & m_e[None, :]
        x = tl.load(p_parts + part[:, None] * E + e[None, :], mask, other=0.0)
        out += tl.sum(x * weight[:, None], 0)
        total += weight
    whole = tl.sum(total, 0)
    out = out / tl.where(whole > 0.0, whole, 1.0)
    tl.store(p_out + at * E + e, out.to(p_out.dtype.element_ty), m_e)


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """See reference.py."""
    q, k, v, length = q.contiguous(), _unit_columns(k), _unit_columns(v), length.contiguous()
    k_scale, v_scale = (s if s is None else s.contiguous() for s in (k_scale, v_scale))
    (batch, tokens, heads, c), (_, slots, key_heads, e) = q.shape, v.shape
    out = q.new_empty(batch, tokens, heads, e)
    if not batch:
        return out
    group = heads // key_heads
    window = min(window or _EVERYTHING, _EVERYTHING)
    span = min(slots, window + tokens - 1)
    itemsize = k.element_size() if q.dtype != torch.float32 else 4  # int8 becomes float32 in registers
    t = pick(batch, key_heads, group * tokens, span, (c, e), itemsize, chip(q.device))
    parts, lse = out, None
    if t.splits > 1:
        parts = q.new_empty(batch, t.splits, tokens, heads, e, dtype=torch.float32)
        lse = q.new_empty(batch, t.splits, tokens, heads, dtype=torch.float32)
    factor, cap = (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    _attend[(t.splits, key_heads * triton.cdiv(group * tokens, t.bm), batch)](
        q, k, v, length, k_scale, v_scale, parts, lse, slots, tokens, group, window, *k.stride()[:3], *v.stride()[:3],
        factor, cap, c, triton.next_power_of_2(max(16, c)), e, triton.next_power_of_2(max(16, e)), softcap is not None,
        k_scale is not None, t.splits, precision, t.bm, t.bn, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if lse is not None:
        _add_up[(batch * tokens * heads, triton.cdiv(e, _COLUMNS))](
            parts, lse, out, tokens * heads, t.splits, e, _PARTS, _COLUMNS, num_warps=4
        )
    return out
