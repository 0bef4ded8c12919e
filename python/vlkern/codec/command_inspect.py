"""`vlkern inspect`."""

import argparse
import math
from pathlib import Path

import torch

from vlkern._files import check_file, write_file
from vlkern._progress import say
from vlkern.codec.blocks import synthesize
from vlkern.codec.command import about, add_model, codec_of, describe, progress, read_file
from vlkern.codec.decompress import decode_symbols
from vlkern.codec.format import CELL, VERSION, Header, read
from vlkern.codec.pictures import read_picture, to_pixels
from vlkern.codec.stream import Segment
from vlkern.errors import UserError

#: Segments that are listed at most, and characters of the longest bar.
ROWS, BAR = 48, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern inspect`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="of `vlkern compress`; - is standard input")
    parser.add_argument("--original", type=Path, metavar="PICTURE", help="measure the PSNR against it")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw where the bits went")
    add_model(parser)


def _segments(header: Header, segments: list[Segment]) -> None:
    """A line and a bar for each segment."""
    tiling = header.tiling
    most = max(len(s.stream) for s in segments)
    for (first, last), segment in list(zip(header.spans(), segments, strict=True))[:ROWS]:
        size = len(segment.stream)
        rate = 8 * size / (tiling.tokens(first, last) * CELL**2)
        bar = "█" * max(round(BAR * size / most), 1)
        say(f"  {first}-{last - 1}" if last - first > 1 else f"  {first}", f"{size:>10,}  {rate:.4f} bpp  {bar}")
    if len(segments) > ROWS:
        say("", f"and {len(segments) - ROWS} more")


def run(args: argparse.Namespace) -> int:
    """Show what a file holds. Raises UserError for everything that the user can mend."""
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {args.plot}: expected a name that ends in .png")
        check_file("--plot", args.plot)
    data = read_file(args.file)
    with about(args.file):
        header, segments = read(data)
    original = None if args.original is None else to_pixels(read_picture(args.original))
    if original is not None and original.shape[1:] != (header.height, header.width):
        size = f"{original.shape[2]} x {original.shape[1]}"
        raise UserError(f"--original {args.original}: expected {header.width} x {header.height} pixels, got {size}")

    side = header.tile * CELL
    say("file", describe(header.width, header.height, len(data)))
    say("format", f"version {VERSION}, {header.exactness}, quality {header.level}, model {header.model.hex()}")
    say("tiles", f"{header.tiling.tiles} of {side} x {side} pixels in {len(segments)} segments; bytes of each:")
    _segments(header, segments)
    if original is None and args.plot is None:
        return 0

    codec = codec_of(args)
    bits = torch.zeros(1, *header.grid)
    with torch.no_grad(), about(args.file), progress("decompressing") as show:
        symbols = decode_symbols(codec, header, segments, lambda done: show(done / 2), bits)
        pixels = synthesize(
            codec.model, symbols, header.level, header.height, header.width, lambda done: show(0.5 + done / 2)
        )
    if original is not None:
        error = float((original.double() - pixels.double()).square().mean())
        say("PSNR", f"{10 * math.log10(255**2 / error):.2f} dB" if error else "infinite: the same pixels")
    if args.plot is not None:
        from vlkern.codec.plot import plot

        write_file(args.plot, plot(pixels, bits[0]))
        say("wrote", str(args.plot))
    return 0
