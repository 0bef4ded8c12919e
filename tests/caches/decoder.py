"""A layer of attention over random tokens, with caches and, as the oracle, in float64 without them."""

import torch

from vlkern.caches import Caches
from vlkern.layers.rope import Rope

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
ROPE = Rope(HEAD_DIM, base=100.0)


def packed(counts):
    """cu_seqlens of rows with so many tokens each."""
    return torch.tensor([0, *counts]).cumsum(0).int()


class Layer:
    """Rows of up to n tokens with queries, keys and values; a token may be drawn anew after it was rolled back.

    seen[b][p] and out[b, p] are for the token that stands at position p of row b now.
    """

    def __init__(self, batch, n, dtype=torch.float32, softcap=None, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.dtype, self.softcap = dtype, softcap
        self.q, self.k, self.v = (self._draw(batch, n, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.q_weight, self.k_weight = torch.randn(2, HEAD_DIM, generator=self.g).mul(0.2).unbind()
        self.out = torch.full((batch, n, HEADS, HEAD_DIM), torch.nan, dtype=dtype)
        self.until = torch.arange(n).repeat(batch, 1)

    def _draw(self, batch, n, heads):
        return torch.randn(batch, n, heads, HEAD_DIM, generator=self.g).to(self.dtype)

    def draw_again(self, row, first):
        """New tokens from position `first` of a row on."""
        for t in (self.q, self.k, self.v):
            t[row, first:] = torch.randn(t[row, first:].shape, generator=self.g).to(self.dtype)

    def extend(self, caches: Caches, counts=None, chunk=None, layer=0):
        """The next tokens of each row through all caches; `out` gets what comes from the one called `layer`."""
        if chunk is None:
            cu_seqlens, until = packed(counts), None
            if (self.until != torch.arange(self.until.shape[1])).any():
                chunk = caches.chunk(cu_seqlens)
                until = self.until[chunk.rows.long(), chunk.positions.long()].int()
            chunk = caches.chunk(cu_seqlens, until)
        at = chunk.rows.long(), chunk.positions.long()
        tokens, angles = (self.q[at], self.k[at], self.v[at]), ROPE(chunk.positions)
        options = {"q_weight": self.q_weight, "k_weight": self.k_weight, "softcap": self.softcap}
        out = [cache.attend(*tokens, chunk, *angles, **options) for cache in caches.layers][layer]
        there = chunk.positions >= 0
        self.out[at[0][there], at[1][there]] = out[there]
        caches.advance(chunk)
        return out

    def _turned(self, x, weight):
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.double())
        theta = 100.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
        turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1], dtype=torch.float64)[:, None] * theta)
        y = torch.complex(*h.chunk(2, -1)) * turn[:, None]
        return torch.cat([y.real, y.imag], -1)

    def oracle(self, window=None):
        """[B, n, H, C] float64: every token's attention, from the tokens themselves and a matrix for a mask."""
        q, k = self._turned(self.q.double(), self.q_weight), self._turned(self.k.double(), self.k_weight)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in (k, self.v.double()))
        s = torch.einsum("bihc,bjhc->bhij", q, k) * HEAD_DIM**-0.5
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        i = torch.arange(q.shape[1])
        visible = i <= torch.maximum(i, self.until)[:, :, None]
        if window is not None:
            visible = visible & (i > i[:, None] - window)
        return torch.einsum("bhij,bjhc->bihc", s.masked_fill(~visible[:, None], -torch.inf).softmax(-1), v)
