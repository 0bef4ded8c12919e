"""The codec M2T as the training loop sees it: bits of noisy latents against squared error, at all rates at once."""

import torch
from torch import nn

from vlkern.models.m2t import M2T


class Objective(nn.Module):
    """The mean over pictures of (bits per pixel + lambda 255^2 MSE) / sqrt(lambda).

    MSE is that of sub-pixels in [0, 1]. Each picture has a level of quality of its own, which gives lambda; without
    the last factor the highest qualities, where both terms are larger, would outweigh the others.

    Args:
        model: the codec.

    latest: [2] of the last batch: bits per pixel, and mean squared error of a sub-pixel in [-1, 1].

    Example:
        >>> objective = Objective(vlkern.models.create("m2t-tiny"))
        >>> loss = objective(torch.zeros(2, 3, 64, 64), torch.tensor([0, 3]), torch.rand(2, 16, 4, 4) - 0.5)
    """

    weights: torch.Tensor

    def __init__(self, model: M2T) -> None:
        super().__init__()
        self.model = model
        levels = range(model.config.levels)
        weights = torch.tensor([model.config.distortion_weight(level) for level in levels])
        self.register_buffer("weights", weights, persistent=False)
        self.latest = torch.zeros(2)

    def forward(
        self, pixels: torch.Tensor, level: torch.Tensor, noise: torch.Tensor, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `M2T.forward` takes -> loss []."""
        reconstruction, bits = self.model(pixels, level, noise, known)
        error = (reconstruction - pixels).square().flatten(1).mean(1)
        if known is not None:  # MT: the bits of what is masked stand for those of all tokens
            known = known.reshape(len(pixels), -1)
            bits = bits.reshape(len(pixels), -1) * (known.shape[1] / (~known).sum(1).clamp(min=1)).unsqueeze(1)
        rate = bits.reshape(len(pixels), -1).sum(1) * (3 / pixels[0].numel())
        self.latest = torch.stack([rate.mean(), error.mean()]).detach()
        weight = self.weights[level]
        return ((rate + weight * (255**2 / 4) * error) / weight.sqrt()).mean()


@torch.no_grad()
def start_from_principal_components(model: M2T, pixels: torch.Tensor) -> None:
    """Set the strided convolutions to an orthonormal transform: block by block of 2 x 2, what varies most is kept.

    Stage by stage the principal components of 2 x 2 neighbours (all their channels) become the kernels of a
    convolution, and transposed those of the synthesis. The other taps and channels keep a small part of what they
    started with. An untrained codec begins so as a block transform, rather than as noise.

    Args:
        model: with fresh parameters.
        pixels: [B, 3, H, W] in [-1, 1], a few dozen pictures.
    """
    strided = [m for m in model.encoder if isinstance(m, nn.Conv2d)]
    transposed = [m for m in model.decoder if isinstance(m, nn.ConvTranspose2d)]
    x = pixels
    for down, up in zip(strided, reversed(transposed), strict=True):
        used = x.shape[1]
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * used)
        _, vectors = torch.linalg.eigh(patches.double().T @ patches.double())  # not centred: 0 is a grey
        count = min(4 * used, down.out_channels)
        basis = vectors.flip(1).T[:count].float().reshape(count, used, 2, 2)
        for conv in (down, up):
            conv.weight.mul_(0.1)
        down.weight[:count] = 0
        down.weight[:count, :used, 2:4, 2:4] = basis
        up.weight[:, :used] = 0
        up.weight[:count, :used, 2:4, 2:4] = basis
        x = (patches @ basis.flatten(1).T).unflatten(0, (len(x), x.shape[2] // 2, -1)).permute(0, 3, 1, 2)
