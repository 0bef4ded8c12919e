"""What the commands compress, decompress and inspect share."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlkern._files import reason
from vlkern.codec.codec import Codec, load
from vlkern.errors import UserError


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
    """What a file holds. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def check_apart(source: Path, target: Path) -> None:
    """Make sure that a result does not replace what it is made of. Raises UserError if it would."""
    if target.exists() and os.path.samefile(source, target):
        raise UserError(f"{target}: expected another file than the one that is read")


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
