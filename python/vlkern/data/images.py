"""Pictures: bytes of a file -> uint8 tensor of the size of the model -> the range that the models take."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

#: Told by their first bytes: Pillow would try seven formats before WebP, a fifth of the time of a small picture.
_FORMATS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def check_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) from (H, W) or the side of a square.

    Raises:
        ValueError: not one or two whole numbers above 0.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"image_size must be one or two whole numbers above 0 (height, width), got {image_size!r}")
    return pair[0], pair[1]


def check_resample(resample: str) -> Image.Resampling:
    """Pillow's filter of that name. Raises ValueError if there is none."""
    if resample not in _FILTERS:
        raise ValueError(f"resample must be one of {', '.join(_FILTERS)}, got {resample!r}")
    return _FILTERS[resample]


#: (H, W) or the side of a square; or what gives the (H, W) that a picture of H x W pixels gets.
Size = int | tuple[int, int] | Callable[[int, int], tuple[int, int]]


def decode_image(data: bytes, size: Size, *, resample: str = "bilinear") -> torch.Tensor:
    """Decode any format that Pillow knows and squeeze it to `size`, as SigLIP does (the aspect ratio is not kept).

    A photograph is turned upright as its EXIF says. Transparent pictures are laid on white; of a moving picture the
    first frame is taken. Both filters are antialiased: Pillow's grow with the reduction.

    Args:
        data: contents of the image file.
        size: (H, W) in pixels, the side of a square, or a function: (H, W) of the picture -> (H, W) of the result.
        resample: "bilinear" (SigLIP 2) or "bicubic" (Hugging Face's processor of SigLIP 1, open_clip).

    Returns:
        [3, H, W] uint8, RGB.

    Raises:
        ValueError: `resample` or `size` is none of these, or the data is no picture that Pillow can decode.
    """
    chosen = check_resample(resample)
    if callable(size):
        shape = size
    else:
        fixed = check_size(size)
        shape = lambda height, width: fixed  # noqa: E731
    image = open_image(data)
    return squeeze(image, shape(image.height, image.width), chosen)


def open_image(data: bytes) -> Image.Image:
    """The picture as `decode_image` takes it, at its own size: upright, RGB, transparent parts on white.

    Raises:
        ValueError: the data is no picture that Pillow can decode.
    """
    formats = [name for magic, name in _FORMATS.items() if data.startswith(magic)]
    try:
        with Image.open(io.BytesIO(data), formats=formats or None) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            return on_white(opened)
    except UnidentifiedImageError as error:  # Pillow's own message names an address in memory
        raise ValueError("no readable picture: cannot identify its format") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise ValueError(f"no readable picture: {error or type(error).__name__}") from error


def on_white(image: Image.Image) -> Image.Image:
    """A copy in RGB; what is transparent lies on white, and of 16 bits of grey the upper 8 are taken.

    Raises:
        ValueError: channels have more bits than that.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip, so that nearly all became white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"expected channels of 8 or 16 bits, got mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def squeeze(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> torch.Tensor:
    """An RGB picture resized to (H, W), whatever its shape -> [3, H, W] uint8."""
    return as_tensor(image.resize((size[1], size[0]), filter))


def as_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture -> [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape (mean and standard deviation 0.5 in the usual notation)."""
    return pixels.to(torch.float32) / 127.5 - 1
