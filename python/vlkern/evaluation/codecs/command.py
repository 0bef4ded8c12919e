"""`vlkern eval m2t`: files, curves and a page about a codec that was trained."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlkern import codec, data
from vlkern._files import check_folder
from vlkern._progress import say
from vlkern.codec.codec import Codec
from vlkern.codec.command import add_model, codec_of
from vlkern.codec.format import EXACTNESS
from vlkern.codec.pictures import read_picture
from vlkern.errors import UserError
from vlkern.evaluation.codecs.contestants import Contestant, rivals
from vlkern.evaluation.codecs.evaluate import evaluate, write
from vlkern.evaluation.pictures import walk

WHAT = "codecs of `vlkern train m2t`: rate and distortion beside JPEG, WebP and others"
#: What the codec is called beside the others.
OURS = "vlkern"


def _level(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {value!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data."""
    add = parser.add_argument
    add_model(parser)
    add("--data", type=Path, metavar="DIR", help="a folder of pictures (the four photographs that come with vlkern)")
    add("--quality", type=_level, nargs="+", metavar="Q", help="only these levels, two or more (all)")
    add("--exact", choices=EXACTNESS, help="as in `vlkern compress`")
    add("--out", type=Path, metavar="DIR", help="where results.json, report.html and plots go")


def _read(folder: Path) -> tuple[dict[str, Image.Image], list[str]]:
    """Name -> RGB picture, and a line for each file that is left out."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found, skipped = {}, []
    for name in walk(folder):
        try:
            found[name] = read_picture(folder / name)
        except UserError as error:
            skipped.append(str(error))
    if not found:
        raise UserError(f"--data {folder}: no picture can be read" + (f"; the first: {skipped[0]}" if skipped else ""))
    return found, skipped


def _ours(model: Codec, qualities: Sequence[int] | None, exact: str | None) -> Contestant:
    levels = sorted(set(range(model.levels) if qualities is None else qualities))
    if len(levels) < 2:
        raise UserError("--quality: expected two levels or more, a curve has two ends")
    if wrong := [level for level in levels if not 0 <= level < model.levels]:
        raise UserError(f"--quality {wrong[0]}: expected levels from 0 to {model.levels - 1}")
    if exact is not None and exact not in model.exactness:
        raise UserError(f"--exact {exact}: the model has no weights for it")
    about = f"exact {exact or model.exactness[-1]}"

    def encode(picture: Image.Image, quality: int) -> bytes:
        return codec.compress(picture, quality=quality, exact=exact, codec=model)

    return Contestant(OURS, about, levels, encode, lambda file: codec.decompress(file, codec=model))


def run(args: argparse.Namespace) -> int:
    """Measure. Raises UserError for everything that the user can mend."""
    if args.out is not None:
        check_folder("--out", args.out)
    ours = _ours(codec_of(args), args.quality, args.exact)
    folder = args.data or data.photos() / "eval"
    pictures, skipped = _read(folder)
    contestants = [ours, *rivals()]
    say("data", f"{folder}: {len(pictures)} pictures")
    say("codecs", ", ".join(c.name for c in contestants))
    for line in skipped:
        say("", f"left out: {line}")
    found = evaluate(pictures, contestants, side_by_side=args.out is not None)
    if args.out is not None:
        model = str(args.model or "the one that comes with vlkern")
        written = write(found, model, str(folder), skipped, args.out)
        say("wrote", f"{args.out}: {', '.join(written)}")
    for table in found.tables():
        table.show()
    return 0
