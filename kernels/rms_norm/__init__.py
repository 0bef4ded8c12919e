"""RMS normalisation; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.rms_norm import reference, samples


def _bind(x: Any, weight: Any, *, eps: float = 1e-6, offset: float = 0.0) -> tuple[Any, ...]:
    x, weight = _checks.floating("x", x), _checks.floating("weight", weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., N] with N >= 1, got {list(x.shape)}")
    _checks.shape("weight", weight, (x.shape[-1],))
    _checks.on_device("weight", weight, "x", x)
    eps, offset = _checks.number("eps", eps, positive=True), _checks.number("offset", offset)
    if _checks.autocast_dtype(x) is not None:
        x = x.float()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x, weight if weight.dtype == wide else weight.to(wide), eps, offset


_op = Op(
    "rms_norm",
    public="rms_norm",
    schemas={
        "rms_norm": "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
        "rms_norm_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["rms_norm"], _op.raw["rms_norm_backward"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, backend: str) -> Any:
        y, rstd = _forward[backend](x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward[ctx.backend](grad, x, weight, rstd, ctx.offset)
        return dx, dweight, None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """RMS normalisation over the last dimension.

        y = x / sqrt(mean(x^2) + eps) * (offset + weight)

    Args:
        x: [..., N], float32, bfloat16 or float16 (float64 on the reference).
        weight: [N], any of these dtypes; read as float32.
        eps: added to the mean square; > 0.
        offset: added to the weight: 0 for the usual form, 1 for Gemma's, whose weights are stored minus one.

    Returns:
        [..., N] in x's dtype; under autocast float32. Sums run in float32. Differentiable once in x and weight.

    Raises:
        TypeError: x or weight is not a floating-point tensor, eps or offset no number.
        ValueError: weight is not [N] or lies on another device, N is 0, eps is not positive and finite.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Gemma (offset).

    Example:
        >>> y = vlkern.ops.rms_norm(torch.randn(4, 640), torch.zeros(640), offset=1.0)
    """
    x, weight, eps, offset = _bind(x, weight, eps=eps, offset=offset)
    backend = _op.choose(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset, backend)
        return result
    return _forward[backend](x, weight, eps, offset)[0]
