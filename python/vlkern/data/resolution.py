"""At which size a picture is seen: resolutions drawn at random, and grids of patches that keep the aspect ratio.

A picture of resolution R has about the area of a square of R x R pixels, whatever its shape.

Source: Dehghani et al., Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution, 2023.
"""

import math
from dataclasses import dataclass

import torch

WAYS = ("side", "area")


def between(probability: torch.Tensor, low: float, high: float, mean: float, std: float) -> torch.Tensor:
    """A normal distribution cut to [low, high]: the number below which lies this part of it, by the inverse of its CDF.

    Args:
        probability: any shape, float64 in [0, 1); uniform numbers give draws.
        low: where it is cut.
        high: likewise.
        mean: of the distribution before it is cut.
        std: likewise.

    Returns:
        The same shape, float64, in [low, high].
    """
    edges = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64) - mean) / std)
    return (mean + std * torch.special.ndtri(torch.lerp(edges[0], edges[1], probability))).clamp(low, high)


@dataclass(frozen=True)
class Resolutions:
    """A distribution of resolutions: u in [-1, 1], mapped linearly to [low, high], or to [low^2, high^2] for the area.

    low, high  pixels; the smallest and the largest resolution
    mean       of the normal distribution N(mean, 1) cut to [-1, 1] from which u is drawn; None draws it uniformly
    of         "side" or "area": what is linear in u

    The paper compares uniform, N(0, 1), N(-0.5, 1) and N(0.5, 1), of sides and areas: N(-0.5, 1) of the side is best,
    and the default. Its long runs draw the side uniformly from [64, 256].

    Raises:
        ValueError: not 0 < low <= high, a mean that is no finite number, or another way.

    Example:
        >>> import torch
        >>> Resolutions(64, 256).draw(3, torch.Generator().manual_seed(0))
        tensor([243.4153, 176.9569, 135.2032], dtype=torch.float64)
    """

    low: float
    high: float
    mean: float | None = -0.5
    of: str = "side"

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high < math.inf):
            raise ValueError(f"resolutions must be 0 < low <= high, got low {self.low} and high {self.high}")
        if self.mean is not None and not math.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number or None, got {self.mean}")
        if self.of not in WAYS:
            raise ValueError(f"of must be one of {', '.join(WAYS)}, got {self.of!r}")

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count] float64, in pixels, from a generator of the CPU."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        u = 2 * uniform - 1 if self.mean is None else between(uniform, -1.0, 1.0, self.mean, 1.0)
        power = 1 if self.of == "side" else 2
        low, high = self.low**power, self.high**power
        return (low + (u + 1) / 2 * (high - low)) ** (1 / power)


def grid(height: int, width: int, resolution: float, patch: int, *, longest: int | None = None) -> tuple[int, int]:
    """Rows and columns of patches of a picture at this resolution: about its aspect ratio, never more than its area.

    With N = (resolution / patch)^2 the short side gets the rounded number of patches, the long side the rounded number
    or as many as keep rows * columns <= max(N, 1). So a sequence of N tokens holds any picture, and a side changes by
    half a patch or what that limit takes. A square stays one.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        resolution: R, in pixels.
        patch: side of a patch, in pixels.
        longest: patches of the longer side, at most; None does not limit it.

    Raises:
        ValueError: a size, the resolution, the patch or `longest` is not positive.

    Example:
        >>> grid(480, 640, resolution=224, patch=16)
        (12, 16)
    """
    for name, value in (("height", height), ("width", width), ("resolution", resolution), ("patch", patch)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if longest is not None and longest < 1:
        raise ValueError(f"longest must be at least 1 patch, got {longest}")
    area = max((resolution / patch) ** 2, 1.0)
    aspect = min(height, width) / max(height, width)
    short = max(1, math.floor(math.sqrt(area * aspect) + 0.5))
    # A square of exactly R pixels must not lose a row to rounding: 1e-9 of a patch is no pixel.
    short = min(short, math.floor(math.sqrt(area) + 1e-9))
    long = max(short, min(math.floor(math.sqrt(area / aspect) + 0.5), math.floor(area / short + 1e-9)))
    long = short if height == width else long
    if longest is not None:
        short, long = min(short, longest), min(long, longest)
    return (short, long) if height <= width else (long, short)
