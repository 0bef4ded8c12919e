"""The gate of Gemma's MLP; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.geglu import reference, samples


def _bind(gate: Any, up: Any) -> tuple[Any, ...]:
    gate, up = _checks.floating("gate", gate), _checks.floating("up", up)
    _checks.shape("up", up, gate.shape)
    _checks.same("up", up, "gate", gate)
    return gate, up


_op = Op(
    "geglu",
    public="geglu",
    schemas={
        "geglu": "(Tensor gate, Tensor up) -> Tensor",
        "geglu_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["geglu"], _op.raw["geglu_backward"]


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, backend: str) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _forward[backend](gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *_backward[ctx.backend](grad, *ctx.saved_tensors), None


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gated linear unit of Gemma's MLP, whose two linear layers give `gate` and `up`.

        y = gelu(gate) * up,    gelu(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

    Args:
        gate: [...], float32, bfloat16 or float16 (float64 on the reference).
        up: as gate.

    Returns:
        [...] in gate's dtype, rounded once; computed in float32. Differentiable once in gate and up; the backward
        keeps these two and recomputes the rest.

    Raises:
        TypeError: gate or up is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ.

    Source: Shazeer, GLU Variants Improve Transformer, 2020; Gemma, 2024.

    Example:
        >>> y = vlkern.ops.geglu(torch.randn(4, 2048), torch.randn(4, 2048))
    """
    gate, up = _bind(gate, up)
    backend = _op.choose(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        result: torch.Tensor = _GeGLU.apply(gate, up, backend)
        return result
    y: torch.Tensor = _forward[backend](gate, up)
    return y
