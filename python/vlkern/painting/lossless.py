"""What ordinary files need for the same pictures without loss: the yardstick of bits per sub-pixel."""

import io
from typing import Any

import torch
from PIL import Image

#: name -> how Pillow writes it as small as it can
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    "lossless WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}


def bits(pixels: torch.Tensor) -> dict[str, float]:
    """Bits per sub-pixel, the mean over pictures [n, 3, H, W] uint8, of each format; every file with its header."""
    found = dict.fromkeys(FORMATS, 0.0)
    for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy():
        image = Image.fromarray(picture)
        for name, options in FORMATS.items():
            out = io.BytesIO()
            image.save(out, **options)
            found[name] += 8 * out.tell() / pixels.numel()
    return found
