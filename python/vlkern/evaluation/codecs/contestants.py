"""What is compared: the formats that Pillow writes here, and anything else with two functions."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from PIL import Image, features


@dataclass(frozen=True)
class Contestant:
    """A codec and the qualities at which it is measured.

    name       as tables and plots call it
    about      how it was set
    qualities  increasing; more is better and larger
    encode     (RGB picture, quality) -> the file
    decode     the file -> the picture, RGB
    """

    name: str
    about: str
    qualities: Sequence[int]
    encode: Callable[[Image.Image, int], bytes]
    decode: Callable[[bytes], Image.Image]


def _decode(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def _pillow(name: str, about: str, qualities: Sequence[int], **options: Any) -> Contestant:
    def encode(picture: Image.Image, quality: int) -> bytes:
        out = io.BytesIO()
        picture.save(out, quality=quality, **options)
        return out.getvalue()

    return Contestant(name, about, qualities, encode, _decode)


def jpeg() -> Contestant:
    """Baseline JPEG with the tables of Huffman codes fitted to each picture."""
    qualities = (*range(1, 10), *range(10, 30, 2), *range(30, 80, 5), 80, 85, 90, 95)
    return _pillow("JPEG", "4:2:0, optimize", qualities, format="JPEG", subsampling="4:2:0", optimize=True)


def webp() -> Contestant:
    """Lossy WebP, which is 4:2:0 always, at its slowest setting."""
    return _pillow("WebP", "method 6", (0, 2, 5, *range(10, 100, 10), 95), format="WEBP", method=6)


def avif() -> Contestant:
    """AVIF as Pillow sets it unless told otherwise."""
    return _pillow("AVIF", "4:2:0, speed 6", (5, *range(10, 100, 10)), format="AVIF", subsampling="4:2:0", speed=6)


def jpeg_xl() -> Contestant:
    """JPEG XL, which Pillow writes with the help of a plugin."""
    return _pillow("JPEG XL", "effort 7", (5, *range(10, 100, 10), 95), format="JXL", effort=7)


def rivals() -> list[Contestant]:
    """The formats that this machine has; JPEG is always there and comes first."""
    found = [jpeg()]
    if features.check("webp"):
        found.append(webp())
    if features.check("avif"):
        found.append(avif())
    if find_spec("pillow_jxl") is not None:
        __import__("pillow_jxl")  # registers the format
        found.append(jpeg_xl())
    return found
