"""Shapes and masks on which attention is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """Documents of these lengths side by side, hq query heads on hkv key heads, head dims d and dv.

    mask  full, causal, window (causal, the last `window` keys), prefix (causal after half of the document), random
          (any intervals, also empty ones and beyond the keys) or cross (one query per document)
    """

    name: str
    lengths: tuple[int, ...]
    hq: int = 2
    hkv: int = 2
    d: int = 16
    dv: int | None = None
    mask: str = "full"
    window: int = 0
    softcap: float | None = None
    contiguous: bool = True
    bench: bool = False


#: Images of a packed batch, in patches.
PACKED = (100, 300, 196, 50, 576, 256, 77, 400, 90, 211) * 2

SAMPLES = [
    Sample("empty", ()),
    Sample("one", (1,), hq=1, hkv=1, d=8),
    Sample("below_a_tile", (15, 7), d=24, mask="causal"),
    Sample("above_a_tile", (65, 50, 3), d=40, dv=16),
    Sample("grouped", (33, 40), hq=4, hkv=2, d=64, mask="causal", softcap=5.0),
    Sample("so400m_head", (49, 20), hq=2, hkv=1, d=72),
    Sample("qkv_in_one", (40, 9), d=32, mask="prefix", contiguous=False),
    Sample("window", (100,), hq=2, hkv=1, d=16, mask="window", window=24),
    Sample("pooling", (30, 1, 18), d=24, mask="cross"),
    Sample("random", (70,), hq=3, hkv=1, d=8, dv=48, mask="random"),
    Sample("several_blocks", (150, 111), hq=1, hkv=1, d=256),
    Sample("packed_images", PACKED, hq=12, hkv=12, d=64, bench=True),
    Sample("packed_images_so400m", PACKED, hq=12, hkv=12, d=72, bench=True),
    Sample("packed_images_128", PACKED, hq=8, hkv=4, d=128, bench=True),
    Sample("causal_4k", (4096,), hq=8, hkv=4, d=64, mask="causal", bench=True),
    Sample("window_4k", (4096,), hq=8, hkv=4, d=64, mask="window", window=1024, bench=True),
    Sample("window_8k", (8192,), hq=8, hkv=4, d=64, mask="window", window=1024, bench=True),
    Sample("window_16k", (16384,), hq=8, hkv=4, d=64, mask="window", window=1024, bench=True),
]


def _bounds(sample: Sample, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor(sample.lengths, dtype=torch.int32)
    ends = lengths.cumsum(0, dtype=torch.int32)
    n = int(lengths.sum())
    if sample.mask == "cross":
        return ends - lengths, ends
    if sample.mask == "random":
        start, stop = torch.randint(-5, n + 6, (2, n), generator=g, dtype=torch.int32).sort(0).values
        empty = torch.rand(n, generator=g) < 0.1
        return torch.where(empty, stop, start), torch.where(empty, start, stop)
    first, last = (t.repeat_interleave(lengths) for t in (ends - lengths, ends))
    i = torch.arange(n, dtype=torch.int32)
    if sample.mask == "causal":
        return first, i + 1
    if sample.mask == "window":
        return torch.maximum(first, i - sample.window + 1), i + 1
    if sample.mask == "prefix":
        return first, torch.maximum(i + 1, (first + last) // 2)
    return first, last


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    start, stop = _bounds(sample, g)
    n, dv = sum(sample.lengths), sample.dv or sample.d
    sizes = [(len(start), sample.hq, sample.d), (n, sample.hkv, sample.d), (n, sample.hkv, dv)]
    if sample.contiguous:
        q, k, v = (torch.randn(*size, generator=g).to(device, dtype) for size in sizes)
    else:  # as a fused projection leaves them
        joint = torch.randn(n, sample.hq + 2 * sample.hkv, sample.d, generator=g).to(device, dtype)
        q, k, v = joint.split([sample.hq, sample.hkv, sample.hkv], 1)
    kwargs = {} if sample.softcap is None else {"softcap": sample.softcap}
    return (q, k, v, start.to(device), stop.to(device)), kwargs


def visible(start: torch.Tensor, stop: torch.Tensor, keys: int) -> int:
    """How many (query, key) pairs the mask lets through."""
    return int((stop.clamp(0, keys) - start.clamp(0, keys)).clamp(min=0).sum(dtype=torch.int64))


def work(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> dict[str, int]:
    """The forward: 2 (D + Dv) FLOPs for each visible pair and query head; the backward does 2.5 times as many."""
    pairs = 0 if q.is_meta else visible(start, stop, k.shape[0]) * q.shape[1]
    out = q.shape[0] * q.shape[1] * v.shape[2] * q.element_size()
    return {
        "flops": max(2 * (q.shape[2] + v.shape[2]) * pairs, q.numel()),
        "bytes": q.nbytes + k.nbytes + v.nbytes + out,
    }


def magnitudes(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """For each gradient the sum of |terms|, to which rounding errors are proportional: dp - delta cancels.

    So do the terms of a score, which is summed in float32 whatever the inputs are: once in the forward, for the LSE,
    and again in the backward, in another order of addition unless the two kernels share their loop. With e the sum of
    |terms| of a score (times the slope of the cap, and its own size behind a cap), one rounding eps of it leaves
    p (1 +- eps e), and to first order in eps, with dev = dp - delta,

        ds = p dev  is off by  eps p (e |dev| + sum_j p_j e_j |dev_j|)        dv = p g  by  eps p e |g|.

    The reference runs one product twice and gets the same bits, so where one key has all the weight its p is exactly 1
    and its own error does not tell of this one; there dev is 0, and so dv alone feels it.
    """
    scale = q.shape[2] ** -0.5 if scale is None else scale
    eps = torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps  # in roundings of the gradients
    g, q, k, v = (t.double() for t in (grad, q, k, v))
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    q, g = q.unflatten(1, groups), g.unflatten(1, groups)
    s = torch.einsum("qhgd,khd->hgqk", q, k) * scale
    e = torch.einsum("qhgd,khd->hgqk", q.abs(), k.abs()) * abs(scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
        e = e * (1 - (s / softcap) ** 2) + s.abs()
    j = torch.arange(k.shape[0], device=q.device)
    visible = (j >= start[:, None]) & (j < stop[:, None])
    p = torch.softmax(s.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    dp, terms = (torch.einsum("qhgd,khd->hgqk", a, b) for a, b in ((g, v), (g.abs(), v.abs())))
    dev = (dp - (p * dp).sum(-1, keepdim=True)).abs()
    each = terms + eps * e * dev
    ds = p * (each + (p * each).sum(-1, keepdim=True)) * abs(scale)
    dq = torch.einsum("hgqk,khd->qhgd", ds, k.abs()).flatten(1, 2)
    dv = torch.einsum("hgqk,qhgd->khd", p * (1 + eps * e), g.abs())
    return dq, torch.einsum("hgqk,qhgd->khd", ds, q.abs()), dv
