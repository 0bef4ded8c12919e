"""Likelihood of a mixture of Gaussians from hidden states and the layer that gives its parameters: see README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks, _mixture
from vlkern._op import Op
from vlkern.kernels.gmm_nll import check_min_scale, check_target
from vlkern.kernels.linear_gmm_nll import reference, samples


def _check_hidden(hidden: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = _checks.floating("hidden", hidden), _checks.floating("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [N, D], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must hold at least one parameter and one channel, [P, D], got {list(weight.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must have shape [N, {weight.shape[1]}], got {list(hidden.shape)}")
    if (dtype := _checks.autocast_dtype(hidden)) is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _checks.same("weight", weight, "hidden", hidden)
    return hidden, weight


def _bind(
    hidden: Any, weight: Any, bias: Any, target: Any, *, layout: Any = "joint", min_scale: Any = 1e-6
) -> tuple[Any, ...]:
    hidden, weight = _check_hidden(hidden, weight)
    if bias is not None:
        _checks.shape("bias", _checks.floating("bias", bias), (weight.shape[0],))
        _checks.on_device("bias", bias, "hidden", hidden)
        bias = bias.to(torch.promote_types(hidden.dtype, torch.float32))
    target = check_target(target, hidden, "hidden")
    _checks.shape("target", target, (hidden.shape[0], target.shape[-1]))
    _mixture.components_of(weight.shape[0], target.shape[1], layout, "weight", weight.shape)
    return hidden, weight, bias, target, layout == "joint", check_min_scale(min_scale)


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_op = Op(
    "linear_gmm_nll",
    public="linear_gmm_nll",
    schemas={
        "linear_gmm_nll": f"({_ARGUMENTS}, bool joint, float min_scale) -> (Tensor, Tensor)",
        "linear_gmm_nll_backward": (
            f"(Tensor grad, {_ARGUMENTS}, Tensor log_weights, bool joint, float min_scale, bool of_hidden,"
            " bool of_weight) -> (Tensor, Tensor, Tensor, Tensor)"
        ),
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["linear_gmm_nll"], _op.raw["linear_gmm_nll_backward"]


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        joint: bool,
        min_scale: float,
        backend: str,
    ) -> Any:
        nll, log_weights = _forward[backend](hidden, weight, bias, target, joint, min_scale)
        ctx.save_for_backward(hidden, weight, bias, target, log_weights)
        ctx.options, ctx.backend = (joint, min_scale), backend
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        needs = ctx.needs_input_grad
        d_hidden, d_weight, d_bias, d_target = _backward[ctx.backend](
            grad, *ctx.saved_tensors, *ctx.options, needs[0], needs[1]
        )
        return (
            d_hidden if needs[0] else None,
            d_weight if needs[1] else None,
            d_bias if needs[2] else None,
            d_target if needs[3] else None,
            *[None] * 3,
        )


def linear_gmm_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    layout: str = "joint",
    min_scale: float = 1e-6,
) -> torch.Tensor:
    """`gmm_nll(hidden @ weight.T + bias, target)`, of whose parameters [N, P] only a part exists at a time.

    Args:
        hidden: [N, D]; float32, bfloat16 or float16 (float64 on the reference).
        weight: [P, D], the rows of the head; same dtype and device. P as in `gmm_nll`.
        bias: [P], any float dtype; or None.
        target: [N, d], any float dtype.
        layout: "joint" or "per_channel", as in `gmm_nll`.
        min_scale: the least scale, as in `gmm_nll`.

    Returns:
        The negative log-likelihood in nats: [N] for "joint", [N, d] for "per_channel"; float32 (float64 for float64).
        Parameters are float32 for every input dtype. Differentiable once in hidden, weight, bias and target.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: no k gives P; shapes or devices differ; min_scale is not positive; there is no such layout.

    Source: the head of Tschannen et al., JetFormer, 2024; computed in parts as in `linear_cross_entropy`.

    Example:
        >>> hidden, weight = torch.randn(6, 64), torch.randn(1024 * (1 + 2 * 4), 64, requires_grad=True)
        >>> vlkern.ops.linear_gmm_nll(hidden, weight, None, torch.randn(6, 4)).mean().backward()
    """
    hidden, weight, bias, target, joint, min_scale = _bind(
        hidden, weight, bias, target, layout=layout, min_scale=min_scale
    )
    backend = _op.choose(hidden, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias, target)):
        result: torch.Tensor = _Nll.apply(hidden, weight, bias, target, joint, min_scale, backend)
        return result
    nll: torch.Tensor = _forward[backend](hidden, weight, bias, target, joint, min_scale)[0]
    return nll
