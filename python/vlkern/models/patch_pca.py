"""Patches of pictures in the basis of their principal components: a linear and nearly orthogonal stand-in for a flow.

    mean   = W (x - m),  divided by s where `whiten`       x a patch [p q C] row by row, column by column, channel by
    logvar = 2 log noise_std                               channel; m [p q C]; rows of W [K, p q C] orthonormal
    x      = W^T (z s) + m, cut to [-1, 1]                 s = sqrt(explained variance)

With `groups` f the K numbers of a patch become f tokens of K / f: all first parts, then all second ones, and so on.

    B pictures   n patches of a picture   K components   p, q sides of a patch

Source: Tschannen et al., JetFormer, 2024, which compares it with the learned flow.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from vlkern import _checks

#: What a component's variance is not taken to be below, when numbers are divided by its root: the eps of float32.
_LEAST = 1.1920929e-07


@dataclass(frozen=True)
class PatchPcaConfig:
    """patch: (p, q) pixels.  components: K.  whiten: divide by s.  groups: f.  noise_std: of the codes; 0 is no noise.

    Raises:
        ValueError: no such sizes.
    """

    patch: tuple[int, int]
    components: int
    whiten: bool = True
    groups: int = 1
    noise_std: float = 0.01

    def __post_init__(self) -> None:
        if not (isinstance(self.patch, tuple) and len(self.patch) == 2 and all(side > 0 for side in self.patch)):
            raise ValueError(f"patch must be two positive integers, got {self.patch!r}")
        if not 0 < self.components <= self.numbers:
            raise ValueError(f"components must be 1 to {self.numbers}, got {self.components}")
        if self.groups < 1 or self.components % self.groups:
            raise ValueError(f"groups must divide the {self.components} components, got {self.groups}")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"noise_std must be a finite number of at least 0, got {self.noise_std}")

    @property
    def numbers(self) -> int:
        """Of a patch, p q 3."""
        return 3 * self.patch[0] * self.patch[1]


class PatchPca(nn.Module):
    """The transform; it begins as the first K numbers of a patch, `fit` learns it from pictures.

    Example:
        >>> pca = PatchPca(PatchPcaConfig((4, 4), components=20)).fit(torch.rand(50, 3, 16, 16) * 2 - 1)
        >>> mean, logvar = pca.encode(torch.zeros(2, 3, 16, 16))
        >>> mean.shape, pca.decode(mean, 16, 16).shape
        (torch.Size([2, 16, 20]), torch.Size([2, 3, 16, 16]))
    """

    components: torch.Tensor
    explained_variance: torch.Tensor
    mean: torch.Tensor

    def __init__(self, config: PatchPcaConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("components", torch.eye(config.components, config.numbers))
        self.register_buffer("explained_variance", torch.ones(config.components))
        self.register_buffer("mean", torch.zeros(config.numbers))

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, n, p q 3]."""
        t, (p, q) = _checks.floating("pixels", pixels), self.config.patch
        if t.dim() != 4 or t.shape[1] != 3 or t.shape[2] % p or t.shape[3] % q or 0 in t.shape:
            raise ValueError(f"pixels must be [B, 3, H, W] of whole patches of {p} x {q}, got {list(t.shape)}")
        rows = t.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # [B, 3, h, p, w, q]
        return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def fit(self, pixels: torch.Tensor) -> "PatchPca":
        """Mean, directions and variances of the patches of [B, 3, H, W] in [-1, 1]; in float64 inside.

        Raises:
            TypeError, ValueError: no pictures of whole patches, or not more than one patch.
        """
        patches = self._patches(pixels).flatten(0, 1).double()
        if len(patches) < 2:
            raise ValueError(f"pixels must hold more than one patch, got {len(patches)}")
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh((patches - mean).T.cov())
        k = self.config.components
        self.mean.copy_(mean)
        self.components.copy_(directions.T.flip(0)[:k])
        self.explained_variance.copy_(variances.flip(0)[:k].clamp(min=0))
        return self

    def _scale(self) -> torch.Tensor:
        return self.explained_variance.clamp(min=_LEAST).sqrt()

    @property
    def logdet(self) -> torch.Tensor:
        """Of a patch, log |det dz/dx| [] of the directions that are kept: 0 without `whiten`."""
        return -self._scale().log().sum() if self.config.whiten else torch.zeros((), device=self.mean.device)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, H, W] in [-1, 1] -> mean and log variance of the codes, [B, n f, K / f] each.

        Raises:
            TypeError, ValueError: no pictures of whole patches.
        """
        c = self.config
        z = (self._patches(pixels) - self.mean) @ self.components.T
        if c.whiten:
            z = z / self._scale()
        z = z.unflatten(2, (c.groups, -1)).transpose(1, 2).flatten(1, 2)
        return z, torch.full_like(z, 2 * math.log(c.noise_std) if c.noise_std > 0 else 0.0)

    def decode(self, z: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Codes [B, n f, K / f] -> pictures [B, 3, height, width] in [-1, 1].

        Raises:
            ValueError: there are not as many codes.
        """
        c, (p, q) = self.config, self.config.patch
        h, w = height // p, width // q
        _checks.shape("z", z, (len(z), h * w * c.groups, c.components // c.groups))
        z = z.unflatten(1, (c.groups, -1)).transpose(1, 2).flatten(2)
        if c.whiten:
            z = z * self.explained_variance.sqrt()
        patches = z @ self.components + self.mean
        rows = patches.view(-1, h, w, p, q, 3).permute(0, 5, 1, 3, 2, 4)
        return rows.reshape(-1, 3, h * p, w * q).clamp(-1, 1)
