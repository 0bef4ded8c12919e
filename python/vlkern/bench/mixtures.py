"""What model files and torch.distributions do for mixtures: rivals of gmm_nll, linear_gmm_nll and mixture_bits."""

import math

import torch

from vlkern import _mixture


def _squareplus(x: torch.Tensor) -> torch.Tensor:
    return (x + (x.square() + 4).sqrt()) / 2


def nll(params: torch.Tensor, target: torch.Tensor, *, layout: str = "joint", min_scale: float = 1e-6) -> torch.Tensor:
    """The lines that one writes by hand, in float32: log_softmax, the log-densities, logsumexp."""
    logits, loc, raw = _mixture.split(params.float(), target.shape[-1], layout)
    z = target.float().unsqueeze(-2 if layout == "joint" else -1)
    scale = _squareplus(raw).clamp(min=min_scale)
    log_density = -(0.5 * ((z - loc) / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi))
    if layout == "joint":
        log_density = log_density.sum(-1)
    return -(logits.log_softmax(-1) + log_density).logsumexp(-1)


def distribution_nll(
    params: torch.Tensor, target: torch.Tensor, *, layout: str = "joint", min_scale: float = 1e-6
) -> torch.Tensor:
    """torch.distributions, without the validation of arguments."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    logits, loc, raw = _mixture.split(params.float(), target.shape[-1], layout)
    normal = Normal(loc, _squareplus(raw).clamp(min=min_scale), validate_args=False)
    components = Independent(normal, 1, validate_args=False) if layout == "joint" else normal
    mixture = MixtureSameFamily(Categorical(logits=logits, validate_args=False), components, validate_args=False)
    log_prob: torch.Tensor = mixture.log_prob(target.float())
    return -log_prob


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    layout: str = "joint",
    min_scale: float = 1e-6,
) -> torch.Tensor:
    """A linear layer, then the lines above: every parameter is materialised."""
    params = torch.nn.functional.linear(hidden, weight, bias)
    return nll(params, target, layout=layout, min_scale=min_scale)


def bits(symbols: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The lines of learned codecs, in float32: erfc of minus the distance, weights, the bound, log2."""
    logits, means, raw = params.float().unbind(-3)
    scale = raw.clamp(math.log(0.11), math.log(256)).exp()
    away = (symbols.float().unsqueeze(-2) - means).abs()
    upper, lower = (0.5 * torch.erfc((away + edge) / scale * math.sqrt(0.5)) for edge in (-0.5, 0.5))
    return -(logits.softmax(-2) * (upper - lower)).sum(-2).clamp(min=1e-9).log2()


def distribution_bits(symbols: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """torch.distributions, without the validation of arguments: differences of the mixture's cdf."""
    from torch.distributions import Categorical, MixtureSameFamily, Normal

    logits, means, raw = params.movedim(-2, -1).unbind(-3)
    normal = Normal(means, raw.clamp(math.log(0.11), math.log(256)).exp(), validate_args=False)
    mixture = MixtureSameFamily(Categorical(logits=logits, validate_args=False), normal, validate_args=False)
    p: torch.Tensor = mixture.cdf(symbols + 0.5) - mixture.cdf(symbols - 0.5)
    return -p.clamp(min=1e-9).log2()
