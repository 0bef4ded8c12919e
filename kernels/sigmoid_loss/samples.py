"""Shapes on which the sigmoid loss is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """B pairs of width d; `valid` leaves every third slot empty; `huge` is measured on request only."""

    name: str
    b: int
    d: int
    scale: float = 10.0
    bias: float = -10.0
    valid: bool = False
    contiguous: bool = True
    bench: bool = False
    huge: bool = False


SAMPLES = [
    Sample("one", 1, 1),
    Sample("tiny", 3, 5),
    Sample("below_a_tile", 31, 33, scale=3.7, bias=-2.25),
    Sample("above_a_tile", 65, 64),
    Sample("hot", 33, 24, scale=100.0, bias=7.5),
    Sample("empty_slots", 50, 40, valid=True),
    Sample("strided", 40, 24, contiguous=False),
    Sample("several_chunks", 1031, 96),
    Sample("siglip_so400m_4k", 4096, 1152, bench=True),
    Sample("siglip_b16_8k", 8192, 768, bench=True),
    Sample("siglip_b16_64k", 65536, 768, bench=True, huge=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device.

    Each text is its image plus noise, so that positive pairs stand out as they do in training.
    """
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if sample.b * sample.d < 1 << 20 else torch.float32
    image = torch.randn(sample.b, sample.d, generator=g, dtype=wide)
    text = image + torch.randn(sample.b, sample.d, generator=g, dtype=wide)
    image, text = (torch.nn.functional.normalize(t, dim=-1).to(device, dtype) for t in (image, text))
    if not sample.contiguous:
        image, text = image.t().contiguous().t(), torch.cat([text, text], 1)[:, : sample.d]
    scale = torch.tensor(sample.scale, dtype=torch.promote_types(dtype, torch.float32), device=device)
    bias = torch.full_like(scale, sample.bias)
    kwargs = {"valid": torch.arange(sample.b, device=device) % 3 != 1} if sample.valid else {}
    return (image, text, scale, bias), kwargs


def work(image: torch.Tensor, text: torch.Tensor, *rest: torch.Tensor) -> dict[str, int]:
    """Forward and backward: three matmuls of 2 B^2 D FLOPs; image and text are read, their gradients written."""
    return {"flops": 6 * image.shape[0] * text.shape[0] * image.shape[1], "bytes": 4 * image.nbytes}


def magnitudes(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    valid: Any = None,
) -> tuple[torch.Tensor | None, ...]:
    """For each gradient the sum of |terms|, to which its rounding errors are proportional.

    The terms cancel: in sum g <x, y> and sum g, g > 0 for negative pairs and g < 0 for positive ones; in sum_j g_ij y_j
    the y_j differ in sign, and with few channels almost nothing may be left.
    """
    rows, columns = valid if isinstance(valid, tuple) else (valid, valid)
    x, y = image.double(), text.double()
    count = len(x)
    if rows is not None:
        x, y, count = x * rows[:, None], y * columns[:, None], max(int(rows.sum()), 1)
    dots = x @ y.T
    z = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    g = grad.abs() / count * torch.sigmoid(-z * (scale.double() * dots + bias.double()))
    if rows is not None:
        g = g * rows[:, None] * columns
    scale = scale.double()
    return scale * (g @ y.abs()), scale * (g.T @ x.abs()), (g * dots.abs()).sum(), g.sum()
