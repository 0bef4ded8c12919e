"""Boxes, masks and labels drawn onto a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlkern.boxes.text import Detection

if TYPE_CHECKING:
    from PIL import Image

#: One colour per label, again from the first when there are more labels: told apart also by the colour-blind.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_OPACITY = 0.45


def draw(
    image: "Image.Image",
    objects: Sequence[Detection],
    *,
    masks: Sequence[torch.Tensor | None] | None = None,
) -> "Image.Image":
    """A copy of the picture, in RGB, with a frame around each object, its label, and its mask as a coloured veil.

    Args:
        image: of any size and shape: boxes are fractions of its height and width.
        objects: from `parse`.
        masks: bool [height, width] or None for each object, from `MaskVae.masks`.

    Raises:
        ValueError: there are not as many masks as objects, or one has not the size of the picture.

    Example:
        >>> answer = vlkern.boxes.parse("<loc0100><loc0100><loc0900><loc0500> cat")
        >>> vlkern.boxes.draw(image, answer.objects).save("cat.png")
    """
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    picture = image.convert("RGB")
    shown = [None] * len(objects) if masks is None else list(masks)
    if len(shown) != len(objects):
        raise ValueError(f"masks must be one for each of the {len(objects)} objects, got {len(shown)}")
    labels = list(dict.fromkeys(found.label for found in objects))
    colours = [_COLOURS[labels.index(found.label) % len(_COLOURS)] for found in objects]
    for mask, colour in zip(shown, colours, strict=True):
        if mask is None:
            continue
        if tuple(mask.shape) != (picture.height, picture.width):
            raise ValueError(
                f"masks must have the picture's shape [{picture.height}, {picture.width}], got {list(mask.shape)}"
            )
        veil = Image.fromarray((mask.float() * 255 * _OPACITY).round().to(torch.uint8).numpy())
        picture.paste(Image.new("RGB", picture.size, ImageColor.getrgb(colour)), mask=veil)
    pen = ImageDraw.Draw(picture)
    thick = max(1, round(min(picture.size) / 150))
    font = ImageFont.load_default(size=max(10, min(picture.size) / 28))
    for found, colour in zip(objects, colours, strict=True):
        top, left, bottom, right = found.pixels(picture.height, picture.width)
        # The last row and column of the box are inside it.
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=thick)
        if found.label:
            x0, y0, x1, y1 = pen.textbbox((0, 0), found.label, font=font)
            # Above the box where there is room, and never outside the picture.
            x = max(0, min(left, picture.width - round(x1 - x0) - 2 * thick))
            y = top - round(y1 - y0) - 2 * thick
            y = y if y >= 0 else top
            pen.rectangle((x, y, x + x1 - x0 + 2 * thick, y + y1 - y0 + 2 * thick), fill=colour)
            pen.text((x + thick - x0, y + thick - y0), found.label, fill="black", font=font)
    return picture
