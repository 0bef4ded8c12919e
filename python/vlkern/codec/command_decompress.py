"""`vlkern decompress`."""

import argparse
from pathlib import Path

from vlkern._files import check_file, write_file
from vlkern.codec.command import about, add_model, check_apart, codec_of, progress, read_file
from vlkern.codec.decompress import decompress
from vlkern.codec.format import read
from vlkern.codec.pictures import check_lossless, pack_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern decompress`."""
    parser.add_argument("file", type=Path, metavar="IN", help="of `vlkern compress`")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the picture: .png, .ppm, .bmp, .tif or .webp; it is replaced at once"
    )
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Decompress. Raises UserError for everything that the user can mend; then there is no picture."""
    check_lossless(args.out)
    data = read_file(args.file)
    check_apart(args.file, args.out)
    check_file("OUT", args.out)
    with about(args.file):
        read(data)  # before the model is loaded
    codec = codec_of(args)
    with about(args.file), progress("decompressing") as show:
        picture = decompress(data, codec=codec, show=show)
    write_file(args.out, pack_picture(picture, args.out))
    print(f"{args.out}: {picture.width} x {picture.height}")
    return 0
