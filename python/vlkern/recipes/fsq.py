"""The autoencoder with finite scalar quantization, as the training loop sees it: what comes back should be the same."""

import torch
from torch import nn

from vlkern.models.fsq_autoencoder import FsqAutoencoder
from vlkern.recipes.autoencoders import AutoencoderTask, psnr


class Objective(nn.Module):
    """The mean squared error of reconstructions, and nothing else: quantization needs no loss of its own.

    latest: [1 + codes] of the last batch: its loss, and how often each code was used.

    Example:
        >>> loss = Objective(vlkern.models.create("fsq-tiny"))(torch.zeros(4, 3, 32, 32))
    """

    def __init__(self, model: FsqAutoencoder) -> None:
        super().__init__()
        self.model = model
        self.latest = torch.zeros(1 + model.config.codes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[b, 3, H, W] in [-1, 1] -> loss []."""
        reconstruction, indices = self.model(pixels)
        loss = (reconstruction.float() - pixels).square().mean()
        uses = indices.flatten().bincount(minlength=self.model.config.codes)
        self.latest = torch.cat([loss.detach()[None], uses.to(loss.dtype)])
        return loss


class FsqTask(AutoencoderTask):
    """What the loop trains: see vlkern.train.task.Task."""

    family = FsqAutoencoder

    def numbers(self) -> dict[str, float]:
        """PSNR of the last batch in decibels, and the part of all codes that it used."""
        loss, *uses = self.latest()
        return {"psnr": psnr(loss), "codes_used": sum(use > 0 for use in uses) / len(uses)}
