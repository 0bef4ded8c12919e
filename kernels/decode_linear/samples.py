"""Shapes on which decode_linear is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """x [m, k] times weights [n_i, k]."""

    name: str
    m: int
    k: int
    n: tuple[int, ...]
    before: bool = False
    geglu: bool = False
    after: bool = False
    residual: bool = False
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", 0, 8, (8,), before=True),
    Sample("one", 1, 1, (1,)),
    Sample("below_a_part", 3, 15, (31, 7, 7), before=True),
    Sample("above_a_part", 2, 264, (65, 130), before=True),
    Sample("two_parts", 3, 264, (66, 131), before=True),
    Sample("gate", 5, 33, (40, 40), before=True, geglu=True),
    Sample("back", 4, 48, (37,), after=True, residual=True),
    Sample("plain", 16, 24, (50,), residual=True),
    Sample("all", 2, 40, (24, 24), before=True, geglu=True, after=True, residual=True, contiguous=False),
    Sample("gemma3_270m_qkv", 1, 640, (1024, 256, 256), before=True, bench=True),
    Sample("gemma3_270m_out", 1, 1024, (640,), after=True, residual=True, bench=True),
    Sample("gemma3_270m_gate", 1, 640, (2048, 2048), before=True, geglu=True, bench=True),
    Sample("gemma3_270m_down", 1, 2048, (640,), after=True, residual=True, bench=True),
    Sample("gemma3_1b_gate", 4, 1152, (6912, 6912), before=True, geglu=True, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        t = torch.randn(*shape, generator=g, dtype=torch.float64)
        return (t if sample.contiguous else t.t().contiguous().t()).to(device, dtype)

    m, k, n = sample.m, sample.k, sample.n
    args = [draw(m, k), *(draw(rows, k) * k**-0.5 for rows in n)]
    width = n[0] if sample.geglu else sum(n)
    kwargs: dict[str, Any] = {"geglu": True} if sample.geglu else {}
    if sample.before:
        kwargs["before"] = 0.1 * draw(k)
    if sample.after:
        kwargs["after"] = 0.1 * draw(width)
    if sample.residual:
        kwargs["residual"] = draw(m, width)
    return tuple(args), kwargs | ({"offset": 1.0} if sample.before or sample.after else {})


def work(x: torch.Tensor, *rest: torch.Tensor) -> dict[str, int]:
    """2 M N K FLOPs; everything is read once, above all the weights, and y is written."""
    weights = [t for t in rest if t.dim() == 2 and t.shape[1] == x.shape[1]]
    return {
        "flops": max(x.numel(), 2 * len(x) * sum(w.numel() for w in weights)),
        "bytes": x.nbytes + sum(t.nbytes for t in rest),
    }
