"""The same part of a picture from files of about equal size."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from vlkern.evaluation.codecs.contestants import Contestant
from vlkern.evaluation.codecs.measure import Point, pixels_of
from vlkern.evaluation.codecs.quality import psnr

#: Bits per pixel of the files, about; ours decides exactly.
RATE = 0.25
#: Side of a crop in pixels, and of the steps in which the place is looked for.
SIDE, STEP = 192, 16


@dataclass(frozen=True)
class Crop:
    """A part of a picture; `bpp` and `psnr` are of the whole, None for the original."""

    codec: str
    pixels: Image.Image
    bpp: float | None = None
    psnr: float | None = None

    def uri(self) -> str:
        """As the address of an image in a page, without loss."""
        out = io.BytesIO()
        self.pixels.save(out, "WEBP", lossless=True)
        return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _worst(original: torch.Tensor, decoded: torch.Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part with the largest squared error."""
    error = (original.double() - decoded.double()).square().sum(0)[None, None]
    height, width = (min(SIDE, side) for side in original.shape[1:])
    found = F.avg_pool2d(error, (height, width), stride=STEP)[0, 0]
    row, column = divmod(int(found.argmax()), found.shape[1])
    top, left = row * STEP, column * STEP
    return left, top, left + width, top + height


def _closest(codec: Contestant, picture: Image.Image, points: Sequence[Point], size: int) -> bytes:
    """The file of one codec whose size is closest: between the measured qualities on both sides all are tried that
    halving the distance meets. Sizes grow with quality, but for a few bytes."""
    mine = sorted((p for p in points if p.codec == codec.name), key=lambda p: p.quality)
    low = max((p.quality for p in mine if p.size <= size), default=mine[0].quality)
    high = min((p.quality for p in mine if p.size > size), default=mine[-1].quality)
    tried = {quality: codec.encode(picture, quality) for quality in {low, high}}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = codec.encode(picture, middle)
        low, high = (middle, high) if len(tried[middle]) <= size else (low, middle)
    return min(tried.values(), key=lambda file: abs(len(file) - size))


def crops(picture: Image.Image, points: Sequence[Point], contestants: Sequence[Contestant]) -> list[Crop]:
    """The original and what each codec makes of it, the first contestant deciding size and place.

    The size is that of its file closest to RATE, the place where its squared error is largest.

    Args:
        picture: RGB.
        points: of this picture.
        contestants: ours first.
    """
    ours = contestants[0]
    chosen = min((p for p in points if p.codec == ours.name), key=lambda p: abs(p.bpp - RATE))
    original, found = pixels_of(picture), []
    box = (0, 0, 0, 0)
    for codec in contestants:
        first = codec is ours
        file = codec.encode(picture, chosen.quality) if first else _closest(codec, picture, points, chosen.size)
        back = codec.decode(file)
        if first:
            box = _worst(original, pixels_of(back))
            found.append(Crop("original", picture.crop(box)))
        bpp = 8 * len(file) / (picture.width * picture.height)
        found.append(Crop(codec.name, back.crop(box), bpp, psnr(original, pixels_of(back))))
    return found
