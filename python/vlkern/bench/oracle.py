"""No number without a check: the truth about a case, and how far a contestant is from it."""

import torch

from vlkern.bench.case import Case, Inputs, backend_contestant, modes_of
from vlkern.bench.rivals import Function
from vlkern.kernels.interval_attention import reference as attention
from vlkern.kernels.linear_cross_entropy import reference as cross_entropy
from vlkern.kernels.linear_gmm_nll import reference as linear_mixture
from vlkern.kernels.sigmoid_loss import reference as sigmoid_loss

_BLOCK = 1024
_LOGITS = 1 << 26


def _sigmoid_loss_in_blocks(inputs: Inputs) -> list[torch.Tensor]:
    """Loss and gradients for a batch whose [B, B] tensors do not fit, 1024 rows at a time.

    Every pair is first a negative; then, as softplus(-s) = softplus(s) - s, each s_ii and its gradient -1 are added.
    """
    image, text, scale, bias = (t.detach() for t in inputs.args)
    weight = torch.ones_like(scale) / len(image)
    dots = (image * text).sum(1)
    loss = -weight * (scale * dots + bias).sum()
    d_image, d_text = -weight * scale * text, -weight * scale * image
    d_scale, d_bias = -weight * dots.sum(), -torch.ones_like(bias)
    for i in range(0, len(image), _BLOCK):
        part = sigmoid_loss.sigmoid_loss_grad(
            image[i : i + _BLOCK], text, scale, bias, weight, None, None, diagonal=False
        )
        loss += part[0]
        d_image[i : i + _BLOCK] += part[1]
        d_text += part[2]
        d_scale += part[3]
        d_bias += part[4]
    return [loss, d_image, d_text, d_scale, d_bias]


def _attention_in_blocks(inputs: Inputs) -> list[torch.Tensor]:
    """Attention and its gradients, 1024 rows of a group of heads at a time; for each, the keys that its rows see."""
    q, k, v, start, stop = (t.detach() for t in inputs.args)
    scale, group = q.shape[2] ** -0.5, q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    (grad,) = inputs.grads
    assert grad is not None
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        for i in range(0, len(q), _BLOCK):
            rows = slice(i, i + _BLOCK)
            lo, hi = int(start[rows].min()), int(stop[rows].max())
            near = (q[rows, heads], k[lo:hi, h : h + 1], v[lo:hi, h : h + 1])
            bounds = (start[rows] - lo, stop[rows] - lo)
            part, lse = attention.interval_attention(*near, *bounds, scale, None)
            out[rows, heads] = part
            gradients = attention.interval_attention_backward(
                grad[rows, heads], None, *near, part, lse, *bounds, scale, None
            )
            dq[rows, heads] = gradients[0]
            dk[lo:hi, h : h + 1] += gradients[1]
            dv[lo:hi, h : h + 1] += gradients[2]
    return [out, dq, dk, dv]


def _cross_entropy_in_blocks(inputs: Inputs) -> list[torch.Tensor]:
    """The mean over tokens and its gradients, so many tokens at a time that their logits fit."""
    hidden, weight, target = (t.detach() for t in inputs.args)
    loss, d_hidden, d_weight = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
    share = (target >= 0).to(hidden.dtype) / (target >= 0).sum()
    for rows in torch.arange(len(hidden)).split(max(1, _LOGITS // len(weight))):
        lse, own, _, d_hidden[rows], part, _ = cross_entropy.linear_cross_entropy_sweep(
            hidden[rows], weight, None, target[rows], share[rows], None, 1.0, 0.0, None, 0.0, True, True
        )
        loss += (share[rows] * (lse - own)).sum()
        d_weight += part
    return [loss, d_hidden, d_weight]


def _linear_mixture_in_blocks(inputs: Inputs) -> list[torch.Tensor]:
    """nll and its gradients, 64 tokens at a time, whose parameters fit."""
    hidden, weight, bias, target = (t.detach() for t in inputs.args)
    d_weight, d_bias, found, grad = torch.zeros_like(weight), torch.zeros_like(bias), [], inputs.grads[0]
    assert grad is not None
    for rows in torch.arange(len(hidden)).split(64):
        nll, log_weights = linear_mixture.linear_gmm_nll(hidden[rows], weight, bias, target[rows], True, 1e-6)
        parts = linear_mixture.linear_gmm_nll_backward(
            grad[rows], hidden[rows], weight, bias, target[rows], log_weights, True, 1e-6, True, True
        )
        d_weight += parts[1]
        d_bias += parts[2]
        found.append((nll, parts[0], parts[3]))
    nll, d_hidden, d_target = (torch.cat(several) for several in zip(*found, strict=True))
    return [nll, d_hidden, d_weight, d_bias, d_target]


def truth(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """Output and gradients by the reference in float64; for a huge sample in float32, in blocks."""
    if case.op == "sigmoid_loss" and not inputs.kwargs and inputs.args[0].shape[0] > _BLOCK:
        return _sigmoid_loss_in_blocks(inputs.to(torch.float32 if case.huge else torch.float64))
    if case.op == "interval_attention" and not inputs.kwargs and inputs.args[0].shape[0] > _BLOCK:
        return _attention_in_blocks(inputs.to(torch.float64))
    if case.op == "linear_cross_entropy" and not inputs.kwargs and inputs.args[1].shape[0] > _BLOCK:
        return _cross_entropy_in_blocks(inputs.to(torch.float32 if case.huge else torch.float64))
    if case.op == "linear_gmm_nll" and case.huge:
        return _linear_mixture_in_blocks(inputs.to(torch.float32))
    return inputs.to(torch.float64).run(backend_contestant(case.op, "reference").make(), modes_of(case.op)[-1])


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; inf when the shape differs, nan when the result is."""
    if got.shape != want.shape:
        return float("inf")
    want = want.double() if not want.is_floating_point() else want
    return float((got.to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """sqrt(machine epsilon): half of the dtype's digits. It tells a wrong formula from rounding; errors are printed.

    Whole numbers have to be equal.
    """
    if not dtype.is_floating_point:
        return 0.0
    return float(torch.finfo(dtype).eps) ** 0.5


def errors(case: Case, inputs: Inputs, want: list[torch.Tensor], function: Function, mode: str) -> list[float]:
    """Errors of each output and of each gradient. Raises ValueError when one is beyond the tolerance."""
    got = inputs.run(function, mode)
    found = [error(g, w) for g, w in zip(got, want, strict=mode != "forward")]
    limit = tolerance(case.dtype)
    if not all(e <= limit for e in found):
        outputs = len(found) - (len(inputs.leaves) if mode != "forward" else 0)
        names = ["output"] * outputs + [f"gradient {i}" for i in range(len(inputs.leaves))]
        worst = max(range(len(found)), key=lambda i: float("inf") if found[i] != found[i] else found[i])
        raise ValueError(f"wrong {names[worst]}: error {found[worst]:.1e} against the reference, allowed {limit:.1e}")
    return found
