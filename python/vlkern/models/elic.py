"""ELIC's analysis and synthesis transforms: pictures to a grid of latents with 1/16 of their sides, and back.

    analysis    pixels -> conv -> blocks -> conv -> blocks -> [attention] -> conv -> blocks -> conv -> [attention] -> y
    synthesis   y -> [attention] -> deconv -> blocks -> deconv -> [attention] -> blocks -> deconv -> blocks -> deconv
    block       x + conv 1x1(relu(conv 3x3(relu(conv 1x1(x)))))                      half the channels inside
    attention   x + a(x) sigmoid(b(x)),  a three residual units, b three and a conv 1x1;  unit: relu(block(x))

Every conv is 5x5 with a stride of 2, every deconv its transpose. There is no normalisation, and between the strided
convolutions nothing bends but the blocks, which start at zero: an untrained transform is linear.

    B pictures   H, W sides in pixels   h, w sides of the latents, H / 16 and W / 16   C channels of the latents

Source: He et al., ELIC: Efficient Learned Image Compression, 2022, without its context models.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

#: Pixels along the side of a latent.
DOWNSAMPLING = 16


@dataclass(frozen=True)
class ElicConfig:
    """Size of the transforms.

    widths     channels at 1/2, 1/4 and 1/8 of the picture's sides
    blocks     residual blocks there
    attention  whether there are the two attention modules
    """

    widths: tuple[int, int, int] = (256, 256, 256)
    blocks: tuple[int, int, int] = (3, 3, 3)
    attention: bool = True

    def __post_init__(self) -> None:
        for name, least in (("widths", 2), ("blocks", 0)):
            counts = getattr(self, name)
            right = isinstance(counts, tuple) and len(counts) == 3
            if not (right and all(type(count) is int and count >= least for count in counts)):
                raise ValueError(f"{name} must be three integers of at least {least}, got {counts!r}")


def _start(conv: nn.Conv2d | nn.ConvTranspose2d, fan_in: float) -> nn.Module:
    """A convolution that passes on the variance of what comes in."""
    nn.init.normal_(conv.weight, std=fan_in**-0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _silent(width: int, inputs: int) -> nn.Conv2d:
    """1x1, which gives zeros at first."""
    conv = nn.Conv2d(inputs, width, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def _conv(inputs: int, outputs: int) -> nn.Module:
    """5x5, half the side."""
    return _start(nn.Conv2d(inputs, outputs, 5, stride=2, padding=2), 25 * inputs)


def _deconv(inputs: int, outputs: int) -> nn.Module:
    """5x5, twice the side: 25 / 4 numbers of each channel have part in a result."""
    return _start(nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1), 6.25 * inputs)


class Block(nn.Module):
    """x + conv 1x1(relu(conv 3x3(relu(conv 1x1(x))))): [B, F, H, W] -> [B, F, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.reduce = _start(nn.Conv2d(width, inner, 1), width / 2)
        self.conv = _start(nn.Conv2d(inner, inner, 3, padding=1), 9 * inner / 2)
        self.expand = _silent(width, inner)

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return x_BFHW + self.expand(F.relu(self.conv(F.relu(self.reduce(x_BFHW)))))


class Attention(nn.Module):
    """x + a(x) sigmoid(b(x)): [B, F, H, W] -> [B, F, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.content = nn.ModuleList(Block(width) for _ in range(3))
        self.gate = nn.ModuleList(Block(width) for _ in range(3))
        self.project = _silent(width, width)

    def forward(self, x_BFHW: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        content = gate = x_BFHW
        for a, b in zip(self.content, self.gate, strict=True):
            content, gate = F.relu(a(content)), F.relu(b(gate))
        return x_BFHW + content * torch.sigmoid(self.project(gate))


def _blocks(config: ElicConfig, stage: int) -> list[nn.Module]:
    return [Block(config.widths[stage]) for _ in range(config.blocks[stage])]


def _attention(config: ElicConfig, width: int) -> list[nn.Module]:
    return [Attention(width)] if config.attention else []


class Analysis(nn.Sequential):
    """Pixels [B, 3, H, W] -> [B, C, H / 16, W / 16]; H and W are multiples of 16."""

    def __init__(self, config: ElicConfig, channels: int) -> None:
        a, b, c = config.widths
        super().__init__(
            _conv(3, a), *_blocks(config, 0),
            _conv(a, b), *_blocks(config, 1), *_attention(config, b),
            _conv(b, c), *_blocks(config, 2),
            _conv(c, channels), *_attention(config, channels),
        )  # fmt: skip


class Synthesis(nn.Sequential):
    """[B, C, h, w] -> pixels [B, 3, 16 h, 16 w], which nothing bounds."""

    def __init__(self, config: ElicConfig, channels: int) -> None:
        a, b, c = config.widths
        super().__init__(
            *_attention(config, channels), _deconv(channels, c), *_blocks(config, 2),
            _deconv(c, b), *_attention(config, b), *_blocks(config, 1),
            _deconv(b, a), *_blocks(config, 0),
            _deconv(a, 3),
        )  # fmt: skip


def margin(transform: Analysis | Synthesis) -> int:
    """Latents beyond a region's edge that a pixel or latent inside of it can depend on, through `transform`."""
    reach, scale = 0.0, 1.0 if isinstance(transform, Analysis) else float(DOWNSAMPLING)  # in pixels
    for module in transform:
        if isinstance(module, nn.Conv2d):
            reach, scale = reach + 2 * scale, scale * 2
        elif isinstance(module, nn.ConvTranspose2d):
            reach, scale = reach + scale, scale / 2
        elif isinstance(module, Attention):
            reach += 3 * scale
        else:
            reach += scale
    return int(-(-reach // DOWNSAMPLING))
