"""The bytes of a file to its picture."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from vlkern.codec.blocks import synthesize
from vlkern.codec.codec import Codec, load
from vlkern.codec.errors import DamagedFile, Mismatch
from vlkern.codec.format import Header, read
from vlkern.codec.pictures import to_image
from vlkern.codec.stream import Segment, decode_segment
from vlkern.codec.tiles import tiling_of

_ADVICE = {
    "float": (
        "a file of the level `float` can only be read by the same build on the same kind of machine; "
        "compress the picture with `--exact integer` for others"
    ),
    "integer": "this should not happen: please report it with the file and the output of `vlkern info`",
}


@torch.no_grad()
def decompress(
    data: bytes, *, codec: Codec | None = None, show: Callable[[float], None] = lambda done: None
) -> Image.Image:
    """The picture of a file, RGB.

    Args:
        data: of `compress`.
        codec: the one with which it was made; None is the one that is part of the package.
        show: told from time to time which part is done.

    Raises:
        DamagedFile: a UserError and so a ValueError: the bytes are not those that were written.
        Mismatch: also one: they are, but of another model, or this machine computes other probabilities.
    """
    header, segments = read(data)
    codec = load() if codec is None else codec
    symbols = decode_symbols(codec, header, segments, lambda done: show(done / 2))
    pixels = synthesize(
        codec.model, symbols, header.level, header.height, header.width, lambda done: show(0.5 + done / 2)
    )
    return to_image(pixels)


def check_model(codec: Codec, header: Header) -> None:
    """Make sure that the file was made with this codec. Raises Mismatch if not."""
    config = codec.model.config
    if header.exactness not in codec.exactness:
        raise Mismatch(f"made at the level {header.exactness}, for which this model has no weights")
    name = codec.name(header.exactness)
    if header.model != name:
        raise Mismatch(
            f"made with the model {header.model.hex()}, this one is {name.hex()}: give its folder (`--model`)"
        )
    if (header.tile, header.channels) != (config.tile, config.channels) or header.level >= config.levels:
        raise DamagedFile("damaged header: sizes or quality are none of the model's")


@torch.no_grad()
def decode_symbols(
    codec: Codec,
    header: Header,
    segments: list[Segment],
    show: Callable[[float], None],
    bits_1hw: torch.Tensor | None = None,
) -> torch.Tensor:
    """The latents [C, h, w] int32 of a file. Arguments and errors as `decompress`; `bits_1hw` gets those of each token,
    float32."""
    check_model(codec, header)
    # NumPy's zeros take memory when they are written: a small file that claims to be a huge picture gets none.
    symbols = torch.from_numpy(np.zeros((header.channels, *header.grid), dtype=np.int32))
    tiling = tiling_of(codec.model.config, *header.grid)
    entropy, checksum = codec.entropy(header.exactness), header.checksum
    for number, ((first, last), segment) in enumerate(zip(header.spans(), segments, strict=True)):
        valid = tiling.valid(first, last)
        try:
            bits = None if bits_1hw is None else torch.zeros(valid.shape)
            tokens = decode_segment(entropy, header.level, segment, valid, checksum, bits)
        except Mismatch as error:
            raise Mismatch(f"segment {number}: {error}; {_ADVICE[header.exactness]}") from error
        except DamagedFile as error:
            raise DamagedFile(f"segment {number}: {error}") from error
        checksum = segment.checksum
        tiling.put(symbols, tokens, first, last)
        if bits_1hw is not None and bits is not None:
            tiling.put(bits_1hw, bits[..., None], first, last)
        show(last / tiling.tiles)
    return symbols
