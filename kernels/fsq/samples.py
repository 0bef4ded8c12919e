"""Shapes on which fsq is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """z [*shape, d] for d levels."""

    name: str
    shape: tuple[int, ...]
    levels: tuple[int, ...]
    variant: str = "official"
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0,), (8, 5, 5, 5)),
    Sample("one", (1,), (3,)),
    Sample("below_a_tile", (7,), (8, 8, 8, 6, 5)),
    Sample("above_a_tile", (3, 91), (8, 8, 8, 6, 5), "symmetric"),
    Sample("many_levels", (33,), (1000, 2, 63), "symmetric"),
    Sample("maskgit", (530,), (8, 5, 5, 5)),
    Sample("transposed", (5, 33), (8, 6, 5), contiguous=False),
    Sample("wide_index", (41,), (16,) * 15),
    Sample("maskgit_below", (257,), (8, 5, 5, 5)),
    Sample("maskgit_1m", (1 << 20,), (8, 5, 5, 5), bench=True),
    Sample("uvim_256k", (1 << 18,), (7, 5, 5, 5, 5), bench=True),
    Sample("symmetric_256k", (1 << 18,), (8, 5, 5, 5), "symmetric", bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(*sample.shape, len(sample.levels), generator=g, dtype=torch.float64)
    if sample.bench:
        z = (1024 * z).round() / 1024  # none so close to a boundary that the rounding of a rival's tanh decides
    if not sample.contiguous:
        z = z.transpose(0, -1).contiguous().transpose(0, -1)
    return (z.to(device, dtype), sample.levels), {"variant": sample.variant}


def work(z: torch.Tensor, thresholds: torch.Tensor) -> dict[str, int]:
    """The forward: a comparison per threshold, 6 FLOPs an element; z is read, codes and 8-byte indices are written.

    The backward reads the gradient and z and writes one tensor.
    """
    vectors = z.numel() // z.shape[-1]
    return {"flops": vectors * (thresholds.numel() + 6 * z.shape[-1]), "bytes": 2 * z.nbytes + 8 * vectors}


def smooth(z: torch.Tensor, levels: tuple[int, ...], *, variant: str) -> torch.Tensor:
    """The codes before rounding, of which the public function has the gradient."""
    size = torch.tensor(levels, dtype=z.dtype)
    if variant == "symmetric":
        return torch.tanh(z)
    half, offset = (size - 1) * (1 - 1e-3) / 2, (size % 2 == 0) / 2
    return (torch.tanh(z + torch.tan(offset / half)) * half - offset) / (size / 2).floor()
