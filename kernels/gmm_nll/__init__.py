"""The negative log-likelihood of a mixture of Gaussians; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks, _mixture
from vlkern._op import Op
from vlkern.kernels.gmm_nll import reference, samples


def check_target(target: Any, params: torch.Tensor, params_name: str) -> torch.Tensor:
    """`target` [..., d], a float tensor on the device of the parameters; float64 only beside float64."""
    target = _checks.floating("target", target)
    if target.dim() == 0 or target.shape[-1] == 0:
        raise ValueError(f"target must have shape [..., d] with at least one dimension, got {list(target.shape)}")
    _checks.on_device("target", target, params_name, params)
    if (params.dtype == torch.float64) != (target.dtype == torch.float64):
        target = target.to(torch.promote_types(params.dtype, torch.float32))
    return target


def check_min_scale(min_scale: Any) -> float:
    """A positive number whose inverse is a float32."""
    value = _checks.number("min_scale", min_scale, positive=True)
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"min_scale must be in [1e-30, 1e30], got {value}")
    return value


def _bind(params: Any, target: Any, *, layout: Any = "joint", min_scale: Any = 1e-6) -> tuple[Any, ...]:
    params = _checks.floating("params", params)
    target = check_target(target, params, "params")
    d = target.shape[-1]
    _mixture.components(params, d, layout)
    _checks.shape("target", target, (*params.shape[:-1], d))
    rows = target.numel() // d
    rest = layout == "joint", check_min_scale(min_scale)
    return params.reshape(rows, params.shape[-1]), target.reshape(rows, d), *rest


_op = Op(
    "gmm_nll",
    public="gmm_nll",
    schemas={
        "gmm_nll": "(Tensor params, Tensor target, bool joint, float min_scale) -> (Tensor, Tensor)",
        "gmm_nll_backward": (
            "(Tensor grad, Tensor params, Tensor target, Tensor log_weights, bool joint, float min_scale)"
            " -> (Tensor, Tensor)"
        ),
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["gmm_nll"], _op.raw["gmm_nll_backward"]


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, params: torch.Tensor, target: torch.Tensor, joint: bool, min_scale: float, backend: str
    ) -> Any:
        nll, log_weights = _forward[backend](params, target, joint, min_scale)
        ctx.save_for_backward(params, target, log_weights)
        ctx.options, ctx.backend = (joint, min_scale), backend
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        d_params, d_target = _backward[ctx.backend](grad, *ctx.saved_tensors, *ctx.options)
        return d_params, d_target, None, None, None


def gmm_nll(
    params: torch.Tensor, target: torch.Tensor, *, layout: str = "joint", min_scale: float = 1e-6
) -> torch.Tensor:
    """The negative log-likelihood of `target` under a mixture of k diagonal Gaussians, in nats.

        nll = -log sum_k softmax(logits)_k prod_d N(target_d; loc_kd, scale_kd)
        scale = max(squareplus(raw), min_scale),    squareplus(x) = (x + sqrt(x^2 + 4)) / 2

    Nothing of size [..., k, d] is made beside the parameters and their gradient.

    Args:
        params: [..., P]; float32, bfloat16 or float16 (float64 on the reference). k follows from P and d.
            "joint": P = k (1 + 2 d), that is [k logits][k, 2, d] with loc before the raw scale.
            "per_channel": P = 3 k d, that is [3 d, k]: logits [d, k], loc [d, k], raw scale [d, k].
        target: [..., d], any float dtype.
        layout: "joint", one mixture over all dimensions; or "per_channel", a mixture of its own for each.
        min_scale: the least scale; a raw scale below it has no gradient.

    Returns:
        [...] for "joint", [..., d] for "per_channel"; float32 (float64 for float64), computed in float32 from any
        parameters. Differentiable once in params and target.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: no k gives P; shapes or devices differ; min_scale is not positive; there is no such layout.

    Source: Tschannen et al., GIVT, 2024; Tschannen et al., JetFormer, 2024.

    Example:
        >>> params = torch.randn(8, 16 * (1 + 2 * 32), requires_grad=True)
        >>> vlkern.ops.gmm_nll(params, torch.randn(8, 32)).mean().backward()
    """
    flat, points, joint, min_scale = _bind(params, target, layout=layout, min_scale=min_scale)
    backend = _op.choose(flat, points)
    shape = params.shape[:-1] if joint else target.shape
    if torch.is_grad_enabled() and (flat.requires_grad or points.requires_grad):
        result: torch.Tensor = _Nll.apply(flat, points, joint, min_scale, backend)
    else:
        result = _forward[backend](flat, points, joint, min_scale)[0]
    return result.reshape(shape)
