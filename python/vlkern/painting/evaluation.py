"""`vlkern eval pictures`: figures and a page about a model that makes pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vlkern import data, models
from vlkern._device import device_of
from vlkern._files import check_folder, write_file
from vlkern._progress import say
from vlkern.errors import UserError
from vlkern.evaluation.options import whole
from vlkern.evaluation.tables import Table
from vlkern.painting import Measures, Pictures, lossless, painter_of
from vlkern.painting.page import curve, page

WHAT = "models that make pictures: reconstructions, samples, bits per sub-pixel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="RUN/model of a training")
    add("--data", type=Path, nargs="+", required=True, metavar="SHARD", help="WebDataset shards, or folders of them")
    add("--class-key", default="category", metavar="KEY", help="where the class is in the .json (default: category)")
    add("--pictures", type=whole, metavar="N", help="only the first N")
    add("--seed", type=int, default=0, metavar="N", help="of samples (0)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is a GPU)")
    add("--out", type=Path, metavar="DIR", help="where results.json and report.html go")


def _pictures(args: argparse.Namespace, size: int) -> tuple[Pictures, list[str]]:
    try:
        pairs = data.PairShards(args.data, size)
    except data.DataError as error:
        raise data.DataError(f"--data: {error}") from error
    numbers = range(min(len(pairs), args.pictures or len(pairs)))
    read = [pairs[number] for number in numbers]
    classes = [pairs.record(number).get(args.class_key) for number in numbers]
    pixels = torch.stack([pair.pixels for pair in read])
    return Pictures(pixels, [pair.caption for pair in read], classes), pairs.skipped


def _table(measures: Measures, files: dict[str, float]) -> Table:
    rows = [[name, f"{value:.4g}"] for name, value in measures.numbers.items()]
    if measures.bits is not None:
        rows.append(["bits per sub-pixel", f"{measures.bits:.3f}"])
        rows += [[f"... as {name}", f"{value:.3f}"] for name, value in files.items()]
    return Table("pictures", ["", "value"], rows)


def run(args: argparse.Namespace) -> int:
    """Measure. Raises UserError for everything that the user can mend."""
    if args.out is not None:
        check_folder("--out", args.out)
    try:
        model: Any = models.load_pretrained(args.model, dtype=torch.float32)
        painter = painter_of(model)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from error
    model = model.to(device_of(args.device)).eval()
    pictures, skipped = _pictures(args, model.config.image_size)
    say("data", f"{', '.join(map(str, args.data))}: {len(pictures.pixels)} pictures")
    torch.manual_seed(args.seed)
    with torch.no_grad():
        measures = painter.measure(model, args.model, pictures)
    files = {} if measures.bits is None else lossless.bits(pictures.pixels)
    for line in skipped:
        say("", f"left out: {line}")
    if args.out is not None:
        about = {"model": f"{type(model).__name__}, {args.model}", "pictures": f"{len(pictures.pixels)} held out"}
        points = curve(args.model.parent)
        write_file(args.out / "report.html", page(about, measures, files, points).encode())
        results = {
            "schema": 1, "model": str(args.model), "pictures": len(pictures.pixels), **measures.numbers,
            "bits_per_subpixel": measures.bits, "lossless_files": files, "skipped": skipped,
        }  # fmt: skip
        write_file(args.out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
        say("wrote", f"{args.out}: report.html, results.json")
    _table(measures, files).show()
    return 0
