"""A picture to the bytes of a file."""

from collections.abc import Callable

import torch
from PIL import Image

from vlkern.codec.blocks import analyse
from vlkern.codec.codec import Codec, load
from vlkern.codec.format import MOST_TILES, TILES, Header, write
from vlkern.codec.pictures import to_pixels
from vlkern.codec.stream import encode_segment
from vlkern.codec.tiles import tiling_of


@torch.no_grad()
def compress(
    image: Image.Image | torch.Tensor,
    *,
    quality: int | None = None,
    exact: str | None = None,
    codec: Codec | None = None,
    batch: int = TILES,
    show: Callable[[float], None] = lambda done: None,
) -> bytes:
    """The file of a picture. The bytes follow from the arguments: the same on each call, on the same machine.

    Args:
        image: a picture of Pillow, turned upright and converted to RGB, or a tensor [3, H, W] uint8. A photograph of
            24 million pixels takes about 0.6 GB besides.
        quality: from 0, the smallest file, to codec.levels - 1; None is the one in the middle.
        exact: "integer", a file that every machine reads, or "float", one for the same build on the same kind of
            machine; None is "integer" if the codec has it.
        codec: None is the one that is part of the package.
        batch: tiles that are coded at a time, 1 to 64.
        show: told from time to time which part is done.

    Raises:
        TypeError: image is neither.
        ValueError: it has no pixels, too many, transparent parts, more than 8 bits or several frames; another argument
            is out of range.

    Example:
        >>> codec = vlkern.codec.Codec(vlkern.models.create("m2t-tiny"))
        >>> data = vlkern.codec.compress(torch.zeros(3, 40, 56, dtype=torch.uint8), codec=codec)
        >>> vlkern.codec.decompress(data, codec=codec).size
        (56, 40)
    """
    pixels = to_pixels(image)
    codec = load() if codec is None else codec
    config = codec.model.config
    exact = codec.exactness[-1] if exact is None else exact
    entropy = codec.entropy(exact)
    level = config.levels // 2 if quality is None else quality
    if type(level) is not int or not 0 <= level < config.levels:
        raise ValueError(f"quality must be a whole number from 0 to {config.levels - 1}, got {quality!r}")
    if type(batch) is not int or not 1 <= batch <= MOST_TILES:
        raise ValueError(f"batch must be a whole number from 1 to {MOST_TILES}, got {batch!r}")

    height, width = pixels.shape[1:]
    header = Header(exact, level, batch, codec.name(exact), width, height, config.tile, config.channels)
    symbols = analyse(codec.model, pixels, level, lambda done: show(done / 2))
    tiling, checksum, segments = tiling_of(config, *header.grid), header.checksum, []
    for first, last in header.spans():
        tokens, valid = tiling.take(symbols, first, last), tiling.valid(first, last)
        segment = encode_segment(entropy, level, tokens, valid, checksum)
        checksum = segment.checksum
        segments.append(segment)
        show(0.5 + last / tiling.tiles / 2)
    return write(header, segments)
