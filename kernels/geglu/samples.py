"""Shapes on which geglu is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """gate and up [*shape]."""

    name: str
    shape: tuple[int, ...]
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", (0, 8)),
    Sample("one", (1,)),
    Sample("below_a_vector", (3, 5)),
    Sample("above_a_vector", (1, 33)),
    Sample("above_a_block", (3, 2731)),
    Sample("transposed", (48, 33), contiguous=False),
    Sample("gemma3_270m_prefill", (2048, 2048), bench=True),
    Sample("gemma3_1b_prefill", (2048, 6912), bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, *sample.shape, generator=g, dtype=torch.float64)
    gate = 2 * gate
    if not sample.contiguous:
        gate, up = gate.t().contiguous().t(), up.t().contiguous().t()
    return (gate.to(device, dtype), up.to(device, dtype)), {}


def work(gate: torch.Tensor, up: torch.Tensor) -> dict[str, int]:
    """The forward: about 10 FLOPs an element; gate and up are read, y is written. The backward moves 5 tensors."""
    return {"flops": 10 * gate.numel(), "bytes": 3 * gate.nbytes}


def magnitudes(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each gradient what its rounding errors are proportional to: gelu's slope has terms of size |z| and 1."""
    g, z = grad.double().abs(), gate.double().abs()
    return g * up.double().abs() * (1 + z), g * z
