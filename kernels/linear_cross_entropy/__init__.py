"""Cross-entropy over a vocabulary, from hidden states and the output embedding; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.linear_cross_entropy import reference, samples

REDUCTIONS = ("mean", "sum", "none")
#: What the raw ops take for a token that does not count. Any target >= V is a class that another rank holds.
IGNORED = -1

_TOKENS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_TERMS = "float? softcap, float scale, float smoothing, int? classes, float z_loss, bool of_hidden, bool of_weight"


def check_range(target: torch.Tensor, classes: int | None, ignore_index: int) -> None:
    """Targets are classes or ignore_index. None: not known yet, because other ranks hold some of them."""
    if not _checks.values_may_be_read(target):
        return
    bad = (target < 0) & (target != ignore_index)
    if classes is not None:
        bad |= (target >= classes) & (target != ignore_index)
    if bad.any():
        at = int(bad.nonzero()[0, 0])
        classes_of = f"in [0, {classes})" if classes is not None else ">= 0"
        raise ValueError(
            f"target must be {classes_of} or ignore_index ({ignore_index}), got {int(target[at])} at position {at}"
        )


def _check_hidden(hidden: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = _checks.floating("hidden", hidden), _checks.floating("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [T, D], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must hold at least one class and one channel, [V, D], got {list(weight.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must have shape [T, {weight.shape[1]}], got {list(hidden.shape)}")
    if (dtype := _checks.autocast_dtype(hidden)) is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _checks.same("weight", weight, "hidden", hidden)
    return hidden, weight


def _check_target(target: Any, hidden: torch.Tensor, ignore_index: Any) -> None:
    if _checks.tensor("target", target).dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    _checks.shape("target", target, (hidden.shape[0],))
    _checks.on_device("target", target, "hidden", hidden)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _bind(
    hidden: Any,
    weight: Any,
    target: Any,
    *,
    bias: Any = None,
    softcap: Any = None,
    ignore_index: Any = -100,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    reduction: Any = "mean",
    logit_scale: Any = 1.0,
    group: Any = None,
) -> tuple[Any, ...]:
    """Checked arguments as the raw ops take them; label smoothing and z_loss after the tensors."""
    hidden, weight = _check_hidden(hidden, weight)
    _check_target(target, hidden, ignore_index)
    check_range(target, weight.shape[0] if group is None else None, ignore_index)
    if bias is not None:
        _checks.shape("bias", _checks.floating("bias", bias), (weight.shape[0],))
        _checks.on_device("bias", bias, "hidden", hidden)
        bias = bias.to(torch.promote_types(hidden.dtype, torch.float32))
    if softcap is not None:
        softcap = _checks.number("softcap", softcap, positive=True)
    label_smoothing = _checks.number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    z_loss, logit_scale = _checks.number("z_loss", z_loss), _checks.number("logit_scale", logit_scale)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    target = target.masked_fill(target == ignore_index, IGNORED)
    return hidden, weight, bias, target, softcap, logit_scale, label_smoothing, z_loss


_op = Op(
    "linear_cross_entropy",
    public="linear_cross_entropy",
    schemas={
        "linear_cross_entropy": f"({_TOKENS}, float? softcap, float scale) -> (Tensor, Tensor, Tensor)",
        "linear_cross_entropy_grad": (f"({_TOKENS}, Tensor share, Tensor lse, {_TERMS}) -> (Tensor, Tensor, Tensor)"),
        "linear_cross_entropy_sweep": (
            f"({_TOKENS}, Tensor share, {_TERMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
)
sums_of_tokens, gradients_given_lse = _op.raw["linear_cross_entropy"], _op.raw["linear_cross_entropy_grad"]
_sweep = _op.raw["linear_cross_entropy_sweep"]


def losses_of(
    lse: torch.Tensor, own: torch.Tensor, total: torch.Tensor, smoothing: float, classes: int, z_loss: float
) -> torch.Tensor:
    """[T]: lse - (1 - s) z_y - s / V sum_v z_v + z_loss lse^2; tokens that do not count have zeros everywhere."""
    losses = lse - (1 - smoothing) * own
    if smoothing:
        losses = losses - smoothing * total / classes
    return losses + z_loss * lse.square() if z_loss else losses


def _times(gradient: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, last_use: bool) -> torch.Tensor:
    """gradient * grad, in place where nobody will ask for the gradient again: d_weight may be the largest tensor."""
    if not last_use:
        return (gradient * grad).to(dtype)
    if not (_checks.values_may_be_read(grad) and grad.item() == 1):
        gradient.mul_(grad)
    return gradient.to(dtype)


class _Reduced(torch.autograd.Function):
    """sum_t share_t loss_t. One sweep computes loss and gradients; the backward only multiplies by grad_output."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> torch.Tensor:
        target, share, softcap, scale, smoothing, z_loss, of_hidden, of_weight, backend = rest
        lse, own, total, *gradients = _sweep[backend](
            hidden, weight, bias, target, share, softcap, scale, smoothing, None, z_loss, of_hidden, of_weight
        )
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return (share * losses_of(lse, own, total, smoothing, weight.shape[0], z_loss)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        last_use = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            _times(d_hidden, grad, ctx.dtype, last_use) if needs_hidden else None,
            _times(d_weight, grad, ctx.dtype, last_use) if needs_weight else None,
            d_bias * grad if needs_bias else None,
            *[None] * 9,
        )


class Tokens(torch.autograd.Function):
    """loss_t of every token. Its gradient needs that of each loss, so the backward computes the logits again.

    `across`, for a vocabulary in slices, combines the ranks' sums and adds up their gradients of hidden.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> torch.Tensor:
        target, softcap, scale, smoothing, z_loss, backend, across = rest
        sums = sums_of_tokens[backend](hidden, weight, bias, target, softcap, scale)
        lse, own, total = across.combine(*sums, target) if across else sums
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.terms, ctx.backend, ctx.across = (
            (softcap, scale, smoothing, across and across.classes, z_loss),
            backend,
            across,
        )
        return losses_of(lse, own, total, smoothing, across.classes if across else weight.shape[0], z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: D102
        hidden, weight, bias, target, lse = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden, d_weight, d_bias = gradients_given_lse[ctx.backend](
            hidden, weight, bias, target, grad.contiguous(), lse, *ctx.terms, needs_hidden, needs_weight
        )
        if ctx.across and needs_hidden:
            d_hidden = ctx.across.sum(d_hidden)
        return (
            d_hidden.to(hidden.dtype) if needs_hidden else None,
            d_weight.to(weight.dtype) if needs_weight else None,
            d_bias if needs_bias else None,
            *[None] * 7,
        )


def linear_cross_entropy(
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
    group: Any = None,
) -> torch.Tensor:
    """Cross-entropy of a vocabulary's logits, without the [T, V] tensor; nothing is left out of the sums.

        z_tv   = logit_scale * (<hidden_t, weight_v> + bias_v),    then softcap * tanh(z_tv / softcap)
        lse_t  = log sum_v exp(z_tv)
        loss_t = lse_t - (1 - s) z_ty - s / V sum_v z_tv + z_loss * lse_t^2,    y = target_t, s = label_smoothing

    Args:
        hidden: [T, D]; float32, bfloat16 or float16 (float64 on the reference).
        weight: [V, D], the output embedding, same dtype and device.
        target: [T] int64, classes in [0, V) or `ignore_index`.
        bias: [V], any float dtype, added to the products; or None.
        softcap: bound of the logits, as in Gemma 2; None for none.
        ignore_index: target of tokens that do not count. Their hidden states may hold anything, even NaN, and their
            gradients are zero.
        label_smoothing: s in [0, 1]: how much of the target is spread evenly over all classes.
        z_loss: coefficient of lse^2, which keeps the logits from drifting; added to the loss.
        reduction: "mean" over the tokens that count (0 if none does, where F.cross_entropy gives NaN), "sum", or "none"
            for the losses of all tokens, 0 where ignored. The gradient of "none" costs a fourth matmul.
        logit_scale: factor of the logits.
        group: process group whose ranks hold consecutive slices of the vocabulary, in the order of their ranks: then
            `weight` and `bias` are this rank's rows, V the sum over ranks, hidden and target the same on all of them.
            Every rank returns the whole loss and gets the whole gradient of hidden (`docs/distributed.md`).

    Returns:
        [] float32, [T] for "none" (float64 for float64). Logits and sums are float32 for every input dtype.
        Differentiable once in hidden, weight and bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, an option is out of range, or a target is (read on CPU tensors, elsewhere
            with `vlkern.validate(True)`).

    Source: the chunked computation as in Hsu et al., Liger Kernel, 2024; z_loss: Chowdhery et al., PaLM, 2022.

    Example:
        >>> hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> loss = vlkern.ops.linear_cross_entropy(hidden, weight, torch.randint(100, (6,)), softcap=30.0)
        >>> loss.backward()
    """
    options = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index, "logit_scale": logit_scale}
    hidden, weight, bias, target, softcap, scale, smoothing, z_loss = _bind(
        hidden, weight, target, **options,
        label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, group=group,
    )  # fmt: skip
    backend = _op.choose(hidden, weight)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    share = (target >= 0).to(torch.promote_types(hidden.dtype, torch.float32))
    if reduction == "mean":
        share = share / share.sum().clamp(min=1)
    if differentiate and group is None and reduction != "none":
        result: torch.Tensor = _Reduced.apply(
            hidden, weight, bias, target, share, softcap, scale, smoothing, z_loss, hidden.requires_grad,
            weight.requires_grad, backend,
        )  # fmt: skip
        return result
    if group is not None:
        from vlkern.kernels.linear_cross_entropy import parallel

        losses = parallel.token_losses(
            hidden, weight, bias, target, softcap, scale, smoothing, z_loss, backend, differentiate, group
        )
    elif differentiate:
        losses = Tokens.apply(hidden, weight, bias, target, softcap, scale, smoothing, z_loss, backend, None)
    else:
        lse, own, total = sums_of_tokens[backend](hidden, weight, bias, target, softcap, scale)
        losses = losses_of(lse, own, total, smoothing, weight.shape[0], z_loss)
    return losses if reduction == "none" else (share * losses).sum()


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: Any = None,
) -> torch.Tensor:
    """The log-probability of each token's target, log softmax(z_t)[target_t], without the [T, V] tensor.

    What bits per byte, perplexities and scores of given answers are made of; z as in `linear_cross_entropy`.

    Args:
        hidden: [T, D]; float32, bfloat16 or float16 (float64 on the reference).
        weight: [V, D], the output embedding, same dtype and device.
        target: [T] int64, classes in [0, V) or `ignore_index`.
        bias: [V], any float dtype, added to the products; or None.
        softcap: bound of the logits; None for none.
        logit_scale: factor of the logits.
        ignore_index: target of tokens that do not count; their result is 0.
        group: as in `linear_cross_entropy`.

    Returns:
        [T] float32 (float64 for float64), at most 0. Differentiable once in hidden, weight and bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, an option is out of range, or a target is.

    Source: the definition of softmax.

    Example:
        >>> log_probs = vlkern.ops.linear_log_probs(torch.randn(6, 16), torch.randn(9, 16), torch.arange(6))
        >>> bits = -log_probs.sum() / torch.tensor(2.0).log()
    """
    return -linear_cross_entropy(
        hidden, weight, target, bias=bias, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index,
        reduction="none", group=group,
    )  # fmt: skip
