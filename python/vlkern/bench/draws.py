"""What a user would pick instead of gmm_sample, from the same noise."""

import torch

from vlkern import _mixture


def gmm_sample(
    params: torch.Tensor, *, dims: int, noise: tuple[torch.Tensor, torch.Tensor], layout: str = "joint"
) -> torch.Tensor:
    """The lines of a sampler: the distribution function of all components, the scales of all, one gather."""
    logits, loc, raw = (t.float() for t in _mixture.split(params, dims, layout))
    below = logits.softmax(-1).cumsum(-1)
    component = torch.searchsorted(below, noise[0].float().unsqueeze(-1), right=True).clamp(max=logits.shape[-1] - 1)
    scale = ((raw + torch.sqrt(raw.square() + 4)) / 2).clamp(min=1e-6)
    if layout == "joint":
        component = component.unsqueeze(-1).expand(*component.shape, dims)
        loc, scale = loc.gather(-2, component).squeeze(-2), scale.gather(-2, component).squeeze(-2)
    else:
        loc, scale = loc.gather(-1, component).squeeze(-1), scale.gather(-1, component).squeeze(-1)
    return loc + scale * noise[1].float()
