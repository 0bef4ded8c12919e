"""The tokenizer of the FSQ paper: MaskGIT's convolutions around finite scalar quantization in place of a codebook.

    pixels [B, 3, H, W] -> (x + 1) / 2 -> encoder -> [B, h, w, D] -> linear -> z [B, h, w, d]
    z -> codes, indices = fsq_quantize(z, levels)       index = one of prod(levels) integers for each of h w tokens
    codes -> linear -> [B, D, h, w] -> decoder -> 2 x - 1 -> pixels

There is no codebook to learn, and no loss but that of the reconstruction: the gradient passes the rounding as if it
were not there.

    B pictures   H, W sides in pixels   h, w sides of the grid   D width of a token   d channels that are quantized

Sources: Mentzer et al., Finite Scalar Quantization, 2023; Chang et al., MaskGIT, 2022.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vlkern import ops
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.models.conv_autoencoder import ConvConfig, Decoder, Encoder, check_image_size, check_pixels


@dataclass(frozen=True)
class FsqConfig:
    """An autoencoder of square pictures.

    levels      of the d channels of a token; a token is one of prod(levels) codes
    image_size  H and W
    width       D, channels between the convolutions and the quantization
    network     size of encoder and decoder
    """

    levels: tuple[int, ...]
    image_size: int
    width: int = 256
    network: ConvConfig = field(default_factory=ConvConfig)

    def __post_init__(self) -> None:
        levels = self.levels
        if not (isinstance(levels, tuple) and levels and all(type(level) is int and level > 1 for level in levels)):
            raise ValueError(f"levels must be integers above 1, one for each channel, got {levels!r}")
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"width must be a positive integer, got {self.width!r}")
        check_image_size(self.image_size, self.network.downsampling)

    @property
    def codes(self) -> int:
        """How many there are: prod(levels)."""
        return math.prod(self.levels)

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a token."""
        return self.network.downsampling

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        side = self.image_size // self.downsampling
        return side, side

    @property
    def tokens(self) -> int:
        """Of a picture: h w."""
        return math.prod(self.grid)


#: The tokenizers of the paper (section 5.2; the other numbers of codes are those of its table 1), and two that train
#: on two cores.
PRESETS = {
    "fsq-tiny": FsqConfig((8, 6, 5), 32, 64, ConvConfig(filters=16, multipliers=(1, 2, 4), blocks=1, groups=8)),
    "fsq-tiny-64": FsqConfig((8, 5, 5, 5), 64, 64, ConvConfig(16, multipliers=(1, 2, 4, 4), blocks=1, groups=8)),
    "fsq-maskgit-128": FsqConfig((8, 5, 5, 5), 128),
    "fsq-maskgit-256": FsqConfig((8, 5, 5, 5), 256),
}


class FsqAutoencoder(nn.Module):
    """Pictures to tokens and back.

    Example:
        >>> model = vlkern.models.create("fsq-tiny")
        >>> indices = model.encode(torch.zeros(2, 3, 32, 32))
        >>> indices.shape, model.decode(indices).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.network, config.width)
        self.project_in = dense_(Linear(config.width, len(config.levels)), lecun=True)
        self.project_out = dense_(Linear(len(config.levels), config.width), lecun=True)
        self.decoder = Decoder(config.network, config.width)

    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def quantize(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] -> codes [B, h, w, d], which have a gradient, and indices [B, h, w] int64."""
        check_pixels(pixels, self.config.image_size, self.config.image_size)
        x_BhwD = self.encoder((pixels + 1) / 2).permute(0, 2, 3, 1)
        codes, indices = ops.fsq_quantize(self.project_in(x_BhwD), self.config.levels)
        return codes, indices

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, h, w, d] -> pixels [B, 3, H, W], which nothing bounds: for training."""
        return self.decoder(self.project_out(codes).permute(0, 3, 1, 2)) * 2 - 1

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> indices [B, h, w] int64 in [0, codes).

        Raises:
            TypeError: the pixels are no floating-point numbers.
            ValueError: their shape is another.
        """
        return self.quantize(pixels)[1]

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices [B, h, w] in [0, codes) -> pixels [B, 3, H, W], cut to [-1, 1].

        Raises:
            TypeError: the indices are no integers.
            ValueError: their shape is another.
        """
        if not isinstance(indices, torch.Tensor) or indices.dtype not in (torch.int32, torch.int64):
            got = indices.dtype if isinstance(indices, torch.Tensor) else type(indices).__name__
            raise TypeError(f"indices must be a tensor of int32 or int64, got {got}")
        if indices.dim() != 3 or tuple(indices.shape[1:]) != self.config.grid:
            h, w = self.config.grid
            raise ValueError(f"indices must have shape [B, {h}, {w}], got {list(indices.shape)}")
        dtype = self.project_out.weight.dtype
        codes = ops.fsq_dequantize(indices.to(torch.int64), self.config.levels, dtype=dtype)
        return self.reconstruct(codes).clamp(-1, 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] -> (reconstruction of the same shape, not cut; indices [B, h, w] int64)."""
        codes, indices = self.quantize(pixels)
        return self.reconstruct(codes), indices
