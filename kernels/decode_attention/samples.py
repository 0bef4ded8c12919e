"""Shapes on which decode_attention is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """Rows of these lengths in caches of `slots` slots; `tokens` queries a row, h query heads on kh key heads.

    contiguous  False: the caches are every other row of larger ones, and keys and values share their memory
    """

    name: str
    lengths: tuple[int, ...]
    slots: int
    tokens: int = 1
    h: int = 2
    kh: int = 1
    c: int = 16
    cv: int | None = None
    window: int | None = None
    softcap: float | None = None
    int8: bool = False
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (), 8),
    Sample("one", (1,), 1, h=1, c=8),
    Sample("below_a_tile", (15, 0), 20, tokens=2, h=3, kh=1, c=24),
    Sample("above_a_tile", (65, 17), 70, tokens=3, h=4, kh=2, c=40, cv=16),
    Sample("ring", (28, 100), 28, tokens=4, h=4, kh=2, window=24, softcap=2.0),
    Sample("so400m_head", (33,), 40, tokens=16, h=4, kh=2, c=72, window=9),
    Sample("gemma3_270m_ring", (300,), 64, h=4, kh=1, c=256, window=64),
    Sample("every_other_row", (21, 50), 64, h=2, kh=2, c=32, contiguous=False),
    Sample("int8", (30, 45), 64, tokens=2, h=4, kh=2, c=64, int8=True),
    Sample("one_split", (70, 41), 80, h=4, kh=1, c=64),
    Sample("several_splits", (600, 290), 640, h=2, kh=1, c=64),
    Sample("gemma3_4b_8k", (8192,) * 4, 8192, h=8, kh=4, c=256, bench=True),
    Sample("gemma3_4b_8k_int8", (8192,) * 4, 8192, h=8, kh=4, c=256, int8=True, bench=True),
    Sample("gemma3_4b_32k", (32768,), 32768, h=8, kh=4, c=256, bench=True),
    Sample("gemma3_270m_short", (64,), 2048, h=4, kh=1, c=256, bench=True),
]


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] -> int8 [..., C] and float32 [...]: x = int8 * scale to within half a scale, scale = max |x| / 127."""
    scale = x.abs().amax(-1) / 127
    steps = torch.where(scale > 0, 1 / scale, 0.0)
    return (x * steps[..., None]).round().to(torch.int8), scale.float()


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    rows, cv = len(sample.lengths), sample.cv or sample.c
    q = torch.randn(rows, sample.tokens, sample.h, sample.c, generator=g)
    k = torch.randn(rows, sample.slots, sample.kh, sample.c, generator=g)
    v = torch.randn(rows, sample.slots, sample.kh, cv, generator=g)
    kwargs: dict[str, Any] = {"window": sample.window, "softcap": sample.softcap}
    if sample.int8:
        (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
        kwargs |= {"k_scale": k_scale.to(device), "v_scale": v_scale.to(device)}
    else:
        k, v = k.to(dtype), v.to(dtype)
    if not sample.contiguous:
        k, v = torch.stack([k, v], 2).repeat_interleave(2, 0)[::2].unbind(2)
    length = torch.tensor(sample.lengths, dtype=torch.int32)
    return (q.to(device, dtype), k.to(device), v.to(device), length.to(device)), kwargs


def work(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, *scales: torch.Tensor
) -> dict[str, int]:
    """2 (C + Cv) FLOPs for each occupied slot, query head and token; the occupied slots are read once.

    A window that is shorter than the cache is not counted.
    """
    occupied = k.shape[0] * k.shape[1] if length.is_meta else int(length.clamp(0, k.shape[1]).sum())
    tokens, heads = q.shape[1:3]
    slot = k.shape[2] * ((k.shape[3] + v.shape[3]) * k.element_size() + 4 * len(scales))
    out = q.numel() // q.shape[3] * v.shape[3] * q.element_size()
    return {
        "flops": max(2 * (k.shape[3] + v.shape[3]) * occupied * tokens * heads, q.numel()),
        "bytes": q.nbytes + out + occupied * slot,
    }
