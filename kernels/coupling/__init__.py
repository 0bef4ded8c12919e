"""The affine coupling of normalizing flows and its inverse; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.coupling import reference, samples


def _indices(name: str, value: Any, size: int, x_name: str, x: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    t = _checks.tensor(name, value)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be None unless {x_name} has shape [B, N, K], got {list(x.shape)}")
    if t.dim() != 1 or t.shape[0] > size:
        raise ValueError(f"{name} must have shape [n] with n <= {size}, got {list(t.shape)}")
    _checks.on_device(name, t, x_name, x)
    if _checks.values_may_be_read(t) and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in [0, {size}), got {low} to {high}")
        if int(torch.bincount(t, minlength=size).max()) > 1:
            raise ValueError(f"{name} must not repeat an index, got {t.tolist()}")
    return t.contiguous()


def _bind_as(
    x_name: str, x: Any, shift: Any, raw_scale: Any, *, tokens: Any = None, channels: Any = None, max_scale: Any = 2.0
) -> tuple[Any, ...]:
    x = _checks.floating(x_name, x)
    shift, raw_scale = _checks.floating("shift", shift), _checks.floating("raw_scale", raw_scale)
    if x.dim() < 2:
        raise ValueError(f"{x_name} must have shape [B, ...] with two dimensions or more, got {list(x.shape)}")
    max_scale = _checks.number("max_scale", max_scale, positive=True)
    tokens = _indices("tokens", tokens, x.shape[1], x_name, x)
    channels = _indices("channels", channels, x.shape[-1], x_name, x)
    of_part = list(x.shape)
    if tokens is not None:
        of_part[1] = tokens.shape[0]
    if channels is not None:
        of_part[-1] = channels.shape[0]
    _checks.shape("shift", shift, tuple(of_part))
    _checks.shape("raw_scale", raw_scale, tuple(of_part))
    if _checks.autocast_dtype(x) is not None:  # as losses and norms: the errors of a flow add up over its depth
        x, shift, raw_scale = x.float(), shift.float(), raw_scale.float()
    _checks.same("shift", shift, x_name, x)
    _checks.same("raw_scale", raw_scale, x_name, x)
    return x, shift, raw_scale, tokens, channels, max_scale


def _bind(x: Any, shift: Any, raw_scale: Any, **options: Any) -> tuple[Any, ...]:
    return _bind_as("x", x, shift, raw_scale, **options)


_MAP = "Tensor shift, Tensor raw, Tensor? tokens, Tensor? channels, float max_scale"
_SAVED = "Tensor grad, Tensor grad_logdet, Tensor y, Tensor raw"

_op = Op(
    "coupling",
    public="affine_coupling",
    schemas={
        "affine_coupling": f"(Tensor x, {_MAP}) -> (Tensor, Tensor)",
        "affine_coupling_part": f"(Tensor x, {_MAP}) -> (Tensor, Tensor, Tensor)",
        "affine_coupling_backward": f"({_SAVED}, float max_scale) -> (Tensor, Tensor)",
        "affine_coupling_part_backward": f"({_SAVED}, Tensor? tokens, Tensor? channels, float max_scale)"
        " -> (Tensor, Tensor, Tensor)",
        "affine_coupling_inverse": f"(Tensor y, {_MAP}) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["affine_coupling"], _op.raw["affine_coupling_backward"]
_part, _part_backward = _op.raw["affine_coupling_part"], _op.raw["affine_coupling_part_backward"]
_inverse = _op.raw["affine_coupling_inverse"]


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shift: torch.Tensor,
        raw: torch.Tensor,
        tokens: torch.Tensor | None,
        channels: torch.Tensor | None,
        max_scale: float,
        backend: str,
    ) -> Any:
        if tokens is None and channels is None:
            y, logdet = _forward[backend](x, shift, raw, None, None, max_scale)
            y2 = y
        else:
            y, logdet, y2 = _part[backend](x, shift, raw, tokens, channels, max_scale)
        ctx.save_for_backward(y2, raw, tokens, channels)
        ctx.max_scale, ctx.backend = max_scale, backend
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, grad_logdet: torch.Tensor) -> Any:
        y2, raw, tokens, channels = ctx.saved_tensors
        grads = grad, grad_logdet
        if tokens is None and channels is None:
            dx, draw = _backward[ctx.backend](*grads, y2, raw, ctx.max_scale)
            dshift = dx
        else:
            dx, dshift, draw = _part_backward[ctx.backend](*grads, y2, raw, tokens, channels, ctx.max_scale)
        return dx, dshift, draw, None, None, None, None


def affine_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw_scale: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    max_scale: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine coupling of Jet: part of x is shifted and scaled, the rest passes; and its log-determinant.

        x2 = x[:, tokens][:, :, channels]     y2 = (x2 + shift) s     s = max_scale sigmoid(raw_scale)
        logdet[b] = sum log s[b]

    shift and raw_scale come from a network that sees only the rest of x, which makes the map invertible.

    Args:
        x: [B, N, K], float32, bfloat16 or float16 (float64 on the reference); any [B, ...] where tokens and channels
            are None.
        shift: [B, n, k], the shape of x2, in x's dtype.
        raw_scale: as shift; each in turn may be a half of one tensor.
        tokens: [n] int32, the tokens that change, in the order of shift; each at most once. None: all N in order.
        channels: [k] int32, the channels that change, likewise.
        max_scale: what the scale stays below, > 0.

    Returns:
        y [B, N, K] in x's dtype and logdet [B] in float32; under autocast both float32. Computed in float32.
        Differentiable once in x, shift and raw_scale; the backward keeps the changed part of y and raw_scale.

    Raises:
        TypeError: x, shift or raw_scale is not a floating-point tensor, or their dtypes differ; an index vector is
            not int32; max_scale is no number.
        ValueError: shapes or devices do not fit, max_scale is not positive and finite, an index is out of range or
            occurs twice (looked at on the CPU, elsewhere under `vlkern.validate(True)`).

    Source: Dinh et al., Density estimation using Real NVP, 2016; Kolesnikov et al., Jet, 2024.

    Example:
        >>> half = torch.arange(0, 48, 2, dtype=torch.int32)
        >>> x, shift, raw_scale = torch.randn(4, 64, 48), torch.randn(4, 64, 24), torch.randn(4, 64, 24)
        >>> y, logdet = vlkern.ops.affine_coupling(x, shift, raw_scale, channels=half)
    """
    bound = _bind(x, shift, raw_scale, tokens=tokens, channels=channels, max_scale=max_scale)
    x, shift, raw = bound[:3]
    backend = _op.choose(*(t for t in bound if isinstance(t, torch.Tensor)))
    if torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or raw.requires_grad):
        result: tuple[torch.Tensor, torch.Tensor] = _Coupling.apply(*bound, backend)
        return result
    y, logdet = _forward[backend](*bound)
    return y, logdet


def affine_coupling_inverse(
    y: torch.Tensor,
    shift: torch.Tensor,
    raw_scale: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    max_scale: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `affine_coupling`: x2 = y2 / s - shift. It has no gradients.

    Args:
        y: [B, N, K], as x there.
        shift: as there.
        raw_scale: as there.
        tokens: as there.
        channels: as there.
        max_scale: as there.

    Returns:
        x [B, N, K] in y's dtype, and the log-determinant of this map [B], minus that of `affine_coupling`.

    Raises:
        TypeError: as there.
        ValueError: as there, or a tensor requires a gradient.

    Source: as there.

    Example:
        >>> x, shift, raw_scale = torch.randn(3, 4, 64, 24).unbind()
        >>> y, logdet = vlkern.ops.affine_coupling(x, shift, raw_scale)
        >>> x, _ = vlkern.ops.affine_coupling_inverse(y, shift, raw_scale)
    """
    bound = _bind_as("y", y, shift, raw_scale, tokens=tokens, channels=channels, max_scale=max_scale)
    _checks.no_gradient(y=y, shift=shift, raw_scale=raw_scale)
    x, logdet = _inverse[_op.choose(*(t for t in bound if isinstance(t, torch.Tensor)))](*bound)
    return x, logdet
