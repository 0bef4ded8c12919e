"""`vlkern eval paligemma`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vlkern import data, models
from vlkern._device import device_of
from vlkern._files import check_folder, write_file
from vlkern._progress import say
from vlkern.data.prompts import check_tokenizer
from vlkern.errors import UserError
from vlkern.evaluation import report
from vlkern.evaluation.answers import Questions
from vlkern.evaluation.options import whole
from vlkern.evaluation.progress import Bar
from vlkern.evaluation.tables import Table, cut, percent
from vlkern.models.paligemma import PaliGemma

WHAT = "PaliGemma: classes, boxes and captions of clip art or of your own pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="RUN/model of a training, or a Hugging Face directory")
    add(
        "--tokenizer", metavar="PATH", help="tokenizer file or folder, or `bytes` (default: the one in the model's DIR)"
    )
    add("--data", type=Path, nargs="+", required=True, metavar="SHARD", help="WebDataset shards, or folders of them")
    add("--class-key", default="category", metavar="KEY", help="where the class is in the .json (default: category)")
    add("--pictures", type=whole, metavar="N", help="only the first N")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is a GPU)")
    add("--batch", type=whole, default=64, metavar="N", help="pictures at once (default: 64)")
    add("--out", type=Path, metavar="DIR", help="where results.json goes")


def _model(args: argparse.Namespace) -> PaliGemma:
    try:
        model: Any = models.load_pretrained(args.model)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    if not isinstance(model, PaliGemma):
        raise UserError(f"--model {args.model}: expected a PaliGemma, got {type(model).__name__}")
    return model.to(device_of(args.device)).eval()


def _tables(results: dict[str, Any]) -> list[Table]:
    """What a reader sees."""
    tables, rows = [], []
    if (category := results.get("category")) is not None:
        rows.append([f"class of {category['pictures']} pictures", category["accuracy"], category["chance"]])
    boxes, caption = results["boxes"], results["caption"]
    rows.append([f"boxes of {boxes['objects']} objects, IoU >= 0.5", boxes["found"], boxes["chance"]])
    rows.append(["... and their class", boxes["named"], None])
    rows.append([f"{caption['tokens']} tokens of captions", caption["accuracy"], caption["chance"]])
    shown = [[name, percent(value), "-" if chance is None else percent(chance)] for name, value, chance in rows]
    tables.append(Table("answers", ["", "right", "chance"], shown))
    if category is not None:
        order = sorted(category["by_class"].items(), key=lambda item: -item[1]["pictures"])
        lines = [[name, str(entry["pictures"]), percent(entry["accuracy"])] for name, entry in order]
        tables.append(Table("by class", ["class", "pictures", "right"], cut(lines, report.ROWS)))
    return tables


def run(args: argparse.Namespace) -> int:
    """Evaluate. Raises UserError for everything that the user can mend."""
    if args.out is not None:
        check_folder("--out", args.out)
    model = _model(args)
    vocabulary = data.load_vocabulary(args.tokenizer or args.model)
    check_tokenizer(vocabulary, model.config)
    size = model.config.vision.image_size
    try:
        pairs = data.PairShards(args.data, size)
    except data.DataError as error:
        raise data.DataError(f"--data: {error}") from error
    tasks = data.Tasks(pairs, size, class_key=args.class_key)
    numbers = range(min(len(pairs), args.pictures or len(pairs)))
    say("data", f"{', '.join(map(str, pairs.paths))}: {len(numbers)} pictures")
    questions = Questions(model, vocabulary, tasks, args.batch)
    results: dict[str, Any] = {"schema": 1, "model": str(args.model), "pictures": len(numbers)}
    kinds = {"boxes": questions.boxes, "caption": questions.caption}
    if any(tasks.category(number) for number in numbers):
        kinds = {"category": questions.category, **kinds}
    with torch.inference_mode():
        for name, ask in kinds.items():
            with Bar(name, len(numbers)) as bar:
                results[name] = ask(numbers, bar.update)
    results["skipped"] = [questions.skipped[number] for number in sorted(questions.skipped)]
    for line in results["skipped"]:
        say("", f"left out: {line}")
    if args.out is not None:
        write_file(args.out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
        say("wrote", f"{args.out / 'results.json'}")
    for table in _tables(results):
        table.show()
    return 0
