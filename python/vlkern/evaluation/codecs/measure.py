"""Every codec at every quality on every picture: size, closeness and time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image

from vlkern.evaluation.codecs.contestants import Contestant
from vlkern.evaluation.codecs.quality import LEAST, ms_ssim, psnr


@dataclass(frozen=True)
class Point:
    """One file.

    bpp      bits per pixel: eight times its bytes, by width times height
    psnr     dB, over the three channels
    ms_ssim  None where the picture is too small for it
    encode   seconds
    decode   seconds
    """

    codec: str
    picture: str
    quality: int
    size: int
    bpp: float
    psnr: float
    ms_ssim: float | None
    encode: float
    decode: float


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """[3, H, W] uint8 of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _turns(contestants: Sequence[Contestant]) -> Iterator[tuple[Contestant, int]]:
    """Everybody's first quality, everybody's second, ...: what slows the machine down for a while hits all alike."""
    for turn in zip_longest(*([(c, quality) for quality in c.qualities] for c in contestants)):
        yield from (entry for entry in turn if entry is not None)


def measure(
    name: str, picture: Image.Image, contestants: Sequence[Contestant], show: Callable[[int], None] = lambda done: None
) -> list[Point]:
    """All files of one RGB picture; `show` is told how many are done.

    Raises:
        ValueError: a codec gave a picture of another size.
    """
    original, points = pixels_of(picture), []
    for codec, quality in _turns(contestants):
        start = time.perf_counter()
        file = codec.encode(picture, quality)
        between = time.perf_counter()
        back = codec.decode(file)
        end = time.perf_counter()
        if back.size != picture.size:
            raise ValueError(f"{codec.name}: {name} came back with the size {back.size}, expected {picture.size}")
        decoded = pixels_of(back)
        points.append(
            Point(
                codec.name, name, quality, len(file), 8 * len(file) / (picture.width * picture.height),
                psnr(original, decoded), ms_ssim(original, decoded) if min(picture.size) >= LEAST else None,
                between - start, end - between,
            )
        )  # fmt: skip
        show(len(points))
    return points
