"""`vlkern decompress`."""

import argparse
from pathlib import Path

from vlkern.codec.command import STREAM, about, add_model, check_out, codec_of, progress, read_file, write_out
from vlkern.codec.decompress import decompress
from vlkern.codec.format import read
from vlkern.codec.pictures import check_lossless, pack_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern decompress`."""
    parser.add_argument("file", type=Path, metavar="IN", help="of `vlkern compress`; - is standard input")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the picture: .png, .ppm, .bmp, .tif or .webp; it is replaced at once; - is standard output, PNG",
    )
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Decompress. Raises UserError for everything that the user can mend; then there is no picture."""
    name = Path("-.png") if args.out == STREAM else args.out
    check_lossless(name)
    data = read_file(args.file)
    check_out(args.file, args.out)
    with about(args.file):
        read(data)  # before the model is loaded
    codec = codec_of(args)
    with about(args.file), progress("decompressing") as show:
        picture = decompress(data, codec=codec, show=show)
    write_out(args.out, pack_picture(picture, name), f"{picture.width} x {picture.height}")
    return 0
