"""Linear layers of a step of decoding, with what stands around them; the maths is in README.md."""

from typing import Any

import torch

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.decode_linear import reference, samples

#: Up to so many rows the weights' way from memory is what a product takes (csrc/few_rows.h).
MOST_ROWS = 16


def _norm(name: str, value: Any, width: int, x: torch.Tensor) -> None:
    if value is not None:
        _checks.shape(name, _checks.floating(name, value), (width,))
        _checks.on_device(name, value, "x", x)


def _bind(
    x: Any,
    *weights: Any,
    before: Any = None,
    geglu: Any = False,
    after: Any = None,
    residual: Any = None,
    eps: Any = 1e-6,
    offset: Any = 0.0,
) -> tuple[Any, ...]:
    x = _checks.floating("x", x)
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[0] > MOST_ROWS:
        raise ValueError(f"x must have shape [M, K] with M <= {MOST_ROWS} and K >= 1, got {list(x.shape)}")
    if not weights:
        raise ValueError("weights must be at least one, got none")
    if (dtype := _checks.autocast_dtype(x)) is not None:
        x, weights = x.to(dtype), tuple(_checks.floating("weights", w).to(dtype) for w in weights)
        residual = residual.to(dtype) if isinstance(residual, torch.Tensor) else residual
    width = 0
    for weight in weights:
        w = _checks.floating("weights", weight)
        if w.dim() != 2 or w.shape[1] != x.shape[1]:
            raise ValueError(f"weights must have shape [N, {x.shape[1]}], got {list(w.shape)}")
        _checks.same("weights", w, "x", x)
        width += w.shape[0]
    if geglu:
        if len(weights) != 2 or weights[0].shape != weights[1].shape:
            raise ValueError(f"weights must be two of one shape with geglu, got {[list(w.shape) for w in weights]}")
        width //= 2
    if width == 0:
        raise ValueError("weights must have at least one row, got none")
    _norm("before", before, x.shape[1], x)
    _norm("after", after, width, x)
    if residual is not None:
        _checks.shape("residual", _checks.floating("residual", residual), (x.shape[0], width))
        _checks.same("residual", residual, "x", x)
    eps, offset = _checks.number("eps", eps, positive=True), _checks.number("offset", offset)
    return x, list(weights), before, bool(geglu), after, residual, eps, offset


_op = Op(
    "decode_linear",
    public="decode_linear",
    schemas={
        "decode_linear": "(Tensor x, Tensor[] weights, Tensor? before, bool geglu, Tensor? after, Tensor? residual,"
        " float eps, float offset) -> Tensor",
    },
    reference=reference,
    backends=("cpu",),
    bind=_bind,
    work=samples.work,
    differentiable=False,
)
_forward = _op.raw["decode_linear"]


def decode_linear(
    x: torch.Tensor,
    *weights: torch.Tensor,
    before: torch.Tensor | None = None,
    geglu: bool = False,
    after: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> torch.Tensor:
    """Linear layers of a step of decoding with the norms, the gate and the sum around them, in one call.

        u = N(x; before)                                            N(x; w) = x / sqrt(mean(x^2) + eps) * (offset + w)
        y = [u weights_1^T | u weights_2^T | ...]                   with geglu: gelu(u weights_1^T) * (u weights_2^T)
        out = residual + N(y; after)

    For CPUs and a few tokens: such a layer takes the time in which its weights are read, and calls of their own for
    the norms and sums of a layer would take as long again. Of these parts each may be missing.

    Args:
        x: [M, K], float32, bfloat16 or float16 (float64 on the reference); 1 <= K, M <= 16.
        weights: one or several [N_i, K], same dtype and device; N is the sum of N_i.
        before: [K], the weight of an RMS norm of x, any of these dtypes and read as float32, or None for no norm.
        geglu: gelu (tanh form) of the first of two weights' products times the second's: N is N_1 = N_2.
        after: [N], the weight of an RMS norm of the products, likewise.
        residual: [M, N], x's dtype and device, added last; or None.
        eps: of the norms; > 0.
        offset: added to the norms' weights: 1 for Gemma, whose weights are stored minus one.

    Returns:
        [M, N] in x's dtype; under autocast in autocast's. Everything runs in float32 and is rounded once. A row has the
        same bits whatever stands beside it. No gradient: `vlkern.ops.linear`, `rms_norm` and `geglu` have one.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ; eps or offset is no number.
        ValueError: there is no weight, or there are not two for geglu; shapes or devices do not fit; x has more than 16
            rows; eps is not positive and finite; an argument requires a gradient.

    Source: Gemma 3, 2025 (norms before and after a layer); Shazeer, GLU Variants Improve Transformer, 2020.

    Example:
        >>> x, gate, up, down = torch.randn(1, 64), torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96)
        >>> h = vlkern.ops.decode_linear(x, gate, up, before=torch.zeros(64), geglu=True, offset=1.0)
        >>> y = vlkern.ops.decode_linear(h, down, residual=x)
    """
    arguments = _bind(x, *weights, before=before, geglu=geglu, after=after, residual=residual, eps=eps, offset=offset)
    if torch.is_grad_enabled():
        named = {f"weights[{i}]": w for i, w in enumerate(weights)}
        _checks.no_gradient(x=x, before=before, after=after, residual=residual, **named)
    result: torch.Tensor = _forward[_op.choose(arguments[0])](*arguments)
    return result
