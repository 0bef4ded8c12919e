"""Draws from mixtures of Gaussians in plain PyTorch: the definition."""

from dataclasses import dataclass

import torch

from vlkern import _mixture

#: The maximum of a guided density is sought no farther than this from the conditional mean.
REACH = 10.0
#: A guided density so many times narrower than GIVT's proposal is proposed from itself.
NARROW = 1.0


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def squareplus(raw: torch.Tensor) -> torch.Tensor:
    """(raw + sqrt(raw^2 + 4)) / 2, without cancellation and without overflow."""
    large = raw.abs() / 2 + torch.hypot(raw, torch.full_like(raw, 2)) / 2
    return torch.where(raw < 0, 1 / large, large)


def choose(logits: torch.Tensor, uniform: torch.Tensor, mixture_temperature: float) -> torch.Tensor:
    """logits [..., k], uniform [...] in [0, 1) -> component [...]: the first whose cumulated weight exceeds uniform."""
    weights = ((logits - logits.amax(-1, keepdim=True)) * mixture_temperature).exp()
    below = weights.cumsum(-1)
    total = below[..., -1:]
    return ((below <= uniform.unsqueeze(-1) * total) & (below < total)).sum(-1)


def _take(values: torch.Tensor, component: torch.Tensor, joint: bool) -> torch.Tensor:
    """values [N, k, d] and component [N], or [N, d, k] and [N, d] -> [N, d]."""
    if joint:
        return values.gather(1, component[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1)
    return values.gather(2, component.unsqueeze(2)).squeeze(2)


def _drawn(
    params: tuple[torch.Tensor, ...],
    uniform: torch.Tensor,
    dims: int,
    joint: bool,
    temperature: float,
    mixture_temperature: float,
    min_scale: float,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of the `params` [N, P] loc and scale [N, d] of the component that the first of them gives."""
    layout = "joint" if joint else "per_channel"
    first, _, _ = _mixture.split(_wide(params[0]), dims, layout)
    component = choose(first, uniform, mixture_temperature)
    found = []
    for p in params:
        _, loc, raw = _mixture.split(p, dims, layout)
        scale = squareplus(_wide(_take(raw, component, joint))).clamp(min=min_scale) * temperature
        found.append((_wide(_take(loc, component, joint)), scale))
    return found


def gmm_sample(
    params: torch.Tensor,
    uniform: torch.Tensor,
    eps: torch.Tensor,
    dims: int,
    joint: bool,
    temperature: float,
    mixture_temperature: float,
    min_scale: float,
) -> torch.Tensor:
    """params [N, P], uniform [N] ([N, d] unless joint), eps [N, d] -> z [N, d] in float32 (float64 for float64)."""
    ((loc, scale),) = _drawn((params,), uniform, dims, joint, temperature, mixture_temperature, min_scale)
    return loc + scale * eps


@dataclass(frozen=True)
class Guided:
    """p~ = p_c^(1 + w) / p_u^w of two Gaussians, in delta = x - loc_c: log p~ = slope delta - curvature delta^2 / 2."""

    curvature: torch.Tensor
    slope: torch.Tensor
    proposal: torch.Tensor
    """Scale of the proposal, a normal around loc_c; exp(-delta^2 / (2 proposal^2)) cuts the tails of p~ / max p~."""

    @classmethod
    def of(
        cls,
        conditional: tuple[torch.Tensor, torch.Tensor],
        unconditional: tuple[torch.Tensor, torch.Tensor],
        w: float,
    ) -> "Guided":
        """From loc and scale of the two."""
        (loc, scale), (loc_u, scale_u) = conditional, unconditional
        curvature = (1 + w) / scale.square() - w / scale_u.square()
        return cls(curvature, w * (loc - loc_u) / scale_u.square(), 2 * torch.maximum(scale, scale_u))

    def try_out(self, tries: torch.Tensor, chances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normal and uniform noise [R, N, d] -> delta [R, N, d] and whether it is accepted."""
        a, c = self.curvature, self.slope
        peaked = (a > 0) & (c.abs() <= REACH * a)
        narrow = peaked & (a * self.proposal.square() > NARROW**2)
        mean = torch.where(peaked, c / a, 0.0)
        delta = torch.where(narrow, mean + tries * a.rsqrt(), tries * self.proposal)
        beyond = delta * (c - a * delta / 2) - REACH * (c.abs() - REACH * a / 2)
        log_p = torch.where(peaked, -a / 2 * (delta - mean).square(), beyond)
        log_ratio = log_p + (delta / self.proposal).square() / 2
        return delta, chances.log() < torch.where(narrow, -log_ratio, log_ratio)


def gmm_guided_sample(
    params: torch.Tensor,
    unconditional: torch.Tensor,
    uniform: torch.Tensor,
    eps: torch.Tensor,
    tries: torch.Tensor,
    chances: torch.Tensor,
    dims: int,
    joint: bool,
    guidance: float,
    temperature: float,
    mixture_temperature: float,
    min_scale: float,
) -> torch.Tensor:
    """As gmm_sample, with tries and chances [R, N, d] for R rounds of rejection; -> z [N, d]."""
    with_, without = _drawn((params, unconditional), uniform, dims, joint, temperature, mixture_temperature, min_scale)
    delta, accepted = Guided.of(with_, without, guidance).try_out(tries, chances)
    first = accepted.int().argmax(0, keepdim=True)
    loc, scale = with_
    return loc + torch.where(accepted.any(0), delta.gather(0, first).squeeze(0), scale * eps)
