"""One step of parallel decoding in plain PyTorch: the definition."""

import torch

#: The smallest uniform number that has a logarithm here.
TINY = 2.0**-32


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def masked_decode_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    noise: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance: float,
    temperature: float,
    mask: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [B, N, V], ids [B, N], count [B], noise [B, N, 2] -> the next ids, all ids, their log probabilities."""
    z = _wide(logits)
    if unconditional is not None:
        z = z + guidance * (z - _wide(unconditional))
    unknown = ids == mask
    log_p = torch.log_softmax(z, -1)
    sums = log_p.exp().cumsum(-1, dtype=torch.float64)
    reached = noise[..., :1].double() * sums[..., -1:]
    token = torch.searchsorted(sums, reached.contiguous(), right=True).clamp(max=z.shape[-1] - 1)
    own = log_p.gather(-1, token)[..., 0]
    filled = torch.where(unknown, token[..., 0], ids)
    gumbel = -torch.log(-torch.log(noise[..., 1].clamp(TINY)))
    confidence = (own + temperature * gumbel).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    key = torch.where(unknown, confidence, torch.inf)
    rank = key.sort(dim=-1, stable=True).indices.argsort(-1)
    take = torch.minimum(count.to(torch.int64), unknown.sum(-1))
    following = torch.where(rank < take[:, None], mask, filled)
    return following, filled, torch.where(unknown, own, 0.0)
