"""Finite scalar quantization as its notebook writes it, and vector-quantize-pytorch's: rivals of fsq."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Quantized = tuple[torch.Tensor, torch.Tensor]


def _straight_through(rounded: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    return smooth + (rounded - smooth).detach()


def fsq(z: torch.Tensor, levels: tuple[int, ...], *, variant: str = "official") -> Quantized:
    """The published notebook, or the formula of the symmetric variant, in float32."""
    size = torch.tensor(levels, device=z.device)
    if variant == "symmetric":
        scaled = (size - 1) * (torch.tanh(z.float()) + 1) / 2 + 0.5
        whole = _straight_through(scaled.floor(), scaled)
        codes, digits = 2 / (size - 1) * whole - 1, whole
    else:
        half, offset = (size - 1) * (1 - 1e-3) / 2, torch.where(size % 2 == 1, 0.0, 0.5)
        bound = torch.tanh(z.float() + torch.tan(offset / half)) * half - offset
        whole, width = _straight_through(bound.round(), bound), size // 2
        codes, digits = whole / width, whole + width
    basis = torch.cat([size.new_ones(1), size[:-1].cumprod(0)])
    return codes.to(z.dtype), (digits.detach().round().long() * basis).sum(-1)


def lucidrains(module: ModuleType) -> Callable[..., Quantized]:
    """FSQ of vector_quantize_pytorch. Its bound is not the official one; its symmetric variant is the same as ours."""
    layers: dict[tuple[int, ...], Any] = {}

    def run(z: torch.Tensor, levels: tuple[int, ...], *, variant: str = "official") -> Quantized:
        if variant != "symmetric":
            raise ValueError("its bound has other constants, (1 + 1e-3) and atanh, and finds other integers")
        if levels not in layers:
            layers[levels] = module.FSQ(list(levels), preserve_symmetry=True).to(z.device)
        codes, indices = layers[levels](z.flatten(0, -2)[None])
        return codes.view(z.shape), indices.view(z.shape[:-1])

    return run
