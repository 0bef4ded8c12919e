"""Interval attention in Triton: streaming softmax forward, two kernels backward. The maths is in README.md.

Forward and dq: a program has BM queries of one head and walks over the tiles of BN keys from its smallest start to its
largest stop. Tiles that every query sees whole, from the largest start to the smallest stop, skip the mask test.
dk and dv: a program has BN keys of one key head and walks over the blocks of BM queries that may see them. Nothing is
added atomically, so the bits of a result do not change from call to call.

A head dim is read as one or two tiles whose widths are powers of two: 72 as 64 + 16, not as 128.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

import torch
import triton
import triton.language as tl

from vlkern._triton import chip
from vlkern._triton_math import tanh
from vlkern.kernels.interval_attention.triton_tiles import factors, pick, pitches, regular, widths

#: Blocks of queries whose bounds a program looks at together: at first for all, then among those it may need.
_SCAN, _CHUNK = 256, 32


@triton.jit
def _load(p_x, rows, pitch, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of x [.., D], `pitch` times 8 elements apart: columns [0, D1), and [D1, D1 + D2) if there are any."""
    # Times 8 last: so the compiler knows that rows begin on 8 elements and reads 16 bytes at a time.
    at = p_x + (rows * pitch * 8)[:, None]
    d1 = tl.arange(0, D1)
    x1 = tl.load(at + d1[None, :]) if D1 <= D else tl.load(at + d1[None, :], (d1 < D)[None, :], other=0.0)
    x2 = x1
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        x2 = tl.load(at + d2[None, :], (d2 < D)[None, :], other=0.0)
    return x1, x2


@triton.jit
def _store(p_x, rows, m_rows, pitch, x1, x2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The counterpart of _load, for rows that m_rows selects; `pitch` in elements."""
    at = p_x + rows.to(tl.int64)[:, None] * pitch
    d1 = tl.arange(0, D1)
    tl.store(at + d1[None, :], x1.to(p_x.dtype.element_ty), m_rows[:, None] & (d1 < D)[None, :])
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        tl.store(at + d2[None, :], x2.to(p_x.dtype.element_ty), m_rows[:, None] & (d2 < D)[None, :])


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return tl.zeros([ROWS, D1], tl.float32), tl.zeros([ROWS, D2 if D2 > 0 else 16], tl.float32)


@triton.jit
def _dots(x1, x2, y1, y2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """x [I, D] times the transpose of y [J, D]."""
    dots = tl.dot(x1, tl.trans(y1), input_precision=PRECISION)
    if D2 > 0:
        if x1.dtype == tl.float32:  # two sums, as their rounding errors grow with the number of terms
            dots += tl.dot(x2, tl.trans(y2), input_precision=PRECISION)
        else:
            dots = tl.dot(x2, tl.trans(y2), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _add(z1, z2, x, y1, y2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """z [I, D] + x [I, J] y [J, D]; x is rounded to y's dtype."""
    z1 = tl.dot(x.to(y1.dtype), y1, z1, input_precision=PRECISION)
    if D2 > 0:
        z2 = tl.dot(x.to(y1.dtype), y2, z2, input_precision=PRECISION)
    return z1, z2


@triton.jit
def _scores(dots, factor, cap, CAPPED: tl.constexpr):
    """s log2(e) from q . k, and ds / d(scale q . k)."""
    if CAPPED:
        t = tanh(dots * factor)
        return t * cap, 1.0 - t * t
    return dots * factor, dots


@triton.jit
def _interval(p_start, p_stop, i, Nq, Nk):
    """start, stop and whether there is a key between them, for queries i; none for i >= Nq."""
    start = tl.maximum(tl.load(p_start + i, i < Nq, other=0), 0)
    stop = tl.minimum(tl.load(p_stop + i, i < Nq, other=0), Nk)
    return start, stop, start < stop


@triton.jit
def _hull(start, stop, some, Nk):
    """Of the rows that see a key: the first key that one sees, the last + 1, and the same of those that all see."""
    low = tl.min(tl.where(some, start, Nk), 0)
    high = tl.max(tl.where(some, stop, 0), 0)
    inner_low = tl.max(tl.where(some, start, 0), 0)
    inner_high = tl.min(tl.where(some, stop, Nk), 0)
    return low, high, inner_low, inner_high


@triton.jit
def _split(low, high, inner_low, inner_high, BN: tl.constexpr):
    """Tiles of BN keys from `low` on: how many, and the first and last + 1 of those that need no mask."""
    tiles = tl.cdiv(tl.maximum(high - low, 0), BN)
    first = tl.minimum(tl.cdiv(tl.maximum(inner_low - low, 0), BN), tiles)
    last = tl.minimum(tl.maximum(inner_high - low, 0) // BN, tiles)
    return tiles, first, tl.maximum(first, last)


@triton.jit
def _attend(
    o1, o2, top, total, q1, q2, p_k, p_v, k_pitch, v_pitch, start, stop, low, high, first, count, skip, factor, cap,
    EDGE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr,
    E2: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Streaming softmax over `count` tiles, those from number `first` on `skip` tiles further right."""
    columns = tl.arange(0, BN)  # [BN]
    for n in range(0, count):
        left = low + tl.where(n < first, n, n + skip) * BN
        # Rows beyond the last key that counts read that one again: cheaper than a mask, and the mask on s drops them.
        rows = tl.minimum(columns, high - 1 - left) if EDGE else columns
        k1, k2 = _load(p_k + left.to(tl.int64) * k_pitch * 8, rows, k_pitch, D, D1, D2)
        v1, v2 = _load(p_v + left.to(tl.int64) * v_pitch * 8, rows, v_pitch, E, E1, E2)
        dots = _dots(q1, q2, k1, k2, D2, PRECISION)  # [BM, BN]
        if EDGE:
            s, _ = _scores(dots, factor, cap, CAPPED)
            j = left + columns
            s = tl.where((j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None]), s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        elif CAPPED:
            s, _ = _scores(dots, factor, cap, CAPPED)
            higher = tl.maximum(top, tl.max(s, 1))
            shift = higher
        else:  # factor >= 0: the largest score is that of the largest product, and s - shift is one instruction
            s = dots * factor
            higher = tl.maximum(top, tl.max(dots, 1) * factor)
            shift = higher
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(top - shift)  # [BM]
        total = total * fade + tl.sum(p, 1)
        o1, o2 = _add(o1 * fade[:, None], o2 * fade[:, None], p, v1, v2, E2, PRECISION)
        top = higher
    return o1, o2, top, total


@triton.jit(do_not_specialize=["Nq", "Nk", "group"])
def _fwd(
    p_q, p_k, p_v, p_start, p_stop, p_out, p_lse, Nq, Nk, group, q_pitch, k_pitch, v_pitch, q_head, k_head, v_head,
    factor, cap, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr,
    E2: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # grid (ceil(Nq / BM), Hq); the last rows first, as under a causal mask they see the most keys
    block, h, heads = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g = (h // group).to(tl.int64)
    i = block * BM + tl.arange(0, BM)  # [BM]
    start, stop, some = _interval(p_start, p_stop, i, Nq, Nk)
    low, high, inner_low, inner_high = _hull(start, stop, some, Nk)
    tiles, first, last = _split(low, high, inner_low, inner_high, BN)

    p_q += (block * BM).to(tl.int64) * q_pitch * 8 + h.to(tl.int64) * q_head * 8
    q1, q2 = _load(p_q, tl.minimum(tl.arange(0, BM), Nq - 1 - block * BM), q_pitch, D, D1, D2)
    p_k += g * k_head * 8
    p_v += g * v_head * 8
    o1, o2 = _zeros(BM, E1, E2)
    top = tl.full([BM], float("-inf"), tl.float32)  # largest score so far
    total = tl.zeros([BM], tl.float32)  # sum of exp2(score - top)
    for edge in tl.static_range(2):
        o1, o2, top, total = _attend(
            o1, o2, top, total, q1, q2, p_k, p_v, k_pitch, v_pitch, start, stop, low, high,
            first if edge else 0, tiles - (last - first) if edge else last - first, last - first if edge else first,
            factor, cap, edge, D, D1, D2, E, E1, E2, CAPPED, PRECISION, BN,
        )  # fmt: skip
    total = tl.where(some, total, 1.0)
    inverse = tl.where(some, 1.0 / total, 0.0)
    row = tl.cast(heads, tl.int64) * E
    _store(p_out + h * E, i, i < Nq, row, o1 * inverse[:, None], o2 * inverse[:, None], E, E1, E2)
    lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + i.to(tl.int64) * heads + h, lse, i < Nq)


@triton.jit(do_not_specialize=["Nq", "Nk"])
def _prepare(
    p_g, p_out, p_lse, p_g_lse, p_start, p_stop, p_rows, p_hulls, Nq, Nk, g_pitch, out_pitch, g_head, out_head,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # grid (ceil(Nq / BM), Hq): rows [2, Hq, Nq] = lse log2(e) and delta; hulls [4, blocks]
    block, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i = block * BM + tl.arange(0, BM)  # [BM]
    m_i = i < Nq
    read = tl.minimum(tl.arange(0, BM), Nq - 1 - block * BM)
    down, right = (block * BM).to(tl.int64), h.to(tl.int64)
    g1, g2 = _load(p_g + down * g_pitch * 8 + right * g_head * 8, read, g_pitch, E, E1, E2)
    o1, o2 = _load(p_out + down * out_pitch * 8 + right * out_head * 8, read, out_pitch, E, E1, E2)
    delta = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    if E2 > 0:
        delta += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
    at = i.to(tl.int64) * heads + h
    if p_g_lse is not None:
        delta -= tl.load(p_g_lse + at, m_i, other=0.0).to(tl.float32)
    lse = tl.load(p_lse + at, m_i, other=0.0)
    # With +inf in the place of -inf, exp2(s - lse) is 0 in the rows that see no key: no other test for them.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    p_rows += h.to(tl.int64) * Nq + i
    tl.store(p_rows, lse, m_i)
    tl.store(p_rows + tl.cast(heads, tl.int64) * Nq, delta, m_i)
    if h == 0:
        start, stop, some = _interval(p_start, p_stop, i, Nq, Nk)
        low, high, inner_low, inner_high = _hull(start, stop, some, Nk)
        blocks = tl.num_programs(0)
        tl.store(p_hulls + block, low)
        tl.store(p_hulls + blocks + block, high)
        tl.store(p_hulls + 2 * blocks + block, inner_low)
        tl.store(p_hulls + 3 * blocks + block, inner_high)


@triton.jit
def _query_gradient(
    dq1, dq2, q1, q2, g1, g2, lse, delta, p_k, p_v, k_pitch, v_pitch, start, stop, low, high, first, count, skip,
    factor, cap, EDGE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr,
    E1: tl.constexpr, E2: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq / scale over the tiles that _attend would take with the same arguments."""
    columns = tl.arange(0, BN)  # [BN]
    for n in range(0, count):
        left = low + tl.where(n < first, n, n + skip) * BN
        rows = tl.minimum(columns, high - 1 - left) if EDGE else columns
        k1, k2 = _load(p_k + left.to(tl.int64) * k_pitch * 8, rows, k_pitch, D, D1, D2)
        v1, v2 = _load(p_v + left.to(tl.int64) * v_pitch * 8, rows, v_pitch, E, E1, E2)
        s, slope = _scores(_dots(q1, q2, k1, k2, D2, PRECISION), factor, cap, CAPPED)  # [BM, BN]
        if EDGE:
            j = left + columns
            s = tl.where((j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None]), s, float("-inf"))
        p = tl.exp2(tl.minimum(s - lse[:, None], 0.0))  # of scores beyond 1e9 rounding alone could be 2^128
        ds = p * (_dots(g1, g2, v1, v2, E2, PRECISION) - delta[:, None])
        if CAPPED:
            ds *= slope
        dq1, dq2 = _add(dq1, dq2, ds, k1, k2, D2, PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=["Nq", "Nk", "group"])
def _bwd_dq(
    p_g, p_q, p_k, p_v, p_start, p_stop, p_rows, p_dq, Nq, Nk, group, g_pitch, q_pitch, k_pitch, v_pitch,
    g_head, q_head, k_head, v_head, factor, cap, scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # grid (ceil(Nq / BM), Hq), as _fwd
    block, h, heads = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g = (h // group).to(tl.int64)
    i = block * BM + tl.arange(0, BM)  # [BM]
    start, stop, some = _interval(p_start, p_stop, i, Nq, Nk)
    low, high, inner_low, inner_high = _hull(start, stop, some, Nk)
    tiles, first, last = _split(low, high, inner_low, inner_high, BN)

    read = tl.minimum(tl.arange(0, BM), Nq - 1 - block * BM)
    down, right = (block * BM).to(tl.int64), h.to(tl.int64)
    q1, q2 = _load(p_q + down * q_pitch * 8 + right * q_head * 8, read, q_pitch, D, D1, D2)
    g1, g2 = _load(p_g + down * g_pitch * 8 + right * g_head * 8, read, g_pitch, E, E1, E2)
    p_rows += right * Nq + i
    lse = tl.load(p_rows, i < Nq, other=float("inf"))  # [BM]
    delta = tl.load(p_rows + tl.cast(heads, tl.int64) * Nq, i < Nq, other=0.0)  # [BM]
    p_k += g * k_head * 8
    p_v += g * v_head * 8
    dq1, dq2 = _zeros(BM, D1, D2)
    for edge in tl.static_range(2):
        dq1, dq2 = _query_gradient(
            dq1, dq2, q1, q2, g1, g2, lse, delta, p_k, p_v, k_pitch, v_pitch, start, stop, low, high,
            first if edge else 0, tiles - (last - first) if edge else last - first, last - first if edge else first,
            factor, cap, edge, D, D1, D2, E, E1, E2, CAPPED, PRECISION, BN,
        )  # fmt: skip
    _store(p_dq + h * D, i, i < Nq, tl.cast(heads, tl.int64) * D, dq1 * scale, dq2 * scale, D, D1, D2)


@triton.jit
def _key_gradients(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, p_g, p_q, p_start, p_stop, p_rows, g_pitch, q_pitch, g_head, q_head,
    j, Nq, Nk, heads, h0, group, start_block, first, count, skip, factor, cap,
    EDGE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr,
    E2: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv over `count` blocks of queries a head, those from number `first` on `skip` blocks further."""
    for n in range(0, count * group):
        h = (h0 + n // count).to(tl.int64)
        at = n % count
        top = (start_block + tl.where(at < first, at, at + skip)) * BM
        i = top + tl.arange(0, BM)  # [BM]
        read = tl.minimum(tl.arange(0, BM), Nq - 1 - top)
        down = top.to(tl.int64)
        q1, q2 = _load(p_q + down * q_pitch * 8 + h * q_head * 8, read, q_pitch, D, D1, D2)
        g1, g2 = _load(p_g + down * g_pitch * 8 + h * g_head * 8, read, g_pitch, E, E1, E2)
        lse = tl.load(p_rows + h * Nq + i, i < Nq, other=float("inf"))  # [BM]
        delta = tl.load(p_rows + (heads + h) * Nq + i, i < Nq, other=0.0)  # [BM]
        s, slope = _scores(_dots(k1, k2, q1, q2, D2, PRECISION), factor, cap, CAPPED)  # [BN, BM]
        if EDGE:
            start, stop, _ = _interval(p_start, p_stop, i, Nq, Nk)
            s = tl.where((j[:, None] >= start[None, :]) & (j[:, None] < stop[None, :]), s, float("-inf"))
        p = tl.exp2(tl.minimum(s - lse[None, :], 0.0))
        dv1, dv2 = _add(dv1, dv2, p, g1, g2, E2, PRECISION)
        ds = p * (_dots(v1, v2, g1, g2, E2, PRECISION) - delta[None, :])
        if CAPPED:
            ds *= slope
        dk1, dk2 = _add(dk1, dk2, ds, q1, q2, D2, PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def _range(m, b):
    """First and last + 1 of the numbers b that m selects, and how many those are; (huge, 0, 0) for none."""
    return tl.min(tl.where(m, b, 1 << 30), 0), tl.max(tl.where(m, b + 1, 0), 0), tl.sum(m.to(tl.int32), 0)


@triton.jit(do_not_specialize=["Nq", "Nk", "group"])
def _bwd_dkdv(
    p_g, p_q, p_k, p_v, p_start, p_stop, p_rows, p_hulls, p_dk, p_dv, Nq, Nk, group,
    g_pitch, q_pitch, k_pitch, v_pitch, g_head, q_head, k_head, v_head, factor, cap, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SCAN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (ceil(Nk / BN), Hkv): BN keys of one head against every block of BM queries, of group heads each
    left, h, heads = tl.program_id(0) * BN, tl.program_id(1), tl.num_programs(1)
    right = tl.minimum(left + BN, Nk)
    j = left + tl.arange(0, BN)  # [BN]
    read = tl.minimum(tl.arange(0, BN), Nk - 1 - left)
    k1, k2 = _load(p_k + left.to(tl.int64) * k_pitch * 8 + h.to(tl.int64) * k_head * 8, read, k_pitch, D, D1, D2)
    v1, v2 = _load(p_v + left.to(tl.int64) * v_pitch * 8 + h.to(tl.int64) * v_head * 8, read, v_pitch, E, E1, E2)

    blocks = tl.cdiv(Nq, BM)
    first, last = blocks, 0  # of the blocks that see a key of this tile
    for b0 in range(0, blocks, SCAN):
        b = b0 + tl.arange(0, SCAN)  # [SCAN]
        low = tl.load(p_hulls + b, b < blocks, other=Nk)
        high = tl.load(p_hulls + blocks + b, b < blocks, other=0)
        b_first, b_last, _ = _range((low < right) & (high > left), b)
        first, last = tl.minimum(first, b_first), tl.maximum(last, b_last)

    dk1, dk2 = _zeros(BN, D1, D2)
    dv1, dv2 = _zeros(BN, E1, E2)
    for b0 in range(first, last, CHUNK):  # in chunks, so that a few far queries do not make all between them visited
        b = b0 + tl.arange(0, CHUNK)  # [CHUNK]
        low = tl.load(p_hulls + b, b < last, other=Nk)
        high = tl.load(p_hulls + blocks + b, b < last, other=0)
        inner_low = tl.load(p_hulls + 2 * blocks + b, b < last, other=Nk)
        inner_high = tl.load(p_hulls + 3 * blocks + b, b < last, other=0)
        b_first, b_last, _ = _range((low < right) & (high > left), b)
        # Blocks whose every query sees every key of the tile need no mask, if they are neighbours.
        i_first, i_last, inner = _range((low < high) & (inner_low <= left) & (inner_high >= right), b)
        whole = (inner > 0) & (i_last - i_first == inner)
        i_first, inner = tl.where(whole, i_first, b_first), tl.where(whole, inner, 0)
        for edge in tl.static_range(2):
            dk1, dk2, dv1, dv2 = _key_gradients(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, p_g, p_q, p_start, p_stop, p_rows, g_pitch, q_pitch, g_head, q_head,
                j, Nq, Nk, heads * group, h * group, group, b_first if edge else i_first,
                i_first - b_first if edge else 0,
                tl.maximum(b_last - b_first, 0) - inner if edge else inner, inner if edge else 0,
                factor, cap, edge, D, D1, D2, E, E1, E2, CAPPED, PRECISION, BM,
            )  # fmt: skip
    _store(p_dk + h * D, j, j < Nk, tl.cast(heads, tl.int64) * D, dk1 * scale, dk2 * scale, D, D1, D2)
    _store(p_dv + h * E, j, j < Nk, tl.cast(heads, tl.int64) * E, dv1, dv2, E, E1, E2)


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    if scale < 0:
        q, scale = -q, -scale
    q, k, v, start, stop = regular(q), regular(k), regular(v), start.contiguous(), stop.contiguous()
    (nq, hq, d), (nk, hkv, dv) = q.shape, v.shape
    out, lse = q.new_empty(nq, hq, dv), q.new_empty(nq, hq, dtype=torch.float32)
    if nq:
        c = pick((d, dv), q.dtype, chip(q.device))
        t = c.forward
        _fwd[(triton.cdiv(nq, t.bm), hq)](
            q, k, v, start, stop, out, lse, nq, nk, hq // hkv, *pitches(q, k, v), *factors(scale, softcap)[:2],
            d, *widths(d, q.dtype), dv, *widths(dv, q.dtype), softcap is not None, c.precision, t.bm, t.bn,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out, lse


def interval_attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    if scale < 0:  # (-q) (-scale): the same scores
        dq, dk, dv = interval_attention_backward(grad, grad_lse, -q, k, v, out, lse, start, stop, -scale, softcap)
        return -dq, dk, dv
    grad, q, k, v, out = (regular(x) for x in (grad, q, k, v, out))
    start, stop, lse = start.contiguous(), stop.contiguous(), lse.contiguous()
    (nq, hq, d), (nk, hkv, e) = q.shape, v.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not nq:
        return dq, dk.zero_(), dv.zero_()
    c = pick((d, e), q.dtype, chip(q.device))
    factor, cap, capped = factors(scale, softcap)
    dims = (d, *widths(d, q.dtype), e, *widths(e, q.dtype))
    blocks = triton.cdiv(nq, c.dkdv.bm)
    rows = q.new_empty(2, hq, nq, dtype=torch.float32)
    hulls = start.new_empty(4, blocks)
    _prepare[(blocks, hq)](
        grad, out, lse, grad_lse if grad_lse is None else grad_lse.contiguous(), start, stop, rows, hulls, nq, nk,
        *pitches(grad, out), *dims[3:], c.dkdv.bm,
    )  # fmt: skip
    strides = pitches(grad, q, k, v)
    t = c.dq
    _bwd_dq[(triton.cdiv(nq, t.bm), hq)](
        grad, q, k, v, start, stop, rows, dq, nq, nk, hq // hkv, *strides, factor, cap, scale, *dims, capped,
        c.precision, t.bm, t.bn, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    t = c.dkdv
    if nk:
        _bwd_dkdv[(triton.cdiv(nk, t.bn), hkv)](
            grad, q, k, v, start, stop, rows, hulls, dk, dv, nq, nk, hq // hkv, *strides, factor, cap, scale, *dims,
            capped, c.precision, t.bm, t.bn, _SCAN, _CHUNK, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dq, dk, dv
