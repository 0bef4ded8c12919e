"""The likelihood of a mixture whose parameters a linear layer gives, in plain PyTorch: the definition.

It holds the [N, P] parameters; the kernels do not.
"""

import torch

from vlkern.kernels.gmm_nll import reference as mixture


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _params(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    products = _wide(hidden) @ _wide(weight).T
    return products if bias is None else products + bias


def linear_gmm_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    joint: bool,
    min_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of gmm_nll for params = hidden weight^T + bias, which are float32 for 16-bit inputs, too.

    hidden [N, D], weight [P, D], bias [P] float32, target [N, d].
    """
    if hidden.is_meta:
        return mixture.shapes(weight.shape[0], target, joint, hidden.dtype)
    return mixture.gmm_nll(_params(hidden, weight, bias), target, joint, min_scale)


def linear_gmm_nll_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_weights: torch.Tensor,
    joint: bool,
    min_scale: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sum(nll * grad): d_hidden [N, D] and d_weight [P, D], no rows where not asked for; d_bias, d_target.

    d_bias [P] is float32 (float64 for float64), empty without a bias; the others have the dtype of their tensor.
    """
    if hidden.is_meta:
        of_bias = weight.new_empty(0 if bias is None else weight.shape[0], dtype=_wide(weight[:0]).dtype)
        rows = hidden if of_hidden else hidden[:0], weight if of_weight else weight[:0]
        d_hidden, d_weight = (t.new_empty(t.shape) for t in rows)
        return d_hidden, d_weight, of_bias, target.new_empty(target.shape)
    params = _params(hidden, weight, bias)
    g, d_target = mixture.gmm_nll_backward(grad, params, target, log_weights, joint, min_scale)
    d_hidden = g @ _wide(weight) if of_hidden else hidden[:0]
    d_weight = g.T @ _wide(hidden) if of_weight else weight[:0]
    d_bias = g.sum(0) if bias is not None else g.new_empty(0)
    return d_hidden.to(hidden.dtype).contiguous(), d_weight.to(weight.dtype).contiguous(), d_bias, d_target
