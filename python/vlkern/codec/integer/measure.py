"""What integers cost: bits of the same symbols with the float transformer and with the integer one."""

import math
from collections.abc import Iterable

import torch

from vlkern import ops
from vlkern.codec.integer.convert import Latents
from vlkern.codec.integer.model import IntegerEntropy
from vlkern.coding import Mixtures
from vlkern.models.m2t import M2T


def latents_of(model: M2T, pixels: torch.Tensor, level: int) -> Latents:
    """The tokens of a picture.

    Args:
        model: M2T.
        pixels: [3, H, W] uint8, H and W multiples of 16.
        level: of quality.
    """
    with torch.no_grad():
        tokens, known = model.tiles(model.analysis(pixels.unsqueeze(0) / 127.5 - 1, level).round())
    return Latents(tokens, known, level)


def mixtures_of(entropy: IntegerEntropy, latents: Latents) -> Mixtures:
    """The mixtures of all tokens, step after step: means and so on [T, N, K, C]."""
    state, end, found = entropy.begin(len(latents.tokens), latents.level), 0, []
    before: slice | None = None
    for n in entropy.config.groups:
        given = (None, None) if before is None else (latents.tokens[:, before].int(), latents.known[:, before])
        found.append(entropy.step(state, *given))
        before, end = slice(end, end + n), end + n
    return Mixtures(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def parameters(mixtures: Mixtures) -> torch.Tensor:
    """As `ops.mixture_bits` takes them: [..., 3, K, C]."""
    low, high = math.log(0.11), math.log(256)
    scales = low + mixtures.scales * ((high - low) / 63)
    return torch.stack([mixtures.weights.clamp(min=2**-9).log(), mixtures.means / 256, scales], -3)


def cost(model: M2T, entropy: IntegerEntropy, latents: Iterable[Latents]) -> dict[int, tuple[float, float]]:
    """Level -> bits with the float transformer, and with the integers."""
    found: dict[int, tuple[float, float]] = {}
    for sample in latents:
        with torch.no_grad():
            both = (
                model.entropy(sample.tokens, model.quality(sample.level), sample.known),
                parameters(mixtures_of(entropy, sample)),
            )
            floats, integers = (float(ops.mixture_bits(sample.tokens, p)[sample.known].double().sum()) for p in both)
        before = found.get(sample.level, (0.0, 0.0))
        found[sample.level] = (before[0] + floats, before[1] + integers)
    return found
