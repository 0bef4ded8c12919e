"""What an FSQ autoencoder paints and how it is measured: reconstructions, and how many of its codes it uses."""

from pathlib import Path

import torch

from vlkern.data import to_unit
from vlkern.models.fsq_autoencoder import FsqAutoencoder
from vlkern.painting.base import Measures, Options, Pictures
from vlkern.painting.reconstruction import decibels, reconstructions, side_by_side
from vlkern.painting.sheet import to_bytes


def paint(model: FsqAutoencoder, folder: Path, options: Options) -> torch.Tensor:
    """The picture of the options again, [1, 3, S, S] uint8; without one, codes drawn at random [count, 3, S, S].

    Raises:
        UserError: the options ask for what an autoencoder has no use for.
    """
    options.only("an FSQ autoencoder", "image")
    c, device = model.config, model.project_out.weight.device
    if options.image is not None:
        indices = model.encode(to_unit(options.image[None].to(device)))
    else:
        indices = torch.randint(c.codes, (options.count, *c.grid), generator=options.generator).to(device)
    return to_bytes(model.decode(indices)).cpu()


def measure(model: FsqAutoencoder, folder: Path, pictures: Pictures) -> Measures:
    """PSNR, and the part of all codes that the tokens of these pictures use at least once."""
    c, device = model.config, model.project_out.weight.device
    uses = torch.zeros(c.codes)

    def again(pixels: torch.Tensor) -> torch.Tensor:
        indices = model.encode(pixels.to(device))
        uses.add_(indices.flatten().bincount(minlength=c.codes).cpu())
        return model.decode(indices)

    pixels = reconstructions(pictures.pixels, again)
    part = uses / uses.sum()
    perplexity = float(torch.special.entr(part).sum().exp())
    return Measures(
        numbers={
            "PSNR, dB": decibels(pictures.pixels, pixels),
            f"codes used at least once, % of {c.codes}": 100 * float((uses > 0).float().mean()),
            "perplexity of the codes": perplexity,
        },
        sheets={"originals, and below each its reconstruction": side_by_side(pictures.pixels, pixels)},
    )
