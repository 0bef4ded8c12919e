"""Pictures from a MaskGIT: all masked tokens are drawn at once, the surest stay, and again.

    unknown_0 = tokens that are not known at first;    step t = 0, ..., T - 1,  r = (t + 1) / T
    z = logits of the class + a_t (those - logits of no class),    a_t = guidance t / (T - 1)
    every masked token is drawn from softmax(z); its confidence is log p + tau (1 - r) Gumbel
    the m least confident are masked again, m = max(1, min(unknown - 1, floor(unknown_0 gamma(r))))

The picture is what step T - 1 drew, before its masking. The steps themselves are `vlkern.ops.masked_decode_step`; how
many tokens are masked is known beforehand, so that nothing waits for a GPU, and logits are computed for these alone.

    B pictures   N tokens   M masked ones   T steps
"""

import math
from dataclasses import dataclass

import torch

from vlkern import _checks, ops
from vlkern.models.maskgit import MaskGit

SCHEDULES = ("cosine", "uniform", "pow:K", "log", "exp")


def masked_part(ratio: float, schedule: str = "cosine", tokens: int = 256) -> float:
    """gamma: the part of the tokens that is masked when `ratio` of the steps is done, in [1e-6, 1].

        cosine  cos(pi r / 2)     uniform  1 - r     pow:K  1 - r^K
        log  -log2(r) / log2(N)     exp  1 - 2^(-(1 - r) log2 N)

    Args:
        ratio: r in [0, 1].
        schedule: one of these.
        tokens: N, for log and exp; at least 2.

    Raises:
        ValueError: no such schedule, or r is not in [0, 1].

    Example:
        >>> [round(masked_part(r), 3) for r in (0.0, 0.5, 1.0)]
        [1.0, 0.707, 0.0]
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio!r}")
    kind, _, power = schedule.partition(":")
    if schedule == "cosine":
        part = math.cos(math.pi / 2 * ratio)
    elif schedule == "uniform":
        part = 1 - ratio
    elif kind == "pow" and power.replace(".", "", 1).isdigit() and float(power) > 0:
        part = 1 - ratio ** float(power)
    elif schedule == "log":
        part = 1.0 if ratio == 0 else -math.log2(ratio) / math.log2(tokens)
    elif schedule == "exp":
        part = 1 - 2 ** (-(1 - ratio) * math.log2(tokens))
    else:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} with K > 0, got {schedule!r}")
    return min(1.0, max(1e-6, part))


def masked_counts(tokens: int, steps: int, schedule: str = "cosine") -> list[int]:
    """How many of `tokens` are masked after each step; 1 after the last one, whose masking is never looked at.

    Example:
        >>> masked_counts(256, 8)
        [251, 236, 212, 181, 142, 97, 49, 1]
    """
    counts, unknown = [], tokens
    for t in range(1, steps + 1):
        unknown = max(1, min(unknown - 1, math.floor(tokens * masked_part(t / steps, schedule, max(2, tokens)))))
        counts.append(unknown)
    return counts


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn.

    Args:
        steps: T; the paper takes 8 for 256 tokens, 12 for 1024.
        temperature: of the Gumbel noise on the confidence, tau.
        guidance: of the last step; it grows from 0 linearly. 0 asks the model only once a step.
        schedule: "cosine", "uniform", "pow:K", "log" or "exp".
        generator: of the model's device; None is PyTorch's own.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    steps: int = 8
    temperature: float = 4.5
    guidance: float = 0.0
    schedule: str = "cosine"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be a positive integer, got {self.steps!r}")
        for name in ("temperature", "guidance"):
            if _checks.number(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        masked_part(0.5, self.schedule)


def _remaining(unknown: torch.Tensor, before: torch.Tensor, part: float) -> torch.Tensor:
    """m of each row [B], without a wait for the device."""
    return torch.minimum((unknown.double() * part).floor().to(before.dtype), before - 1).clamp(min=1)


def _of_nothing(model: MaskGit, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits when all ids are masked: pictures of one class share them. On a GPU finding out would be a wait."""
    if labels.device.type != "cpu":
        all_logits: torch.Tensor = model(ids, labels)
        return all_logits
    classes, which = labels.unique(return_inverse=True)
    logits: torch.Tensor = model(ids[: len(classes)], classes)
    return logits[which]


@torch.inference_mode()
def sample(
    model: MaskGit, labels: torch.Tensor, sampler: Sampler | None = None, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens of a picture for each label.

    Args:
        model: in evaluation or not, it has no chance inside.
        labels: [B] int64; `model.config.classes` for no class.
        sampler: how they are drawn; None for the paper's ways.
        known: [B, N] int64, tokens that stay as they are, and `model.config.mask` where some are to be drawn: for
            in-painting. The schedule counts those that are to be drawn.

    Returns:
        ids [B, N] int64, codes.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Example:
        >>> model = vlkern.models.create("maskgit-tiny")
        >>> sample(model, torch.tensor([3, 0]), Sampler(steps=4, guidance=2.0)).shape
        torch.Size([2, 64])
    """
    c, sampler = model.config, Sampler() if sampler is None else sampler
    if _checks.tensor("labels", labels).dim() != 1:
        raise ValueError(f"labels must have shape [B], got {list(labels.shape)}")
    batch, device = len(labels), labels.device
    noise = torch.rand(sampler.steps, batch, c.tokens, 2, generator=sampler.generator, device=device)
    if known is None:
        ids = torch.full((batch, c.tokens), c.mask, device=device)
    else:
        _checks.shape("known", _checks.tensor("known", known), (batch, c.tokens))
        ids = known
    at_first = count = (ids == c.mask).sum(1)
    everywhere = masked_counts(c.tokens, sampler.steps, sampler.schedule)
    nobody = torch.full_like(labels, c.classes)
    for t in range(sampler.steps):
        ratio = (t + 1) / sampler.steps
        places = None
        if known is None and t:  # every row has as many masked tokens, which the host knows
            places = (ids != c.mask).to(torch.int8).sort(dim=1, stable=True).indices[:, : everywhere[t - 1]]
        guidance = sampler.guidance * (t / (sampler.steps - 1) if sampler.steps > 1 else 1.0)
        if guidance:
            twice = None if places is None else places.repeat(2, 1)
            logits, unconditional = model(ids.repeat(2, 1), torch.cat([labels, nobody]), twice).chunk(2)
        elif known is None and t == 0:
            logits, unconditional = _of_nothing(model, ids, labels), None
        else:
            logits, unconditional = model(ids, labels, places), None
        count = _remaining(at_first, count, masked_part(ratio, sampler.schedule, max(2, c.tokens)))
        part, chance = (ids, noise[t]) if places is None else (
            ids.gather(1, places), noise[t].gather(1, places[..., None].expand(-1, -1, 2))
        )  # fmt: skip
        following, filled, _ = ops.masked_decode_step(
            logits, part, count, chance.to(torch.promote_types(logits.dtype, torch.float32)), mask=c.mask,
            temperature=sampler.temperature * (1 - ratio), unconditional=unconditional, guidance=guidance,
        )  # fmt: skip
        drawn = filled if t + 1 == sampler.steps else following
        ids = drawn if places is None else ids.scatter(1, places, drawn)
    return ids
