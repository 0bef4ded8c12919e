"""Sequences of vectors from a masked GIVT: all hidden tokens are drawn at once, the surest stay, and again.

    step s = 1, ..., S, r = s / S: draw every hidden token; its confidence is log p(token) + tau (1 - r) Gumbel
    the m least confident are hidden again, m = max(0, min(hidden - 1, floor(L schedule(r))))

Log-densities of a token spread over hundreds of nats, so the choice temperature tau is much larger than for tokens of a
vocabulary: 35 for 256 tokens of 16 channels in the paper.

    B examples   L tokens   d channels   P parameters of a token   S steps
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from vlkern import _checks
from vlkern.generation.givt import Draw, Sampler, both, evaluating
from vlkern.models.givt import Givt


def masked_ratio(ratio: torch.Tensor, schedule: str = "cosine") -> torch.Tensor:
    """The part of the tokens that is hidden when `ratio` of the steps is done.

    Args:
        ratio: any shape, in [0, 1].
        schedule: "cosine", cos(pi r / 2), or "pow:K", 1 - r^K.

    Returns:
        In [1e-6, 1], of the shape and dtype of `ratio`.

    Raises:
        ValueError: no such schedule.

    Example:
        >>> masked_ratio(torch.tensor([0.0, 0.5, 1.0]), "pow:2")
        tensor([1.0000e+00, 7.5000e-01, 1.0000e-06])
    """
    kind, _, power = schedule.partition(":")
    if schedule == "cosine":
        hidden = torch.cos(math.pi / 2 * ratio)
    elif kind == "pow" and power.replace(".", "", 1).isdigit() and float(power) > 0:
        hidden = 1 - ratio ** float(power)
    else:
        raise ValueError(f"schedule must be cosine or pow:K with K > 0, got {schedule!r}")
    return hidden.clamp(1e-6, 1.0)


def training_mask(keep: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The hidden tokens of each example in training.

    Args:
        keep: [B], in the paper uniform in [0, 0.7]: ceil(L cos(pi / 2 keep)) tokens are hidden.
        order: [B, L] random numbers: those with the smallest are.

    Returns:
        [B, L] bool.
    """
    hidden = order.shape[1] * masked_ratio(keep)
    return order.argsort(1).argsort(1) < hidden[:, None]


def hidden_again(hidden: torch.Tensor, length: int, ratio: float, schedule: str = "cosine") -> torch.Tensor:
    """m: how many of the `hidden` [B] tokens of each example stay hidden after the step that ends at `ratio`."""
    left = (masked_ratio(torch.tensor(ratio), schedule) * length).floor().to(hidden.device, hidden.dtype)
    return torch.minimum(left, hidden - 1).clamp(min=0)


def least_confident(score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The tokens of each example that are hidden again, [B, L] bool: the `count` [B] with the lowest scores [B, L]."""
    return score.argsort(1).argsort(1) < count[:, None]


class Step(NamedTuple):
    """What a step of decoding did.

    tokens    [B, L, d] after it; zero where they are hidden
    hidden    [B, L] bool, after it
    params    [B, L, P] that it drew from
    log_prob  [B, L] of the tokens: of those that it drew, and of those that were known before
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    params: torch.Tensor
    log_prob: torch.Tensor


def steps(
    model: Givt,
    labels: torch.Tensor | int,
    sampler: Sampler | None = None,
    *,
    count: int = 16,
    schedule: str = "cosine",
    choice_temperature: float = 35.0,
    annealed: bool = True,
    draw: Draw | None = None,
    gumbel: Callable[[], torch.Tensor] | None = None,
) -> Iterator[Step]:
    """One step of decoding after the other.

    Args:
        model: of style masked.
        labels: [B] int32 or int64; for models without classes the number of sequences.
        sampler: how tokens are drawn. With guidance their confidence is (1 + w) log p_c - w log p_u.
        count: S.
        schedule: see `masked_ratio`.
        choice_temperature: tau.
        annealed: whether tau falls to 0 in the course of the steps.
        draw: how tokens are drawn, instead of by `sampler`, which then only says whether there is guidance.
        gumbel: gives the noise [B, L] of a step, instead of drawing it.

    Yields:
        S steps; in the last no token is hidden.

    Raises:
        TypeError, ValueError: as `vlkern.generation.givt.sample`; a causal model; `count` or the schedule is none.
    """
    c, sampler = model.config, Sampler() if sampler is None else sampler
    if not c.masked:
        raise ValueError("model must be of style masked, got causal")
    if type(count) is not int or count < 1:
        raise ValueError(f"count must be a positive integer, got {count!r}")
    _checks.number("choice_temperature", choice_temperature)
    guided, device = sampler.guidance > 0, model.position_embedding.device
    drawn = sampler.draws(model.head) if draw is None else draw
    rows, drop = both(model, labels) if guided else (labels, None)
    batch = labels if isinstance(labels, int) else len(labels)
    given = None if isinstance(rows, int) else rows
    tokens = torch.zeros(batch, c.length, c.channels, device=device)
    hidden = torch.ones(batch, c.length, dtype=torch.bool, device=device)

    def noise() -> torch.Tensor:
        uniform = torch.rand(batch, c.length, device=device, generator=sampler.generator)
        return -(-uniform.clamp(min=1e-20).log()).log()

    def log_prob(params: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        # The density before the temperatures: they change how tokens are drawn, not how much the model likes them.
        found = model.head.log_prob(params, z)
        return found.sum(-1) if c.layout == "per_channel" else found

    for number in range(1, count + 1):
        ratio = number / count
        with evaluating(model):
            twice = (tokens.repeat(2, 1, 1), hidden.repeat(2, 1)) if guided else (tokens, hidden)
            params = model(twice[0], given, mask=twice[1], drop=drop)
            conditional, unconditional = params.chunk(2) if guided else (params, None)
            z = torch.where(hidden[..., None], drawn(conditional, unconditional), tokens)
            found = log_prob(conditional, z)
            if unconditional is not None:
                found = (1 + sampler.guidance) * found - sampler.guidance * log_prob(unconditional, z)
            tau = choice_temperature * (1 - ratio if annealed else 1.0)
            score = (found + tau * (noise() if gumbel is None else gumbel())).masked_fill(~hidden, math.inf)
            again = least_confident(score, hidden_again(hidden.sum(1), c.length, ratio, schedule))
            tokens, hidden = z.masked_fill(again[..., None], 0), again
        yield Step(tokens, hidden, conditional, found)


def sample(model: Givt, labels: torch.Tensor | int, sampler: Sampler | None = None, **more: object) -> torch.Tensor:
    """What the last of `steps` gives: tokens [B, L, d] float32.

    Example:
        >>> model = vlkern.models.create("givt-masked-tiny")
        >>> z = vlkern.generation.masked_givt.sample(model, torch.tensor([3, 0]), count=4)
    """
    *_, last = steps(model, labels, sampler, **more)  # type: ignore[arg-type]
    return last.tokens
