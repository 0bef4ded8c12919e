"""`python -m vlkern.codec.integer MODEL PICTURES ...`: the integers of a trained codec, and what they cost."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from vlkern.codec.integer.convert import Latents, convert
from vlkern.codec.integer.measure import cost, latents_of
from vlkern.codec.integer.model import IntegerEntropy
from vlkern.codec.pack import pack
from vlkern.data import DataError, PairShards
from vlkern.errors import UserError
from vlkern.evaluation.pictures import FolderPictures, Pictures, ShardPictures
from vlkern.models.elic import DOWNSAMPLING
from vlkern.models.m2t import M2T
from vlkern.models.pretrained import load_pretrained

#: The longer side of pictures that are looked at, at most.
_SIDE = 512
#: Levels that each picture is coded at. Neighbours in the list take others.
_LEVELS = 3
#: One picture of so many is not calibrated with, but measured.
_MEASURED = 4


def _shape(height: int, width: int) -> tuple[int, int]:
    """The size that a picture is looked at: of multiples of 16."""
    scale = min(1.0, _SIDE / max(height, width))
    rows, columns = (max(1, round(side * scale / DOWNSAMPLING)) * DOWNSAMPLING for side in (height, width))
    return rows, columns


def _open(path: Path) -> Pictures:
    if path.is_dir():
        return FolderPictures(path, _shape)
    try:
        return ShardPictures(PairShards([path], _shape, captions=False))
    except DataError as error:
        raise UserError(f"{path}: {error}") from error


def _pixels(paths: list[Path], most: int) -> Iterator[torch.Tensor]:
    """Of `most` pictures, spread over all."""
    opened = [(pictures, i) for pictures in map(_open, paths) for i in range(len(pictures))]
    for at in range(0, len(opened), max(1, -(-len(opened) // most))):
        pictures, i = opened[at]
        try:
            yield pictures.pixels(i)
        except ValueError as error:
            print(f"{pictures.name(i)}: left out ({error})", file=sys.stderr)


def _samples(model: M2T, paths: list[Path], most: int) -> tuple[list[Latents], list[Latents]]:
    """To calibrate with, and to measure with."""
    levels = model.config.levels
    seen: list[Latents] = []
    unseen: list[Latents] = []
    for i, pixels in enumerate(_pixels(paths, most)):
        found = [latents_of(model, pixels, (i + part * levels // _LEVELS) % levels) for part in range(_LEVELS)]
        (unseen if i % _MEASURED == _MEASURED - 1 else seen).extend(found)
    if not unseen:
        raise UserError(f"PICTURES: expected at least {_MEASURED} that can be read, got {len(seen) // _LEVELS}")
    return seen, unseen


def _run(args: argparse.Namespace) -> None:
    model = load_pretrained(args.model, dtype=torch.float32)
    if not isinstance(model, M2T):
        raise UserError(f"{args.model}: expected an M2T, got {type(model).__name__}")
    model.eval()
    try:
        seen, unseen = _samples(model, args.pictures, args.most)
        weights = convert(model, seen, bits=args.bits)
    except ValueError as error:
        raise UserError(str(error)) from error
    costs = cost(model, IntegerEntropy(model.config, weights), unseen)
    for level in sorted(costs):
        floats, integers = costs[level]
        print(f"level {level:2}   {floats / 8:10.0f} bytes with floats   {100 * (integers / floats - 1):+.3f} %")
    floats, integers = (sum(bits) for bits in zip(*costs.values(), strict=True))
    print(f"together   {floats / 8:10.0f} bytes with floats   {100 * (integers / floats - 1):+.3f} %")
    print(weights.save(args.model))
    if args.pack is not None:
        pack(args.model, args.pack)
        print(args.pack)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlkern.codec.integer",
        description="Make the integers of a trained codec: integer.safetensors beside model.safetensors. Three of four "
        "pictures calibrate, the fourth measures.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="RUN/model of `vlkern train m2t`")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURES", help="folders or WebDataset tar files")
    parser.add_argument("--bits", type=int, default=12, help="of activations (12)")
    parser.add_argument("--most", type=int, default=96, metavar="N", help="pictures, spread over all (96)")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER",
        help="also write a small folder: the integers, and the transforms in float16, without the float transformer",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        if args.most < 1:
            raise UserError(f"--most: expected a positive number, got {args.most}")
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
