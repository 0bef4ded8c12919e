"""GIVT's beta-VAE: MaskGIT's convolutions around a grid of Gaussian latents, the tokens of a model without vocabulary.

    pixels [B, 3, H, W] -> encoder -> mean, log-variance [B, L, d] each
    z = mean + exp(logvar / 2) eps  ->  decoder -> pixels
    loss = 1/2 |pixels - reconstruction|^2 + beta KL(N(mean, exp(logvar)) | N(0, 1)), sums over a picture

One token is one cell of the grid or, with a shuffle of (p, q), the p x q cells that lie together, channel by channel
(c, p, q): fewer and wider tokens of the same latents. `vlkern.models.vit_vae` has the form of transformers.

    B pictures   H, W sides in pixels   c latent channels of a cell   L tokens   d = c p q width of a token

Source: Tschannen et al., GIVT: Generative Infinite-Vocabulary Transformers, 2023.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vlkern.models.conv_autoencoder import ConvConfig, Decoder, Encoder, check_image_size, check_pixels

#: Where log-variances are cut.
LOGVAR = -30.0, 20.0


@dataclass(frozen=True)
class VaeConfig:
    """An autoencoder of square pictures.

    channels    c of a cell
    image_size  H and W
    shuffle     (p, q), rows and columns of cells that make a token
    unit_range  whether the network sees pixels in [0, 1], as the released ones do, or in [-1, 1]
    network     size of encoder and decoder
    """

    channels: int
    image_size: int
    shuffle: tuple[int, int] = (1, 1)
    unit_range: bool = True
    network: ConvConfig = field(default_factory=lambda: ConvConfig(skip="result"))

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels < 1:
            raise ValueError(f"channels must be a positive integer, got {self.channels!r}")
        shuffle = self.shuffle
        if not (isinstance(shuffle, tuple) and len(shuffle) == 2 and all(type(n) is int and n > 0 for n in shuffle)):
            raise ValueError(f"shuffle must be two positive integers, got {shuffle!r}")
        check_image_size(self.image_size, self.network.downsampling)
        side = self.image_size // self.network.downsampling
        if side % shuffle[0] or side % shuffle[1]:
            raise ValueError(f"shuffle must divide the grid of {side} x {side} cells, got {shuffle}")

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a cell."""
        return self.network.downsampling

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.image_size // self.downsampling
        return side // self.shuffle[0], side // self.shuffle[1]

    @property
    def tokens(self) -> int:
        """L."""
        return math.prod(self.grid)

    @property
    def dim(self) -> int:
        """d."""
        return self.channels * math.prod(self.shuffle)


#: The autoencoders of the paper, and two that train on two cores.
PRESETS = {
    "vae-tiny": VaeConfig(4, 32, network=ConvConfig(filters=16, multipliers=(1, 2, 4), blocks=1, groups=8)),
    "vae-tiny-64": VaeConfig(8, 64, network=ConvConfig(filters=16, multipliers=(1, 2, 4, 4), blocks=1, groups=8)),
    "givt-vae-256": VaeConfig(16, 256),
    "givt-vae-512": VaeConfig(16, 512),
    "givt-vae-512-shuffled": VaeConfig(16, 512, shuffle=(1, 2)),
}


def sample(mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """z = mean + exp(logvar / 2) eps with eps of N(0, 1) from `generator` (None: torch's), differentiable in both."""
    eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return with_noise(mean, logvar, eps)


def with_noise(mean: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """mean + exp(logvar / 2) eps."""
    return torch.addcmul(mean, (logvar / 2).exp(), eps)


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) | N(0, 1)) in nats, summed over all but the first dimension: [B, ...] -> [B]."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class Vae(nn.Module):
    """Pictures to latents and back.

    Example:
        >>> model = vlkern.models.create("vae-tiny")
        >>> mean, logvar = model.encode(torch.zeros(2, 3, 32, 32))
        >>> z = model.sample(mean, logvar)
        >>> z.shape, model.decode(z).shape
        (torch.Size([2, 64, 4]), torch.Size([2, 3, 32, 32]))
    """

    sample = staticmethod(sample)

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.network, 2 * config.channels)
        self.decoder = Decoder(config.network, config.channels)

    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] -> mean and log-variance, [B, L, d] each.

        Raises:
            TypeError: the pixels are no floating-point numbers.
            ValueError: their shape is another.
        """
        c = self.config
        check_pixels(pixels, c.image_size, c.image_size)
        mean, logvar = self.encoder((pixels + 1) / 2 if c.unit_range else pixels).chunk(2, dim=1)
        return self._tokens(mean), self._tokens(logvar.clamp(*LOGVAR))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, L, d] -> pixels [B, 3, H, W], cut to [-1, 1].

        Raises:
            ValueError: the latents have another shape.
        """
        return self.reconstruct(z).clamp(-1, 1)

    def reconstruct(self, z: torch.Tensor) -> torch.Tensor:
        """As `decode`, but nothing bounds the pixels: for training."""
        c = self.config
        if not isinstance(z, torch.Tensor) or z.dim() != 3 or tuple(z.shape[1:]) != (c.tokens, c.dim):
            got = list(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"z must have shape [B, {c.tokens}, {c.dim}], got {got}")
        pixels = self.decoder(self._cells(z))
        return pixels * 2 - 1 if c.unit_range else pixels

    def forward(self, pixels: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] and noise [B, L, d] -> (reconstruction, not cut; mean; log-variance)."""
        mean, logvar = self.encode(pixels)
        return self.reconstruct(with_noise(mean, logvar, eps)), mean, logvar

    def _tokens(self, x_Bchw: torch.Tensor) -> torch.Tensor:
        """[B, c, h p, w q] -> [B, h w, c p q]."""
        p, q = self.config.shuffle
        x = x_Bchw.unflatten(2, (-1, p)).unflatten(4, (-1, q))  # [B, c, h, p, w, q]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _cells(self, z_BLd: torch.Tensor) -> torch.Tensor:
        """[B, h w, c p q] -> [B, c, h p, w q]."""
        p, q = self.config.shuffle
        z = z_BLd.unflatten(1, self.config.grid).unflatten(3, (-1, p, q))  # [B, h, w, c, p, q]
        return z.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
