"""masked_decode_step in Triton: a program draws a token, then programs rank the tokens of a row. See README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: Tokens that a program of `_rank` ranks, and with how many at a time it compares them.
RANKED, COMPARED = 32, 128


@dataclass(frozen=True)
class Config:
    """Launch parameters of `_draw`."""

    block: int
    """Classes at a time."""
    warps: int


def pick(classes: int) -> Config:
    """A vocabulary of MaskGIT, 1024 classes, in one go; 8 classes a thread."""
    block = min(4096, max(32, triton.next_power_of_2(classes)))
    return Config(block, max(1, min(8, block // 256)))


@triton.jit
def _guided(p_z, p_plain, at, m, guidance, GUIDED: tl.constexpr):
    z = tl.load(p_z + at, m, other=float("-inf")).to(tl.float32)
    if GUIDED:
        plain = tl.load(p_plain + at, m, other=0.0).to(tl.float32)
        z = tl.where(m, z + guidance * (z - plain), float("-inf"))
    return z


@triton.jit
def _minus_log(g):
    """-log(g) in (0, 1); near 1, where it vanishes, by a series, since a GPU's logarithm has an absolute error."""
    h = 1.0 - g
    p = h * (1.0 / 6.0) + 0.2
    p = p * h + 0.25
    p = p * h + (1.0 / 3.0)
    p = p * h + 0.5
    p = (p * h + 1.0) * h
    return tl.where(h < 0.03, p, -tl.log(g))


@triton.jit
def _draw(
    p_z, p_plain, p_ids, p_noise, p_filled, p_log, p_key, V, guidance, temperature, MASK,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B N): one token each
    t = tl.program_id(0).to(tl.int64)
    known = tl.load(p_ids + t)
    unknown = known == MASK
    token, log_p, key = known, 0.0, float("inf")
    if unknown:
        j, row = tl.arange(0, BLOCK), t * V
        top, total = float("-inf"), 0.0
        for begin in range(0, V, BLOCK):
            z = _guided(p_z, p_plain, row + begin + j, begin + j < V, guidance, GUIDED)
            higher = tl.maximum(top, tl.max(z, 0))
            near = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - near) + tl.sum(tl.exp(z - near), 0)
            top = higher
        reached = tl.load(p_noise + 2 * t) * total
        below, count, last = 0.0, 0, 0
        for begin in range(0, V, BLOCK):
            z = _guided(p_z, p_plain, row + begin + j, begin + j < V, guidance, GUIDED)
            e = tl.exp(z - top)
            sums = below + tl.cumsum(e, 0)
            count += tl.sum(((sums <= reached) & (begin + j < V)).to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(e > 0, begin + j, 0), 0))
            below += tl.sum(e, 0)
        drawn = tl.minimum(count, last).to(tl.int64)
        own = _guided(p_z, p_plain, row + drawn, drawn < V, guidance, GUIDED)
        token = drawn
        log_p = own - top - tl.log(total)
        g = tl.maximum(tl.load(p_noise + 2 * t + 1), 2.3283064365386963e-10)
        key = log_p - temperature * tl.log(_minus_log(g))
        key = tl.where(key == key, key, float("-inf"))
    tl.store(p_filled + t, token)
    tl.store(p_log + t, log_p)
    tl.store(p_key + t, key)


@triton.jit
def _rank(p_key, p_ids, p_filled, p_count, p_next, N, MASK, RANKED: tl.constexpr, COMPARED: tl.constexpr):
    # grid (B, N / RANKED): a token's rank is the number of smaller keys, and of equal ones before it
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    mine = tl.load(p_key + b * N + i, i < N, other=float("inf"))[:, None]
    rank = tl.zeros([RANKED], tl.int32)
    for begin in range(0, N, COMPARED):
        j = begin + tl.arange(0, COMPARED)
        other = tl.load(p_key + b * N + j, j < N, other=float("inf"))[None, :]
        first = (other < mine) | ((other == mine) & (j[None, :] < i[:, None]))
        rank += tl.sum((first & (j < N)[None, :]).to(tl.int32), 1)
    unknown = tl.load(p_ids + b * N + i, i < N, other=0) == MASK
    again = unknown & (rank < tl.load(p_count + b))
    tl.store(p_next + b * N + i, tl.where(again, MASK, tl.load(p_filled + b * N + i, i < N, other=0)), i < N)


def masked_decode_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    noise: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance: float,
    temperature: float,
    mask: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    logits, ids, count, noise = (t.contiguous() for t in (logits, ids, count, noise))
    plain = logits if unconditional is None else unconditional.contiguous()
    rows, tokens, classes = logits.shape
    following, filled = torch.empty_like(ids), torch.empty_like(ids)
    log_p, key = (logits.new_empty(ids.shape, dtype=torch.float32) for _ in range(2))
    if ids.numel():
        c = pick(classes)
        _draw[(rows * tokens,)](
            logits, plain, ids, noise, filled, log_p, key, classes, guidance, temperature, mask,
            unconditional is not None, c.block, num_warps=c.warps,
        )  # fmt: skip
        _rank[(rows, triton.cdiv(tokens, RANKED))](
            key, ids, filled, count, following, tokens, mask, RANKED, COMPARED, num_warps=4
        )
    return following, filled, log_p
