"""Picture files: whatever Pillow reads to RGB of 8 bits, or a reason why not; and files without loss."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vlkern._files import reason
from vlkern.codec.format import LARGEST, check_sides
from vlkern.errors import UserError

#: Modes of Pillow with at most 8 bits a channel.
_MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBA", "LA", "PA", "La", "RGBa")
#: Tag of EXIF.
_ORIENTATION = 0x0112
#: Ending of a file -> how Pillow writes it without loss.
_LOSSLESS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 4},
    ".ppm": {"format": "PPM"},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"},
    ".webp": {"format": "WEBP", "lossless": True},
}


def read_picture(path: Path) -> Image.Image:
    """The picture of a file, upright, RGB: see `to_rgb`.

    Raises:
        UserError: it cannot be read, is no picture, or one that the codec does not take.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    return unpack_picture(data, str(path))


@contextmanager
def _largest() -> Iterator[None]:
    """Pillow warns of pictures above a number of pixels, and refuses those of twice as many: here those that we do."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = LARGEST // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"a picture must have 1 to {LARGEST} pixels, got more") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def unpack_picture(data: bytes, name: str) -> Image.Image:
    """The picture of a file with these contents; errors begin with `name`, otherwise as `read_picture`."""
    try:
        with _largest(), Image.open(io.BytesIO(data)) as opened:
            check_sides(*opened.size)
            return to_rgb(opened)
    except UnidentifiedImageError as error:  # Pillow's own message names an address in memory
        raise UserError(f"{name}: is no picture that Pillow can read") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise UserError(f"{name}: is no readable picture ({error or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as the codec takes it: upright as its EXIF says, RGB.

    Grey, palette, CMYK and other modes of 8 bits are converted as Pillow does it. An alpha channel is dropped if
    nothing is transparent. Profiles of colours are not kept: numbers are taken as sRGB.

    Raises:
        ValueError: parts are transparent, a channel has more than 8 bits, there are several frames, or no pixels.
    """
    # Cameras append previews as frames of an MPO; its first one is the photograph.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"expected one picture, got {getattr(image, 'n_frames', 'several')} frames")
    if image.mode not in _MODES:
        raise ValueError(f"expected channels of 8 bits, got mode {image.mode}: convert it first")
    if image.width < 1 or image.height < 1:
        raise ValueError(f"expected a picture with pixels, got {image.width} x {image.height}")
    turned = image.getexif().get(_ORIENTATION, 1) != 1
    upright = ImageOps.exif_transpose(image) if turned else image  # which would make a copy
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        if upright.getchannel("A").point(lambda alpha: alpha < 255).getbbox():
            raise ValueError("expected a picture without transparent parts: lay it on a background first")
    if upright.mode == "RGB":
        upright.load()
        return upright
    return upright.convert("RGB")


def to_pixels(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """A picture, or a tensor [3, H, W] uint8, as such a tensor.

    Raises:
        TypeError: it is neither.
        ValueError: see `to_rgb`; the tensor has another shape; there are no pixels or too many.
    """
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    elif isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"image must be uint8, got {image.dtype}")
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"image must have shape [3, H, W], got {list(image.shape)}")
        pixels = image.cpu()
    else:
        raise TypeError(f"image must be a PIL.Image.Image or a tensor, got {type(image).__name__}")
    check_sides(pixels.shape[2], pixels.shape[1])
    return pixels


def to_image(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] uint8 -> RGB picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def check_lossless(path: Path) -> None:
    """Make sure that `pack_picture` knows the ending. Raises UserError if not."""
    if path.suffix.lower() not in _LOSSLESS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(_LOSSLESS)}")


def pack_picture(image: Image.Image, path: Path) -> bytes:
    """The contents of a file with this name, without loss.

    Raises:
        UserError: the format has no room for so many pixels.
    """
    out = io.BytesIO()
    try:
        image.save(out, **_LOSSLESS[path.suffix.lower()])
    except (OSError, ValueError) as error:  # WebP has at most 16383 pixels a side
        raise UserError(f"{path}: cannot be written in this format ({reason(error)})") from error
    return out.getvalue()
