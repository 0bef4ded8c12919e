"""A random square of a picture instead of the whole picture squeezed to one: its grain stays what it is."""

from dataclasses import dataclass

import torch
from PIL import Image

from vlkern._random import draws, uniform
from vlkern.data.images import as_tensor


@dataclass(frozen=True)
class RandomCrop:
    """A square out of every picture, at a place drawn for it: the `image_size` of `PairShards` that squeezes nothing.

    side    of the square, in pixels
    shrink  None cuts it out of the picture as it is. Otherwise a square of n x n pixels is made smaller (by a Lanczos
            filter): n is drawn uniformly in its logarithm, from side / shrink to the picture's shorter side, which it
            also is where that is less. 0.8 and below hides the traces that JPEG left in photographs

    Raises:
        ValueError: `side` is no whole number above 0, or `shrink` not in (0, 1].

    Example:
        >>> PairShards(clipart_mini() / "test.tar", RandomCrop(32), captions=False)[0].pixels.shape
        torch.Size([3, 32, 32])
    """

    side: int
    shrink: float | None = None

    def __post_init__(self) -> None:
        if type(self.side) is not int or self.side < 1:
            raise ValueError(f"side must be a whole number above 0, got {self.side!r}")
        if self.shrink is not None and not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be above 0 and at most 1, got {self.shrink}")

    def cut(self, image: Image.Image, draw: int) -> torch.Tensor:
        """The square that belongs to a number.

        Args:
            image: RGB.
            draw: from 0 to 2^64 - 1; all that chance does follows from it.

        Returns:
            [3, side, side] uint8.

        Raises:
            ValueError: the picture is smaller. It would have to be enlarged.
        """
        width, height = image.size
        shorter = min(width, height)
        if shorter < self.side:
            raise ValueError(f"{width} x {height} pixels, too small for a crop of {self.side} x {self.side}")
        x, y, size = uniform(draws(3, draw, 0)).tolist()
        if self.shrink is None:
            left, top = int(x * (width - self.side + 1)), int(y * (height - self.side + 1))
            return as_tensor(image.crop((left, top, left + self.side, top + self.side)))
        least = min(self.side / self.shrink, shorter)
        n = min(least * (shorter / least) ** size, shorter)
        left, top = x * (width - n), y * (height - n)
        box = (left, top, min(left + n, width), min(top + n, height))
        return as_tensor(image.resize((self.side, self.side), Image.Resampling.LANCZOS, box))
