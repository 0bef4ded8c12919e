"""From logits to the next token.

    z = (penalised logits - their maximum) / temperature
    kept = tokens with z >= every cut:  top-k, then top-p of what is left, then min-p
    next = the first kept token, in the order of their ids, at which the cumulative probability exceeds u

u in [0, 1) is number `step` of a row's own stream, so what a row draws does not depend on the other rows. Every filter
is a cut: of tokens with equal logits all are kept or none, so no sorting order matters. Greedy takes the smallest id of
the largest logits.

    B rows   V vocabulary   N steps
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlkern import _checks
from vlkern._random import draws, uniform

#: Top-p looks at this many tokens before it sorts all.
_HEAD = 1024


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; `Sampler(temperature=0)` is greedy.

    Args:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens, and those as likely as the last of them.
        top_p: of these keep the smallest set whose probability reaches p, and tokens as likely as its last.
        min_p: of these keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: logits of tokens already in the prompt or the answer are divided by it where they are
            positive and multiplied where negative, before everything else; 1 changes nothing.
        seed: a whole number for every row alike: a prompt gets the same answer alone or in any batch (as far as its
            logits are the same), and equal prompts equal answers. Or a number for each row. None draws new ones.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Example:
        >>> sampler = Sampler(temperature=0.7, top_k=2, seed=1)
        >>> sampler.filter(torch.tensor([[0.0, 0.7, 1.4, 0.7]]))
        tensor([[-inf, -1.,  0., -1.]])
        >>> sampler.draw(torch.tensor([[0.0, 0.7, 1.4, 0.7]]), torch.tensor([0.1]))
        tensor([1])

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p); Nguyen et al., Turning Up the
    Heat: Min-p Sampling, 2024; Keskar et al., CTRL, 2019 (repetition penalty).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if _checks.number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        _checks.number("repetition_penalty", self.repetition_penalty, positive=True)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number above 0, got {self.top_k!r}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= _checks.number(name, value) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        if not all(seed is None or type(seed) is int for seed in seeds):
            raise TypeError(f"seed must be a whole number or one for each row, got {self.seed!r}")

    def uniforms(self, rows: int, steps: int) -> torch.Tensor:
        """[B, N] float64: what `draw` takes in each step.

        Raises:
            ValueError: there are seeds, but not one for each row.
        """
        if self.temperature == 0:
            return torch.zeros(rows, steps, dtype=torch.float64)
        if self.seed is None:
            seeds: Sequence[int] = [secrets.randbits(64) for _ in range(rows)]
        else:
            seeds = [self.seed] * rows if isinstance(self.seed, int) else self.seed
        if len(seeds) != rows:
            raise ValueError(f"seed must be one number or one for each of the {rows} rows, got {len(seeds)}")
        streams = [uniform(draws(steps, seed, 0)) for seed in seeds]
        return torch.from_numpy(np.stack(streams)) if streams else torch.zeros(0, steps, dtype=torch.float64)

    def penalise(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The repetition penalty: logits [B, V] of tokens `seen` [B, V] bool become smaller."""
        penalty = self.repetition_penalty
        return logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))

    def filter(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] -> z [B, V] float32 of a positive temperature, -inf for tokens that are not kept.

        The most likely token has z = 0 and is always kept.
        """
        z = logits.float()
        z = (z - z.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = _cut(z, z.topk(self.top_k).values[:, -1:])
        if self.top_p is not None and self.top_p < 1:
            z = _cut(z, _nucleus(z, self.top_p))
        if self.min_p:
            z = _cut(z, torch.full_like(z[:, :1], math.log(self.min_p)))
        return z

    def draw(self, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The next token of each row: logits [B, V] (penalised, if need be) and u [B] in [0, 1) -> [B] int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        sums = self.filter(logits).exp_().cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(sums, u[:, None].to(sums) * sums[:, -1:], right=True)[:, 0]


#: What `generate` does unless it is told otherwise.
GREEDY = Sampler(temperature=0.0)


def _cut(z: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """z [B, V] without what is below low [B, 1]."""
    return z.masked_fill(z < low, -math.inf)


def _nucleus(z: torch.Tensor, p: float) -> torch.Tensor:
    """[B, V] -> [B, 1]: the z of the token with which the cumulative probability, from the likeliest on, reaches p.

    The likeliest tokens are nearly always enough, and finding them is 40 times faster than sorting 262,144.
    """
    total = z.exp().sum(-1, keepdim=True, dtype=torch.float64)
    for count in sorted({min(_HEAD, z.shape[-1]), z.shape[-1]}):
        head = z.topk(count).values
        before = (head.exp().cumsum(-1, dtype=torch.float64) < p * total).sum(-1, keepdim=True)
        if count == z.shape[-1] or bool((before < count).all()):
            break
    return head.gather(-1, before.clamp(max=count - 1))
