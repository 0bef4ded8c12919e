"""What the commands compress, decompress and inspect share."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlkern._files import check_file, reason, write_file
from vlkern.codec.codec import Codec, load
from vlkern.errors import UserError

#: As IN or FILE standard input, as OUT standard output.
STREAM = Path("-")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="RUN/model of `vlkern train m2t` (that which comes with vlkern)"
    )


def codec_of(args: argparse.Namespace) -> Codec:
    """The codec that the options name. Raises UserError if there is none."""
    try:
        return load(args.model)
    except ValueError as error:
        raise UserError(f"--model {error}" if args.model else str(error)) from error


def read_file(path: Path) -> bytes:
    """What a file, or standard input, holds. Raises UserError if it cannot be read."""
    try:
        return sys.stdin.buffer.read() if path == STREAM else path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def check_out(source: Path, target: Path) -> None:
    """See that OUT can be written, and that it does not replace what it is made of. Raises UserError if not."""
    if target == STREAM:
        if sys.stdout.isatty():
            raise UserError("OUT -: expected a pipe or a file behind `>`, got a terminal")
        return
    if target.is_file() and source != STREAM and os.path.samefile(source, target):
        raise UserError(f"{target}: expected another file than the one that is read")
    check_file("OUT", target)


def write_out(path: Path, content: bytes, line: str) -> None:
    """Write a result, and say so in a line that does not get between its bytes. Raises UserError or OSError."""
    if path != STREAM:
        write_file(path, content)
        print(f"{path}: {line}")
        return
    sys.stdout.buffer.write(content)
    sys.stdout.flush()
    print(f"{path}: {line}", file=sys.stderr)


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Errors begin with the name of this file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def describe(width: int, height: int, size: int) -> str:
    """Of a file of `size` bytes."""
    return f"{width} x {height}, {size:,} bytes, {8 * size / (width * height):.4f} bits per pixel"


@contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, which is told which part is done; nothing elsewhere."""
    if not sys.stdout.isatty():
        yield lambda done: None
        return
    # Here and not above: it takes a quarter of a second, which is more than most pictures.
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from vlkern._progress import LiveBar

    columns = TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with LiveBar(*columns, total=1, transient=True) as bar:
        yield lambda done: bar.draw(completed=done)
