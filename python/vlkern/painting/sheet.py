"""Many small pictures in one."""

import io

import torch
from PIL import Image

#: Pictures in a row, and pixels between them.
COLUMNS, GAP = 8, 4
#: Small pictures are enlarged, by a whole number, until their side is at least this.
SIDE = 96


def sheet(pictures: torch.Tensor, columns: int = COLUMNS) -> Image.Image:
    """Pictures [n, 3, H, W] uint8 in rows on light grey, from the top left.

    Raises:
        ValueError: these are no pictures, or there is none.

    Example:
        >>> sheet(torch.zeros(10, 3, 32, 32, dtype=torch.uint8)).size
        (804, 204)
    """
    if pictures.dim() != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8 or not len(pictures):
        raise ValueError(f"pictures must be [n, 3, H, W] uint8, got {list(pictures.shape)} {pictures.dtype}")
    scale = max(1, -(-SIDE // max(pictures.shape[2:])))
    large = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = large.shape[2] + GAP, large.shape[3] + GAP
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = torch.full((3, rows * height + GAP, columns * width + GAP), 230, dtype=torch.uint8)
    for number, picture in enumerate(large):
        top, left = GAP + number // columns * height, GAP + number % columns * width
        canvas[:, top : top + height - GAP, left : left + width - GAP] = picture
    return Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())


def png(pictures: torch.Tensor, columns: int = COLUMNS) -> bytes:
    """`sheet` as the contents of a PNG file."""
    out = io.BytesIO()
    sheet(pictures, columns).save(out, "PNG", optimize=True)
    return out.getvalue()


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] (what is beyond is cut off) -> uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
