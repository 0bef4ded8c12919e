"""A float entropy model as integers: calibrated on latents of pictures, without training.

Every tensor of activations a becomes round(a / s), with a scale s that lets the largest |a| of the calibration fill the
`bits`; weights become int8, with a scale for each row. The scales of what a product takes and gives are its
multiplier / 2^shift.

    residual   s = 2^-F, such that the largest residual is 2^17 to 2^18: larger ones have room up to 2^23
    q, k       channel by channel, such that q k / sqrt(channels) in powers of two is a whole number shifted right
    head       logits in powers of two / 1024, means in 1/256, log scales in steps of the table of scales
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.codec.integer.arithmetic import EXPONENT, RESIDUAL
from vlkern.codec.integer.weights import Attention, Dense, Layer, Norm, Weights
from vlkern.models.m2t import DELTA, M2T, Block

#: Bits of the largest residual seen.
_RESIDUAL_BITS = 18
#: Steps of log scale in the table of scales: 0.11 ... 256 in 63 steps.
_LOG_LOW, _LOG_STEP = math.log(0.11), math.log(256 / 0.11) / 63


@dataclass(frozen=True)
class Latents:
    """Tokens of some tiles, all of one level.

    tokens  [T, N, C] symbols in coding order, floating-point
    known   [T, N] bool, which are inside of the picture
    level   of quality
    """

    tokens: torch.Tensor
    known: torch.Tensor
    level: int


class Ranges:
    """The largest magnitudes of what passes through a transformer, channel by channel.

    Args:
        model: the codec.
        latents: what to look at.
    """

    def __init__(self, model: M2T, latents: Iterable[Latents]) -> None:
        self._found: dict[tuple[nn.Module, str], torch.Tensor] = {}
        hooks = [
            part.register_forward_hook(self._note)
            for part in model.entropy.modules()
            if isinstance(part, (nn.LayerNorm, nn.Linear))
        ]
        try:
            with torch.no_grad():
                for sample in latents:
                    model.entropy(sample.tokens, model.quality(sample.level), sample.known)
        finally:
            for hook in hooks:
                hook.remove()
        if not self._found:
            raise ValueError("latents must not be empty")

    def _note(self, part: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for name, tensor in (("in", inputs[0]), ("out", output)):
            largest = tensor.detach().double().flatten(0, -2).abs().amax(0)
            before = self._found.get((part, name))
            self._found[part, name] = largest if before is None else torch.maximum(before, largest)

    def channels(self, part: nn.Module, where: str) -> torch.Tensor:
        """[channels] of what goes "in" or comes "out" of a part of the model."""
        return self._found[part, where].clamp_min(1e-6)

    def largest(self, part: nn.Module, where: str) -> float:
        """Of all channels."""
        return float(self.channels(part, where).max())


def _fixed(real: torch.Tensor, most: int, highest: int) -> tuple[torch.Tensor, int]:
    """Numbers as whole ones divided by 2^shift, as exact as |whole| <= most and shift <= highest allow."""
    shift = max(1, min(highest, math.floor(math.log2(most / float(real.abs().max().clamp_min(1e-30))))))
    return (real * 2.0**shift).round().long().clamp(-most, most), shift


def _dense(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale_in: float,
    scale_out: torch.Tensor | float,
    limit: int,
    table: torch.Tensor | None = None,
) -> Dense:
    """A product whose inputs and outputs stand for integers times these scales."""
    weight = weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()
    # The second keeps the bias far below 2^31.
    step = torch.maximum(weight.abs().amax(1) / 127, bias.abs() / scale_in * 2.0**-29).clamp_min(1e-12)
    multiplier, shift = _fixed(step * scale_in / scale_out, (1 << 31) - 1, 62)
    return Dense(
        (weight / step.unsqueeze(1)).round().to(torch.int8),
        (bias / (step * scale_in)).round().int(),
        multiplier.int(),
        shift,
        limit,
        table,
    )


def _norm(part: nn.LayerNorm, scale_in: float, scale_out: float, limit: int) -> Norm:
    gain, shift = _fixed(part.weight.detach().double() / scale_out, (1 << 31) - 1, 36)
    shift = min(60, shift + 12)  # u is in 2^-12
    bias = (part.bias.detach().double() / scale_out * 2.0**shift).round().long()
    return Norm(gain.int(), bias, shift, limit, max(1, round(part.eps / scale_in**2)))


def _gelu(scale_in: float, scale_out: float, limit: int) -> torch.Tensor:
    x = torch.arange(-limit, limit + 1, dtype=torch.float64) * scale_in
    return (F.gelu(x, approximate="tanh") / scale_out).round().clamp(-limit, limit).to(torch.int16)


def _layer(block: Block, ranges: Ranges, residual: float, limit: int) -> Layer:
    width = block.out_proj.in_features
    s_norm1, s_norm2 = (ranges.largest(part, "out") / limit for part in (block.norm1, block.norm2))
    q, k, v = ranges.channels(block.qkv, "out").split(width)
    # q k / sqrt(channels) log2(e) 2^10 = (whole q) (whole k) 2^-shift
    unit = 2.0**EXPONENT / math.log(2) / math.sqrt(width // block.heads)
    shift = max(0, min(30, math.floor(-math.log2(float((q * k).max()) / limit**2 * unit))))
    both = 2.0**-shift / unit  # the product of the scales of a channel's queries and keys
    s_q, s_k, s_v = (both * q / k).sqrt(), (both * k / q).sqrt(), float(v.max()) / limit
    s_qkv = torch.cat([s_q, s_k, torch.full_like(v, s_v)])
    s_seen = ranges.largest(block.out_proj, "in") / limit
    multiplier, out_shift = _fixed(torch.tensor([s_v / s_seen * 2.0**-15], dtype=torch.float64), (1 << 31) - 1, 62)
    s_hidden = ranges.largest(block.fc1, "out") / limit
    s_gelu = ranges.largest(block.fc2, "in") / limit
    return Layer(
        _norm(block.norm1, residual, s_norm1, limit),
        _dense(block.qkv.weight, block.qkv.bias, s_norm1, s_qkv, limit),
        Attention(shift, int(multiplier), out_shift, limit),
        _dense(block.out_proj.weight, block.out_proj.bias, s_seen, residual, RESIDUAL),
        _norm(block.norm2, residual, s_norm2, limit),
        _dense(block.fc1.weight, block.fc1.bias, s_norm2, s_hidden, limit, _gelu(s_hidden, s_gelu, limit)),
        _dense(block.fc2.weight, block.fc2.bias, s_gelu, residual, RESIDUAL),
    )


@torch.no_grad()
def convert(model: M2T, latents: Iterable[Latents], *, bits: int = 12) -> Weights:
    """The entropy model of a codec in integers.

    Args:
        model: an M2T on the CPU.
        latents: what to calibrate with: pictures like those to come, at all levels.
        bits: of activations, with their sign, 6 to 16.

    Returns:
        integers that `IntegerEntropy` takes.

    Raises:
        ValueError: the model is an MT; bits is out of range; there are no latents; sums of products could leave 31
            bits because the model is too wide for so many bits of activations.
    """
    c, entropy = model.config, model.entropy
    if c.bidirectional:
        raise ValueError("model must be an M2T: there is no MT in integers")
    if not 6 <= bits <= 16:
        raise ValueError(f"bits must be from 6 to 16, got {bits}")
    limit = (1 << (bits - 1)) - 1
    ranges = Ranges(model, latents)
    norms: list[Any] = [norm for block in entropy.blocks() for norm in (block.norm1, block.norm2)]
    largest = max(ranges.largest(norm, "in") for norm in [*norms, entropy.norm])
    residual = 2.0 ** (math.ceil(math.log2(largest)) - _RESIDUAL_BITS)

    def table(rows: torch.Tensor) -> torch.Tensor:
        return (rows.double() / residual).round().clamp(-RESIDUAL, RESIDUAL).int()

    s_norm = ranges.largest(entropy.norm, "out") / limit
    steps = torch.tensor([math.log(2) / 2**EXPONENT, 1 / 256, _LOG_STEP], dtype=torch.float64)
    offset = torch.tensor([0.0, 0.0, _LOG_LOW], dtype=torch.float64)
    size = c.components * c.channels
    weights = Weights(
        _dense(entropy.embed.weight / DELTA, entropy.embed.bias, 1.0, residual, RESIDUAL),
        table(entropy.embed(entropy.mask / DELTA)),
        table(entropy.slot),
        table(torch.stack([model.quality(level) for level in range(c.levels)])),
        tuple(_layer(block, ranges, residual, limit) for block in entropy.blocks()),
        _norm(entropy.norm, residual, s_norm, limit),
        _dense(
            entropy.head.weight,
            entropy.head.bias.double() - offset.repeat_interleave(size),
            s_norm,
            steps.repeat_interleave(size),
            RESIDUAL,
        ),
    )
    weights.check(c)
    return weights
