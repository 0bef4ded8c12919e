"""RMS norm and rotary position embedding of heads; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.norm_rope import reference, samples


def check_angles(name: str, value: Any, x_name: str, x: torch.Tensor) -> torch.Tensor:
    """`value`, which must be the cosines or sines for x [T, H, C]: [T, C / 2] in float32, widened for a float64 x."""
    t = _checks.tensor(name, value)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if t.dtype != torch.float32 and t.dtype != wide:
        raise TypeError(f"{name} must be {wide}, got {t.dtype}")
    _checks.shape(name, t, (x.shape[0], x.shape[2] // 2))
    _checks.on_device(name, t, x_name, x)
    return t if t.dtype == wide else t.to(wide)


def check_weight(name: str, value: Any, x_name: str, x: torch.Tensor) -> torch.Tensor | None:
    """`value`, which must be None or the weight [C] of a norm of x [T, H, C]."""
    if value is None:
        return None
    t = _checks.floating(name, value)
    _checks.shape(name, t, (x.shape[2],))
    _checks.on_device(name, t, x_name, x)
    return t.to(x.dtype if x.dtype == torch.float64 else torch.float32) if t.dtype == torch.float64 else t


def check_heads(name: str, value: Any) -> torch.Tensor:
    """`value`, which must be [tokens, heads, head dim] with an even head dim."""
    t = _checks.floating(name, value)
    shape = t.shape
    if len(shape) != 3 or shape[2] == 0 or shape[2] % 2:
        raise ValueError(f"{name} must have shape [tokens, heads, even head dim], got {list(shape)}")
    return t


def _bind(x: Any, cos: Any, sin: Any, weight: Any = None, *, eps: float = 1e-6, offset: float = 1.0) -> tuple[Any, ...]:
    x = check_heads("x", x)
    cos, sin = check_angles("cos", cos, "x", x), check_angles("sin", sin, "x", x)
    weight = check_weight("weight", weight, "x", x)
    weight = weight if weight is None or weight.dtype == cos.dtype else weight.to(cos.dtype)
    return x, cos, sin, weight, _checks.number("eps", eps, positive=True), _checks.number("offset", offset)


_op = Op(
    "norm_rope",
    public="norm_rope",
    schemas={
        "norm_rope": "(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
        "norm_rope_backward": "(Tensor grad, Tensor x, Tensor cos, Tensor sin, Tensor? weight, Tensor rstd,"
        " float offset) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["norm_rope"], _op.raw["norm_rope_backward"]


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        backend: str,
    ) -> Any:
        y, rstd = _forward[backend](x, cos, sin, weight, eps, offset)
        ctx.save_for_backward(x, cos, sin, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, cos, sin, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward[ctx.backend](grad, x, cos, sin, weight, rstd, ctx.offset)
        dcos = dsin = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dcos, dsin = reference.angle_gradients(grad, x, weight, rstd, ctx.offset)
        return dx, dcos, dsin, None if weight is None else dweight, None, None, None


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> torch.Tensor:
    """RMS norm over the channels of each head, then rotary position embedding (RoPE), in one pass.

        h = x / sqrt(mean(x^2) + eps) * (offset + weight)        without weight: h = x
        y_j = h_j cos_j - h_(j + C/2) sin_j,    y_(j + C/2) = h_(j + C/2) cos_j + h_j sin_j,    j < C / 2

    Args:
        x: [T, H, C], queries or keys of T tokens; float32, bfloat16 or float16 (float64 on the reference); C even.
        cos: [T, C / 2] float32, the cosine of each token's angles: `vlkern.layers.rope.Rope` makes them, once per
            forward for all layers with the same base.
        sin: [T, C / 2] float32.
        weight: [C], of any of these dtypes and read as float32, or None for no norm (Gemma 1 and 2).
        eps: added to the mean square; > 0.
        offset: added to the weight: 1 for Gemma, whose weights are stored minus one, 0 for the usual form.

    Returns:
        [T, H, C] in x's dtype, rounded once. Everything in between runs in float32. Differentiable once in x, weight,
        cos and sin.

    Raises:
        TypeError: an argument is no tensor of these dtypes, eps or offset no number.
        ValueError: shapes or devices do not fit, C is odd, eps is not positive and finite.

    Source: Su et al., RoFormer, 2021; Henry et al., Query-Key Normalization, 2020; Gemma 3 (both, in this order).

    Example:
        >>> from vlkern.layers.rope import Rope
        >>> cos, sin = Rope(64, base=10000.0)(torch.arange(5))
        >>> y = vlkern.ops.norm_rope(torch.randn(5, 4, 64), cos, sin, torch.zeros(64))
    """
    x, cos, sin, weight, eps, offset = _bind(x, cos, sin, weight, eps=eps, offset=offset)
    backend = _op.choose(x, cos, sin)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, cos, sin, weight)):
        result: torch.Tensor = _NormRope.apply(x, cos, sin, weight, eps, offset, backend)
        return result
    return _forward[backend](x, cos, sin, weight, eps, offset)[0]
