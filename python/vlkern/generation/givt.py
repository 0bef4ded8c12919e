"""Sequences of vectors from a causal GIVT: one token after the other on a key/value cache, or the best of some beams.

z_t ~ p(z | z_1, ..., z_(t-1), class)     scales times `temperature`: a little below 1 makes better pictures
guided: z_t ~ p(z | ..., class)^(1 + w) / p(z | ...)^w, see `vlkern.ops.gmm_guided_sample`

B examples   L tokens   d channels   P parameters of a token   b beams   f fans
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vlkern import _checks
from vlkern.layers.mixture import MixtureHead
from vlkern.models.givt import Givt

#: Parameters [B, P] of the density and, when guided, of that without a class -> tokens [B, d].
Draw = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from its density.

    temperature          multiplies the scales, 0 is the mean of a component
    mixture_temperature  multiplies the logits: above 1 the likely components become likelier
    guidance             w
    generator            on the device of the model; None is PyTorch's own

    Raises:
        ValueError: a number is negative.

    Example:
        >>> sampler = Sampler(temperature=0.95, guidance=0.4, generator=torch.Generator().manual_seed(0))
    """

    temperature: float = 1.0
    mixture_temperature: float = 1.0
    guidance: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "mixture_temperature", "guidance"):
            if _checks.number(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def draws(self, head: MixtureHead) -> Draw:
        """The function that draws from what this head gives."""
        options = {
            "temperature": self.temperature, "mixture_temperature": self.mixture_temperature,
            "generator": self.generator,
        }  # fmt: skip

        def draw(params: torch.Tensor, unconditional: torch.Tensor | None) -> torch.Tensor:
            if unconditional is None:
                return head.sample(params, **options)  # type: ignore[arg-type]
            return head.guided_sample(params, unconditional, guidance=self.guidance, **options)  # type: ignore[arg-type]

        return draw


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and without dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def both(model: Givt, labels: torch.Tensor | int) -> tuple[torch.Tensor | int, torch.Tensor]:
    """Labels [B], or the number of examples, twice, and `drop` [2 B], which hides those of the second half.

    Raises:
        ValueError: the model always has its label.
    """
    if not model.config.unlabelled:
        raise ValueError("guidance must be 0: the model always has its label")
    batch = labels if isinstance(labels, int) else len(labels)
    drop = torch.arange(2 * batch, device=model.position_embedding.device) >= batch
    return (2 * labels if isinstance(labels, int) else labels.repeat(2)), drop


def sample(
    model: Givt,
    labels: torch.Tensor | int,
    sampler: Sampler | None = None,
    *,
    encoded: torch.Tensor | None = None,
    draw: Draw | None = None,
) -> torch.Tensor:
    """One sequence for each label.

    Args:
        model: of style causal.
        labels: [B] int32 or int64; for models without classes the number of sequences.
        sampler: how tokens are drawn; guidance costs a second row in the cache for each sequence.
        encoded: [B, M, D] of `model.encode`, for models with an encoder.
        draw: how tokens are drawn, instead of by `sampler`, which then only says whether there is guidance.

    Returns:
        Tokens [B, L, d] float32; `model.latents_of` makes latents of them.

    Raises:
        TypeError, ValueError: no such labels, guidance for a model that always has its label, a masked model.

    Example:
        >>> model = vlkern.models.create("givt-tiny")
        >>> z = vlkern.generation.givt.sample(model, torch.tensor([3, 0]), Sampler(temperature=0.95, guidance=0.4))
    """
    sampler = Sampler() if sampler is None else sampler
    draw = sampler.draws(model.head) if draw is None else draw
    guided = sampler.guidance > 0
    with evaluating(model):
        given, drop = both(model, labels) if guided else (labels, None)
        x = model.begin(given, drop)
        caches = model.new_caches(len(x))
        seen = model.see(encoded.repeat(2, 1, 1) if guided and encoded is not None else encoded, 1)
        tokens: list[torch.Tensor] = []
        while True:
            params = model.head(model.extend(x, caches, seen))
            conditional, unconditional = params.chunk(2) if guided else (params, None)
            tokens.append(draw(conditional, unconditional))
            if len(tokens) == model.config.length:
                return torch.stack(tokens, 1)
            x = model.embed(tokens[-1])
            x = x.repeat(2, 1) if guided else x


@dataclass(frozen=True)
class Beams:
    """How many beams there are, how many draws each makes in a step, and how the best are found.

    beams        b, sequences that are kept
    fans         f, draws of each in a step
    temperature  None: the b best by their log-density go on. Else b are drawn without replacement, with probabilities
                 that go as exp(log-density / temperature)

    Raises:
        ValueError: a number is not positive.
    """

    beams: int = 4
    fans: int = 8
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("beams", "fans"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.temperature is not None:
            _checks.number("temperature", self.temperature, positive=True)


def beam_search(
    model: Givt,
    labels: torch.Tensor | int,
    sampler: Sampler | None = None,
    beams: Beams | None = None,
    *,
    encoded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest sequence that beams with fans find for each label.

    All b beams of an example start alike, so each draws its own first token; from then on every beam draws f tokens,
    and of the b f candidates b are kept by the sum of the log-densities of their tokens, under the sampler's
    temperatures.

    Args:
        model: of style causal.
        labels: as `sample`.
        sampler: how candidates are drawn; without guidance.
        beams: numbers of beams and fans.
        encoded: as `sample`.

    Returns:
        Tokens [B, L, d] float32 of the best beam of each example, and its log-density [B] in nats.

    Raises:
        TypeError, ValueError: as `sample`; guidance, or a temperature of 0, under which there is no density.

    Example:
        >>> model = vlkern.models.create("givt-tiny")
        >>> z, score = beam_search(model, torch.tensor([3]), Sampler(temperature=0.9), Beams(beams=2, fans=4))
    """
    sampler, beams = Sampler() if sampler is None else sampler, Beams() if beams is None else beams
    if sampler.guidance or not sampler.temperature:
        raise ValueError(
            f"sampler must have guidance 0 and a temperature above 0, got {sampler.guidance} and {sampler.temperature}"
        )
    b, length, head, draw = beams.beams, model.config.length, model.head, sampler.draws(model.head)

    def log_prob(params: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        found = head.log_prob(
            params, z, temperature=sampler.temperature, mixture_temperature=sampler.mixture_temperature
        )
        return found.sum(-1) if head.layout == "per_channel" else found

    with evaluating(model):
        x = model.begin(labels * b if isinstance(labels, int) else labels.repeat_interleave(b))
        examples = len(x) // b
        caches = model.new_caches(len(x))
        seen = model.see(None if encoded is None else encoded.repeat_interleave(b, 0), 1)
        tokens = x.new_empty(len(x), 0, model.config.channels, dtype=torch.float32)
        score = x.new_zeros(len(x), dtype=torch.float32)
        for step in range(length):
            params = head(model.extend(x, caches, seen))
            fans = beams.fans if step else 1
            rows = torch.arange(len(x), device=x.device).repeat_interleave(fans)
            z = draw(params[rows], None)
            candidates = score[rows] + log_prob(params[rows], z)
            if step:
                kept = _kept(candidates.view(examples, b * fans), beams, sampler.generator)
                parents = rows[kept]
                tokens, z, candidates = tokens[parents], z[kept], candidates[kept]
                if step + 1 < length:
                    caches = caches.fork(parents)
            tokens, score = torch.cat([tokens, z[:, None]], 1), candidates
            x = model.embed(z)
        best = score.view(examples, b).argmax(1) + torch.arange(examples, device=x.device) * b
        return tokens[best], score[best]


def _kept(scores: torch.Tensor, beams: Beams, generator: torch.Generator | None) -> torch.Tensor:
    """Which of the candidates [E, b f] of each of E examples go on: [E b], counted over all."""
    if beams.temperature is not None:  # Gumbel's maxima are a draw without replacement
        noise = torch.empty_like(scores).exponential_(generator=generator)
        scores = scores / beams.temperature - noise.log()
    first = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
    return (scores.topk(beams.beams, 1).indices + first).flatten()
