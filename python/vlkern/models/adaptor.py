"""The adaptor between a VAE and GIVT: an invertible network that keeps volumes, so that it needs no log-determinant.

    z [h w, d] on a grid of tokens, its channels cut in halves (a, b)
    block       (a, b) -> (b, a + F(b))             inverse: (b, c) -> (c - F(b), b)
    F           [GN ReLU] conv GN ReLU conv GN ReLU conv         the first two only behind the first block

Whatever F is, the map is one to one and its Jacobian has determinant +-1: the likelihood of what comes out is that of
what went in. It is trained together with GIVT and learns latents that GIVT finds easier to predict. Convolutions are
3 x 3 without bias; every group norm has min(32, d / 2) groups.

    B examples   L = h w tokens   d channels

Sources: Jacobsen et al., i-RevNet, 2018; Tschannen et al., GIVT, 2023 (the models named +A).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks
from vlkern.layers.init import lecun_normal_


@dataclass(frozen=True)
class AdaptorConfig:
    """Sizes.

    channels    d of a token; even
    grid        rows and columns of tokens, h and w
    blocks      how many
    bottleneck  twice the channels inside F; None: d, as many inside as outside

    Raises:
        ValueError: no adaptor can have these sizes.
    """

    channels: int
    grid: tuple[int, int]
    blocks: int = 8
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "blocks", *(() if self.bottleneck is None else ("bottleneck",))):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if len(self.grid) != 2 or not all(type(side) is int and side > 0 for side in self.grid):
            raise ValueError(f"grid must be two positive integers (h, w), got {self.grid!r}")
        for name, value in (("channels", self.channels), ("bottleneck", self.bottleneck or self.channels)):
            if value % 2 or value // 2 % self.groups:
                raise ValueError(f"{name} must be even, and half of it a multiple of {self.groups} groups, got {value}")

    @property
    def groups(self) -> int:
        """Of each group norm."""
        return max(1, min(32, self.channels // 2))


class _Norm(nn.GroupNorm):
    """Group norm and ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return F.relu(super().forward(x))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    lecun_normal_(layer.weight, fan_in=9 * inputs)
    return layer


class Branch(nn.Module):
    """F of a block, on half of the channels."""

    def __init__(self, c: AdaptorConfig, *, first: bool) -> None:
        super().__init__()
        half, inside = c.channels // 2, (c.bottleneck or c.channels) // 2
        self.norm0 = None if first else _Norm(c.groups, half, eps=1e-6)
        self.conv0 = _convolution(half, inside)
        self.norm1, self.conv1 = _Norm(c.groups, inside, eps=1e-6), _convolution(inside, inside)
        self.norm2, self.conv2 = _Norm(c.groups, inside, eps=1e-6), _convolution(inside, half)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """[B, d / 2, h, w] -> [B, d / 2, h, w]."""
        x = x_BChw if self.norm0 is None else self.norm0(x_BChw)
        return self.conv2(self.norm2(self.conv1(self.norm1(self.conv0(x)))))


class Adaptor(nn.Module):
    """Latents of a VAE to tokens of GIVT, and back.

    Args:
        config: sizes.

    Example:
        >>> adaptor = vlkern.models.adaptor.Adaptor(AdaptorConfig(channels=16, grid=(8, 8), blocks=2, bottleneck=64))
        >>> z = torch.randn(1, 64, 16)
        >>> torch.allclose(adaptor.inverse(adaptor(z)), z, atol=1e-5)
        True
    """

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Branch(config, first=i == 0) for i in range(config.blocks))

    def _halves(self, name: str, x_BLd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, w = self.config.grid
        _checks.floating(name, x_BLd)
        _checks.shape(name, x_BLd, (x_BLd.shape[0] if x_BLd.dim() else 0, h * w, self.config.channels))
        a, b = x_BLd.transpose(1, 2).unflatten(2, (h, w)).chunk(2, 1)
        return a, b

    def forward(self, z_BLd: torch.Tensor) -> torch.Tensor:
        """Latents [B, L, d], row by row of the grid -> tokens [B, L, d].

        Raises:
            TypeError: no floating-point tensor.
            ValueError: of another shape.
        """
        a, b = self._halves("z_BLd", z_BLd)
        for branch in self.blocks:
            a, b = b, a + branch(b)
        return torch.cat([a, b], 1).flatten(2).transpose(1, 2)

    def inverse(self, tokens_BLd: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, d] -> the latents [B, L, d] from which `forward` makes them, to rounding.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        a, b = self._halves("tokens_BLd", tokens_BLd)
        for branch in reversed(self.blocks):
            a, b = b - branch(a), a
        return torch.cat([a, b], 1).flatten(2).transpose(1, 2)
