"""Rivals of fsq, its notebook and vector-quantize-pytorch, and of masked_decode_step, the lines of MaskGIT's loop."""

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


def masked_decode_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    noise: torch.Tensor,
    *,
    mask: int,
    temperature: float = 0.0,
    unconditional: torch.Tensor | None = None,
    guidance: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax, cumulative sums and a search with the same numbers; log p by gather, Gumbel noise, a sort and a cut."""
    z = logits.float()
    if unconditional is not None:
        z = z + guidance * (z - unconditional.float())
    p = z.softmax(-1)
    sums = p.cumsum(-1)
    drawn = torch.searchsorted(sums, noise[..., :1] * sums[..., -1:], right=True).clamp(max=z.shape[-1] - 1)
    unknown = ids == mask
    log_p = torch.where(unknown, p.gather(-1, drawn)[..., 0].log(), 0.0)
    filled = torch.where(unknown, drawn[..., 0], ids)
    gumbel = -(-noise[..., 1].clamp(1e-10).log()).log()
    confidence = torch.where(unknown, log_p + temperature * gumbel, torch.inf)
    cut = confidence.sort(-1).values.gather(
        1, torch.minimum(count, unknown.sum(1)).clamp(max=ids.shape[1] - 1)[:, None]
    )
    return torch.where(confidence < cut, mask, filled), filled, log_p
