"""`vlkern search`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlkern._files import check_file, write_file
from vlkern._progress import say
from vlkern.errors import UserError
from vlkern.evaluation.options import add_model, encoder_of, whole
from vlkern.evaluation.pictures import Pictures, open_pictures
from vlkern.evaluation.progress import Bar
from vlkern.evaluation.tables import Table
from vlkern.search.hits import Hit, best
from vlkern.search.index import Index, build, load_index, save_index
from vlkern.search.page import Card, hits_page, thumbnail

COUNT = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern search`."""
    add_model(parser)
    add = parser.add_argument
    add("queries", nargs="+", metavar="QUERY", help='what to look for, such as "a red car"')
    add("--images", type=Path, metavar="DIR", help="all pictures in this folder and those below it")
    # Not nargs="+", which would take the queries behind it for shards.
    add("--data", type=Path, action="append", metavar="SHARD", help="instead: WebDataset shards; may be repeated")
    add("--count", type=whole, metavar="N", help=f"hits for each query (default: {COUNT})")
    add("--index", type=Path, metavar="FILE", help="keep embeddings here (.safetensors) and reuse those still valid")
    add("--page", type=Path, metavar="FILE", help="write a page that shows the hits (.html)")


def _check(args: argparse.Namespace) -> Index | None:
    """What can be said before anything is loaded. Returns the index so far."""
    for query in args.queries:
        if not query.strip():
            raise UserError("a query is empty; say in words what the picture shows")
    for option, path in (("--index", args.index), ("--page", args.page)):
        if path is not None:
            check_file(option, path)
    return load_index(args.index) if args.index is not None and args.index.exists() else None


def _percent(probability: float) -> str:
    return "< 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"


def _show(query: str, hits: Sequence[Hit], pictures: Pictures, numbers: Sequence[int]) -> None:
    rows = []
    for place, hit in enumerate(hits, 1):
        number = numbers[hit.picture]
        name, caption = pictures.name(number), pictures.caption(number)
        rows.append(
            [
                str(place),
                _percent(hit.probability),
                f"{hit.cosine:.3f}",
                name if name == caption else f"{name}: {caption}",
            ]
        )
    Table(f"“{query}”", ["", "probability", "cosine", "picture"], rows).show()


def _card(hit: Hit, pictures: Pictures, number: int) -> Card:
    try:
        uri = thumbnail(pictures.file(number))
    except (OSError, ValueError):  # it was there when it was embedded
        uri = ""
    return Card(uri, pictures.caption(number), f"{_percent(hit.probability)} · {hit.cosine:.3f}")


def run(args: argparse.Namespace) -> int:
    """Search. Raises UserError for everything that the user can mend."""
    old = _check(args)
    encoder = encoder_of(args)
    pictures = open_pictures(args.images, args.data, encoder.image_size, resample=encoder.resample)
    count = args.count or min(COUNT, len(pictures))
    if count > len(pictures):
        raise UserError(f"--count {count}: there are only {len(pictures)} pictures")
    with Bar("pictures", len(pictures)) as bar:
        index, numbers, skipped, reused = build(encoder, pictures, old, show=bar.update)
    kept = numbers.tolist()
    say("pictures", f"{len(index)} in {pictures.place}" + (f", {reused} of them from {args.index}" if old else ""))
    if old and old.model != index.model:
        say("", "its embeddings are those of another model, or of another precision: all are made anew")
    if skipped:
        say("", f"{len(skipped)} left out, because they cannot be read:")
    for line in skipped:
        say("", line)
    if args.index is not None:
        save_index(index, args.index)
        say("index", str(args.index))

    answers = best(encoder, index.vectors, args.queries, min(count, len(index)))
    asked = list(zip(args.queries, answers, strict=True))
    if args.page is not None:
        about = {"Model": str(args.model), "Size": str(encoder), "Pictures": f"{len(index)} in {pictures.place}"}
        rows = [(query, [_card(hit, pictures, kept[hit.picture]) for hit in hits]) for query, hits in asked]
        write_file(args.page, hits_page(about, rows, skipped).encode())
        say("wrote", str(args.page))
    for query, hits in asked:
        _show(query, hits, pictures, kept)
    return 0
