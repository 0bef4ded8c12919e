"""What a user would pick instead of the affine coupling."""

import math

import torch
import torch.nn.functional as F


def affine_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    raw_scale: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    max_scale: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lines of a flow's model file, in float32 as there: gather the part, map it, put it back."""
    part = x if tokens is None else x[:, tokens]
    part = part if channels is None else part[:, :, channels]
    raw = raw_scale.float()
    y2 = ((part.float() + shift.float()) * (torch.sigmoid(raw) * max_scale)).to(x.dtype)
    logdet = (F.logsigmoid(raw) + math.log(max_scale)).flatten(1).sum(1)
    if tokens is None and channels is None:
        return y2, logdet
    y = x.clone()
    if tokens is None:
        y[:, :, channels] = y2
    elif channels is None:
        y[:, tokens] = y2
    else:
        y[:, tokens[:, None], channels] = y2
    return y, logdet
