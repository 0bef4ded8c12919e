"""The convolutional encoder and decoder of MaskGIT's tokenizer, which FSQ's and GIVT's autoencoders are made of too.

    encoder   conv 3x3 -> levels 0, 1, ..., n: blocks, and but for the last level half the side -> blocks -> out
    decoder   conv 3x3 -> blocks -> levels n, ..., 1, 0: blocks, and but for level 0 twice the side -> out
    block     x -> skip + conv 3x3(act(norm(conv 3x3(act(norm(x))))))

Level i has filters * multipliers[i] channels and 1 / 2^i of the picture's side. `norm` is a GroupNorm, `act` the swish
x sigmoid(x); `out` is norm, act and a last convolution, 1x1 in the encoder and 3x3 in the decoder. `skip` is x, where a
block changes the number of channels a 1x1 convolution of x. (In the code of GIVT, and so in its checkpoints, that is a
convolution **of the block's own result**, and x itself is not passed on.) There is no attention.

    B pictures   H, W sides in pixels   h, w sides of the grid, H / 2^n   F channels of a level   D width of a token

Sources: Chang et al., MaskGIT, 2022; Mentzer et al., Finite Scalar Quantization, 2023; Tschannen et al., GIVT, 2023.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.layers.init import lecun_normal_

DOWNSAMPLING = ("mean", "conv")
SKIPS = ("input", "result")


@dataclass(frozen=True)
class ConvConfig:
    """Size of an encoder and of its decoder.

    filters      channels of the first level
    multipliers  channels of every level, in multiples of `filters`
    blocks       of every level, and once more at the grid
    groups       of channels that are normalised together
    downsample   "mean" of 2 x 2 pixels, or "conv": a 4x4 convolution that takes every other pixel
    skip         where a block changes the channels, a convolution of its "input" or of its "result" is added
    """

    filters: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    downsample: str = "mean"
    skip: str = "input"

    def __post_init__(self) -> None:
        for name in ("filters", "blocks", "groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        counts = self.multipliers
        if not (isinstance(counts, tuple) and counts and all(type(count) is int and count > 0 for count in counts)):
            raise ValueError(f"multipliers must be positive integers, one for each level, got {counts!r}")
        if self.filters % self.groups:
            raise ValueError(f"filters must be a multiple of groups, got {self.filters} and {self.groups}")
        for name, choices in (("downsample", DOWNSAMPLING), ("skip", SKIPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a token: 2^n."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of every level."""
        return tuple(self.filters * multiplier for multiplier in self.multipliers)


def check_image_size(image_size: int, multiple: int) -> None:
    """Raise ValueError unless pictures of this side can be cut into tokens of `multiple` pixels."""
    if type(image_size) is not int or image_size < 1 or image_size % multiple:
        raise ValueError(f"image_size must be a positive multiple of {multiple}, a token's side, got {image_size!r}")


def check_pixels(pixels: torch.Tensor, height: int, width: int) -> None:
    """Raise TypeError or ValueError unless these are pictures of this size."""
    if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise TypeError(f"pixels must be a tensor of floating-point numbers in [-1, 1], got {got}")
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, height, width):
        raise ValueError(f"pixels must have shape [B, 3, {height}, {width}], got {list(pixels.shape)}")


def _conv(inputs: int, outputs: int, side: int, *, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size, or halves it; flax's initial values."""
    conv = nn.Conv2d(inputs, outputs, side, stride=stride, padding=(side - 1) // 2, bias=bias)
    lecun_normal_(conv.weight, fan_in=inputs * side**2)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _channels_last(x_BFHW: torch.Tensor) -> torch.Tensor:
    """The channels of a pixel side by side in memory, and so in all that follows: convolutions are faster with that."""
    return x_BFHW.contiguous(memory_format=torch.channels_last)


class _NormSwish(nn.GroupNorm):
    """[B, F, H, W] -> the same: normalised by groups of channels, then x sigmoid(x)."""

    def __init__(self, c: ConvConfig, channels: int) -> None:
        super().__init__(c.groups, channels, eps=1e-6)

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x_BFHW))


class ResBlock(nn.Module):
    """Two convolutions without bias; see the head of this file for what is added."""

    def __init__(self, c: ConvConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _NormSwish(c, inputs), _conv(inputs, outputs, 3, bias=False)
        self.norm2, self.conv2 = _NormSwish(c, outputs), _conv(outputs, outputs, 3, bias=False)
        self._of_result = c.skip == "result"
        self.skip = _conv(outputs if self._of_result else inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        y_BFHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BFHW))))
        if self.skip is None:
            return x_BFHW + y_BFHW
        return y_BFHW + self.skip(y_BFHW if self._of_result else x_BFHW)


class Downsample(nn.Module):
    """Half the side: the mean of 2 x 2 pixels, or a convolution."""

    def __init__(self, c: ConvConfig, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 4, stride=2) if c.downsample == "conv" else None

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        """[B, F, H, W] -> [B, F, H / 2, W / 2]."""
        return F.avg_pool2d(x_BFHW, 2) if self.conv is None else self.conv(x_BFHW)


class Upsample(nn.Module):
    """Twice the side: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        """[B, F, H, W] -> [B, F, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BFHW, scale_factor=2.0, mode="nearest"))


class _Blocks(nn.Sequential):
    """A number of blocks, the first of which may change the channels."""

    def __init__(self, c: ConvConfig, inputs: int, outputs: int) -> None:
        super().__init__(*(ResBlock(c, inputs if i == 0 else outputs, outputs) for i in range(c.blocks)))


class Encoder(nn.Module):
    """Pictures to a grid of vectors.

    Args:
        c: size.
        outputs: D, channels of the grid.

    Example:
        >>> Encoder(ConvConfig(filters=32, multipliers=(1, 2)), outputs=8)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, c: ConvConfig, outputs: int) -> None:
        super().__init__()
        self.stem = _conv(3, c.filters, 3, bias=False)
        self.levels, self.downsamples = nn.ModuleList(), nn.ModuleList()
        inputs = c.filters
        for level, channels in enumerate(c.channels):
            self.levels.append(_Blocks(c, inputs, channels))
            if level < len(c.channels) - 1:
                self.downsamples.append(Downsample(c, channels))
            inputs = channels
        self.middle = _Blocks(c, inputs, inputs)
        self.norm, self.head = _NormSwish(c, inputs), _conv(inputs, outputs, 1)

    def forward(self, x_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, D, h, w]."""
        x = self.stem(_channels_last(x_B3HW))
        for level, blocks in enumerate(self.levels):
            x = blocks(x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        return self.head(self.norm(self.middle(x)))

    def blocks(self) -> Iterator[nn.Module]:
        """All residual blocks, from the picture to the grid."""
        for blocks in (*self.levels, self.middle):
            yield from blocks


class Decoder(nn.Module):
    """A grid of vectors to pictures.

    Args:
        c: size; `levels` and `upsamples` are kept in the order in which they run, from the grid to the picture.
        inputs: D, channels of the grid.

    Example:
        >>> Decoder(ConvConfig(filters=32, multipliers=(1, 2)), inputs=8)(torch.zeros(1, 8, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(self, c: ConvConfig, inputs: int) -> None:
        super().__init__()
        last = c.channels[-1]
        self.stem, self.middle = _conv(inputs, last, 3), _Blocks(c, last, last)
        self.levels, self.upsamples = nn.ModuleList(), nn.ModuleList()
        before = last
        for channels in reversed(c.channels):
            self.levels.append(_Blocks(c, before, channels))
            before = channels
        for channels in reversed(c.channels[1:]):
            self.upsamples.append(Upsample(channels))
        self.norm, self.head = _NormSwish(c, before), _conv(before, 3, 3)

    def forward(self, x_BDhw: torch.Tensor) -> torch.Tensor:
        """[B, D, h, w] -> [B, 3, H, W], which nothing bounds."""
        x = self.middle(self.stem(_channels_last(x_BDhw)))
        for level, blocks in enumerate(self.levels):
            x = blocks(x)
            if level < len(self.upsamples):
                x = self.upsamples[level](x)
        return self.head(self.norm(x))

    def blocks(self) -> Iterator[nn.Module]:
        """All residual blocks, from the grid to the picture."""
        for blocks in (self.middle, *self.levels):
            yield from blocks


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters())
