"""The sigmoid loss in Triton: tiles of logits with a fused epilogue, then two matmuls. The maths is in README.md.

The images go in chunks of R rows. For each chunk one kernel computes the logits tile by tile and reduces them at once
to the sums of loss, d_scale and d_bias and to G = dL/dlogits, the one [R, N] tensor; cuBLAS then takes G into d_image
(finished with the chunk) and d_text (summed over the chunks in float32). That is three matmuls, the fewest possible.
Against a matmul into float32 logits and a pass over them the fused kernel saves 8 bytes of traffic per pair. The loss
alone needs no chunks: nothing but its sums leaves the kernel.

Counted for an H200 at M = N = 32768, D = 1152, bfloat16: 7.4 TFLOP are 9.4 ms at 790 TFLOP/s. Beside them stand the
epilogue, 26 instructions per pair or 0.9 ms that the tensor cores wait for; G, written once and read twice, 6.4 GB or
1.5 ms of memory time behind the matmuls; and the float32 sums of d_text, read and written once per chunk, 0.8 ms.

Every sum has a fixed order: no atomics. scale, bias and weight are read on the device, so nothing waits for the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip
from vlkern._triton_math import add_product


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same shape, dtype and chip."""

    rows: int
    """Images in a chunk, a multiple of bm."""
    bm: int
    """Images in a tile."""
    bn: int
    """Texts in a tile."""
    bk: int
    """Channels per step of the matmul."""
    warps: int
    stages: int
    """Steps whose loads are in flight."""
    precision: str
    """How float32 is multiplied: "ieee", or "tf32" if PyTorch's own matmuls may."""


#: Tiles of one step down that share their texts in the L2 cache; with 132 SMs about 16 x 8 tiles run at a time.
_GROUP = 16

#: Tile of d_image that cuBLAS computes on one SM; a chunk with one for every SM wastes none of them.
_OUTPUT_TILE = 128 * 192


def pick(shape: tuple[int, int, int], dtype: torch.dtype, on: Chip) -> Config:
    """The configuration for M images and N texts of D channels."""
    m, _, d = shape
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if dtype != torch.float32:
        # 128 x 256 is the largest tile whose sums fit in the registers: 85 FLOPs per byte from L2 (128 x 128: 64).
        bm, bn, bk, warps = 128, 256, 64, 8
    elif tf32:
        bm, bn, bk, warps = 128, 128, 32, 8
    else:
        bm, bn, bk, warps = 64, 64, 32, 8
    stages = max(2, min(4, on.shared // ((bm + bn) * bk * dtype.itemsize)))
    # G holds at most four times as much as text does, so memory stays linear in N; below 1024 rows launches would show.
    most = min(on.sms * _OUTPUT_TILE // d, max(4 * d, 1024))
    rows = triton.cdiv(m, triton.cdiv(m, most))
    return Config(triton.cdiv(rows, bm) * bm, bm, bn, bk, warps, stages, "tf32" if tf32 else "ieee")


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 to 2e-7 of itself: e times a minimax polynomial. log(1 + e) would lose a small e."""
    p = 0.00523268789 * e - 0.0295052132
    p = p * e + 0.0782259103
    p = p * e - 0.136632423
    p = p * e + 0.191060051
    p = p * e - 0.248429818
    p = p * e + 0.333190968
    p = p * e - 0.499994931
    p = p * e + 0.99999997
    return p * e


@triton.jit
def _pairs(dots, scale, bias, i, j, crosses):
    """softplus(u) and -z sigmoid(u) for u = -z s, s = scale dots + bias; z = 1 where i == j in a tile that crosses."""
    s = dots * scale + bias
    u = s
    if crosses:
        u = tl.where(i[:, None] == j[None, :], -s, s)
    # exp2 and rsqrt flush denormals and are one instruction each; exp and a division take four and seven.
    e = tl.exp2(tl.abs(s) * -1.44269504)  # exp(-|u|)
    loss = tl.maximum(u, 0.0) + _log1p_unit(e)
    q = tl.rsqrt(1.0 + e)
    g = tl.where(u >= 0.0, 1.0, e) * (q * q)
    if crosses:
        g = tl.where(i[:, None] == j[None, :], -g, g)
    return loss, g


@triton.jit
def _quarters(dots):
    """[BM, BN] -> four strips [BM, BN / 4]. The layout of a matmul's result makes it a renaming of registers."""
    BM: tl.constexpr = dots.shape[0]
    BN: tl.constexpr = dots.shape[1]
    a, b = tl.split(dots.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    a0, a1 = tl.split(a.reshape(BM, 2, BN // 4).permute(0, 2, 1))
    b0, b1 = tl.split(b.reshape(BM, 2, BN // 4).permute(0, 2, 1))
    return a0, a1, b0, b1


@triton.jit
def _logits(
    p_x, p_y, p_scale, p_bias, p_x_valid, p_y_valid, p_g, p_sums, first, M, N, pitch, tiles, D,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, DIAGONAL: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # grid (tiles of the chunk,): logits of images first + [0, M) and texts [0, N), one [BM, BN] tile each
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    tile_i = group * GROUP + (tl.program_id(0) % (GROUP * across)) % height
    tile_j = (tl.program_id(0) % (GROUP * across)) // height

    i = tile_i * BM + tl.arange(0, BM)  # [BM], counted from `first`
    j = tile_j * BN + tl.arange(0, BN)  # [BN]
    k = tl.arange(0, BK)  # [BK]
    # Rows beyond the edge read the last one again: cheaper than a mask in every step, and the epilogue takes them out.
    at_x = p_x + (first + tl.minimum(i, M - 1)).to(tl.int64)[:, None] * D + k[None, :]  # [BM, BK]
    at_y = p_y + tl.minimum(j, N - 1).to(tl.int64)[None, :] * D + k[:, None]  # [BK, BN]
    dots = tl.zeros([BM, BN], tl.float32)
    for start in range(0, D, BK):
        if WHOLE:
            b_x, b_y = tl.load(at_x + start), tl.load(at_y + start)
        else:
            m_k = start + k < D
            b_x, b_y = tl.load(at_x + start, m_k[None, :], other=0.0), tl.load(at_y + start, m_k[:, None], other=0.0)
        dots = tl.dot(b_x, b_y, dots, input_precision=PRECISION)

    scale, bias = tl.load(p_scale), tl.load(p_bias)
    loss = tl.zeros([BM], tl.float32)
    d_scale = tl.zeros([BM], tl.float32)
    d_bias = tl.zeros([BM], tl.float32)
    if MASKED:  # as factors, which take one register a row or column, not one predicate a pair
        keep_i = (i < M).to(tl.float32)
        if p_x_valid is not None:
            keep_i *= tl.load(p_x_valid + first + i, i < M, other=0).to(tl.float32)
    # Only one tile in a hundred holds positive pairs; a branch spares the others two comparisons per pair.
    crosses = DIAGONAL and (first + tile_i * BM < tile_j * BN + BN) and (tile_j * BN < first + tile_i * BM + BM)
    strips = _quarters(dots)
    for q in tl.static_range(4):  # strip by strip: the intermediate values of a whole tile do not fit in the registers
        j = tile_j * BN + q * (BN // 4) + tl.arange(0, BN // 4)  # [BN / 4]
        b_loss, g = _pairs(strips[q], scale, bias, first + i, j, crosses)
        if MASKED:
            keep_j = (j < N).to(tl.float32)
            if p_y_valid is not None:
                keep_j *= tl.load(p_y_valid + j, j < N, other=0).to(tl.float32)
            b_loss, g = b_loss * keep_j[None, :], g * (keep_i[:, None] * keep_j[None, :])
        loss += tl.sum(b_loss, 1)
        if GRADIENT:
            d_scale += tl.sum(g * strips[q], 1)
            d_bias += tl.sum(g, 1)
            at_g = p_g + i.to(tl.int64)[:, None] * pitch + j[None, :]
            tl.store(at_g, (g * UNIT).to(p_g.dtype.element_ty))  # G is allocated in whole tiles
    if MASKED:
        loss *= keep_i
    p_sum = p_sums + (first // BM + tile_i) * across + tile_j
    tl.store(p_sum, tl.sum(loss))
    if GRADIENT:
        tl.store(p_sum + tiles, tl.sum(d_scale))
        tl.store(p_sum + 2 * tiles, tl.sum(d_bias))


class _Sweep:
    """The tiles of one call: what the loss alone and the loss with gradients share."""

    def __init__(self, outputs: int, image: torch.Tensor, text: torch.Tensor, *rest: Any) -> None:
        scale, bias, image_valid, text_valid, self.diagonal = rest
        self.image, self.text = image.contiguous(), text.contiguous()
        (self.m, self.d), self.n = image.shape, text.shape[0]
        self.config = c = pick((self.m, self.n, self.d), image.dtype, chip(image.device))
        self.tiles = triton.cdiv(self.m, c.bm) * triton.cdiv(self.n, c.bn)
        self.sums = image.new_empty(outputs, self.tiles, dtype=torch.float32)
        masks = [v if v is None else v.contiguous().view(torch.uint8) for v in (image_valid, text_valid)]
        self.inputs = (self.image, self.text, scale, bias, *masks)
        self.masked = any(v is not None for v in masks)

    def launch(self, first: int, rows: int, g: torch.Tensor | None = None, unit: float = 1.0) -> None:
        """The tiles of images first to first + rows. Their G, times `unit`, goes to `g` if there is one."""
        c = self.config
        masked = self.masked or rows % c.bm > 0 or self.n % c.bn > 0
        _logits[(triton.cdiv(rows, c.bm) * triton.cdiv(self.n, c.bn),)](
            *self.inputs, g, self.sums, first, rows, self.n, 0 if g is None else g.stride(0), self.tiles, self.d,
            self.d % c.bk == 0, unit, self.diagonal, masked, g is not None,
            c.precision, _GROUP, c.bm, c.bn, c.bk, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def sigmoid_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    diagonal: bool,
) -> torch.Tensor:
    """See reference.py."""
    sweep = _Sweep(1, image, text, scale, bias, image_valid, text_valid, diagonal)
    sweep.launch(0, sweep.m)
    return weight * sweep.sums.sum()


def sigmoid_loss_grad(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    sweep = _Sweep(3, image, text, scale, bias, image_valid, text_valid, diagonal)
    x, y, c = sweep.image, sweep.text, sweep.config
    # |g| < 1 as stored, the weight 1/B comes later. float16 would still lose a g below 6e-8: 2^15 uses its whole range.
    unit = 2.0**15 if x.dtype == torch.float16 else 1.0
    factor = scale * weight / unit
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    d_image = torch.empty_like(x, dtype=dtype)
    d_text = torch.empty_like(y, dtype=torch.float32)
    g_chunk = x.new_empty(c.rows, triton.cdiv(sweep.n, c.bn) * c.bn)
    d_chunk = x.new_empty(min(c.rows, sweep.m), sweep.d, dtype=torch.float32)
    for first in range(0, sweep.m, c.rows):
        rows = slice(first, min(first + c.rows, sweep.m))
        count = rows.stop - first
        sweep.launch(first, count, g_chunk, unit)
        g, dx = g_chunk[:count, : sweep.n], d_chunk[:count]
        add_product(dx, g, y, beta=0)
        torch.mul(dx, factor, out=d_image[rows])
        add_product(d_text, g.t(), x[rows], beta=min(first, 1))
    loss, d_scale, d_bias = (weight * total for total in sweep.sums.sum(1))
    d_text = torch.mul(d_text, factor, out=d_text if dtype == torch.float32 else torch.empty_like(y))
    return loss, d_image, d_text, d_scale, d_bias
