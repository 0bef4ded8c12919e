"""What a beta-VAE paints and how it is measured: reconstructions, and what its latents tell."""

from pathlib import Path

import torch

from vlkern.data import to_unit
from vlkern.models.vae import Vae, kl_divergence
from vlkern.painting.base import Measures, Options, Pictures
from vlkern.painting.reconstruction import decibels, reconstructions, side_by_side
from vlkern.painting.sheet import to_bytes


def paint(model: Vae, folder: Path, options: Options) -> torch.Tensor:
    """[count, 3, S, S] uint8: the picture of the options again and again, or latents of N(0, 1), decoded.

    Raises:
        UserError: the options ask for what an autoencoder has no use for.
    """
    options.only("a VAE", "image")
    c, device = model.config, model.decoder.head.weight.device
    eps = torch.randn(options.count, c.tokens, c.dim, generator=options.generator).to(device)
    if options.image is not None:
        mean, logvar = model.encode(to_unit(options.image[None].to(device)))
        eps = mean + (logvar / 2).exp() * eps
    return to_bytes(model.decode(eps)).cpu()


def measure(model: Vae, folder: Path, pictures: Pictures) -> Measures:
    """PSNR of what the mean latents give, and the KL divergence of the latents from N(0, 1)."""
    device = model.decoder.head.weight.device
    found: list[torch.Tensor] = []

    def again(pixels: torch.Tensor) -> torch.Tensor:
        mean, logvar = model.encode(pixels.to(device))
        found.append(kl_divergence(mean, logvar).cpu())
        return model.decode(mean)

    pixels = reconstructions(pictures.pixels, again)
    return Measures(
        numbers={
            "PSNR, dB": decibels(pictures.pixels, pixels),
            "KL divergence of a picture, nats": float(torch.cat(found).mean()),
        },
        sheets={"originals, and below each its reconstruction": side_by_side(pictures.pixels, pixels)},
    )
