"""The sigmoid contrastive loss of SigLIP; the maths is in README.md."""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.sigmoid_loss import reference, samples

_ARGUMENTS = (
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor weight, "
    "Tensor? image_valid, Tensor? text_valid, bool diagonal)"
)
Valid = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def _scalar(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    """A Python number or a one-element tensor as a 0-d tensor of the accumulation dtype on `like`'s device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(value, torch.Tensor):
        return torch.full((), _checks.number(name, value), dtype=dtype, device=like.device)
    _checks.floating(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or have one element, got shape {list(value.shape)}")
    _checks.on_device(name, value, "image", like)
    if _checks.values_may_be_read(value) and not math.isfinite(value.item()):
        raise ValueError(f"{name} must be finite, got {value.item()}")
    return value.reshape(()).to(dtype)


def _masks(valid: Any, image: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if valid is None:
        return None, None
    pair = valid if isinstance(valid, tuple) else (valid, valid)
    if len(pair) != 2:
        raise ValueError(f"valid must be one mask or a pair (image_valid, text_valid), got {len(pair)} masks")
    for mask in pair:
        _checks.tensor("valid", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"valid must be bool, got {mask.dtype}")
        _checks.shape("valid", mask, (image.shape[0],))
        _checks.on_device("valid", mask, "image", image)
    return pair


def _bind(image: Any, text: Any, scale: Any, bias: Any, *, valid: Any = None, group: Any = None) -> tuple[Any, ...]:
    image, text = _checks.floating("image", image), _checks.floating("text", text)
    if image.dim() != 2:
        raise ValueError(f"image must have shape [B, D], got {list(image.shape)}")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"image must hold at least one pair and one channel, got shape {list(image.shape)}")
    _checks.shape("text", text, tuple(image.shape))
    _checks.same("text", text, "image", image)
    scale, bias = _scalar("scale", scale, image), _scalar("bias", bias, image)
    image_valid, text_valid = _masks(valid, image)
    if (dtype := _checks.autocast_dtype(image)) is not None:
        image, text = image.to(dtype), text.to(dtype)
    # Dynamo refuses an autograd.Function that is given the same tensor twice.
    text = text.view_as(text) if text is image else text
    text_valid = text_valid.view_as(text_valid) if text_valid is not None and text_valid is image_valid else text_valid
    if image_valid is None or text_valid is None:
        count = torch.full_like(scale, image.shape[0])
    else:
        # Whatever lies in an empty slot, even NaN, must not reach the matmuls.
        image = image.masked_fill(~image_valid[:, None], 0)
        text = text.masked_fill(~text_valid[:, None], 0)
        count = image_valid.sum().to(scale.dtype)
    return image, text, scale, bias, count, image_valid, text_valid, True


_op = Op(
    "sigmoid_loss",
    public="sigmoid_contrastive_loss",
    schemas={
        "sigmoid_loss": f"{_ARGUMENTS} -> Tensor",
        "sigmoid_loss_grad": f"{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
)
loss_of_block, gradients_of_block = _op.raw["sigmoid_loss"], _op.raw["sigmoid_loss_grad"]


class _SigmoidLoss(torch.autograd.Function):
    """One sweep computes loss and gradients; the backward only multiplies by grad_output."""

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, text: torch.Tensor, *rest: Any) -> Any:
        *arguments, backend = rest
        loss, *gradients = gradients_of_block[backend](image, text, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtype = image.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        d_image, d_text, d_scale, d_bias = (g * grad for g in ctx.saved_tensors)
        return d_image.to(ctx.dtype), d_text.to(ctx.dtype), d_scale, d_bias, None, None, None, None, None


def sigmoid_contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: float | torch.Tensor,
    bias: float | torch.Tensor,
    *,
    valid: Valid = None,
    group: Any = None,
) -> torch.Tensor:
    """Sigmoid contrastive loss of SigLIP, without a [B, B] tensor: memory is linear in B.

        logit_ij = scale * <image_i, text_j> + bias,    z_ij = +1 if i == j else -1
        loss     = -(1 / B) * sum_ij log sigmoid(z_ij * logit_ij)

    Args:
        image: [B, D], L2-normalised by the caller; float32, bfloat16 or float16 (float64 on the reference).
        text: [B, D], same dtype and device; row i belongs to row i of `image`.
        scale: temperature factor exp(t'), a number or a tensor of one element (may need grad). Unitless.
        bias: added to every logit; likewise.
        valid: [B] bool, or a pair (image_valid, text_valid): pairs with an empty row or column are taken out, and B
            counts the valid rows. Contents of empty slots are ignored.
        group: process group over which the batch is spread (`torch.distributed.group.WORLD` for all ranks). Every rank
            passes its own B rows, the same number everywhere. The texts travel round a ring, so memory does not grow
            with the number of ranks W. Each rank returns its local mean: the mean over ranks is the loss of the global
            batch. Gradients of image and text are W times the global ones and those of scale and bias average to them,
            so that DistributedDataParallel's averaging is exact (`docs/distributed.md`).

    Returns:
        [] float32 (float64 for float64). Logits and sums are float32 for every input dtype. Differentiable once in
        image, text, scale and bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, B is 0, scale or bias is not finite (read on CPU tensors, elsewhere with
            `vlkern.validate(True)`), or ranks hold different numbers of rows.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. The bias is added, as in the paper's code.

    Example:
        >>> loss = vlkern.ops.sigmoid_contrastive_loss(image, text, log_scale.exp(), bias)
    """
    arguments = _bind(image, text, scale, bias, valid=valid)
    image, text, scale, bias, count, *masks, diagonal = arguments
    backend = _op.choose(image, text)
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:4])
    if group is not None:
        from vlkern.kernels.sigmoid_loss import ring

        return ring.sigmoid_loss(image, text, scale, bias, count, *masks, group, backend, differentiate)
    weight = 1 / count.clamp(min=1)
    if differentiate:
        result: torch.Tensor = _SigmoidLoss.apply(image, text, scale, bias, weight, *masks, diagonal, backend)
        return result
    return loss_of_block[backend](image, text, scale, bias, weight, *masks, diagonal)
