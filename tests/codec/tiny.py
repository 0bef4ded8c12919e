"""A codec with random weights that runs in milliseconds, and pictures for it."""

import functools

import torch

from vlkern import codec, models
from vlkern.codec.integer import Latents, convert


@functools.cache
def tiny(seed: int = 0) -> codec.Codec:
    """Every layer does something: an untrained M2T is nearly linear, and its probabilities nearly constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.create("m2t-tiny")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():  # symbols of several sizes
            model.log_gain += 2
            model.log_ungain -= 2
    return codec.Codec(model)


@functools.cache
def exact() -> codec.Codec:
    """The same one, with whole numbers."""
    model = tiny().model
    seen = []
    with torch.no_grad():
        for level in range(model.config.levels):
            tokens, known = model.tiles(model.analysis(picture(128, 128)[None] / 127.5 - 1, level).round())
            seen.append(Latents(tokens, known, level))
    return codec.Codec(model, convert(model, seen))


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[3, H, W] uint8: smooth colours and some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noisy = smooth * 200 + 25 + 10 * torch.randn(3, height, width, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)
