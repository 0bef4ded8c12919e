"""Shapes on which affine_coupling is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """x [*shape]; a checkerboard of tokens and a random half of the channels where those say so."""

    name: str
    shape: tuple[int, ...]
    tokens: bool = False
    channels: bool = False
    strided: bool = False
    """shift and raw_scale are halves of one tensor, as a network's last layer leaves them."""
    bench: bool = False


SAMPLES = [
    Sample("empty", (0, 4, 6)),
    Sample("one", (1, 1)),
    Sample("below_a_vector", (3, 1, 5)),
    Sample("above_a_vector", (2, 1, 33), strided=True),
    Sample("tokens", (2, 9, 7), tokens=True),
    Sample("channels", (2, 5, 12), channels=True, strided=True),
    Sample("above_a_tile", (1, 33, 130)),
    Sample("both", (3, 8, 22), tokens=True, channels=True, strided=True),
    Sample("more_channels", (3, 9, 40), channels=True, strided=True),
    Sample("jet_imagenet64_half", (64, 256, 24), bench=True),
    Sample("jet_imagenet64_channels", (64, 256, 48), channels=True, strided=True, bench=True),
    Sample("jet_imagenet64_checkerboard", (64, 256, 48), tokens=True, strided=True, bench=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sample.shape, generator=g, dtype=torch.float64)
    part, options = list(sample.shape), {}
    if sample.tokens:
        options["tokens"] = torch.arange(1, sample.shape[1], 2, dtype=torch.int32, device=device)
        part[1] = len(options["tokens"])
    if sample.channels:
        shuffled = torch.randperm(sample.shape[2], generator=g)
        options["channels"] = shuffled[: sample.shape[2] // 2].to(device, torch.int32)
        part[2] = sample.shape[2] // 2
    shift, raw = torch.randn(2, *part, generator=g, dtype=torch.float64)
    shift, raw = shift.to(device, dtype), (3 * raw).to(device, dtype)
    if sample.strided:
        shift, raw = torch.cat([shift, raw], -1).chunk(2, -1)
    return (x.to(device, dtype), shift, raw), options


def work(x: torch.Tensor, shift: torch.Tensor, raw: torch.Tensor, *indices: torch.Tensor) -> dict[str, int]:
    """The forward: about 20 FLOPs an element of the part, half of them the logarithm; all is read, y is written."""
    return {"flops": x.numel() + 20 * raw.numel(), "bytes": 2 * x.nbytes + 2 * raw.nbytes}


def magnitudes(
    grad: torch.Tensor,
    grad_logdet: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor,
    raw: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """draw = (dy y2 + dlogdet) (1 - sigmoid): the terms cancel, and y2 is read as it was rounded."""
    from vlkern.kernels.coupling import reference

    tokens, channels = options.get("tokens"), options.get("channels")
    y, _ = reference.affine_coupling(x.double(), shift.double(), raw.double(), tokens, channels, 2.0)
    terms = (reference.part(grad.double() * y, tokens, channels)).abs()
    of_logdet = grad_logdet.double().abs().view(-1, *[1] * (raw.dim() - 1))
    return None, None, terms + of_logdet
