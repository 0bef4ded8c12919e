"""JetFormer as the training loop sees it: noise that fades, noise on the tokens, and the two directions."""

import math

import torch
from torch import nn

from vlkern.models.jetformer import JetFormer
from vlkern.recipes.pictures import Chance, PictureTask

#: Noise on the pixels at the beginning and at the end of a run, in levels out of 256.
FIRST, LAST = 64.0, 0.0
#: The standard deviation of the noise on soft tokens is uniform between 0 and this.
TOKEN_NOISE = 0.3
#: The share of the texts before pictures that are left out.
DROP = 0.1
#: What the nats of a text count beside the bits of a picture.
TEXT_WEIGHT = 0.0025


def noise_scale(progress: float, first: float = FIRST, last: float = LAST) -> float:
    """Standard deviation of the noise on pixels when `progress` in [0, 1] of the run is over: half a cosine.

    Example:
        >>> noise_scale(0.0), noise_scale(0.5), noise_scale(1.0)
        (64.0, 32.0, 0.0)
    """
    return (first - last) * (1 + math.cos(math.pi * progress)) / 2 + last


def add_noise(pixels: torch.Tensor, noise: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] with noise, on whole levels again; beyond [-1, 1], too.

    Args:
        pixels: [B, 3, S, S].
        noise: N(0, 1) of this shape.
        scale: its standard deviation in levels out of 256, a number or [B, 1, 1, 1].
    """
    levels = ((pixels + 1) * 127.5).round()
    return (levels + scale * noise).round() / 127.5 - 1


class Objective(nn.Module):
    """Bits of pictures where the text comes first, weighed nats of texts where the picture does; their mean."""

    def __init__(self, model: JetFormer, *, text_weight: float = TEXT_WEIGHT, stop: bool = True) -> None:
        """`stop`: the flow does not learn from pictures that come first."""
        super().__init__()
        self.model, self._weight, self._stop = model, text_weight, stop

    def forward(
        self,
        pixels: torch.Tensor,
        ids: torch.Tensor,
        noise: torch.Tensor,
        text_first: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss [].

        Args:
            pixels: [B, 3, S, S] in [-1, 1], plus noise of one level.
            ids: [B, L], without their labels where that is wanted.
            noise: [B, N, d], added to the soft tokens of the rows in which they come last, as inputs and as targets.
            text_first: [B] bool.
            lengths: [B] words of each text; None: L.
        """
        model, first = self.model, text_first[:, None, None]
        tokens, logdet = model.encode(pixels)
        if self._stop:
            tokens = torch.where(first, tokens, tokens.detach())
            logdet = torch.where(text_first, logdet, logdet.detach())
        d = model.config.modelled
        soft = tokens[..., :d] + torch.where(first, noise, 0)
        out = model.outputs(soft, ids, lengths, text_first)
        bits = model.image_bits(out.image, torch.cat([soft, tokens[..., d:]], -1), logdet)
        nats = self._weight * model.text_nats(out.text, ids, lengths)
        return torch.where(text_first, bits, nats).mean()


class JetFormerTask(PictureTask):
    """What the loop trains: see vlkern.recipes.pictures.PictureTask.

    Args:
        picture_first: share of the examples that learn to write the text of a picture.
        noise: on the pixels at the first step.
    """

    family = JetFormer

    def __init__(
        self, model: JetFormer, *args: object, picture_first: float = 0.0, noise: float = FIRST, **options: object
    ) -> None:
        super().__init__(model, Objective(model), *args, **options)  # type: ignore[arg-type]
        self._picture_first, self._noise = picture_first, noise

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Pixels with the noise of this part of the run and of one level, ids, noise on tokens, who comes first."""
        c = self.model.config
        text_first = chance.uniform() >= self._picture_first
        scale = torch.where(text_first, noise_scale(progress, self._noise), 0.0)[:, None, None, None]
        pixels = add_noise(pixels, chance.normal(*pixels.shape[1:]), scale) + chance.uniform(*pixels.shape[1:]) / 127.5
        ids = torch.where((chance.uniform(1) < DROP) & text_first[:, None], c.bos + 2, ids)
        noise = TOKEN_NOISE * chance.uniform(1, 1) * chance.normal(c.tokens, c.modelled)
        return pixels, ids, noise, text_first
