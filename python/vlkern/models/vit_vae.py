"""The beta-VAE of transformers, which GIVT trains for the dense tasks of UViM: label maps (or pictures) to latents.

    planes [B, C, H, W] -> P x P patches, linear + positions -> transformer -> N tokens to L, linear -> mean, logvar
    z [B, L, d] -> linear, L tokens to N + positions -> transformer -> linear -> patches of every output

A plane is a colour, or one class of a label map as zeros and ones. `N to L` is a learned matrix [N, L], or an
antialiased linear resize of the grid to a square of side sqrt(L); the way back likewise.

    B examples   H, W sides in pixels   P patch side   N patches, rows first   D width   L tokens   d width of a token

Sources: Tschannen et al., GIVT: Generative Infinite-Vocabulary Transformers, 2023; Kolesnikov et al., UViM, 2022.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.models import siglip
from vlkern.models.conv_autoencoder import check_pixels
from vlkern.models.vae import LOGVAR, sample, with_noise


@dataclass(frozen=True)
class Labels:
    """One map of labels: its `name`, the `channel` of the input that holds it, and how many `classes` it has."""

    name: str
    channel: int
    classes: int


@dataclass(frozen=True)
class VitVaeConfig:
    """Encoder and decoder of one width.

    image_size  (H, W)
    patch       P
    width       D
    heads       of both transformers
    mlp         hidden units of a block
    depths      blocks of the encoder and of the decoder
    tokens      L
    dim         d
    resize      whether the grid is resized rather than multiplied by a learned matrix
    labels      what is encoded; none: a picture with three colours in [-1, 1]
    """

    image_size: tuple[int, int]
    patch: int
    width: int
    heads: int
    mlp: int
    depths: tuple[int, int]
    tokens: int
    dim: int
    resize: bool = False
    labels: tuple[Labels, ...] = ()

    def __post_init__(self) -> None:
        for depth in self.depths:
            siglip.TowerConfig(self.width, depth, self.heads, self.mlp)
        for name in ("patch", "tokens", "dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if any(side < 1 or side % self.patch for side in self.image_size):
            raise ValueError(f"image_size must be multiples of the patch {self.patch}, got {self.image_size}")
        if self.resize and self.side**2 != self.tokens:
            raise ValueError(f"tokens must be a square number to be a grid, got {self.tokens}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def side(self) -> int:
        """Of the square of latents, if `resize`."""
        return math.isqrt(self.tokens)

    @property
    def planes(self) -> int:
        """C: colours, or classes of all labels."""
        return sum(labels.classes for labels in self.labels) if self.labels else 3


_UVIM: dict[str, Any] = {
    "image_size": (512, 512), "patch": 16, "width": 768, "heads": 12, "mlp": 3072, "depths": (6, 12), "tokens": 256,
    "resize": True,
}  # fmt: skip
#: The autoencoders of the paper's dense tasks.
PRESETS = {
    "givt-vae-panoptic": VitVaeConfig(
        **_UVIM, dim=32, labels=(Labels("semantics", 0, 133 + 1), Labels("instances", 1, 100))
    ),
    "givt-vae-depth": VitVaeConfig(**_UVIM, dim=16, labels=(Labels("depth", 0, 256),)),
}


class _Mix(nn.Module):
    """[B, n, D] -> [B, m, D]: other tokens, each a sum of all, the same for every channel."""

    def __init__(self, c: VitVaeConfig, *, back: bool) -> None:
        super().__init__()
        patches = math.prod(c.grid)
        n, m = (c.tokens, patches) if back else (patches, c.tokens)
        self._from, self._to = ((c.side, c.side), c.grid) if back else (c.grid, (c.side, c.side))
        self.weight = None if c.resize else nn.Parameter(torch.empty(n, m))
        if self.weight is not None:
            nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BnD: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            return (x_BnD.transpose(1, 2) @ self.weight).transpose(1, 2)
        x = x_BnD.transpose(1, 2).unflatten(2, self._from)
        x = F.interpolate(x, self._to, mode="bilinear", align_corners=False, antialias=True)
        return x.flatten(2).transpose(1, 2)


class _Transformer(nn.Module):
    """Learned positions, blocks and the final LN: [B, N, D] -> [B, N, D]."""

    def __init__(self, c: VitVaeConfig, depth: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(math.prod(c.grid), c.width))
        self.encoder = siglip.Encoder(siglip.TowerConfig(c.width, depth, c.heads, c.mlp))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        nn.init.normal_(self.positions, std=1 / math.sqrt(c.width))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return self.norm(self.encoder(x_BND + self.positions))


class VitVae(nn.Module):
    """Label maps, or pictures, to latents and back.

    Example:
        >>> config = VitVaeConfig((32, 32), 8, 64, 2, 128, (1, 1), tokens=4, dim=3, labels=(Labels("depth", 0, 10),))
        >>> model = VitVae(config)
        >>> mean, logvar = model.encode(torch.randint(10, (2, 1, 32, 32)))
        >>> mean.shape, model.decode(model.sample(mean, logvar))["depth"].shape
        (torch.Size([2, 4, 3]), torch.Size([2, 10, 32, 32]))
    """

    sample = staticmethod(sample)

    def __init__(self, config: VitVaeConfig) -> None:
        super().__init__()
        self.config = config
        numbers = config.planes * config.patch**2
        self.patch_embedding = dense_(Linear(numbers, config.width), lecun=True)
        self.encoder = _Transformer(config, config.depths[0])
        self.to_tokens = _Mix(config, back=False)
        self.encoder_head = dense_(Linear(config.width, 2 * config.dim), lecun=True)
        self.decoder_stem = dense_(Linear(config.dim, config.width), lecun=True)
        self.to_patches = _Mix(config, back=True)
        self.decoder = _Transformer(config, config.depths[1])
        self.decoder_head = dense_(Linear(config.width, numbers), lecun=True)

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of both transformers."""
        return [*self.encoder.encoder.layers, *self.decoder.encoder.layers]

    def encode(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs -> mean and log-variance, [B, L, d] each.

        Args:
            inputs: [B, channels, H, W] integers, label maps; a label that is no class of its map (-1) is left out. Or,
                in a model without labels, pixels [B, 3, H, W] in [-1, 1].

        Raises:
            TypeError: the labels are no integers, or the pixels no floating-point numbers.
            ValueError: the shape is another.
        """
        planes = self._one_hot(inputs) if self.config.labels else self._pixels(inputs)
        p = self.config.patch
        x = planes.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, C, h, P, w, P]
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, N, P P C]
        tokens = self.to_tokens(self.encoder(self.patch_embedding(x)))
        mean, logvar = self.encoder_head(tokens).chunk(2, dim=2)
        return mean, logvar.clamp(*LOGVAR)

    def decode(self, z: torch.Tensor) -> Any:
        """Latents [B, L, d] -> logits {name: [B, classes, H, W]}; without labels pixels [B, 3, H, W] cut to [-1, 1].

        Raises:
            ValueError: the latents have another shape.
        """
        c = self.config
        if not isinstance(z, torch.Tensor) or z.dim() != 3 or tuple(z.shape[1:]) != (c.tokens, c.dim):
            got = list(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"z must have shape [B, {c.tokens}, {c.dim}], got {got}")
        x = self.decoder_head(self.decoder(self.to_patches(self.decoder_stem(z))))
        x = x.unflatten(2, (c.patch, c.patch, c.planes)).unflatten(1, c.grid)  # [B, h, w, P, P, C]
        planes = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        if not c.labels:
            return planes.clamp(-1, 1)
        parts = planes.split([labels.classes for labels in c.labels], dim=1)
        return {labels.name: part for labels, part in zip(c.labels, parts, strict=True)}

    def forward(self, inputs: torch.Tensor, eps: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Inputs as for `encode` and noise [B, L, d] -> (what `decode` gives of the latents; mean; log-variance)."""
        mean, logvar = self.encode(inputs)
        return self.decode(with_noise(mean, logvar, eps)), mean, logvar

    def _pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        check_pixels(pixels, *self.config.image_size)
        return pixels

    def _one_hot(self, maps: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] -> [B, C, H, W]."""
        c = self.config
        if not isinstance(maps, torch.Tensor) or maps.dtype not in (torch.uint8, torch.int32, torch.int64):
            got = maps.dtype if isinstance(maps, torch.Tensor) else type(maps).__name__
            raise TypeError(f"inputs must be a tensor of uint8, int32 or int64, got {got}")
        channels = 1 + max(labels.channel for labels in c.labels)
        if maps.dim() != 4 or maps.shape[1] < channels or tuple(maps.shape[2:]) != c.image_size:
            h, w = c.image_size
            raise ValueError(f"inputs must have shape [B, {channels}, {h}, {w}], got {list(maps.shape)}")
        planes = [
            maps[:, labels.channel, None] == torch.arange(labels.classes, device=maps.device)[:, None, None]
            for labels in c.labels
        ]
        return torch.cat(planes, dim=1).to(self.patch_embedding.weight.dtype)
