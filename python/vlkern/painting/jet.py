"""Pictures of a Jet: samples, and how many bits per sub-pixel pictures cost that it never saw."""

from pathlib import Path

import torch

from vlkern import flows
from vlkern.models.jet import Jet
from vlkern.painting.base import Measures, Options, Pictures

#: Pictures that go through the flow together.
_CHUNK = 64
_SHOWN = 16
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _samples(model: Jet, count: int, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    c, device = model.config, model.couplings[0].order.device
    z = temperature * torch.randn(count, c.tokens, c.token, generator=generator)
    parts = [model.pixels(model.inverse(part.to(device))) for part in z.split(_CHUNK)]
    return flows.quantise(torch.cat(parts)).cpu()


def paint(model: Jet, folder: Path, options: Options) -> torch.Tensor:
    """Samples; `temperature` (1) multiplies the noise that they are made of.

    Raises:
        UserError: another option is given.
    """
    options.only("a Jet", "temperature")
    temperature = 1.0 if options.temperature is None else options.temperature
    return _samples(model, options.count, temperature, options.generator)


def measure(model: Jet, folder: Path, pictures: Pictures) -> Measures:
    """Bits per sub-pixel, errors of the way forth and back in several dtypes, the cheapest and dearest pictures."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = model.tokens(flows.dequantise(pictures.pixels, generator))
    bits = torch.cat([model.bits(part.to(device)).cpu() for part in x.split(_CHUNK)])
    numbers = {}
    for dtype, errors in flows.round_trip(model, x[:_SHOWN].to(device), dtypes=_DTYPES).items():
        name = str(dtype).removeprefix("torch.")
        numbers[f"largest error forth and back, {name}"] = errors.largest
        numbers[f"mean error forth and back, {name}"] = errors.mean
    order = bits.argsort()
    sheets = {"samples": _samples(model, _SHOWN, 1.0, None)}
    for title, chosen in (("cheapest", order[:8]), ("dearest", order[-8:])):
        sheets[f"{title} pictures, {bits[chosen].mean():.2f} bits per sub-pixel"] = pictures.pixels[chosen]
    return Measures(numbers, sheets, float(bits.mean()))
