"""Shapes on which the vocabulary's cross-entropy is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """T tokens of width d against v classes; `huge` is measured on request only."""

    name: str
    t: int
    v: int
    d: int
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    ignored: bool = False
    contiguous: bool = True
    bench: bool = False
    huge: bool = False


_EVERYTHING = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5}

SAMPLES = [
    Sample("empty", 0, 5, 4),
    Sample("one", 1, 1, 1),
    Sample("every_option", 17, 41, 24, _EVERYTHING, bias=True, ignored=True),
    Sample("token_by_token", 33, 70, 16, {**_EVERYTHING, "reduction": "none"}, bias=True, ignored=True),
    Sample("tiny", 3, 5, 7),
    Sample("below_a_tile", 31, 63, 33),
    Sample("strided", 40, 24, 16, contiguous=False),
    Sample("several_chunks", 1100, 70, 37, ignored=True),
    Sample("above_a_tile", 33, 65, 64, ignored=True),
    Sample("gemma_width_32k_classes", 2048, 32768, 640, bench=True),
    Sample("gemma3_270m_full", 4096, 262144, 640, bench=True, huge=True),
]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device.

    Hidden states lean towards their target's row, as in a trained model: some targets are likely, others are not.
    """
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if sample.v * sample.d < 1 << 20 else torch.float32
    weight = torch.randn(sample.v, sample.d, generator=g, dtype=wide) * sample.d**-0.5
    target = torch.randint(sample.v, (sample.t,), generator=g)
    hidden = torch.randn(sample.t, sample.d, generator=g, dtype=wide)
    hidden += 4 * torch.rand(sample.t, 1, generator=g, dtype=wide) * weight[target]
    bias = torch.randn(sample.v, generator=g, dtype=wide) if sample.bias else None
    if sample.ignored:
        target[torch.arange(sample.t) % 3 == 1] = -100
    if not sample.contiguous:
        hidden, weight = hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, : sample.d]
        target = target.repeat_interleave(2)[::2]
    args = hidden.to(device, dtype), weight.to(device, dtype), target.to(device)
    return args, sample.options if bias is None else {**sample.options, "bias": bias.to(device, dtype)}


def work(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> dict[str, int]:
    """Forward and backward: three matmuls of 2 T V D FLOPs; hidden and weight are read, their gradients written."""
    tokens, (v, d) = hidden.shape[0], weight.shape
    return {"flops": 6 * tokens * v * d, "bytes": 2 * (hidden.nbytes + weight.nbytes)}


def magnitudes(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """For each gradient the sum of |terms|, to which its rounding errors are proportional.

    The terms cancel: a row of dL/dlogits is positive but for the target's entry, and sums to zero.
    """
    x, w, counts = hidden.double(), weight.double(), target != ignore_index
    z = logit_scale * (x @ w.T if bias is None else x @ w.T + bias.double())
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(1, keepdim=True)
    own = torch.arange(len(w), device=target.device) == target[:, None]
    g = (z - lse).exp() * (1 + 2 * z_loss * lse.abs()) + (1 - label_smoothing) * own + label_smoothing / len(w)
    share = grad.double().abs() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)
    g = logit_scale * g * (share * counts)[:, None]
    sums = g @ w.abs(), g.T @ x.abs(), g.sum(0)
    return sums if bias is not None else sums[:2]
