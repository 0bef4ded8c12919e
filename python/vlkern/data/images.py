"""Pictures: bytes of a file -> square uint8 tensor -> the range that the models take."""

import io

import numpy as np
import torch
from PIL import Image


def decode_image(data: bytes, size: int) -> torch.Tensor:
    """Decode any format that Pillow knows and squeeze it to a square, as SigLIP does (the aspect ratio is not kept).

    Transparent pictures are laid on white. Bilinear with antialiasing.

    Args:
        data: contents of the image file.
        size: side of the square S, in pixels.

    Returns:
        [3, S, S] uint8, RGB.

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot decode the data (it uses all three).
    """
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = opened
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape (mean and standard deviation 0.5 in the usual notation)."""
    return pixels.to(torch.float32) / 127.5 - 1
