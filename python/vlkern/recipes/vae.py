"""The beta-VAE as the training loop sees it: reconstructions of noisy latents, and what the latents tell."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.models.vae import Vae, kl_divergence
from vlkern.models.vit_vae import Labels
from vlkern.recipes.autoencoders import AutoencoderTask, psnr
from vlkern.recipes.pictures import Chance


def picture_loss(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """1/2 |pixels - reconstruction|^2 of each picture, summed over its numbers: [B, ...] -> [B]."""
    return 0.5 * (reconstruction.float() - pixels).square().flatten(1).sum(1)


def label_loss(maps: torch.Tensor, logits: Mapping[str, torch.Tensor], labels: Sequence[Labels]) -> torch.Tensor:
    """The cross entropy of label maps in nats, the mean over a map's labels above 0, summed over the maps.

    Args:
        maps: [B, channels, H, W] integers.
        logits: {name: [B, classes, H, W]}, as `VitVae.decode` gives them.
        labels: `VitVaeConfig.labels`.

    Returns:
        [B] float32. A label that is no class has part neither in the sum nor in the count.
    """
    loss = torch.zeros(len(maps), device=maps.device)
    for one in labels:
        target = maps[:, one.channel].long()
        target = target.where((target > 0) & (target < one.classes), -1)
        sums = F.cross_entropy(logits[one.name].float(), target, ignore_index=-1, reduction="none").flatten(1).sum(1)
        loss = loss + sums / (target > 0).flatten(1).sum(1).clamp(min=1)
    return loss


class Objective(nn.Module):
    """(picture_loss + beta KL) / number of sub-pixels, the mean over pictures.

    Args:
        model: the autoencoder.
        beta: weight of the KL divergence of a picture against half the squared error of all its sub-pixels in [-1, 1].

    latest: [2] of the last batch: mean squared error of a sub-pixel, and KL divergence of a picture in nats.

    Example:
        >>> loss = Objective(vlkern.models.create("vae-tiny"), 0.01)(torch.zeros(4, 3, 32, 32), torch.randn(4, 64, 4))
    """

    def __init__(self, model: Vae, beta: float) -> None:
        super().__init__()
        self.model, self._beta = model, beta
        self.latest = torch.zeros(2)

    def forward(self, pixels: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Pixels [b, 3, H, W] in [-1, 1] and noise [b, L, d] of N(0, 1) -> loss []."""
        reconstruction, mean, logvar = self.model(pixels, eps)
        error = picture_loss(pixels, reconstruction).mean() / pixels[0].numel()
        kl = kl_divergence(mean.float(), logvar.float()).mean()
        self.latest = torch.stack([2 * error, kl]).detach()
        return error + self._beta / pixels[0].numel() * kl


class VaeTask(AutoencoderTask):
    """What the loop trains: see vlkern.train.task.Task."""

    family = Vae

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Pictures, and the noise of their latents."""
        c = self.model.config
        return pixels, chance.normal(c.tokens, c.dim)

    def numbers(self) -> dict[str, float]:
        """Of the last batch: PSNR in decibels, and the KL divergence of a picture in nats."""
        error, kl = self.latest()
        return {"psnr": psnr(error), "kl": kl}
