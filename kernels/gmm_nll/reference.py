"""The likelihood of a mixture of Gaussians in plain PyTorch: the definition."""

import math

import torch

from vlkern import _mixture

#: Bound of a distance from a component in units of its scale: its square is a float32, also summed over dimensions.
FARTHEST = 1e18


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


class Terms:
    """All that loss and gradient are made of. Shapes are [N, k, d] for "joint", and for "per_channel" [N, d, k, 1]."""

    def __init__(self, params: torch.Tensor, target: torch.Tensor, joint: bool, min_scale: float) -> None:
        wide = _wide(params)
        self.logits, loc, raw = _mixture.split(wide, target.shape[1], "joint" if joint else "per_channel")
        z = target.to(wide.dtype)[:, None] if joint else target.to(wide.dtype)[..., None, None]
        if not joint:
            loc, raw = loc[..., None], raw[..., None]
        # Squareplus s(x) = (x + h) / 2, h = sqrt(x^2 + 4), and s(x) s(-x) = 1: without cancellation for x < 0.
        self.h = torch.hypot(raw, torch.full_like(raw, 2))
        large = raw.abs() / 2 + self.h / 2
        free = torch.where(raw < 0, 1 / large, large)
        self.clamped = free < min_scale
        self.inverse = torch.where(raw < 0, large, 1 / large).clamp(max=1 / min_scale)
        log_scale = torch.where(raw < 0, -large.log(), large.log()).clamp(min=math.log(min_scale))
        self.u = ((z - loc) * self.inverse).clamp(-FARTHEST, FARTHEST)
        log_density = -(log_scale + 0.5 * self.u.square() + 0.5 * math.log(2 * math.pi)).sum(-1)
        self.log_weights = self.logits + log_density


def shapes(numbers: int, target: torch.Tensor, joint: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty results of gmm_nll for P = `numbers`.

    For meta tensors: a compiler would think for seconds about what the definition does to sizes without numbers.
    """
    (n, d), wide = target.shape, torch.promote_types(dtype, torch.float32)
    log_weights = target.new_empty(n, numbers // (1 + 2 * d) if joint else 0, dtype=wide)
    return target.new_empty((n,) if joint else (n, d), dtype=wide), log_weights


def gmm_nll(
    params: torch.Tensor, target: torch.Tensor, joint: bool, min_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log sum_k softmax(logits)_k N(target; loc_k, scale_k) in float32, float64 for float64.

    params [N, P], target [N, d]. Returns nll, [N] if joint, else [N, d]; and, for the backward of a joint mixture, the
    logit plus the log-density of each component [N, k] ([N, 0] for the others).
    """
    if params.is_meta:
        return shapes(params.shape[1], target, joint, params.dtype)
    terms = Terms(params, target, joint, min_scale)
    nll = terms.logits.logsumexp(-1) - terms.log_weights.logsumexp(-1)
    return nll, terms.log_weights.contiguous() if joint else nll.new_empty(nll.shape[0], 0)


def gmm_nll_backward(
    grad: torch.Tensor,
    params: torch.Tensor,
    target: torch.Tensor,
    log_weights: torch.Tensor,
    joint: bool,
    min_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(nll * grad): d_params [N, P] and d_target [N, d], each in the dtype of its tensor."""
    if params.is_meta:
        return params.new_empty(params.shape), target.new_empty(target.shape)
    t = Terms(params, target, joint, min_scale)
    g = grad.to(t.u.dtype)[..., None]
    share = t.log_weights.softmax(-1)  # of each component in the density
    d_logits = g * (t.logits.softmax(-1) - share)
    pull = (g * share)[..., None] * t.u * t.inverse
    d_raw = ((g * share)[..., None] * (1 - t.u.square()) / t.h).masked_fill(t.clamped, 0)
    n = params.shape[0]
    if joint:
        parts = [d_logits, torch.stack([-pull, d_raw], 2).reshape(n, params.shape[1] - d_logits.shape[1])]
        d_target = pull.sum(1)
    else:
        parts = [part.reshape(n, params.shape[1] // 3) for part in (d_logits, -pull, d_raw)]
        d_target = pull.sum((-2, -1))
    return torch.cat(parts, 1).to(params.dtype), d_target.to(target.dtype).contiguous()
