"""Pictures of a MaskGIT: tokens drawn in a few parallel steps, decoded by its autoencoder."""

import math
from pathlib import Path
from typing import Any

import torch

from vlkern import data, models
from vlkern.errors import UserError
from vlkern.generation.maskgit import Sampler, sample
from vlkern.models.fsq_autoencoder import FsqAutoencoder
from vlkern.models.maskgit import MaskGit
from vlkern.painting.base import Measures, Options, Pictures
from vlkern.painting.reconstruction import decibels, side_by_side
from vlkern.painting.sheet import to_bytes
from vlkern.recipes.maskgit import training_mask
from vlkern.recipes.pictures import AUTOENCODER

#: Steps, temperature of the choice and guidance unless the options say otherwise.
STEPS, TEMPERATURE, GUIDANCE = 12, 4.5, 1.0
#: Pictures that are made together, and on the page.
_CHUNK, _SHOWN = 64, 32


def _autoencoder(model: MaskGit, folder: Path) -> FsqAutoencoder:
    found = models.load_pretrained(folder / AUTOENCODER, dtype=torch.float32)
    c = model.config
    if not isinstance(found, FsqAutoencoder) or (found.config.tokens, found.config.codes) != (c.tokens, c.codes):
        raise UserError(f"{folder / AUTOENCODER}: expected an FsqAutoencoder with {c.tokens} tokens of {c.codes} codes")
    return found.to(model.head_bias.device).eval()


def _paint(model: MaskGit, autoencoder: FsqAutoencoder, labels: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """A picture for each label, [n, 3, S, S] uint8."""
    grids = (sample(model, part, sampler).unflatten(1, autoencoder.config.grid) for part in labels.split(_CHUNK))
    return torch.cat([to_bytes(autoencoder.decode(ids)).cpu() for ids in grids])


def _sampler(device: torch.device, seed: int, **chosen: Any) -> Sampler:
    given = {"steps": STEPS, "temperature": TEMPERATURE, "guidance": GUIDANCE}
    given |= {name: value for name, value in chosen.items() if value is not None}
    return Sampler(**given, generator=torch.Generator(device).manual_seed(seed))  # type: ignore[arg-type]


def paint(model: MaskGit, folder: Path, options: Options) -> torch.Tensor:
    """Pictures of `label`, or of one class after the other.

    Raises:
        UserError: an option is given that the model has no use for, the class is unknown, or there is no autoencoder.
    """
    options.only("a MaskGIT", "label", "temperature", "guidance", "steps")
    c, device = model.config, model.head_bias.device
    classes = data.Classes.load(folder)
    labels = torch.arange(options.count, device=device) % c.classes
    if options.label is not None:
        labels = torch.full_like(labels, classes.number(options.label))
    seed = int(torch.randint(2**62, (), generator=options.generator))
    chosen = {"steps": options.steps, "temperature": options.temperature, "guidance": options.guidance}
    try:
        sampler = _sampler(device, seed, **chosen)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return _paint(model, _autoencoder(model, folder), labels, sampler)


def _numbers(classes: data.Classes, names: list[str | None]) -> torch.Tensor:
    """The number of each class; that of no class where it is unknown."""
    found = []
    for name in names:
        try:
            found.append(classes.vocabulary if name is None else classes.number(name))
        except UserError:
            found.append(classes.vocabulary)
    return torch.tensor(found)


def measure(model: MaskGit, folder: Path, pictures: Pictures) -> Measures:
    """Bits of a masked token with its class and without, the autoencoder's PSNR, samples with guidance and without."""
    c, device = model.config, model.head_bias.device
    autoencoder = _autoencoder(model, folder)
    pixels = data.to_unit(pictures.pixels)
    codes = torch.cat([autoencoder.encode(part.to(device)) for part in pixels.split(_CHUNK)])
    again = torch.cat([to_bytes(autoencoder.decode(part)).cpu() for part in codes.split(_CHUNK)])
    generator = torch.Generator().manual_seed(0)
    rate, order = torch.rand(len(codes), generator=generator), torch.rand(len(codes), c.tokens, generator=generator)
    masked = training_mask(rate, order).to(device)
    labels = _numbers(data.Classes.load(folder), list(pictures.classes)).to(device)

    def bits(labels: torch.Tensor) -> float:
        total = 0.0
        for ids, label, m in zip(*(x.split(_CHUNK) for x in (codes.flatten(1), labels, masked)), strict=True):
            total += float(model.loss(ids, label, m, label_smoothing=0.0)) * len(ids)
        return total / len(codes) / math.log(2)

    hidden = f"{float(masked.float().mean()):.0%} of the tokens masked"
    numbers = {
        f"bits a token ({hidden})": bits(labels),
        f"bits a token without its class ({hidden})": bits(torch.full_like(labels, c.classes)),
        "PSNR of the autoencoder, dB": decibels(pictures.pixels, again),
    }
    shown = torch.arange(_SHOWN, device=device) % c.classes
    sheets = {
        f"samples, class by class, {STEPS} steps, guidance {guidance:g}": _paint(
            model, autoencoder, shown, _sampler(device, 0, guidance=guidance)
        )
        for guidance in (GUIDANCE, 0.0)
    }
    sheets["pictures, and below each what the autoencoder makes of it"] = side_by_side(pictures.pixels, again)
    return Measures(numbers, sheets)
