"""The vocabulary's cross-entropy on a GPU: chunks of tokens, matmuls by cuBLAS, two Triton kernels over the logits.

For each chunk of R tokens cuBLAS writes float32 logits [R, V]; `_sums` reads them once for each token's log sum exp;
`_slopes` reads them again and writes G = dL/dlogits in the input's dtype, which cuBLAS takes into d_hidden (finished
with the chunk) and d_weight (summed over the chunks). Three matmuls, the fewest possible, each as fast as they get.

A kernel that keeps the logits on the chip, as cut-cross-entropy's, needs a fourth matmul and cannot use cuBLAS. What it
would save is the logits' way through memory: 4 bytes written, 8 read, G 2 written and 4 read, 18 bytes a pair beside
6 D FLOPs. At 4 TB/s and 700 TFLOP/s the two are equal at D = 520: above it this way is at most twice as far from the
matmuls' own time as an ideal one, and from D = 2000 on the difference is lost in cuBLAS's lead.

Every sum has a fixed order: no atomics. Nothing waits for the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton_math import add_product, tanh

#: Of no logit: log2(e) times it is still finite.
_LOWEST = tl.constexpr(-2e38)


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same shape."""

    rows: int
    """Tokens in a chunk."""
    bm: int
    """Tokens in a tile of the kernels over the logits."""
    bn: int
    """Classes in such a tile."""
    warps: int


def pick(shape: tuple[int, int]) -> Config:
    """The configuration for T tokens and V classes: a chunk's logits take at most 512 MiB, or 128 tokens."""
    t, v = shape
    most = max(128, min(1024, (1 << 27) // v // 128 * 128))
    chunks = triton.cdiv(max(t, 1), most)
    bn = min(1024, max(16, triton.next_power_of_2(v)))
    return Config(triton.cdiv(max(t, 1), chunks), 4096 // bn, bn, 8)


@triton.jit
def _logits(p_z, p_bias, scale, i, j, R, V, cap, CAPPED: tl.constexpr):
    """z [BM, BN] and dz / d(z before the cap); _LOWEST beyond the edges."""
    m = (i < R)[:, None] & (j < V)[None, :]
    z = tl.load(p_z + i.to(tl.int64)[:, None] * V + j[None, :], m, other=0.0)
    if p_bias is not None:
        z += scale * tl.load(p_bias + j, j < V, other=0.0)[None, :]
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        t = tanh(z / cap)
        z, slope = t * cap, 1.0 - t * t
    return tl.where(m, z, _LOWEST), slope, m


@triton.jit
def _sums(
    p_z, p_bias, p_target, p_lse, p_own, p_total, R, V, scale, cap,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # grid (ceil(R / BM),): log sum exp, the target's logit and the sum of the logits of BM tokens
    i = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    target = tl.load(p_target + i, i < R, other=-1)
    most = tl.full([BM], _LOWEST, tl.float32)
    exps = tl.zeros([BM], tl.float32)
    own = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, V, BN):
        j = start + tl.arange(0, BN)  # [BN]
        z, _, m = _logits(p_z, p_bias, scale, i, j, R, V, cap, CAPPED)
        top = tl.maximum(most, tl.max(z, 1))
        exps = exps * tl.exp2((most - top) * 1.44269504) + tl.sum(tl.exp2((z - top[:, None]) * 1.44269504), 1)
        most = top
        z = tl.where(m, z, 0.0)
        own += tl.sum(tl.where(j[None, :] == target[:, None], z, 0.0), 1)
        total += tl.sum(z, 1)
    counts = target >= 0
    tl.store(p_lse + i, tl.where(counts, most + tl.log2(exps) * 0.6931471805599453, 0.0), i < R)
    tl.store(p_own + i, tl.where(counts, own, 0.0), i < R)
    tl.store(p_total + i, tl.where(counts, total, 0.0), i < R)


@triton.jit
def _slopes(
    p_z, p_bias, p_target, p_lse, p_share, p_g, R, V, scale, cap, hit, spread, z_loss,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # grid (ceil(R / BM), ceil(V / BN)): a tile of G = dL/dlogits, before the scale
    i = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    j = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    target = tl.load(p_target + i, i < R, other=-1)
    share, lse = tl.load(p_share + i, i < R, other=0.0), tl.load(p_lse + i, i < R, other=0.0)
    z, slope, m = _logits(p_z, p_bias, scale, i, j, R, V, cap, CAPPED)
    p = tl.exp2((z - lse[:, None]) * 1.44269504)
    g = p * (1.0 + 2.0 * z_loss * lse)[:, None] - tl.where(j[None, :] == target[:, None], hit + spread, spread)
    g = tl.where((target >= 0)[:, None], g * slope * share[:, None], 0.0)
    tl.store(p_g + i.to(tl.int64)[:, None] * V + j[None, :], g.to(p_g.dtype.element_ty), m)


class _Chunks:
    """The chunks of one call: what the three ops share."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        softcap: float | None,
        scale: float,
    ) -> None:
        # Whatever the hidden states of tokens that do not count hold, even NaN, must not reach the matmuls.
        self.x = hidden.contiguous().masked_fill(target[:, None] < 0, 0)
        self.w, self.target = weight.contiguous(), target.contiguous()
        self.bias = bias if bias is None else bias.contiguous()
        (self.t, self.d), self.v = hidden.shape, weight.shape[0]
        self.config = c = pick((self.t, self.v))
        self.scale, self.cap, self.capped = scale, softcap or 1.0, softcap is not None
        self.slices = [slice(i, min(i + c.rows, self.t)) for i in range(0, self.t, c.rows)]
        self.z = hidden.new_empty(min(c.rows, self.t), self.v, dtype=torch.float32)
        self.lse, self.own, self.total = hidden.new_zeros(3, self.t, dtype=torch.float32).unbind()

    def multiply(self, rows: slice) -> torch.Tensor:
        """scale times the products of a chunk."""
        z = self.z[: rows.stop - rows.start]
        add_product(z, self.x[rows], self.w.t(), beta=0, alpha=self.scale)
        return z

    def sums(self, z: torch.Tensor, rows: slice) -> None:
        c, r = self.config, len(z)
        _sums[(triton.cdiv(r, c.bm),)](
            z, self.bias, self.target[rows], self.lse[rows], self.own[rows], self.total[rows], r, self.v, self.scale,
            self.cap, self.capped, c.bm, c.bn, num_warps=c.warps,
        )  # fmt: skip

    def slopes(
        self, z: torch.Tensor, rows: slice, lse: torch.Tensor, share: torch.Tensor, terms: tuple[float, ...]
    ) -> torch.Tensor:
        c, r = self.config, len(z)
        g = torch.empty_like(z, dtype=self.x.dtype)
        _slopes[(triton.cdiv(r, c.bm), triton.cdiv(self.v, c.bn))](
            z, self.bias, self.target[rows], lse[rows], share[rows], g, r, self.v, self.scale, self.cap, *terms,
            self.capped, c.bm, c.bn, num_warps=c.warps,
        )  # fmt: skip
        return g


class _Gradients:
    """d_hidden, d_weight and d_bias, chunk by chunk.

    float16 would lose small slopes: they are stored so that the largest possible one is 2^15, `unit` times too large.
    """

    def __init__(
        self,
        chunks: _Chunks,
        share: torch.Tensor,
        lse: torch.Tensor | None,
        terms: tuple[float, ...],
        wanted: tuple[bool, bool],
    ) -> None:
        self.chunks, self.terms = chunks, terms
        x, w, self.unit = chunks.x, chunks.w, None
        half = x.dtype == torch.float16
        self.dtype = torch.float32 if half else x.dtype
        if half and chunks.t:
            self.unit = 2.0**15 / share.abs().amax().clamp(min=1e-30)
            if lse is not None:
                self.unit = self.unit / (1 + (1 + 2 * terms[2] * lse).abs().amax())
        self.share = share if self.unit is None else share * self.unit
        self.d_hidden = (
            torch.empty_like(x, dtype=self.dtype) if wanted[0] else x.new_empty(0, chunks.d, dtype=self.dtype)
        )
        # One chunk is one matmul, which sums in float32 by itself; several need a float32 sum.
        wide = torch.float32 if len(chunks.slices) > 1 else self.dtype
        self.d_weight = torch.zeros_like(w, dtype=wide) if wanted[1] else w.new_empty(0, chunks.d, dtype=wide)
        self.d_bias = w.new_zeros(0 if chunks.bias is None else chunks.v, dtype=torch.float32)

    def add(self, z: torch.Tensor, rows: slice, lse: torch.Tensor) -> None:
        c = self.chunks
        g = c.slopes(z, rows, lse, self.share, self.terms)
        if len(self.d_hidden):
            add_product(self.d_hidden[rows], g, c.w, beta=0, alpha=c.scale)
        if len(self.d_weight):
            add_product(self.d_weight, g.t(), c.x[rows], beta=1, alpha=c.scale)
        if len(self.d_bias):
            self.d_bias.add_(g.sum(0, dtype=torch.float32), alpha=c.scale)

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.unit is not None:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.div_(self.unit)
        return self.d_hidden, self.d_weight.to(self.dtype), self.d_bias


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    chunks = _Chunks(hidden, weight, bias, target, softcap, scale)
    for rows in chunks.slices:
        chunks.sums(chunks.multiply(rows), rows)
    return chunks.lse, chunks.own, chunks.total


def _terms(weight: torch.Tensor, smoothing: float, classes: int | None, z_loss: float) -> tuple[float, float, float]:
    """hit, spread and z_loss: what is taken from the target's slope, from all slopes, and the factor of 2 lse p."""
    return 1 - smoothing, smoothing / (classes or weight.shape[0]), z_loss


def linear_cross_entropy_grad(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    share: torch.Tensor,
    lse: torch.Tensor,
    softcap: float | None,
    scale: float,
    smoothing: float,
    classes: int | None,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    chunks = _Chunks(hidden, weight, bias, target, softcap, scale)
    gradients = _Gradients(chunks, share, lse, _terms(weight, smoothing, classes, z_loss), (of_hidden, of_weight))
    for rows in chunks.slices:
        gradients.add(chunks.multiply(rows), rows, lse)
    return gradients.results()


def linear_cross_entropy_sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    share: torch.Tensor,
    softcap: float | None,
    scale: float,
    smoothing: float,
    classes: int | None,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    if hidden.dtype == torch.float16 and z_loss:  # slopes have no bound until all lse are known
        sums = linear_cross_entropy(hidden, weight, bias, target, softcap, scale)
        rest = softcap, scale, smoothing, classes, z_loss, of_hidden, of_weight
        return *sums, *linear_cross_entropy_grad(hidden, weight, bias, target, share, sums[0], *rest)
    chunks = _Chunks(hidden, weight, bias, target, softcap, scale)
    gradients = _Gradients(chunks, share, None, _terms(weight, smoothing, classes, z_loss), (of_hidden, of_weight))
    for rows in chunks.slices:
        z = chunks.multiply(rows)
        chunks.sums(z, rows)
        gradients.add(z, rows, chunks.lse)
    return chunks.lse, chunks.own, chunks.total, *gradients.results()
