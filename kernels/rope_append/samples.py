"""Shapes on which rope_append is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch

from vlkern.kernels.norm_rope.samples import angles


@dataclass(frozen=True)
class Sample:
    """Rows whose next tokens stand at these positions; h query heads, kh key heads, caches of `slots` slots.

    contiguous  False: q, k and v are parts of one fused projection
    """

    name: str
    positions: tuple[tuple[int, ...], ...]
    slots: int
    h: int = 2
    kh: int = 1
    c: int = 16
    cv: int | None = None
    norm: bool = True
    int8: bool = False
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", ((), ()), 4),
    Sample("one", ((0,),), 1, h=1, c=2),
    Sample("below_a_vector", ((3, 4), (-1,), (7, 8)), 9, h=6, kh=2, c=30, cv=14),
    Sample("above_a_tile", ((8, 9), (), (70, 71)), 5, h=9, kh=3, c=34, cv=18),
    Sample("chunk", (tuple(range(10)), (5, 6, 7)), 12, h=4, kh=2, c=64, cv=16),
    Sample("fused_int8", ((14, 15, 16, 17), (3,)), 6, kh=2, norm=False, int8=True, contiguous=False),
    Sample("gemma3_270m_step", ((1023,),), 1024, h=4, kh=1, c=256, bench=True),
    Sample("gemma3_4b_step", ((1023,),) * 4, 1024, h=8, kh=4, c=256, bench=True),
    Sample("gemma3_4b_step_int8", ((1023,),) * 4, 1024, h=8, kh=4, c=256, int8=True, bench=True),
    Sample("gemma3_270m_2k", (tuple(range(2048)),), 2048, h=4, kh=1, c=256, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    t, b, cv = sum(map(len, sample.positions)), len(sample.positions), sample.cv or sample.c
    wide = max(sample.c, cv)
    sizes = [sample.h, sample.kh, sample.kh]
    if sample.contiguous:
        q, k, v = (torch.randn(t, heads, wide, generator=g).to(device, dtype) for heads in sizes)
    else:
        q, k, v = torch.randn(t, sum(sizes), wide, generator=g).to(device, dtype).split(sizes, 1)
    q, k, v = q[..., : sample.c], k[..., : sample.c], v[..., :cv]
    positions = torch.tensor([p for row in sample.positions for p in row], dtype=torch.int32)
    rows = torch.tensor([row for row, several in enumerate(sample.positions) for _ in several], dtype=torch.int32)
    cos, sin = angles(positions, sample.c, dtype)
    caches = [torch.randn(b, sample.slots, sample.kh, n, generator=g) for n in (sample.c, cv)]
    kwargs: dict[str, Any] = {}
    if sample.norm:
        kwargs = {name: torch.randn(sample.c, generator=g).to(device, dtype) for name in ("q_weight", "k_weight")}
    if sample.int8:
        caches = [(20 * cache).to(device, torch.int8) for cache in caches]
        scales = torch.rand(2, b, sample.slots, sample.kh, generator=g).to(device).unbind()
        kwargs |= dict(zip(("k_scale", "v_scale"), (s.clone() for s in scales), strict=True))
    else:
        caches = [cache.to(device, dtype) for cache in caches]
    return (q, k, v, *(t.to(device) for t in (cos, sin, rows, positions)), *caches), kwargs


def work(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> dict[str, int]:
    """7 FLOPs an element for norm and rotation; q, k and v are read and written once, angles read."""
    k_cache, v_cache = rest[4:6]
    stored = k.numel() * k_cache.element_size() + v.numel() * v_cache.element_size()
    return {
        "flops": 7 * (q.numel() + k.numel()),
        "bytes": 2 * q.nbytes + k.nbytes + v.nbytes + stored + rest[0].nbytes + rest[1].nbytes,
    }
