"""`vlkern compress`."""

import argparse
from pathlib import Path

from vlkern.codec.command import add_model, check_out, codec_of, describe, progress, read_file, write_out
from vlkern.codec.compress import compress
from vlkern.codec.format import EXACTNESS
from vlkern.codec.pictures import unpack_picture
from vlkern.errors import UserError


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {value!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern compress`."""
    parser.add_argument("picture", type=Path, metavar="IN", help="any picture that Pillow reads; - is standard input")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the file to write, usually .vlk; it is replaced at once; - is standard output",
    )
    parser.add_argument(
        "--quality", type=_whole, metavar="Q", help="from 0, the smallest file, to 20, the best picture (10)"
    )
    add_model(parser)
    parser.add_argument(
        "--exact", choices=EXACTNESS,
        help="integer: every machine can read the file; float: the same build on the same kind of machine "
        "(integer, if the model has it)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compress. Raises UserError for everything that the user can mend."""
    picture = unpack_picture(read_file(args.picture), str(args.picture))
    check_out(args.picture, args.out)
    codec = codec_of(args)
    try:
        with progress("compressing") as show:
            data = compress(picture, quality=args.quality, exact=args.exact, codec=codec, show=show)
    except UserError:
        raise
    except ValueError as error:  # names the argument
        raise UserError(f"--{error}") from error
    write_out(args.out, data, describe(picture.width, picture.height, len(data)))
    return 0
